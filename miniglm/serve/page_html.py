"""What the page shows: conversations for gradio's Chatbot, and HTML for what gradio has no
component for: shaded tokens with their alternatives, facts about a model, the report of a run.

Every text that comes from outside (a person, a model, a file) is escaped and shown as it is: no
Markdown, no LaTeX, no HTML. The templates are in page.html; the page itself is sample_gradio.py's.
"""

import base64
import html
import math
from dataclasses import dataclass
from pathlib import Path

import jinja2

from miniglm.checkpoint import read_log
from miniglm.jsonl import read_report
from miniglm.serve.server import Piece, Server

MOST_SHOWN = 1000  # characters of a prompt
MOST_POINTS = 8  # evaluations shown of a run
FINISH = {"length": "到长度上限 cut at length", "cancelled": "已停止 stopped"}
FEEDBACK = {"chosen": "Like", "rejected": "Dislike", None: None}  # gradio's names of its thumbs


@dataclass
class Answer:
    model: str
    messages: list[dict]  # what the model is given: the prompt, maybe the turns before it too
    sample: int  # of its random stream
    temperature: float | None = None  # None is the drawer's
    text: str = ""
    finish: str | None = None  # None while it comes
    mark: str | None = None  # "chosen" or "rejected"
    error: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.finish = piece.finish


@dataclass(eq=False)
class Turn:
    """A question, or the beginning of a text, and the answers to it, side by side."""

    prompt: str
    answers: list[Answer]
    is_question: bool = True  # else the beginning of a text


def short(text: str) -> str:
    """A prompt as it is shown: the whole of most, the beginning of a book."""
    cut = f"…（{len(text):,} 字 characters）"
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + cut


# --- conversations -----------------------------------------------------------------------------


def conversation(turns: list[Turn]) -> list[dict]:
    """The value of a Chatbot: a message for each prompt, and one for each answer to it."""
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": [plain(short(turn.prompt))]})
        messages += [answer_message(turn, number) for number in range(len(turn.answers))]
    return messages


def marks(turns: list[Turn]) -> list[str | None]:
    """The feedback_value of a Chatbot."""
    return [FEEDBACK[answer.mark] for turn in turns for answer in turn.answers]


def answer_message(turn: Turn, number: int) -> dict:
    """An answer under a title, beside which gradio shows a spinner while it is pending."""
    answer = turn.answers[number]
    if answer.error:
        fault = {"component": "html", "value": PAGE.fault(answer.error, answer.text)}
        content = {"type": "component", **fault, "constructor_args": {}, "props": {}}
        return {"role": "assistant", "content": [content]}
    title = [answer.model, str(number + 1) if len(turn.answers) > 1 else ""]
    if answer.finish:
        title.append(FINISH.get(answer.finish, "") if answer.text else "空 empty")
    status = {} if answer.finish else {"status": "pending"}
    metadata = {"title": html.escape(" · ".join(filter(None, title)))} | status
    return {"role": "assistant", "content": [plain(answer.text)], "metadata": metadata}


def plain(text: str) -> dict:
    """A text in a message. gradio strips bare strings, and takes `<` for HTML in any text."""
    return {"type": "text", "text": html.escape(text, quote=False)}


# --- how sure it was -----------------------------------------------------------------------------


def certainty(server: Server, turn: Turn, pieces: list[Piece]) -> str:
    """The text with each token shaded by its probability; once it is whole, what else it might
    have been, on hover or touch. A piece has several tokens if they make one character."""
    [answer] = turn.answers
    if answer.error:
        return PAGE.fault(answer.error)
    shaded = []
    for piece in pieces:
        prob = math.prod(token.prob for token in piece.tokens)
        shaded.append((piece.text, prob, alternatives(server, piece) if answer.finish else []))
    return PAGE.certainty(short(turn.prompt), shaded)


def alternatives(server: Server, piece: Piece) -> list[tuple[str, float, bool]]:
    """Each token of a piece and the others it might have been: name, probability, was it taken."""
    rows = []
    for token in piece.tokens:
        others = {id: prob for id, prob in token.alternatives if id != token.id}
        for id, prob in ({token.id: token.prob} | others).items():
            rows.append((name_of(server, id), prob, id == token.id))
    return rows


def name_of(server: Server, id: int) -> str:
    """A token as text; its id if it is special or a part of a character."""
    tokenizer = server.checkpoint.tokenizer
    if id in tokenizer.stop_ids:
        return "终 end"
    text = tokenizer.decode([id])
    if not text or "\ufffd" in text:
        return f"#{id}"
    return text.replace("\n", "↵").replace(" ", "␣")


def shade(prob: float) -> str:
    """Sure is green, unsure is red; translucent, to suit light and dark pages."""
    hue = round(130 * prob**0.5)
    return f"hsla({hue}, 75%, 50%, {0.18 + 0.22 * abs(2 * prob**0.5 - 1):.2f})"


# --- what a model is, and what its run gave ------------------------------------------------------


def facts(server: Server) -> str:
    """A line about a model: what it does, its size, its data, its validation figures."""
    evaluation = read_json(server.checkpoint.out_dir / "evaluation.json")
    return PAGE.facts(server.checkpoint, evaluation)


def report(server: Server) -> str:
    """The evaluation, the course of training, and the pictures that lie in the out_dir itself;
    they come inside the page, as no path of it is served."""
    out_dir = server.checkpoint.out_dir
    files = sorted(out_dir.glob("evaluation-*.json")) or [out_dir / "evaluation.json"]
    evaluations = list(filter(None, map(read_json, files)))
    points = [record for record in read_log(out_dir) if "val_loss" in record][-MOST_POINTS:]
    pictures = {
        path.stem: base64.b64encode(path.read_bytes()).decode()
        for path in sorted(out_dir.glob("*.png"))
        if path.resolve().parent == out_dir.resolve()  # not a link to elsewhere
    }
    return PAGE.report(server.name, evaluations, points, pictures)


def read_json(path: Path) -> dict:
    return read_report(path, (), "evaluate again, or delete it") if path.is_file() else {}


def figure(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
)
TEMPLATES.filters |= {"figure": figure, "shade": shade}
PAGE = TEMPLATES.get_template("page.html").module
