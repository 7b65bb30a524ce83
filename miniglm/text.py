"""Prompts -> text: completions, answers and conversations of a checkpoint.

A fine-tuned model is asked in the chat format and answers; a pretrained one continues the text.
Token ids are generation.py's, the command line is sample.py's.
"""

import codecs
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace

from configurator import UserError, repo_path, show_path
from data_utils import Dataset, Mixture, open_dataset
from miniglm.chat import plain
from miniglm.checkpoint import Checkpoint, load_checkpoint, weights_sha256
from miniglm.decoding import pack, quantize
from miniglm.devices import pick_device
from miniglm.generation import Batch, Request, Sampling
from miniglm.prep.forms import shortened
from miniglm.tokenizer import Tokenizer

AHEAD = 64  # times batch_size: prompts begun before the first that has not ended


@dataclass
class Output:
    """One sample: its ids without the end token, its text, whether it ended by itself (an end
    token or a stop text came), and -log p of its tokens if they were asked for."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    nats: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """exp of the mean -log p, the end token's included."""
        return math.exp(sum(self.nats) / len(self.nats))


def load_for_sampling(out_dir: str, device: str = "auto", int8: bool = False) -> Checkpoint:
    """The best checkpoint of an out_dir, laid out for generation."""
    checkpoint = load_checkpoint(repo_path(out_dir), "best", pick_device(device))
    (quantize if int8 else pack)(checkpoint.model)
    return checkpoint


def fingerprint(checkpoint: Checkpoint, sampling: Sampling) -> dict:
    """What outputs depend on, besides their prompts: for the header of a file that is resumed."""
    sampling = default_temperature(checkpoint, sampling)
    settings = {field.name: getattr(sampling, field.name) for field in fields(Sampling)}
    settings["tokenizer_sha256"] = checkpoint.tokenizer.sha256
    return settings | {"weights_sha256": weights_sha256(checkpoint.path)}


def check_answers(checkpoint: Checkpoint) -> None:
    """Raises UserError if the model has not been fine-tuned on answers."""
    if not checkpoint.answers:
        raise UserError(
            f"{show_path(checkpoint.out_dir)} continues texts, it has learnt no answers; "
            "pass a fine-tuned model's --out_dir="
        )


def dataset_of(checkpoint: Checkpoint, name: str | None) -> Dataset | Mixture:
    """The dataset of this name, else the one that the model was trained on; of questions with texts
    beside them, the questions. Raises UserError if there is none."""
    name = name or checkpoint.run["settings"].get("dataset")
    if not name:
        raise UserError(f"{show_path(checkpoint.path)} names no dataset; pass --dataset=")
    data = open_dataset(name)
    return data.judged[0] if data.beside and len(data.judged) == 1 else data


# --- prompts -----------------------------------------------------------------------------------


def default_temperature(checkpoint: Checkpoint, sampling: Sampling) -> Sampling:
    """The sampling with its temperature filled in: answers are greedy, continuations are not."""
    if sampling.temperature is not None:
        return sampling
    return replace(sampling, temperature=0.0 if checkpoint.answers else 0.8)


def prompt_ids(checkpoint: Checkpoint, text: str) -> list[int]:
    """A question in the chat format for a fine-tuned model, else the text to be continued: its last
    block_size tokens. Raises UserError if a question is longer."""
    if checkpoint.answers:
        question = complete_question(checkpoint, text)
        return chat_prompt(checkpoint, [{"role": "user", "content": question}])
    ids = checkpoint.tokenizer.encode(text) or [checkpoint.tokenizer.end_of_text]
    return ids[-checkpoint.model.config.block_size :]


def chat_prompt(checkpoint: Checkpoint, messages: list[dict]) -> list[int]:
    """Ids that ask for the answer to the last message, a question or a tool's result. The oldest
    turns are left out until a quarter of block_size is free for the answer. Raises UserError if
    what is left is too long: the last question, what came behind it, the system message and the
    tools."""
    block_size = checkpoint.model.config.block_size
    render = checkpoint.tokenizer.render_prompt
    turns = shortened(messages, lambda turns: len(render(turns)) <= block_size - block_size // 4)
    if len(ids := render(turns)) > block_size:
        longest = max((message["content"] for message in plain(turns)), key=len)
        raise UserError(
            f"the prompt {longest[:20]!r}... has {len(ids)} tokens, longer than "
            f"block_size={block_size}; shorten it"
        )
    return ids


def complete_question(checkpoint: Checkpoint, text: str) -> str:
    """The question; if it ends in no mark, with the mark that ended the trained ones."""
    bare = text.strip()
    return bare + checkpoint.question_end if bare and bare[-1].isalnum() else text


# --- outputs -----------------------------------------------------------------------------------


class TextStream:
    """Ids of one sample -> text as it comes: whole characters, up to the first stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str]):
        self.bytes_of, self.stop = tokenizer.bytes_of, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.stopped = "", False

    def push(self, id: int) -> str:
        return self._release(self.decoder.decode(self.bytes_of[id]), keep=True)

    def flush(self) -> str:
        """The remaining text, when no more ids come; U+FFFD for an incomplete character."""
        return self._release(self.decoder.decode(b"", final=True), keep=False)

    def _release(self, new: str, keep: bool) -> str:
        if self.stopped:
            return ""
        self.held += new
        places = [place for stop in self.stop if (place := self.held.find(stop)) >= 0]
        self.stopped = bool(places)
        end = min(places, default=len(self.held) - (self._partial_stop() if keep else 0))
        text, self.held = self.held[:end], self.held[end:]
        return text

    def _partial_stop(self) -> int:
        """How many of the last characters may be the beginning of a stop text."""
        sizes = range(len(self.held), 0, -1)
        return next((n for n in sizes if any(s.startswith(self.held[-n:]) for s in self.stop)), 0)


def complete(
    checkpoint: Checkpoint,
    prompts: Iterable[list[int]],
    sampling: Sampling,
    num_samples: int = 1,
    batch_size: int = 16,
    first_prompt: int = 0,
    nats: bool = False,
) -> Iterator[list[Output]]:
    """The outputs of each prompt, in the prompts' order; batch_size samples are made at once, and
    prompts are taken as there is room. first_prompt: the index of the first, for its random
    stream. nats: whether to keep -log p of each token."""
    tokenizer, sampling = checkpoint.tokenizer, default_temperature(checkpoint, sampling)
    samples_of_prompts = (
        [Request(prompt, sampling, number, i, 0 if nats else None) for i in range(num_samples)]
        for number, prompt in enumerate(prompts, first_prompt)
    )
    batch = Batch(checkpoint.model, tokenizer.stop_ids, batch_size, eager=5000)
    begun: deque[list[Request]] = deque()  # samples of each prompt that is not yet yielded
    output_of: dict[Request, tuple[Output, TextStream]] = {}
    while True:
        # finished outputs wait for the slowest one; beyond AHEAD of them, all wait for it
        while len(batch.waiting) < batch_size and len(begun) < AHEAD * batch_size:
            if (samples := next(samples_of_prompts, None)) is None:
                break
            begun.append(samples)
            for request in samples:
                output_of[request] = Output(), TextStream(tokenizer, sampling.stop)
                batch.add(request)
        if not begun:
            return
        for request, token in batch.step():
            output, text = output_of[request]
            if token.log_prob is not None:
                output.nats.append(-token.log_prob)
            if token.id not in tokenizer.stop_ids:
                output.text += text.push(token.id)
            if text.stopped:
                batch.cancel(request)
            if request.finish:
                output.ids, output.text = request.ids, output.text + text.flush()
                output.ended = request.finish == "stop" or text.stopped
        while begun and all(request.finish for request in begun[0]):
            yield [output_of.pop(request)[0] for request in begun.popleft()]


def stream(
    checkpoint: Checkpoint, prompt: list[int], sampling: Sampling, sample_index: int = 0
) -> Iterator[str]:
    """The text of one sample as it comes, in whole characters."""
    sampling = default_temperature(checkpoint, sampling)
    text = TextStream(checkpoint.tokenizer, sampling.stop)
    batch = Batch(checkpoint.model, checkpoint.tokenizer.stop_ids, size=1)
    batch.add(Request(prompt, sampling, 0, sample_index))
    while batch and not text.stopped:
        for _, token in batch.step():
            if token.id not in batch.stop_ids:
                yield text.push(token.id)
    yield text.flush()


def show(checkpoint: Checkpoint, prompt: str, text: str) -> str:
    """A sample among several: question and answer, or the text with its continuation."""
    return f"问：{prompt}\n答：{text}\n" if checkpoint.answers else f"{prompt}{text}\n{'-' * 20}"
