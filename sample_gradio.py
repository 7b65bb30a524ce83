"""A page to chat with trained models, and an endpoint for programs, on one port.

    python sample_gradio.py --out_dir=out-sanguo-sft,out-sanguo
    python sample_gradio.py --out_dir=out-sanguo-sft --host=0.0.0.0 --auth=user:password

Then open the address that it prints. Nothing is loaded from elsewhere, and nothing is sent. Marks
(good, bad) go into marks.jsonl in the model's out_dir. The endpoint is api.py's, HTML is
miniglm/serve/page_html.py's.
"""

import asyncio
import contextlib
import errno
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ["HF_HUB_OFFLINE"] = "1"

import gradio as gr
import uvicorn
from fastapi import FastAPI

from configurator import UserError, command, configure, show_path
from miniglm.generation import Sampling
from miniglm.serve import api, page_html
from miniglm.serve.gate import LOOPBACK, Gate
from miniglm.serve.page_html import Answer, Chunk, Turn
from miniglm.serve.server import Piece, Server, Stream
from miniglm.text import complete_question, load_for_sampling

MOST_SAMPLES = 5  # side by side
UPDATE = 0.03  # seconds between two updates of a page
LONGEST = 200_000  # characters that a box takes; the gate refuses what is much longer
MOST_TURNS = 50  # shown of a conversation
ALTERNATIVES = 5  # shown of each token
MARK_LOCK = threading.Lock()
Steps = AsyncIterator[None]
FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
# a mark's turn, answer and kind stand on its button
ON_CLICK = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button.mark');
  if (button && !button.disabled) trigger('mark', {...button.dataset});
});
"""


@dataclass
class Settings:
    out_dir: list[str] = field(default_factory=lambda: ["out"])  # of the models, between commas
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 is all of this machine's
    port: int = 7860  # of the page and of /v1
    auth: str | None = None  # user:password, asked of everyone
    open: bool = False  # listen beyond this machine without --auth
    batch_size: int = 16  # requests that one model answers at once
    max_waiting: int = 64  # requests that wait for one model; more are refused
    max_new_tokens: int = 512  # longest output that may be asked for, tokens
    device: str = "auto"  # cuda, mps, cpu; auto is the first of them that is there

    def __post_init__(self):
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.max_waiting < 0:
            raise UserError(f"max_waiting={self.max_waiting} must not be negative")
        if not 0 < self.port < 65536:
            raise UserError(f"port={self.port} must be 1 to 65535")
        if not self.out_dir:
            raise UserError("out_dir names no model; pass --out_dir=A or --out_dir=A,B")
        if self.auth is not None and not all(self.auth.partition(":")):
            raise UserError(f"auth={self.auth!r} must be user:password")
        if self.host not in LOOPBACK and self.auth is None and not self.open:
            raise UserError(
                f"host={self.host} lets others in; pass --auth=user:password, or --open=True"
            )


@dataclass
class Session:
    """One open page: its conversation, and the stream that runs for it."""

    turns: list[Turn] = field(default_factory=list)
    stream: Stream | None = None

    def __deepcopy__(self, memo: dict) -> "Session":  # gradio copies it for each page
        return Session()

    @contextlib.contextmanager
    def streaming(self) -> Iterator[Stream]:
        with Stream() as self.stream:
            try:
                yield self.stream
            finally:
                self.stream = None

    def stop(self) -> None:
        if self.stream:
            self.stream.stop()

    def can_start(self, text: str) -> bool:
        """Whether there is something to do, and nothing else is being done."""
        if self.stream:
            gr.Info("还在回答 / still answering")
        return bool(text.strip()) and not self.stream


# --- generating --------------------------------------------------------------------------------


def drawn(settings: tuple, server: Server) -> Sampling:
    """The sampling that the drawer's sliders say; UserError where they say nonsense."""
    temperature, top_p, max_new_tokens, penalty, seed = settings
    return Sampling(
        max_new_tokens=min(int(max_new_tokens), server.max_new_tokens),
        temperature=float(temperature),
        top_p=float(top_p),
        repetition_penalty=float(penalty),
        seed=int(seed or 0),
    )


def page_temperature(server: Server) -> float:
    """Answers keep to the point; a little chance makes another try another answer."""
    return 0.3 if server.checkpoint.answers else 0.8


def new_turn(server: Server, text: str, before: list[Turn] = ()) -> Turn:
    """What is asked with a text: a question with its mark, after the turns before; or a text to be
    continued."""
    answers = server.checkpoint.answers
    prompt = complete_question(server.checkpoint, text) if answers else text
    messages = []
    for turn in before if answers else ():
        if turn.answers_questions and turn.answers and not turn.error:
            kept = next((a for a in turn.answers if a.mark == "chosen"), turn.answers[0])
            messages.append({"role": "user", "content": turn.prompt})
            messages.append({"role": "assistant", "content": kept.text})
    messages.append({"role": "user", "content": prompt})
    return Turn(server.name, answers, prompt, messages)


async def fill(stream: Stream, turn: Turn, server: Server, settings: tuple, n: float) -> Steps:
    """Asks for n answers of a turn and writes them into it as they come; what goes wrong stands
    in turn.error."""
    turn.answers, turn.error = [], None
    try:
        n = min(max(int(n), 1), MOST_SAMPLES)
        prompt, sampling = server.prompt(turn.messages), drawn(settings, server)
        for sample in range(n):
            server.submit(stream, prompt, sampling, turn.attempt * MOST_SAMPLES + sample)
        turn.answers = [Answer() for _ in range(n)]
        yield
        async for pieces in gathered(stream):
            for piece in pieces:
                turn.answers[piece.number].add(piece)
            yield
    except Exception as error:
        turn.error = explain(error)


async def gathered(stream: Stream) -> AsyncIterator[list[Piece]]:
    """The pieces, those of UPDATE seconds at a time: each update is drawn anew by the browser."""
    async for piece in stream:
        pieces = [piece]
        while not stream.pieces.empty():
            pieces.append(await anext(stream))
        yield pieces
        if stream.unfinished:
            await asyncio.sleep(UPDATE)


def explain(error: Exception) -> str:
    """What the page says of an error; one that is our own fault is also printed."""
    if not isinstance(error, UserError):
        traceback.print_exception(error, file=sys.stderr)
        return f"出错了 / something went wrong: {error}"
    return f"不行 / not possible: {error}"


# --- marks -------------------------------------------------------------------------------------


def save_mark(server: Server, turn: Turn, answer: Answer, kind: str) -> Path:
    """Appends a line to marks.jsonl: {"prompt": messages or text, "chosen" or "rejected": text}."""
    prompt = turn.messages if turn.answers_questions else turn.prompt
    line = json.dumps({"prompt": prompt, kind: answer.text}, ensure_ascii=False) + "\n"
    path = page_html.out_dir_of(server) / "marks.jsonl"
    try:
        with MARK_LOCK, path.open("ab") as file:
            file.write(line.encode())
    except OSError as error:
        raise UserError(f"cannot write {show_path(path)}: {error.strerror}") from None
    answer.mark = kind
    return path


# --- the page ----------------------------------------------------------------------------------


class Page:
    """The handlers of the page's events, and its layout."""

    def __init__(self, servers: dict[str, Server]):
        self.servers = servers

    # handlers: each yields or returns what its components show

    async def ask(self, text, session, name, follow, n, *settings):
        """A new turn; follow: the model is given those before it too. Outputs: log, textbox, stop
        button."""
        if not session.can_start(text):
            yield gr.skip(), gr.skip(), gr.skip()
            return
        turn = new_turn(self.servers[name], text, session.turns if follow else ())
        session.turns = [*session.turns, turn][-MOST_TURNS:]
        async for log, button in self.fill_shown(session, turn, n, settings):
            yield log, "", button

    async def again(self, session, n, *settings):
        """The last turn anew, with the next random numbers. Outputs: log, stop button."""
        if not session.turns or not session.can_start(session.turns[-1].prompt):
            yield gr.skip(), gr.skip()
            return
        turn = session.turns[-1]
        turn.attempt += 1
        if not settings[0]:
            gr.Info("温度为 0，答案不会变 / at temperature 0 the answer stays the same")
        async for update in self.fill_shown(session, turn, n, settings):
            yield update

    async def fill_shown(self, session, turn, n, settings):
        with session.streaming() as stream:
            yield page_html.conversation(session.turns), gr.Button(interactive=True)
            async for _ in fill(stream, turn, self.servers[turn.model], settings, n):
                yield page_html.conversation(session.turns), gr.skip()
        yield page_html.conversation(session.turns), gr.Button(interactive=False)

    async def stop(self, session):
        session.stop()

    async def clear(self, session):
        session.stop()
        session.turns = []
        return page_html.conversation([])

    async def mark(self, session, event: gr.EventData):
        try:
            turn = session.turns[int(event._data["turn"])]
            answer, kind = turn.answers[int(event._data["answer"])], event._data["kind"]
        except (KeyError, IndexError, ValueError, TypeError):
            return gr.skip()  # the page has changed meanwhile
        if answer.mark is None and answer.finish and kind in ("chosen", "rejected"):
            try:
                path = save_mark(self.servers[turn.model], turn, answer, kind)
                gr.Info(f"已记入 / kept in {show_path(path)}", duration=2)
            except UserError as error:
                gr.Warning(str(error))
        return page_html.conversation(session.turns)

    async def compare(self, text, session, one, other, warm, warm_other, *settings):
        """Two models on one prompt, at once. Outputs: log, stop button."""
        if not session.can_start(text):
            yield gr.skip(), gr.skip()
            return
        turns = [new_turn(self.servers[name], text) for name in (one, other)]
        for turn in turns:
            turn.answers = [Answer()]
        with session.streaming() as stream:
            yield page_html.comparison(turns), gr.Button(interactive=True)
            running = []  # the turn of each request of the stream
            for turn, temperature in zip(turns, (warm, warm_other), strict=True):
                server = self.servers[turn.model]
                try:
                    prompt, sampling = server.prompt(turn.messages), (temperature, *settings[1:])
                    server.submit(stream, prompt, drawn(sampling, server))
                    running.append(turn)
                except Exception as error:
                    turn.error = explain(error)
            try:
                async for pieces in gathered(stream):
                    for piece in pieces:
                        running[piece.number].answers[0].add(piece)
                    yield page_html.comparison(turns), gr.skip()
            except Exception as error:
                for turn in running:
                    if not turn.answers[0].finish:
                        turn.error = explain(error)
        yield page_html.comparison(turns), gr.Button(interactive=False)

    async def shade(self, text, session, name, *settings):
        """One output with its probabilities. Outputs: log, stop button."""
        if not session.can_start(text):
            yield gr.skip(), gr.skip()
            return
        server, chunks, fault = self.servers[name], [], None
        turn = new_turn(server, text)
        with session.streaming() as stream:
            yield gr.skip(), gr.Button(interactive=True)
            try:
                prompt, sampling = server.prompt(turn.messages), drawn(settings, server)
                server.submit(stream, prompt, sampling, alternatives=ALTERNATIVES)
                async for pieces in gathered(stream):
                    chunks += [Chunk(piece.text, piece.tokens) for piece in pieces if piece.tokens]
                    yield page_html.certainty(server, turn.prompt, chunks, None, False), gr.skip()
            except Exception as error:
                fault = explain(error)
        yield page_html.certainty(server, turn.prompt, chunks, fault), gr.Button(interactive=False)

    def choose(self, name):
        """Another model: its description, and the temperature that suits its kind."""
        server = self.servers[name]
        return page_html.description(server), page_temperature(server)

    def report(self, name):
        return page_html.run_report(self.servers[name])

    # layout

    def blocks(self) -> gr.Blocks:
        first = next(iter(self.servers.values()))
        with gr.Blocks(title="MiniGLM", analytics_enabled=False) as blocks:
            session = gr.State(Session())
            with gr.Row(elem_id="head"):
                shown(TITLE, elem_id="title", min_width=160)
                name = gr.Dropdown(
                    list(self.servers),
                    value=first.name,
                    label="模型 Model",
                    show_label=False,
                    container=False,
                    min_width=200,
                    elem_id="model",
                )
            facts = shown(page_html.description(first), elem_id="facts")
            settings, n = self.drawer(first)
            name.change(self.choose, name, [facts, settings[0]], **QUIET)
            with gr.Tabs():
                with gr.Tab("对话 Chat", id="chat"):
                    self.chat_tab(session, name, n, settings)
                with gr.Tab("比较 Compare", id="compare"):
                    self.compare_tab(session, settings)
                with gr.Tab("把握 Certainty", id="certainty"):
                    self.certainty_tab(session, name, settings)
                with gr.Tab("训练 Run", id="run") as run_tab:
                    report = shown("", elem_id="report")
                    run_tab.select(self.report, name, report, **QUIET)
                    name.change(self.report, name, report, **QUIET)
        limit = sum(server.most_jobs for server in self.servers.values())
        return blocks.queue(max_size=limit, default_concurrency_limit=limit)

    def drawer(self, first: Server) -> tuple[list[gr.components.Component], gr.Slider]:
        """Temperature, top-p, length, penalty, seed; and the number of samples."""
        longest, width = first.max_new_tokens, {"min_width": 230}
        with gr.Accordion("设置 Settings", open=False, elem_id="settings"), gr.Row():
            settings = [
                gr.Slider(0, 2, page_temperature(first), step=0.05, label=WARMTH, **width),
                gr.Slider(0.05, 1, 1, step=0.05, label="top-p", **width),
                gr.Slider(1, longest, min(256, longest), step=1, label="最长 most tokens", **width),
                gr.Slider(1, 2, 1, step=0.05, label="重复惩罚 penalty", **width),
                gr.Number(1337, precision=0, minimum=0, label="随机种子 seed", **width),
            ]
            n = gr.Slider(
                1, MOST_SAMPLES, 1, step=1, label="样本数 samples", elem_id="samples", **width
            )
        return settings, n

    def chat_tab(self, session, name, n, settings) -> None:
        log = shown(page_html.conversation([]), elem_id="log", js_on_load=ON_CLICK, autoscroll=True)
        with gr.Row(elem_classes="ask"):
            box = prompt_box("question")
            send = gr.Button("发送 Send", variant="primary", min_width=100, scale=1, elem_id="send")
        with gr.Row(elem_classes="tools"):
            stop = gr.Button(
                "停止 Stop", interactive=False, size="sm", min_width=80, elem_id="stop"
            )
            again = gr.Button("重答 Again", size="sm", min_width=80, elem_id="again")
            clear = gr.Button("清空 Clear", size="sm", min_width=80, elem_id="clear")
            # off: a model that was trained on single questions answers worse after others
            follow = gr.Checkbox(
                label="接上文 Follow", container=False, min_width=120, elem_id="follow"
            )
        outputs = [log, box, stop]
        asked = [box, session, name, follow, n, *settings]
        gr.on([box.submit, send.click], self.ask, asked, outputs, api_name="ask", **STREAMED)
        again.click(self.again, [session, n, *settings], [log, stop], api_name="again", **STREAMED)
        stop.click(self.stop, session, None, **QUIET)
        clear.click(self.clear, session, log, **QUIET)
        log.mark(self.mark, session, log, **QUIET)

    def compare_tab(self, session, settings) -> None:
        names = list(self.servers)
        chosen, warmth = [], []
        with gr.Row(elem_classes="pair"):
            for number, name in enumerate((names[0], names[1 % len(names)]), 1):
                with gr.Column(min_width=150):
                    label, start = f"模型 Model {number}", page_temperature(self.servers[name])
                    chosen.append(gr.Dropdown(names, value=name, label=label))
                    warmth.append(gr.Slider(0, 2, start, step=0.05, label=WARMTH))
                    chosen[-1].change(self.warmth, chosen[-1], warmth[-1], **QUIET)
        box, run, stop = prompt_row("compare", "比较 Compare")
        log = shown(page_html.comparison([]), elem_id="compare-log")
        inputs = [box, session, *chosen, *warmth, *settings]
        events = [box.submit, run.click]
        gr.on(events, self.compare, inputs, [log, stop], api_name="compare", **STREAMED)
        stop.click(self.stop, session, None, **QUIET)

    def warmth(self, name):
        return page_temperature(self.servers[name])

    def certainty_tab(self, session, name, settings) -> None:
        box, run, stop = prompt_row("certainty", "生成 Generate")
        log = shown(page_html.certainty(None, "", [], None), elem_id="certainty-log")
        inputs = [box, session, name, *settings]
        events = [box.submit, run.click]
        gr.on(events, self.shade, inputs, [log, stop], api_name="certainty", **STREAMED)
        stop.click(self.stop, session, None, **QUIET)


TITLE = '<span class="name">MiniGLM</span><span class="about">小型中文语言模型</span>'
WARMTH = "温度 temperature"
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
STREAMED = {"show_progress": "hidden", "api_visibility": "undocumented"}


def shown(html: str, **options) -> gr.HTML:
    """HTML of miniglm/serve/page_html.py's making, in its own style."""
    return gr.HTML(html, apply_default_css=False, **options)


def prompt_box(elem_id: str) -> gr.Textbox:
    return gr.Textbox(
        placeholder="孔明是谁    却说曹操",
        lines=1,
        max_lines=6,
        max_length=LONGEST,
        scale=8,
        min_width=200,
        show_label=False,
        container=False,
        elem_id=elem_id,
    )


def prompt_row(kind: str, label: str) -> tuple[gr.Textbox, gr.Button, gr.Button]:
    with gr.Row(elem_classes="ask"):
        box = prompt_box(f"{kind}-text")
        run = gr.Button(label, variant="primary", scale=1, min_width=140, elem_id=f"{kind}-run")
        stop = gr.Button(
            "停止 Stop", interactive=False, scale=1, min_width=100, elem_id=f"{kind}-stop"
        )
    return box, run, stop


# --- serving -----------------------------------------------------------------------------------


def load_servers(config: Settings) -> dict[str, Server]:
    servers = {}
    for name in dict.fromkeys(name.rstrip("/") for name in config.out_dir):
        checkpoint = load_for_sampling(name, config.device)
        limits = config.batch_size, config.max_waiting, config.max_new_tokens
        if Path(name).name not in servers:
            name = Path(name).name
        servers[name] = Server(name, checkpoint, *limits)
    return servers


def make_app(servers: dict[str, Server], config: Settings) -> Gate:
    app = FastAPI(title="MiniGLM", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(api.make_router(servers))
    theme = gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=["monospace"]
    )
    gr.mount_gradio_app(
        app,
        Page(servers).blocks(),
        path="/",
        theme=theme,
        css=page_html.CSS,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=1,
        ssr_mode=False,
        pwa=False,
    )
    alone = config.host in LOOPBACK and config.auth is None and not config.open
    return Gate(app, config.auth, LOOPBACK if alone else None)


def listen(config: Settings) -> socket.socket:
    """The socket, taken before anything is loaded: a port in use is said at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.host, config.port))
    except OSError as error:
        reason = (
            "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        )
        raise UserError(
            f"port={config.port} on host={config.host} {reason}; pass --port="
        ) from None
    return sock


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    sock = listen(config)
    servers = load_servers(config)
    app = make_app(servers, config)
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"page http://{host}:{config.port}   endpoint http://{host}:{config.port}/v1", flush=True)
    for server in servers.values():
        print(f"model {server.name}", flush=True)
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    uvicorn.Server(settings).run(sockets=[sock])


if __name__ == "__main__":
    command(main)
