"""A page to chat with trained models, and an endpoint for programs, on one port.

    python sample_gradio.py --out_dir=out-sanguo-sft,out-sanguo
    python sample_gradio.py --out_dir=out-sanguo-sft --host=0.0.0.0 --auth=user:password

Then open the address that it prints. Nothing is loaded from elsewhere, and nothing is sent. Marks
(thumbs up or down) go into marks.jsonl in the model's out_dir. The endpoint is in
miniglm/serve/api.py, what the page shows in page_html.py and page.css beside it.
"""

import html
import os
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from configurator import ROOT, UserError, at_least, at_most, command, configure, show_path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ["HF_HUB_OFFLINE"] = "1"

import gradio as gr
import uvicorn
from fastapi import FastAPI

from miniglm import jsonl
from miniglm.generation import Request, Sampling
from miniglm.serve import api, page_html
from miniglm.serve.api import MOST_SAMPLES
from miniglm.serve.gate import LOOPBACK, Gate, refuse
from miniglm.serve.page_html import Answer, Turn
from miniglm.serve.server import Piece, Server, Stream
from miniglm.text import complete_question, load_for_sampling

UPDATE = 0.03  # seconds between two updates of a page, which the browser draws anew
LONGEST = 200_000  # characters that a box takes; the gate refuses what is much longer
MOST_TURNS = 50  # shown of a conversation
ALTERNATIVES = 5  # shown of each token
FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
TITLE = '<span class="name">MiniGLM</span><span class="about">小型中文语言模型</span>'
CHAT_HINT = """向模型提一个问题，或写一个开头让它续写。
Ask the model a question, or write a beginning for it to continue."""
CERTAINTY_HINT = """<div class="empty">每个词元按模型给它的概率着色；指着它，看它的其他可能。<br>
Each token is shaded by its probability; point at one to see its alternatives.</div>"""
LOG_HEIGHT = "max(260px, calc(100vh - 315px))"
# texts as they are; of gradio's buttons those of a message
PLAIN = {"render_markdown": False, "latex_delimiters": [], "allow_tags": False, "buttons": ["copy"]}
BARE = {"show_label": False, "container": False}
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
STREAMED = {"show_progress": "hidden", "api_visibility": "undocumented"}
BUSY = gr.update(submit_btn=False, stop_btn="停止 Stop")  # of the box of a prompt


@dataclass
class Settings:
    out_dir: list[str] = field(default_factory=lambda: ["out"])  # of the models, between commas
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 is all of this machine's
    port: Annotated[int, at_least(1), at_most(65535)] = 7860  # of the page and of /v1
    auth: str | None = None  # user:password, asked of everyone
    open: bool = False  # listen beyond this machine without --auth
    batch_size: Annotated[int, at_least(1)] = 16  # requests that one model answers at once
    max_waiting: Annotated[int, at_least(0)] = 64  # requests that wait for one model, at most
    max_new_tokens: Annotated[int, at_least(1)] = 512  # longest output that may be asked for
    device: str = "auto"  # cuda, mps, cpu; auto is the first of them that is there

    def __post_init__(self):
        if not self.out_dir:
            raise UserError("out_dir names no model; pass --out_dir=A or --out_dir=A,B")
        if self.auth is not None and not all(self.auth.partition(":")):
            raise UserError(f"auth={self.auth!r} must be user:password")
        if self.host not in LOOPBACK and self.auth is None and not self.open:
            remedy = "pass --auth=user:password, or --open=True"
            raise UserError(f"host={self.host} lets others in; {remedy}")


@dataclass
class Session:
    """One open page: its conversation, and the stream that runs for it."""

    turns: list[Turn] = field(default_factory=list)
    stream: Stream | None = None

    def stop(self) -> None:
        if self.stream:
            self.stream.stop()

    def clear(self) -> None:
        self.stop()
        self.turns.clear()

    def can_start(self, text: str) -> bool:
        """Whether there is something to do, and nothing else is being done."""
        busy = self.stream is not None and self.stream.open
        if busy:
            gr.Info("还在回答 / still answering")
        return bool(text.strip()) and not busy

    def message(self, index: int) -> tuple[Turn, Answer | None]:
        """What the Chatbot shows as its message of that index. Raises IndexError if it is gone."""
        return [(turn, shown) for turn in self.turns for shown in (None, *turn.answers)][index]


# --- generating --------------------------------------------------------------------------------


def new_turn(server: Server, text: str, n: int = 1, before: Iterable[Turn] = ()) -> Turn:
    """A question or a beginning, and n answers to come. A model that answers gets the turns before
    it, too, of each the answer marked good, or the first."""
    prompt, messages, is_question = text, [], server.checkpoint.answers
    if is_question:
        prompt = complete_question(server.checkpoint, text)
        for turn in before:
            kept = next((a for a in turn.answers if a.mark == "chosen"), turn.answers[0])
            if turn.is_question and not kept.error:
                messages.append({"role": "user", "content": turn.prompt})
                messages.append({"role": "assistant", "content": kept.text})
    messages.append({"role": "user", "content": prompt})
    return Turn(prompt, [Answer(server.name, messages, i) for i in range(n)], is_question)


def explain(error: Exception) -> str:
    """What the page says of an error; one that is our own fault is also printed."""
    if not isinstance(error, UserError):
        traceback.print_exception(error)
        return f"出错了 / something went wrong: {error}"
    return f"不行 / not possible: {error}"


def save_mark(server: Server, answer: Answer, kind: str) -> Path:
    """Appends a line to marks.jsonl: {"prompt": messages or text, "chosen" or "rejected": text}."""
    prompt = answer.messages if server.checkpoint.answers else answer.messages[-1]["content"]
    path = server.checkpoint.out_dir / "marks.jsonl"
    jsonl.append(path, [{"prompt": prompt, kind: answer.text}])
    answer.mark = kind
    return path


# --- the page ----------------------------------------------------------------------------------


class Page:
    """The components of the page, and the handlers of their events. A handler gets the values of
    several inputs by component, and yields or returns what its outputs show."""

    def __init__(self, servers: dict[str, Server]):
        self.servers = servers

    def submit(self, stream, answer, values, alternatives) -> bool:
        """Asks for an answer as the drawer says. If that is impossible, its error says why."""
        settings = {name: values[component] for name, component in self.settings.items()}
        settings["seed"] = settings["seed"] or 0
        if answer.temperature is not None:
            settings["temperature"] = answer.temperature
        try:
            server = self.servers[answer.model]
            prompt, sampling = server.prompt(answer.messages), Sampling(**settings)
            server.submit(stream, Request(prompt, sampling, 0, answer.sample, alternatives))
        except Exception as error:
            answer.error = explain(error)
        return answer.error is None

    async def run(self, values, answers, log, box, draw, alternatives=None):
        """Asks for the answers and writes them as they come; what goes wrong is kept in their
        errors. draw gets the new pieces, and gives what the log shows."""
        with Stream() as stream:
            values[self.session].stream = stream
            running = [a for a in answers if self.submit(stream, a, values, alternatives)]
            yield {log: draw([]), box: BUSY}
            try:
                async for pieces in stream.gathered(UPDATE):
                    for piece in pieces:
                        running[piece.number].add(piece)
                    yield {log: draw(pieces)}
            except Exception as error:
                reason = explain(error)
                for answer in running:
                    answer.error = None if answer.finish else reason
        yield {log: draw([]), box: gr.update(submit_btn=box.submit_btn, stop_btn=False)}

    def chat(self, values, turns, log, box) -> AsyncIterator[dict]:
        """The last turn's answers as they come, under the turns before."""

        def draw(pieces: list[Piece]) -> object:  # an update of a property costs more than a value
            return page_html.conversation(turns) if pieces else conversation(turns)

        return self.run(values, turns[-1].answers, log, box, draw)

    async def ask(self, values):
        session, text = values[self.session], values[self.box]
        if session.can_start(text):
            server = self.servers[values[self.model]]
            before = session.turns if values[self.follow] else ()
            session.turns.append(new_turn(server, text, values[self.samples], before))
            del session.turns[:-MOST_TURNS]
            updates = self.chat(values, session.turns, self.log, self.box)
            yield await anext(updates) | {self.box: BUSY | {"value": ""}}
            async for update in updates:
                yield update

    async def edit(self, values, event: gr.EditData):
        """Asks an edited question; the turns from it on go."""
        session, text = values[self.session], html.unescape(event.value)
        if session.can_start(text):
            turn, _ = session.message(event.index)
            del session.turns[session.turns.index(turn) :]
            async for update in self.ask(values | {self.box: text}):
                yield update

    async def retry(self, values):
        """The last turn anew, with the next random numbers."""
        session, n = values[self.session], values[self.samples]
        if session.turns and session.can_start(session.turns[-1].prompt):
            turn = session.turns[-1]
            last, first = turn.answers[0], turn.answers[0].sample + MOST_SAMPLES
            turn.answers = [Answer(last.model, last.messages, first + i) for i in range(n)]
            if not values[self.settings["temperature"]]:
                gr.Info("温度为 0，答案不会变 / at temperature 0 the answer stays the same")
            async for update in self.chat(values, session.turns, self.log, self.box):
                yield update

    def undo(self, session):
        """Takes the last turn away, and its prompt back into the box."""
        if not session.turns or not session.can_start(session.turns[-1].prompt):
            return gr.skip(), gr.skip()
        prompt = session.turns.pop().prompt
        return conversation(session.turns), prompt

    async def mark(self, session, event: gr.LikeData):
        try:
            _, answer = session.message(event.index)
            if answer and answer.mark is None and answer.finish and answer.text:
                kind = "chosen" if event.liked else "rejected"
                path = save_mark(self.servers[answer.model], answer, kind)
                gr.Info(f"已记入 / kept in {show_path(path)}", duration=2)
        except IndexError:  # the page has changed meanwhile
            pass
        except UserError as error:
            gr.Warning(str(error))
        return conversation(session.turns)

    async def compare(self, values):
        """Two models on one prompt, at once."""
        text, answers = values[self.compare_box], []
        if values[self.session].can_start(text):
            for model, temperature in self.compared:
                answers += new_turn(self.servers[values[model]], text).answers
                answers[-1].temperature = values[temperature]
            turns, log, box = [Turn(text, answers)], self.compare_log, self.compare_box
            async for update in self.chat(values, turns, log, box):
                yield update

    async def shade(self, values):
        """One output with its probabilities."""
        text, shown = values[self.certainty_box], []
        if values[self.session].can_start(text):
            server = self.servers[values[self.model]]
            turn = new_turn(server, text)

            def draw(pieces: list[Piece]) -> str:
                shown.extend(piece for piece in pieces if piece.tokens)
                return page_html.certainty(server, turn, shown)

            log, box = self.certainty_log, self.certainty_box
            async for update in self.run(values, turn.answers, log, box, draw, ALTERNATIVES):
                yield update

    def temperature(self, name):
        """Answers keep to the point; a little chance makes another try another answer."""
        return 0.3 if self.servers[name].checkpoint.answers else 0.8

    def facts(self, name):
        return page_html.facts(self.servers[name])

    def report(self, name):
        return page_html.report(self.servers[name])

    # layout

    def blocks(self) -> gr.Blocks:
        names = list(self.servers)
        with gr.Blocks(title="MiniGLM", analytics_enabled=False) as blocks:
            self.session = gr.State(Session())
            with gr.Row(elem_id="head"):
                own_html(TITLE, "title")
                self.model = gr.Dropdown(names, min_width=200, elem_id="model", **BARE)
            facts = own_html(self.facts(names[0]), "facts")
            with gr.Accordion("设置 Settings", open=False, elem_id="settings"), gr.Row():
                self.drawer(names[0])
            with gr.Tab("对话 Chat"):
                self.chat_tab()
            with gr.Tab("比较 Compare"):
                self.compare_tab(names)
            with gr.Tab("把握 Certainty"):
                self.certainty_box = prompt_box("certainty-text", "生成 Generate")
                self.certainty_log = own_html(CERTAINTY_HINT, "certainty-log")
                inputs = {self.certainty_box, self.model, *self.drawn}
                self.listen(self.shade, inputs, self.certainty_log, self.certainty_box)
            with gr.Tab("训练 Run") as run_tab:
                report = own_html("", "report")
                run_tab.select(self.report, self.model, report, **QUIET)
            temperature = self.settings["temperature"]
            shows = (self.facts, facts), (self.temperature, temperature), (self.report, report)
            for handler, output in shows:
                self.model.change(handler, self.model, output, **QUIET)
        limit = sum(server.most_jobs for server in self.servers.values())
        return blocks.queue(max_size=limit, default_concurrency_limit=limit)

    def listen(self, handler: Callable, inputs: set, log, box: gr.Textbox) -> None:
        box.submit(handler, inputs, [log, box], api_name=handler.__name__, **STREAMED)
        box.stop(Session.stop, self.session, None, **QUIET)

    def drawer(self, name: str) -> None:
        """Settings of Sampling, the number of samples, and whether to follow."""
        longest, width = self.servers[name].max_new_tokens, {"min_width": 230}
        whole = {"step": 1, "precision": 0}
        length = {"value": min(256, longest), "label": "最长 most tokens"}
        self.settings = {
            "temperature": temperature_slider(self.temperature(name)),
            "top_p": gr.Slider(0.05, 1, 1, step=0.05, label="top-p", **width),
            "max_new_tokens": gr.Slider(1, longest, **length, **whole, **width),
            "repetition_penalty": gr.Slider(1, 2, 1, step=0.05, label="重复惩罚 penalty", **width),
            "seed": gr.Number(1337, precision=0, minimum=0, label="随机种子 seed", **width),
        }
        self.samples = gr.Slider(1, MOST_SAMPLES, 1, label="样本数 samples", **whole, **width)
        # off: a model that was trained on single questions answers worse after others
        self.follow = gr.Checkbox(label="接上文 Follow", elem_id="follow", **width)
        self.drawn = {self.session, *self.settings.values()}

    def chat_tab(self) -> None:
        size = {"height": LOG_HEIGHT, "editable": "user"}
        self.log = answers_side_by_side("chat-log", CHAT_HINT, **size)
        self.box = prompt_box("chat-text", "发送 Send")
        inputs = {self.box, self.model, self.follow, self.samples, *self.drawn}
        self.listen(self.ask, inputs, self.log, self.box)
        self.log.edit(self.edit, inputs, [self.log, self.box], **STREAMED)
        self.log.retry(self.retry, inputs, [self.log, self.box], **STREAMED)
        self.log.undo(self.undo, self.session, [self.log, self.box], **QUIET)
        self.log.like(self.mark, self.session, self.log, **QUIET)
        self.log.clear(Session.clear, self.session, None, **QUIET)

    def compare_tab(self, names: list[str]) -> None:
        self.compared = []  # two models, each with a temperature
        with gr.Row(elem_classes="pair"):
            for number, name in enumerate((names[0], names[1 % len(names)]), 1):
                with gr.Column(min_width=150):
                    model = gr.Dropdown(names, value=name, label=f"模型 Model {number}")
                    temperature = temperature_slider(self.temperature(name))
                    model.change(self.temperature, model, temperature, **QUIET)
                    self.compared.append((model, temperature))
        self.compare_box = prompt_box("compare-text", "比较 Compare")
        hint = "两个模型，同一个开头。\nTwo models, one prompt."
        self.compare_log = answers_side_by_side("compare-log", hint)
        inputs = {self.compare_box, *self.compared[0], *self.compared[1], *self.drawn}
        self.listen(self.compare, inputs, self.compare_log, self.compare_box)


def conversation(turns: list[Turn]) -> dict:
    return gr.update(value=page_html.conversation(turns), feedback_value=page_html.marks(turns))


def own_html(content: str, elem_id: str) -> gr.HTML:
    return gr.HTML(content, apply_default_css=False, elem_id=elem_id)


def temperature_slider(value: float) -> gr.Slider:
    return gr.Slider(0, 2, value, step=0.05, label="温度 temperature", min_width=150)


def answers_side_by_side(elem_id: str, hint: str, **options) -> gr.Chatbot:
    """A Chatbot of messages of their own, which page.css puts side by side."""
    options |= {"group_consecutive_messages": False, "layout": "panel", "show_label": False}
    return gr.Chatbot(elem_id=elem_id, placeholder=hint, **PLAIN, **options)


def prompt_box(elem_id: str, submit: str) -> gr.Textbox:
    size, hint = {"max_lines": 6, "max_length": LONGEST}, "孔明是谁    却说曹操"
    return gr.Textbox(placeholder=hint, submit_btn=submit, elem_id=elem_id, **size, **BARE)


# --- serving -----------------------------------------------------------------------------------


def load_servers(config: Settings) -> dict[str, Server]:
    servers = {}
    for name in dict.fromkeys(name.rstrip("/") for name in config.out_dir):
        checkpoint = load_for_sampling(name, config.device)
        limits = config.batch_size, config.max_waiting, config.max_new_tokens
        name = name if Path(name).name in servers else Path(name).name
        servers[name] = Server(name, checkpoint, *limits)
    return servers


def make_app(servers: dict[str, Server], config: Settings) -> Gate:
    app = FastAPI(title="MiniGLM", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(api.make_router(servers))
    app.mount("/v1", refuse(404, "there is only POST /v1/chat/completions, and GET /v1/models"))
    gr.mount_gradio_app(
        app,
        Page(servers).blocks(),
        path="/",
        theme=gr.themes.Soft(
            primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=["monospace"]
        ),
        css_paths=ROOT / "miniglm/serve/page.css",
        footer_links=[],
        run_history=False,
        show_error=False,
    )
    alone = config.host in LOOPBACK and config.auth is None and not config.open
    return Gate(app, config.auth, LOOPBACK if alone else None)


def listen(config: Settings) -> socket.socket:
    """The socket, taken before anything is loaded: a port in use is said at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise UserError(f"cannot listen: {error.strerror}; pass another --port=") from None


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    sock = listen(config)
    servers = load_servers(config)
    app = make_app(servers, config)
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"page http://{host}:{config.port}   endpoint http://{host}:{config.port}/v1", flush=True)
    print("\n".join(f"model {show_path(name)}" for name in servers), flush=True)
    for server in servers.values():
        server.speed_up()
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    try:
        uvicorn.Server(settings).run(sockets=[sock])
    except KeyboardInterrupt:  # a thread that compiles would make Python's own end an abort
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)


if __name__ == "__main__":
    command(main)
