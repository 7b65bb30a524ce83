"""What a value in other people's files means: a text, or a conversation {"role", "content"}.

    "..."   {"text"}                                         a text
    {"question", "answer"}   and others in PAIRS             one question, one answer
    {"instruction", "input", "output", "history", "system"}  the same, with what it refers to;
                                                             `context` is the same as `input`
    {"question", "A", "B", "C", "D", "answer"}               the options follow the question
    {"conversations": [{"role", "content"} or {"from", "value"}]}; without roles they alternate
    {"prompt", "chosen", "rejected"}                         the chosen answer; texts or messages.
    {"conversations", "chosen", "rejected"}                  `preference` reads both answers
    {"instruction", "output": [best, ..., worst]}
    {"prompt", "completion", "label": false}                 a bad answer, never trained
    {"translation": {"en", "zh"}}                            English asks, Chinese answers

`messages` is another name of `conversations`; case makes no difference. If fields have other names,
`parse_fields` reads which plays which part. A question and its answer count before a `text`. What
else a text needs to be understood (BESIDE) makes a record bad. Files are read by readers.py.

Tools are a list at the record or at a turn, calls are "tool_calls" of an answer or a turn from
"function_call", and their results are turns of the role "tool" behind them. Lists and arguments may
be JSON text. `conversation` says what a message then holds.

A message is a text, a number, true or false, or {"type": "text"} parts, a line each. Two questions
in a row are both asked. Two answers in a row are bad: which one is meant? An answer before the
first question is read but not trained, and so is one with "loss": false or "weight": 0. A last
question without an answer is dropped.

Texts are cleaned: CRLF, CR and the other characters that end a line (form feed, U+2028, ...) become
LF, and so do two U+3000 inside a line, or 32 blanks behind a character that is not ASCII, where
paragraphs were joined. Indents made with U+3000 and blanks at line ends go, and of several empty
lines one stays. Indents of ordinary blanks stay, as does one U+3000 inside a line. Messages lose
only the blanks around them. `tidied` removes from both what no one can see, and tells what may be a
fault of the file.
"""

import ast
import bisect
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable

from configurator import UserError, is_text, nearest, printable
from miniglm.chat import plain

Record = str | list[dict]
Preference = tuple[list[dict], str | None, str | None]  # prompt, chosen and rejected answer

# (question, answer) as others name them; the first that a record has both of counts
PAIRS = (
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "chosen"),
    ("query", "response"),
    ("input", "target"),
    ("input", "output"),
    ("q", "a"),
    ("en", "zh"),
    ("source", "target"),
    ("1", "2"),  # the columns of a table without a header
)
TURNS = ("conversations", "conversation", "messages")
ROLES = {"user": "user", "human": "user", "prompter": "user", "question": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model", "answer"), "assistant")
ROLES |= dict.fromkeys(("tool", "function", "observation", "ipython"), "tool")
ROLES |= {"system": "system", "function_call": "assistant"}
NAMES = {"user": "question", "assistant": "answer", "system": "system message", "tool": "result"}
FIELDS = ("text", "question", "input", "answer", "system", "history", "conversations")
OPTIONS = "abcdefgh"  # of a question
MARKS = {"label", "kto_tag", "is_correct", "is_bad"}  # of an answer: whether it is good, or bad
TRUTH = {"true": True, "1": True, "false": False, "0": False}
BESIDE = {"choices", "options", "functions", "tool_calls", "function_call"}
BESIDE |= {"image", "images", "video", "videos", "audio", "audios"}
OTHER_OPTIONS = re.compile(r"(?:opt?|option|choice|选项)[ _-]?[a-h0-9]")
EMPTY = (None, False, "", [], {}, "[]", "{}")  # a table has lists as text
WEIGHTS = {"loss", "weight", "train", "training"}  # of an answer; 0 or false: it is not trained
KNOWN_FIELDS = {*itertools.chain(*PAIRS), *TURNS, *FIELDS, *MARKS, "rejected", "context", *OPTIONS}

GAP = " " * 32  # behind ASCII these part the columns of a table, or code and its comment
PARAGRAPH_END = re.compile(rf"(?:\u3000\u3000|(?<![\0-\x7f]){GAP})[ \t\u3000]*")
CONTROLS = r"\1-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"
PRIVATE = r"\ue000-\uf8ff\U000f0000-\U0010ffff"
UNUSUAL = re.compile(rf"[{CONTROLS}{PRIVATE}\u200b\u2060\ufeff\ufffd锟烫&<]")  # begins any of ODD
ODD = {  # U+200C and U+200D are not: they join letters and emoji
    "control characters, removed": re.compile(
        rf"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\a\x1b]*(?:\a|\x1b\\)|[{CONTROLS}]"
    ),
    "zero-width characters, removed": re.compile(r"[\u200b\u2060\ufeff]"),
    "U+FFFD or 锟斤拷, kept": re.compile("\ufffd|锟斤拷|烫烫烫"),
    "private-use characters, kept": re.compile(f"[{PRIVATE}]"),
    "HTML, kept": re.compile(
        r"(?i)&(?:[a-z]{2,6}|#\d+|#x[\da-f]+);"
        r"|</?(?:br|p|div|span|font|img|t[dr]|table|li|ul|h[1-6])\b[^<>]*>"
    ),
}


class BadRecord(Exception):
    """reason: what is counted; detail: what is shown of it besides; is_good: it is only not wanted,
    and counts as no fault of the file."""

    def __init__(self, reason: str, detail: object = "", is_good: bool = False):
        detail = printable(" ".join(str(detail).encode(errors="replace").decode().split()))[:80]
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.is_good = reason, is_good


def parse_fields(text: str) -> dict[str, str]:
    """question=A,answer=B -> {"question": "A", "answer": "B"}: which field plays which part."""
    fields = {}
    for part in filter(None, text.split(",")):
        role, equals, name = part.partition("=")
        if role not in FIELDS or not equals or not name:
            hint = nearest(role, FIELDS) or f"; write PART=NAME; parts are {', '.join(FIELDS)}"
            raise UserError(f"fields={text!r}: {part!r} is not understood{hint}")
        fields[role] = name
    whole = {"text", "conversations"} & {*fields} or {"question", "answer"} <= {*fields}
    if fields and not whole:
        raise UserError(f"fields={text!r} must name text, conversations, or question and answer")
    return fields


def interpret(
    value: object, fields: dict[str, str], want: type | None = None, aside: Counter | None = None
) -> Record:
    """The text or the conversation that a value means. want: str or list, the one that is wanted.
    aside: counts what of a good conversation is not taken, by reason.

    Raises BadRecord if it means neither, or the other."""
    record = _text(value) if isinstance(value, str) else _record(fields_of(value), fields)
    if want and not isinstance(record, want):
        raise BadRecord("no conversation" if want is list else "no text")
    return conversation(record, aside) if isinstance(record, list) else record


def fields_of(value: object) -> dict:
    """An object's fields, their names in lower case. Raises BadRecord if it is no object."""
    if not isinstance(value, dict):
        raise BadRecord("wrong type", f"{type(value).__name__}, not an object")
    fields = {str(name).strip().lower(): content for name, content in value.items()}
    if len(fields) < len(value):
        raise BadRecord("two fields of one name", ", ".join(map(str, value)))
    return fields


def _record(whole: dict, fields: dict[str, str]) -> Record:
    """The text, or the messages as they are. Raises BadRecord if the answer is marked as bad, or is
    not to be trained."""
    record = _ranked(whole)
    if isinstance(record.get("translation"), dict):
        record = fields_of(record["translation"])
    if fields:
        record = _renamed(record, fields)
    messages = _any_messages(record)
    if messages is None:
        if "text" in record:
            return _text(record["text"])
        raise BadRecord("missing field", f"it has {', '.join(record) or 'none'}")
    is_class = str(whole.get("label")) in ("0", "1") and "completion" not in whole
    if mark_of(whole) is False and not is_class:
        raise BadRecord("one-sided", "the answer is marked as bad", is_good=True)
    if 0 in [whole[name] for name in WEIGHTS.intersection(whole)]:
        raise BadRecord("untrained", is_good=True)
    _refuse_beside(record)
    return messages


def _any_messages(record: dict) -> list[dict] | None:
    """The messages of a record, None if it has none."""
    turns, chosen = _turns(record), record.get("chosen")
    messages = None if turns is None else _history(record.get("history")) + _messages(turns)
    is_open = messages and messages[-1]["role"] != "assistant"
    if (is_open and chosen) or (messages is None and isinstance(chosen, list | dict)):
        messages = _side(record, "chosen")
    for question, answer in PAIRS if messages is None else ():
        if question in record and answer in record:
            messages = _question_and_answer(record, question, answer)
            break
    return messages and _with_head(record, messages)


def _turns(record: dict) -> object:
    return next((record[name] for name in TURNS if name in record), None)


def _refuse_beside(fields: dict) -> None:
    """Raises BadRecord if a record or a turn has what a text alone does not say."""
    for name, value in fields.items():
        if (name in BESIDE or OTHER_OPTIONS.fullmatch(name)) and value not in EMPTY:
            raise BadRecord("more than text", name)


def mark_of(record: dict) -> bool | None:
    """Whether an answer is marked as good or, False, as bad; None if it has no mark."""
    for name in MARKS.intersection(record):
        if (mark := TRUTH.get(str(record[name]).strip().lower())) is not None:
            return mark != (name == "is_bad")
    return None


def _ranked(record: dict) -> dict:
    """{"output": [best, ..., worst]} with its first answer as the output and the chosen one."""
    answers = record.get("output")
    if isinstance(answers, list) and len(answers) > 1 and isinstance(answers[0], str):
        record = record | {"output": answers[0], "chosen": answers[0], "rejected": answers[-1]}
    return record


def _renamed(record: dict, fields: dict[str, str]) -> dict:
    """The fields that --fields= names, under the names of their parts."""
    for name in fields.values():
        if name.lower() not in record:
            raise BadRecord("missing field", name)
    return {part: record[name.lower()] for part, name in fields.items()}


def _text(value: object) -> str:
    text = clean(_string(value, "text"))
    if not text.strip():
        raise BadRecord("empty text")
    return text


def _content(value: object, what: str) -> str:
    """A message's text without the blanks around it: a string, the parts of one, or a number or
    truth value as JSON has it."""
    if isinstance(value, (bool, int, float)) and abs(value) < math.inf:
        return json.dumps(value)
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        if any(part.get("text") is None for part in value):
            raise BadRecord("more than text", f"the parts of the {what}")
        value = "\n".join(_string(part["text"], what) for part in value)
    return _string(value, what).replace("\r\n", "\n").replace("\r", "\n").strip()


def _string(value: object, what: str) -> str:
    """A value that must be text, all of it valid characters; None counts as empty."""
    if value is not None and not isinstance(value, str):
        raise BadRecord("wrong type", f"{what} is {type(value).__name__}, not text")
    if value and not is_whole(value):
        raise BadRecord("damaged characters", f"in the {what}")
    return value or ""


def _question_and_answer(record: dict, question: str, answer: str) -> list[dict]:
    """One pair, what it refers to, its options, and the turns before it."""
    messages = _history(record.get("history"))
    if isinstance(record[question], list):
        messages += _messages(record[question])
    else:
        has_more = question in ("instruction", "question")
        names = (question, "input", "context") if has_more else (question,)
        texts = [_content(record[name], "question") for name in names if name in record]
        if question != "q" and "a" in record and "b" in record:
            options = {name: _content(record.get(name), "option") for name in OPTIONS}
            texts += [f"{name.upper()}. {text}" for name, text in options.items() if text]
        messages.append({"role": "user", "content": "\n".join(filter(None, texts))})
    return [*messages, {"role": "assistant", "content": record[answer]}]


def _with_head(record: dict, messages: list[dict]) -> list[dict]:
    """The messages behind the record's system message, unless they have one of their own, and with
    its tools."""
    system = _string(record.get("system"), "system message").strip()
    if system and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": system}, *messages]
    tools = record.get("tools")
    return messages if tools in EMPTY else [messages[0] | {"tools": tools}, *messages[1:]]


def _history(value: object) -> list[dict]:
    """Earlier turns [[question, answer], ...]."""
    value = _parsed(value, ast.literal_eval, "history") or []
    if not isinstance(value, list) or not all(isinstance(t, list) and len(t) == 2 for t in value):
        raise BadRecord("wrong type", "history is no list of pairs")
    roles = ("user", "assistant")
    return [{"role": r, "content": c} for turn in value for r, c in zip(roles, turn, strict=True)]


def _parsed(value: object, parse: Callable[[str], object], name: str) -> object:
    """A list or an object, which a table has as text."""
    try:
        return parse(value or "[]") if isinstance(value, str) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadRecord("wrong type", f"{name}: {error}") from None


def tool_calls(value: object) -> list[dict]:
    """Calls {"type": "function", "function": {"name", "arguments": an object}} from these or bare
    ones; all of it, or the arguments, may be JSON text. Raises BadRecord if they are none."""
    calls = []
    for call in _objects(value, "tool_calls"):
        call = call.get("function", call)
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str):
            raise BadRecord("wrong type", "a call has no name of a function")
        arguments = _objects([_parsed(call.get("arguments"), json.loads, "arguments") or {}], name)
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments[0]}})
    return calls


def _objects(value: object, name: str) -> list[dict]:
    """A list of objects, which may be JSON text."""
    if value in EMPTY:
        return []
    value = _parsed(value, json.loads, name)
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise BadRecord("wrong type", f"{name}: not a list of objects")
    _string(json.dumps(value, ensure_ascii=False), name)
    return value


def preference(value: object) -> Preference:
    """The prompt's messages, the chosen and the rejected answer that a value means. If it marks one
    answer only, as the chat page's marks and `label` do, the other is None."""
    record = _ranked(fields_of(value))
    mark, names = mark_of(record), ("chosen", "rejected")
    if mark is None or any(record.get(name) for name in names):
        sides = [_side(record, name) for name in names]
    else:
        sides = [_any_messages(record) if mark == is_good else None for is_good in (True, False)]
    sides = [messages and conversation(_with_head(record, messages)) for messages in sides]
    prompts = [messages[:-1] for messages in sides if messages]
    if not prompts:
        raise BadRecord("missing field", "neither chosen nor rejected")
    if prompts[0] != prompts[-1]:
        raise BadRecord("two prompts", prompts[-1][-1]["content"])
    chosen, rejected = (messages and plain(messages[-1:])[0]["content"] for messages in sides)
    return prompts[0], chosen, rejected


def _side(record: dict, name: str) -> list[dict] | None:
    """The messages that end with this answer, `chosen` or `rejected`: behind the prompt unless they
    repeat it."""
    answer = record.get(name)
    if answer is None:
        return None
    if not isinstance(answer, list | dict):
        for question in ("prompt", "question", "instruction"):
            if question in record:
                return _question_and_answer(record, question, name)
        answer = {"role": "assistant", "content": answer}
    answers = _messages(answer if isinstance(answer, list) else [answer])
    if any(message["role"] == "user" for message in answers):
        return answers
    prompt = record.get("prompt")
    if prompt and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return _messages(prompt or _turns(record) or []) + answers


def _messages(value: object) -> list[dict]:
    """Turns {"role", "content"} or {"from", "value"} as messages; without roles they alternate."""
    value = _parsed(value, json.loads, "turns")
    if not isinstance(value, list):
        raise BadRecord("wrong type", "turns are no list of objects")
    messages = []
    for number, turn in enumerate(map(fields_of, value)):
        name = turn.get("role", turn.get("from", ("user", "assistant")[number % 2]))
        if not isinstance(name, str) or name.lower() not in ROLES:
            raise BadRecord("unknown role", name)
        role, content = ROLES[name.lower()], turn.get("content", turn.get("value"))
        calls = turn.pop("tool_calls", None) if role == "assistant" else None
        if name.lower() == "function_call":
            content, calls = None, [_parsed(content, json.loads, name)]
        elif "content" not in turn and "value" not in turn and calls in EMPTY:
            raise BadRecord("missing field", "a turn has no content")
        _refuse_beside(turn)
        message = {"role": role, "content": content, "tools": turn.get("tools")}
        message |= {"tool_calls": calls, "reasoning_content": turn.get("reasoning_content")}
        messages.append(message | {"train": _is_trained(turn)})
    return messages


def _is_trained(turn: dict) -> bool:
    """Whether an answer is to be trained, by its weight."""
    weights = [turn[name] for name in WEIGHTS.intersection(turn) if turn[name] is not None]
    if any(weight not in (0, 1) for weight in weights):
        raise BadRecord("unknown weight", weights)
    return 0 not in weights


def conversation(messages: list[dict], aside: Counter | None = None) -> list[dict]:
    """The messages with their texts, up to the last answer that is trained: {"role", "content"}; of
    an answer also "reasoning_content" and "tool_calls", if it has them, and "train": False if it is
    only read; "tools" stands in the first. Raises BadRecord if there is no question and answer."""
    kept = []
    for message in messages:
        turn, is_asked = _turn(message), any(turn["role"] == "user" for turn in kept)
        if turn["role"] == "assistant" and not (is_asked and message.get("train", True)):
            turn["train"] = False
        if turn["content"] or turn["role"] != "system":
            _check_order(kept, turn)
            kept.append(turn)
    roles = [turn["role"] for turn in kept]
    while kept and (kept[-1]["role"] != "assistant" or "train" in kept[-1]):
        kept.pop()
    if roles[: len(kept)][-2:] not in (["user", "assistant"], ["tool", "assistant"]):
        raise BadRecord("no answer" if "user" in roles else "no question")
    behind = roles[len(kept) :]
    if aside is not None and behind:
        is_answered = "assistant" in behind
        aside["untrained last answer" if is_answered else "unanswered last question"] += 1
    for message in messages:
        if tools := _objects(message.get("tools"), "tools"):
            kept[0]["tools"] = tools
    return kept


def _turn(message: dict) -> dict:
    """A message with its texts, an answer also with its reasoning and its calls."""
    turn = {
        "role": message["role"],
        "content": _content(message["content"], NAMES[message["role"]]),
    }
    if turn["role"] == "assistant":
        if reasoning := _content(message.get("reasoning_content"), "reasoning"):
            turn["reasoning_content"] = reasoning
        if calls := tool_calls(message.get("tool_calls")):
            turn["tool_calls"] = calls
    return turn


def _check_order(before: list[dict], turn: dict) -> None:
    """Raises BadRecord if a turn is empty, or cannot come behind those before it."""
    role, last = turn["role"], before[-1] if before else {"role": None}
    if role != "tool" and not (turn["content"] or "tool_calls" in turn):
        raise BadRecord(f"empty {NAMES[role]}")
    if role == "assistant" and last["role"] == "assistant":
        raise BadRecord("two answers in a row")
    if role == "tool" and not awaits_result(last):
        raise BadRecord("tool without a call")


def awaits_result(message: dict) -> bool:
    """Whether a tool's result can come behind this message."""
    return message["role"] == "tool" or "tool_calls" in message


# --- texts ---------------------------------------------------------------------------------------


def split_of(record: Record, val: float) -> str:
    """val or train, `val` being the share for validation, by the hash of a text, or of the first
    question of a conversation."""
    text = first_question(record) if isinstance(record, list) else record
    digest = hashlib.sha256(text.encode()).digest()
    return "val" if int.from_bytes(digest[:8]) < val * 2**64 else "train"


def first_question(messages: list[dict]) -> str:
    return next(turn["content"] for turn in messages if turn["role"] == "user")


def shortened(messages: list[dict], fits: Callable[[list[dict]], bool]) -> list[dict]:
    """The messages if they fit or have no later question. Else without the oldest turns: from the
    first later question from which on they fit, or from the last if none does. A system message and
    the tools stay. fits: true of what is left of messages that fit."""
    system = [m for m in messages[:1] if m["role"] == "system"]
    tools = {name: messages[0][name] for name in ["tools"] if name in messages[0]}

    def since(place: int) -> list[dict]:
        first, *later = messages[place:]
        return [*system, first, *later] if system else [first | tools, *later]

    places = [n for n, m in enumerate(messages) if m["role"] == "user" and n > len(system)]
    if not places or fits(messages):
        return messages
    n = bisect.bisect_left(places, True, key=lambda place: fits(since(place)))
    return since(places[min(n, len(places) - 1)])


def text_of(record: Record) -> str:
    """All the text of a record."""
    return record if isinstance(record, str) else "\n".join(m["content"] for m in plain(record))


def clean(text: str) -> str:
    """A text as it is kept; the head of this file says how."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    for end in "\v\f\x85\u2028\u2029":
        text = text.replace(end, "\n")
    text = "\n".join(map(clean_line, text.split("\n")))
    if "\n\n\n" in text:  # seldom, and a search is quicker
        text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip("\n")


def clean_line(line: str) -> str:
    line = line.rstrip(" \t\u3000")
    body = line.lstrip(" \t\u3000")
    indent = line[: len(line) - len(body)]
    if "\u3000\u3000" in body or GAP in body:
        body = "\n".join(part.rstrip(" \t\u3000") for part in PARAGRAPH_END.split(body))
    return body if "\u3000" in indent else indent + body


def tidied(value: object, kinds: set[str]) -> object:
    """A value without the characters of ODD that are removed; adds the kinds of all that are in its
    texts."""
    if isinstance(value, dict):
        return {name: tidied(content, kinds) for name, content in value.items()}
    if isinstance(value, list):
        return [tidied(item, kinds) for item in value]
    if isinstance(value, str) and UNUSUAL.search(value):
        for kind, pattern in ODD.items():
            if pattern.search(value):
                kinds.add(kind)
                value = pattern.sub("", value) if kind.endswith("removed") else value
    return value


def is_whole(text: str) -> bool:
    """Whether a text is intact: no damaged byte, no half of a surrogate pair, no NUL."""
    return is_text(text) and "\0" not in text
