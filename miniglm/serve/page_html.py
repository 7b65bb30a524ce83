"""What the page shows, as HTML: conversations, shaded tokens, what a model is, what a run gave.

Every text that comes from outside (a person, a model, a file) goes through `escape` and is shown as
it is: no Markdown, no LaTeX, no HTML. The page itself is sample_gradio.py's.
"""

import base64
import html
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from miniglm.checkpoint import read_log
from miniglm.generation import Token
from miniglm.serve.server import Piece, Server

MOST_SHOWN = 1000  # characters of a prompt
MOST_POINTS = 8  # evaluations shown of a run
PICTURE_NAMES = {
    "curves": "损失与学习率 loss and learning rate",
    "rouge_l": "各题的 ROUGE-L of each question",
    "perplexity": "各题的困惑度 perplexity of each question",
}
MEASURES = {
    "bits_per_byte": "比特每字节 bits per byte",
    "perplexity": "困惑度 perplexity",
    "rouge_l": "ROUGE-L，没学过的题 unseen questions",
    "rouge_l_seen": "ROUGE-L，学过的题 trained questions",
    "rouge_l_lookup": "ROUGE-L，查找最像的题 look-up of the nearest question",
    "bleu": "BLEU",
    "chrf": "chrF++",
    "empty": "空译文的比例 empty translations",
    "unfinished": "没有收尾的比例 not ended by themselves",
    "simplified": "含简体字的比例 with Simplified characters",
    "ended": "自己收尾的比例 ended by themselves",
    "distinct_2": "不同的二字组 distinct pairs of characters",
    "repeated_4grams": "重复的四字组 repeated runs of four",
    "answer_characters": "回答字数 characters an answer",
    "reference_characters": "参考字数 characters a reference",
    "tokens": "计分的词元 tokens scored",
    "split": "划分 split",
    "dataset": "数据 dataset",
    "checkpoint": "存档 checkpoint",
}
FINISH = {"length": "到长度上限 cut at length", "cancelled": "已停止 stopped"}


@dataclass
class Answer:
    text: str = ""
    finish: str | None = None  # None while it comes
    mark: str | None = None  # "chosen" or "rejected"

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.finish = piece.finish


@dataclass
class Turn:
    """A question (or the beginning of a text) and the answers to it, side by side."""

    model: str
    answers_questions: bool  # else it continues the text
    prompt: str
    messages: list[dict]  # what the model is given: the prompt, maybe the turns before it too
    answers: list[Answer] = field(default_factory=list)
    attempt: int = 0  # how often it was asked again
    error: str | None = None


def escape(text: object) -> str:
    return html.escape(str(text))


def short(text: str) -> str:
    """A prompt as it is shown: the whole of most, the beginning of a book."""
    cut = f"…（{len(text):,} 字 characters）"
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + cut


# --- the conversation ----------------------------------------------------------------------------


def conversation(turns: list[Turn]) -> str:
    if not turns:
        return (
            '<div class="empty">向模型提一个问题，或写一个开头让它续写。<br>'
            "Ask the model a question, or write a beginning for it to continue.</div>"
        )
    return "".join(_turn(place, turn) for place, turn in enumerate(turns))


def _turn(place: int, turn: Turn) -> str:
    parts = []
    if turn.answers_questions or turn.error:
        parts.append(
            f'<div class="question"><div class="bubble">{escape(short(turn.prompt))}</div></div>'
        )
    cards = [_card(place, number, turn) for number in range(len(turn.answers))]
    if cards:
        parts.append(f'<div class="answers n{len(cards)}">{"".join(cards)}</div>')
    if turn.error:
        parts.append(f'<div class="error" role="alert">{escape(turn.error)}</div>')
    return f'<div class="turn">{"".join(parts)}</div>'


def _card(place: int, number: int, turn: Turn) -> str:
    answer = turn.answers[number]
    running = answer.finish is None and not turn.error
    title = turn.model if len(turn.answers) == 1 else f"{turn.model} · {number + 1}"
    given = "" if turn.answers_questions else escape(short(turn.prompt))
    caret = '<span class="caret"></span>' if running else ""
    foot = "" if running else _foot(place, number, answer)
    return (
        f'<div class="card"><div class="title">{escape(title)}</div>'
        f'<div class="text"><span class="given">{given}</span>'
        f'<span class="new">{escape(answer.text)}</span>{caret}</div>'
        f"{foot}</div>"
    )


def _foot(place: int, number: int, answer: Answer) -> str:
    if not answer.text:
        return '<div class="foot"><span class="note">（空 empty）</span></div>'
    if not answer.finish:  # it failed on the way
        return ""
    note = f'<span class="note">{FINISH.get(answer.finish, "")}</span>'
    on = " on"
    buttons = "".join(
        f'<button type="button" class="mark {kind}{on if answer.mark == kind else ""}" '
        f'data-turn="{place}" data-answer="{number}" data-kind="{kind}" '
        f'aria-pressed="{str(answer.mark == kind).lower()}" {"disabled" if answer.mark else ""}>'
        f"{label}</button>"
        for kind, label in (("chosen", "好 Good"), ("rejected", "差 Bad"))
    )
    return f'<div class="foot">{note}<span class="marks">{buttons}</span></div>'


def comparison(turns: list[Turn]) -> str:
    """Two models on one prompt."""
    if not turns:
        return '<div class="empty">两个模型，同一个开头。<br>Two models, one prompt.</div>'
    cards = []
    for turn in turns:
        [answer] = turn.answers
        running = answer.finish is None and not turn.error
        note = FINISH.get(answer.finish, "")
        given = "" if turn.answers_questions else escape(short(turn.prompt))
        fault = f'<div class="error" role="alert">{escape(turn.error)}</div>' if turn.error else ""
        caret = '<span class="caret"></span>' if running else ""
        cards.append(
            f'<div class="card"><div class="title">{escape(turn.model)} · '
            f"{kind_of(turn.answers_questions)}</div>"
            f'<div class="text"><span class="given">{given}</span>'
            f'<span class="new">{escape(answer.text)}</span>{caret}</div>'
            f'<div class="foot"><span class="note">{note}</span></div>{fault}</div>'
        )
    return f'<div class="answers n2">{"".join(cards)}</div>'


def kind_of(answers_questions: bool) -> str:
    return "问答 answers" if answers_questions else "续写 continues"


# --- how sure it was -----------------------------------------------------------------------------


@dataclass
class Chunk:
    """Whole characters, and the tokens that made them: one, or several that are parts of one."""

    text: str
    tokens: list[Token]


def certainty(
    server: Server | None, prompt: str, chunks: list[Chunk], error: str | None, whole: bool = True
) -> str:
    """The text with each token shaded by its probability; once it is whole, what else it might
    have been, on hover or touch."""
    if error:
        return f'<div class="error" role="alert">{escape(error)}</div>'
    if not chunks:
        return (
            '<div class="empty">每个词元按模型给它的概率着色；指着它，看它的其他可能。<br>'
            "Each token is shaded by its probability; point at one to see its alternatives.</div>"
        )
    spans = "".join(_chunk(chunk, _tip(server, chunk) if whole else "") for chunk in chunks)
    given = f'<div class="given">{escape(short(prompt))}</div>'
    return f'{given}<div class="shaded">{spans}</div>{_legend()}'


def _chunk(chunk: Chunk, tip: str) -> str:
    prob = math.prod(token.prob for token in chunk.tokens)
    text = escape(chunk.text) or "<b>终 end</b>"
    return (
        f'<span class="tok" tabindex="0" style="background:{shade(prob)}" '
        f'data-prob="{prob:.6f}">{text}{tip}</span>'
    )


def _tip(server: Server, chunk: Chunk) -> str:
    """Each token of a chunk and its alternatives, with their probabilities."""
    rows = []
    for token in chunk.tokens:
        rows.append((token.id, token.prob, "it"))
        rows += [(id, prob, "") for id, prob in token.alternatives if id != token.id]
    lines = "".join(
        f'<span class="alt {kind}"><i>{escape(name_of(server, id))}</i>'
        f'<u><s style="width:{100 * prob:.0f}%"></s></u><em>{percent(prob)}</em></span>'
        for id, prob, kind in rows
    )
    return f'<span class="tip" role="tooltip">{lines}</span>'


def name_of(server: Server, id: int) -> str:
    """A token as text; its bytes where it is a part of a character."""
    tokenizer = server.checkpoint.tokenizer
    if id in tokenizer.stop_ids:
        return "终 end"
    text = tokenizer.decode([id])
    if not text:  # another special token
        return f"#{id}"
    if "\ufffd" in text:
        return f"半字 #{id}"
    return text.replace("\n", "↵").replace(" ", "␣")


def shade(prob: float) -> str:
    """Sure is green, unsure is red; through the page's own background."""
    hue = round(130 * prob**0.5)
    return f"hsla({hue}, 75%, 50%, {0.18 + 0.22 * abs(2 * prob**0.5 - 1):.2f})"


def percent(prob: float) -> str:
    return f"{100 * prob:.1f}%" if prob >= 0.001 else "&lt;0.1%"


def _legend() -> str:
    steps = "".join(
        f'<span style="background:{shade(p)}">{100 * p:g}%</span>' for p in (0.01, 0.1, 0.3, 0.6, 1)
    )
    return f'<div class="legend">概率 probability {steps}</div>'


# --- what a model is, and what its run gave ------------------------------------------------------


def out_dir_of(server: Server) -> Path:
    return server.checkpoint.out_dir


def description(server: Server) -> str:
    """A line about a model: what it does, its size, its data, its validation figures."""
    run, config = server.checkpoint.run, server.checkpoint.model.config
    facts = [
        f"<b>{kind_of(server.checkpoint.answers)}</b>",
        f"{server.checkpoint.n_params / 1e6:.2f}M 参数 parameters",
        f"上下文 context {config.block_size}",
        f"数据 data {escape(run['dataset'].get('name', '?'))}",
    ]
    measured = latest_evaluation(server)
    for key, name in (
        ("bits_per_byte", "bits per byte"),
        ("perplexity", "困惑度 perplexity"),
        ("rouge_l", "ROUGE-L 没学过 unseen"),
        ("rouge_l_seen", "学过 trained"),
    ):
        if key in measured:
            facts.append(f"{name} {figure(measured[key])}")
    loss = run["progress"].get("best_val_loss")
    if not measured and isinstance(loss, float):
        facts.append(f"验证损失 validation loss {loss:.3f}")
    return f'<div class="facts">{"".join(f"<span>{fact}</span>" for fact in facts)}</div>'


def latest_evaluation(server: Server) -> dict:
    return read_object(out_dir_of(server) / "evaluation.json")


def read_object(path: Path) -> dict:
    """A file of one JSON object; {} where there is none, or it is being written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def figure(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else escape(value)


def run_report(server: Server) -> str:
    """The evaluation, the course of training, and the pictures of an out_dir."""
    parts = [_evaluations(server), _course(server), _pictures(out_dir_of(server))]
    return "".join(parts)


def _evaluations(server: Server) -> str:
    files = sorted(out_dir_of(server).glob("evaluation-*.json"))
    columns = [found for path in files if (found := read_object(path))]
    columns = columns or [found for found in [latest_evaluation(server)] if found]
    if not columns:
        return (
            '<div class="empty">还没有评测 / not evaluated yet: '
            f"python evaluations.py --out_dir={escape(server.name)}</div>"
        )
    rows = "".join(
        f"<tr><th>{name}</th>{_cells(column.get(key, '') for column in columns)}</tr>"
        for key, name in MEASURES.items()
        if any(key in column for column in columns)
    )
    return f"<h3>评测 Evaluation</h3><table>{rows}</table>"


def _course(server: Server) -> str:
    points = [r for r in read_log(out_dir_of(server)) if "val_loss" in r][-MOST_POINTS:]
    if not points:
        return ""
    head = "<tr><th>步<br>step</th><th>训练损失<br>train loss</th><th>验证损失<br>val loss</th>"
    head += "<th>比特每字节<br>bits per byte</th><th>秒<br>seconds</th></tr>"
    points = [point | {"seconds": round(point["seconds"])} for point in points]
    keys = ("iter", "train_loss", "val_loss", "val_bits_per_byte", "seconds")
    rows = "".join(f"<tr>{_cells(point.get(key, '') for key in keys)}</tr>" for point in points)
    return f'<h3>训练 Training</h3><table class="course">{head}{rows}</table>'


def _cells(values: Iterable) -> str:
    return "".join(f"<td>{figure(value)}</td>" for value in values)


def _pictures(out_dir: Path) -> str:
    """The pictures that lie in the out_dir itself, inside the page: no path of it is served."""
    figures = []
    for path in sorted(out_dir.glob("*.png")):
        if path.resolve().parent != out_dir.resolve():  # a link to elsewhere
            continue
        content = base64.b64encode(path.read_bytes()).decode()
        name = PICTURE_NAMES.get(path.stem, path.stem)
        figures.append(
            f'<figure><img src="data:image/png;base64,{content}" alt="{escape(name)}">'
            f"<figcaption>{escape(name)}</figcaption></figure>"
        )
    if not figures:
        return ""
    return f'<h3>图 Pictures</h3><div class="pictures">{"".join(figures)}</div>'


CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto; padding: 10px 16px !important; }
main, main.contain, .main { padding: 0 !important; max-width: none !important; }
main .column, .tabitem .column { gap: 10px; }
footer { display: none !important; }
#head { align-items: center; flex-wrap: nowrap; gap: 10px; }
#title { flex: 1 0 auto; width: auto; }
#title .name { font-size: 22px; font-weight: 700; letter-spacing: .02em; }
#title .about { color: var(--body-text-color-subdued); font-size: 14px; margin-left: 12px; }
#model { flex: 0 1 340px; min-width: 0 !important; }
#facts, #title { padding: 0; }
.facts { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; padding: 0 2px;
  color: var(--body-text-color-subdued); }
.facts b { color: var(--color-accent); font-weight: 600; }
#log, #compare-log, #certainty-log { border: 1px solid var(--border-color-primary);
  border-radius: 12px; background: var(--block-background-fill); padding: 14px; }
#log { height: max(260px, calc(100vh - 345px)); overflow-y: auto !important; }
#compare-log, #certainty-log { min-height: 180px; overflow: visible !important; }
.empty { color: var(--body-text-color-subdued); text-align: center; padding: 48px 12px;
  line-height: 1.8; font-size: 15px; }
.turn { margin-bottom: 18px; }
.question { display: flex; justify-content: flex-end; margin-bottom: 10px; }
.bubble { max-width: 85%; background: var(--color-accent); color: #fff; padding: 7px 14px;
  border-radius: 16px 16px 4px 16px; }
.bubble, .text, .shaded, .given, .error { white-space: pre-wrap; overflow-wrap: anywhere;
  line-height: 1.75; font-size: 15px; }
.answers { display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 190px), 1fr)); }
.answers.n1 .card { max-width: 92%; justify-self: start; min-width: min(100%, 300px); }
.card { background: var(--body-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: 4px 16px 16px 16px; padding: 8px 14px; display: flex; flex-direction: column;
  min-width: 0; }
.card .title { font-size: 12px; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.card .text { flex: 1; }
.given { color: var(--body-text-color-subdued); }
.caret { display: inline-block; width: 8px; height: 1.05em; margin-left: 2px;
  vertical-align: text-bottom; background: var(--color-accent);
  animation: blink 1s steps(2) infinite; }
@keyframes blink { 50% { opacity: 0; } }
.foot { display: flex; flex-wrap: wrap; align-items: center; gap: 6px; margin-top: 6px;
  min-height: 26px; }
.note { font-size: 12px; color: var(--body-text-color-subdued); }
.marks { display: flex; gap: 6px; margin-left: auto; }
.mark { font-size: 12px; line-height: 1.4; padding: 3px 11px; border-radius: 999px;
  cursor: pointer; border: 1px solid var(--border-color-primary); white-space: nowrap;
  background: var(--block-background-fill); color: var(--body-text-color); }
.mark:hover:not(:disabled) { border-color: var(--color-accent); color: var(--color-accent); }
.mark:disabled { cursor: default; opacity: .4; }
.mark.on { opacity: 1; color: #fff; }
.mark.chosen.on { background: #15803d; border-color: #15803d; }
.mark.rejected.on { background: #b91c1c; border-color: #b91c1c; }
.error { background: #fef2f2; color: #991b1b; border: 1px solid #fecaca; border-radius: 10px;
  padding: 8px 14px; }
.dark .error { background: #450a0a; color: #fecaca; border-color: #7f1d1d; }
#follow { padding: 4px 0; background: none; border: 0; box-shadow: none; flex: 0 0 auto;
  min-width: 0 !important; white-space: nowrap; }
#follow input { border: 1px solid var(--body-text-color-subdued); }
.tools { align-items: center; flex-wrap: nowrap !important; gap: 8px; }
.tools > :not(button) { flex: 0 0 auto !important; width: auto; min-width: 0 !important;
  border: 0; background: none; }
.tools button { flex: 1 1 0 !important; min-width: 0 !important; padding: 5px 4px;
  white-space: nowrap; }
.ask { align-items: stretch; gap: 8px; }
.ask > :not(button) { flex: 1 1 0 !important; }
.ask button { flex: 0 0 auto !important; padding: 8px 16px; }
.ask button { font-size: 15px; white-space: nowrap; min-width: 0 !important; }
.shaded { line-height: 2.1; font-size: 17px; margin: 8px 0 14px; }
.tok { position: relative; border-radius: 4px; padding: 2px 1px; margin-right: 1px; cursor: help; }
.tok b { white-space: nowrap; font-size: 12px; font-weight: 500; padding: 0 4px; }
.tok:hover, .tok:focus { outline: 2px solid var(--color-accent); z-index: 3; }
.tip { display: none; position: absolute; left: 0; top: calc(100% + 3px); z-index: 9;
  width: 230px; background: var(--block-background-fill); padding: 8px 12px; font-size: 14px;
  border: 1px solid var(--border-color-primary); border-radius: 10px; line-height: 1.6;
  box-shadow: 0 6px 24px rgba(0,0,0,.18); white-space: nowrap; }
.tok:hover .tip, .tok:focus .tip { display: block; }
.tok:focus:has(~ .tok:hover) .tip, .tok:hover ~ .tok:focus .tip { display: none; }
.alt { display: grid; grid-template-columns: 80px 1fr 52px; gap: 6px; align-items: center; }
.alt.it { font-weight: 600; color: var(--color-accent); }
.alt i, .alt em { font-style: normal; overflow: hidden; text-overflow: ellipsis; }
.alt em { text-align: right; font-variant-numeric: tabular-nums; }
.alt u { height: 6px; border-radius: 3px; background: var(--border-color-primary); }
.alt s { display: block; height: 100%; border-radius: 3px; background: var(--color-accent); }
.legend { font-size: 12px; color: var(--body-text-color-subdued); display: flex; gap: 4px;
  flex-wrap: wrap; align-items: center; }
.legend span { padding: 1px 8px; border-radius: 4px; color: var(--body-text-color); }
#report h3 { margin: 14px 0 6px; font-size: 16px; font-weight: 600; }
#report table { border-collapse: collapse; font-size: 14px; width: 100%; }
#report th, #report td { border-bottom: 1px solid var(--border-color-primary); text-align: left;
  padding: 5px 10px 5px 2px; font-weight: 400; overflow-wrap: anywhere; }
#report td { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
#report .course th { text-align: right; color: var(--body-text-color-subdued); font-size: 12px; }
.pictures { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.pictures figure { margin: 0; min-width: 0; }
.pictures img { width: 100%; border-radius: 8px; background: #fff; }
.pictures figcaption { font-size: 13px; color: var(--body-text-color-subdued); }
@media (max-width: 1000px) {  /* beside its token it would stand out of the window */
  .tip { position: fixed; left: 10px; right: 10px; bottom: 10px; top: auto; width: auto; }
}
@media (max-width: 640px) {
  .gradio-container { padding: 8px !important; }
  #title .about { display: none; }
  .ask { flex-wrap: nowrap !important; }
  .ask > :not(button) { min-width: 0 !important; }
  .ask button { padding: 8px 10px; font-size: 14px; }
  #log { padding: 10px; height: max(240px, calc(100vh - 385px)); }
  .tab-container button { padding: 0 7px !important; font-size: 13px !important; }
  .facts { font-size: 12px; gap: 1px 10px; }
  .pair input { font-size: 13px !important; padding-right: 0 !important; }
}
"""
