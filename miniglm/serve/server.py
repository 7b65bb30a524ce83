"""Many users, one model: a Server steps one generation.Batch in a thread of its own.

    server = Server("out-sanguo-sft", checkpoint)
    with Stream() as stream:
        server.submit(stream, Request(prompt, Sampling(temperature=0.3)))
        async for piece in stream:
            print(piece.text, end="")

A Stream may take several requests, of several servers: their pieces come mixed, each with the
number of its request. Leaving the `with` gives up what still runs. The page is sample_gradio.py's,
HTTP is miniglm/serve/api.py's.
"""

import asyncio
import contextlib
import queue
import sys
import threading
import traceback
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from configurator import UserError
from miniglm.checkpoint import Checkpoint
from miniglm.decoding import compile_one_row
from miniglm.generation import Batch, Request, Token
from miniglm.prep.forms import shortened
from miniglm.text import TextStream, chat_prompt, complete_question, default_temperature, prompt_ids

CHARACTERS_PER_TOKEN = 16  # more than any text has; what is beyond is not even encoded


class Busy(UserError):
    """Too many requests wait already."""


@dataclass
class Piece:
    """What a step gave to one request: whole characters (maybe none yet), and the tokens that made
    them. finish: None, or in the last piece "stop", "length" or "cancelled"."""

    number: int  # of the request in its stream
    text: str
    tokens: list[Token]
    finish: str | None = None


class Stream(contextlib.AbstractContextManager):
    """The pieces of some requests, to be read in the event loop that made it."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.jobs: list[Job] = []
        self.unfinished, self.open = 0, True

    def __exit__(self, *_) -> None:
        self.stop()
        self.open = False

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Raises what a request failed with: UserError, or the model's own error."""
        while self.unfinished:
            piece = await self.pieces.get()
            if isinstance(piece, Exception):
                raise piece
            self.unfinished -= piece.finish is not None
            yield piece

    async def gathered(self, seconds: float) -> AsyncIterator[list[Piece]]:
        """The pieces of that many seconds at a time."""
        pieces = []
        async for piece in self:
            pieces.append(piece)
            if self.pieces.empty():
                yield pieces
                pieces = []
                if self.unfinished:
                    await asyncio.sleep(seconds)

    def stop(self) -> None:
        """Ends what runs; the last pieces still come."""
        for job in self.jobs:
            job.server.inbox.put(job)

    def send(self, piece: Piece | Exception) -> None:
        """From any thread."""
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:  # the loop has closed: nobody reads any more
            self.stop()


@dataclass(eq=False)
class Job:
    """A request on its way through a server."""

    server: "Server"
    stream: Stream
    number: int
    request: Request
    text: TextStream
    pending: list[Token] = field(default_factory=list)  # not yet whole characters
    added: bool = False  # to the batch


@dataclass(eq=False, repr=False)
class Server:
    """One checkpoint. At most batch_size requests run at once and max_waiting wait."""

    name: str
    checkpoint: Checkpoint
    batch_size: int = 16
    max_waiting: int = 64
    max_new_tokens: int = 512  # of one request; who submits keeps to it

    def __post_init__(self):
        self.most_jobs = self.batch_size + self.max_waiting
        self.jobs: dict[Request, Job] = {}  # all that have not ended
        self.lock = threading.Lock()  # of jobs
        self.inbox: queue.SimpleQueue[Job] = queue.SimpleQueue()  # a job twice: cancel it
        self.batch = self._new_batch()
        threading.Thread(target=self._work, name=f"serving {self.name}", daemon=True).start()

    def speed_up(self) -> None:
        """Compiles the step of a lone request in the background; all are served meanwhile."""
        # the compiler's thread gives way at once: torch asks for Python's lock at each operation
        sys.setswitchinterval(1e-5)
        arguments = self.batch.decode, self.batch_size
        threading.Thread(target=compile_one_row, args=arguments, daemon=True).start()

    def prompt(self, messages: list[dict]) -> list[int]:
        """The ids that sample.py would give to the model: the conversation with its last question
        completed, or for a pretrained model the last message to be continued. Raises UserError
        if the system's message, the last question or one behind it is too long."""
        checkpoint, last = self.checkpoint, messages[-1]
        if last["role"] not in ("user", "tool"):
            raise UserError("the last message must be the user's or a tool's")
        text, block_size = last["content"], checkpoint.model.config.block_size
        room = CHARACTERS_PER_TOKEN * block_size
        if not checkpoint.answers:
            return prompt_ids(checkpoint, text[-room:])
        content = complete_question(checkpoint, text) if last["role"] == "user" else text

        def fits(turns: list[dict]) -> bool:
            return sum(len(message["content"]) for message in turns) <= room

        if fits(turns := shortened(messages, fits)):
            return chat_prompt(checkpoint, [*turns[:-1], turns[-1] | {"content": content}])
        longest = max(turns, key=lambda message: len(message["content"]))
        had = f"the {longest['role']}'s message has {len(longest['content']):,} characters"
        raise UserError(f"{had}; this model reads {block_size} tokens")

    def submit(self, stream: Stream, request: Request) -> None:
        """Adds a request to the stream. Raises Busy if too many requests wait."""
        request.sampling = default_temperature(self.checkpoint, request.sampling)
        text = TextStream(self.checkpoint.tokenizer, request.sampling.stop)
        job = Job(self, stream, len(stream.jobs), request, text)
        with self.lock:
            if len(self.jobs) >= self.most_jobs:
                raise Busy(f"{len(self.jobs)} requests run or wait for {self.name}; try again soon")
            self.jobs[request] = job
        stream.jobs.append(job)
        stream.unfinished += 1
        self.inbox.put(job)

    # --- in the worker's thread ---------------------------------------------------------------

    def _work(self) -> None:
        while True:
            try:
                self._read_inbox()
                for request, token in self.batch.step():
                    self._pass_on(self.jobs[request], token)
            except Exception as error:
                self._fail(error)

    def _read_inbox(self) -> None:
        """Adds each job that comes, and cancels it if it comes again. Waits if nothing runs."""
        while not self.batch or not self.inbox.empty():
            job = self.inbox.get()
            if job.request in self.jobs:  # else it has ended meanwhile
                if job.added:
                    self.batch.cancel(job.request)
                    self._send(job, "", "cancelled")
                else:
                    self.batch.add(job.request)
                    job.added = True

    def _pass_on(self, job: Job, token: Token) -> None:
        job.pending.append(token)
        ended = token.id in self.checkpoint.tokenizer.stop_ids
        text = "" if ended else job.text.push(token.id)
        if job.text.stopped:
            self.batch.cancel(job.request)
        self._send(job, text, "stop" if job.text.stopped else job.request.finish)

    def _send(self, job: Job, text: str, finish: str | None) -> None:
        if finish:
            text += job.text.flush()
            with self.lock:
                del self.jobs[job.request]
        if text or finish:
            job.stream.send(Piece(job.number, text, job.pending, finish))
            job.pending = []

    def _fail(self, error: Exception) -> None:
        """After an error of the model's own, such as no memory: the requests in work get it, those
        that wait go into a new batch."""
        traceback.print_exception(error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        waiting = list(self.batch.waiting)
        with self.lock:
            failed = [j for r, j in self.jobs.items() if j.added and r not in waiting]
            for job in failed:
                del self.jobs[job.request]
                job.stream.send(RuntimeError(f"the model failed: {reason}"))
        decode, self.batch = self.batch.decode, None  # its memory, before more is taken
        self.batch = self._new_batch()
        self.batch.decode = decode  # may be compiled
        for request in waiting:
            self.batch.add(request)

    def _new_batch(self) -> Batch:
        stop_ids = self.checkpoint.tokenizer.stop_ids
        return Batch(self.checkpoint.model, stop_ids, self.batch_size, eager=0)
