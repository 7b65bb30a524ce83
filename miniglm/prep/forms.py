"""What a value in other people's files means: a text, or a conversation {"role", "content"}.

    "..."   {"text"}                                         a text
    {"question", "answer"}   and others in PAIRS             one question, one answer
    {"instruction", "input", "output", "history", "system"}  the same, with what it refers to
    {"conversations": [{"role", "content"} or {"from", "value"}]}; without roles they alternate
    {"prompt", "chosen", "rejected"}                         the chosen answer; texts or messages.
                                                             `preference` reads both answers
    {"translation": {"en", "zh"}}                            English asks, Chinese answers

`messages` is another name of `conversations`; case makes no difference. If fields have other names,
`parse_fields` reads which plays which part. Files are the business of readers.py.

Texts are cleaned: CRLF and CR become LF, indents made with U+3000 and blanks at line ends go, and
of several empty lines one stays. Indents of ordinary blanks stay, as does U+3000 inside a line.
Messages lose only the blanks around them.
"""

import ast
import hashlib
import itertools
import json
import re
from collections.abc import Callable

from configurator import UserError, nearest

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
ROLES |= {"system": "system"}
FIELDS = ("text", "question", "input", "answer", "system", "history", "conversations")
KNOWN_FIELDS = {*itertools.chain(*PAIRS), *TURNS, *FIELDS, "rejected"}


class BadRecord(Exception):
    """reason: what is counted; detail: what is shown of it besides."""

    def __init__(self, reason: str, detail: object = ""):
        detail = " ".join(str(detail).encode(errors="replace").decode().split())[:80]
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


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


def interpret(value: object, fields: dict[str, str], want: type | None = None) -> Record:
    """The text or the conversation that a value means. want: str or list, the one that is wanted.

    Raises BadRecord if it means neither, or the other."""
    record = _text(value) if isinstance(value, str) else _record(fields_of(value), fields)
    if want and not isinstance(record, want):
        raise BadRecord("no conversation" if want is list else "no text")
    return record


def fields_of(value: object) -> dict:
    """An object's fields, their names in lower case. Raises BadRecord if it is no object."""
    if not isinstance(value, dict):
        raise BadRecord("wrong type", f"{type(value).__name__}, not an object")
    return {str(name).strip().lower(): content for name, content in value.items()}


def _record(record: dict, fields: dict[str, str]) -> Record:
    if isinstance(record.get("translation"), dict):
        record = fields_of(record["translation"])
    if fields:
        record = _renamed(record, fields)
    for name in TURNS:
        if name in record:
            return conversation(_with_system(record, _messages(record[name])))
    if isinstance(record.get("chosen"), list):
        return conversation(_with_system(record, _preferred(record)))
    for question, answer in PAIRS:
        if question in record and answer in record:
            return _question_and_answer(record, question, answer)
    if "text" in record:
        return _text(record["text"])
    raise BadRecord("missing field", f"it has {', '.join(record) or 'none'}")


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


def _string(value: object, what: str) -> str:
    """A value that must be text, all of it valid characters; None counts as empty."""
    if value is not None and not isinstance(value, str):
        raise BadRecord("wrong type", f"{what} is {type(value).__name__}, not text")
    if value and not is_whole(value):
        raise BadRecord("damaged characters", f"in the {what}")
    return value or ""


def _question_and_answer(record: dict, question: str, answer: str) -> list[dict]:
    """One pair, what it refers to (`input`), the turns before it, and a system message."""
    messages = _history(record.get("history"))
    if isinstance(record[question], list):
        messages += _messages(record[question])
    else:
        names = [question, "input"] if question in ("instruction", "question") else [question]
        texts = [_string(record.get(name), "question").strip() for name in names]
        messages.append({"role": "user", "content": "\n".join(filter(None, texts))})
    messages.append({"role": "assistant", "content": record[answer]})
    return conversation(_with_system(record, messages))


def _with_system(record: dict, messages: list[dict]) -> list[dict]:
    """The messages behind the record's system message, unless they have one of their own."""
    system = _string(record.get("system"), "system message").strip()
    if not system or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _history(value: object) -> list[dict]:
    """Earlier turns [[question, answer], ...]."""
    value = _parsed(value, ast.literal_eval, "history") or []
    if not isinstance(value, list) or not all(isinstance(t, list) and len(t) == 2 for t in value):
        raise BadRecord("wrong type", "history is no list of pairs")
    roles = ("user", "assistant")
    return [{"role": r, "content": c} for turn in value for r, c in zip(roles, turn, strict=True)]


def _parsed(value: object, parse: Callable[[str], object], name: str) -> object:
    """A list, which a table has as text."""
    try:
        return parse(value or "[]") if isinstance(value, str) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadRecord("wrong type", f"{name}: {error}") from None


def preference(value: object) -> Preference:
    """The prompt's messages, the chosen and the rejected answer that a value means. If it marks one
    answer only, as the chat page's marks do, the other is None."""
    record = fields_of(value)
    sides = [_side(record, name) for name in ("chosen", "rejected")]
    prompts = [messages[:-1] for messages in sides if messages]
    if not prompts:
        raise BadRecord("missing field", "neither chosen nor rejected")
    if prompts[0] != prompts[-1]:
        raise BadRecord("two prompts", prompts[-1][-1]["content"])
    chosen, rejected = (messages and messages[-1]["content"] for messages in sides)
    return prompts[0], chosen, rejected


def _side(record: dict, name: str) -> list[dict] | None:
    """The conversation that ends with this answer: `chosen`, or `rejected`."""
    answer = record.get(name)
    if answer is None:
        return None
    if isinstance(answer, dict | list):
        messages = answer if isinstance(answer, list) else [answer]
        return conversation(_preferred(record | {"chosen": messages}))
    for question in ("prompt", "question", "instruction"):
        if question in record:
            return _question_and_answer(record, question, name)
    raise BadRecord("missing field", "no prompt")


def _preferred(record: dict) -> list[dict]:
    """The messages of the better answer, behind the prompt unless they repeat it."""
    chosen = _messages(record["chosen"])
    prompt = record.get("prompt")
    if not prompt or any(message["role"] == "user" for message in chosen):
        return chosen
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}, *chosen]
    return _messages(prompt) + chosen


def _messages(value: object) -> list[dict]:
    """Turns {"role", "content"} or {"from", "value"} as messages; without roles they alternate."""
    value = _parsed(value, json.loads, "turns")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise BadRecord("wrong type", "turns are no list of objects")
    messages = []
    for number, turn in enumerate(value):
        name = turn.get("role", turn.get("from", ("user", "assistant")[number % 2]))
        if not isinstance(name, str) or name.lower() not in ROLES:
            raise BadRecord("unknown role", name)
        if "content" not in turn and "value" not in turn:
            raise BadRecord("missing field", "a turn has no content")
        content = turn.get("content", turn.get("value"))
        messages.append({"role": ROLES[name.lower()], "content": content})
    return messages


def conversation(messages: list[dict]) -> list[dict]:
    """The messages with their texts. Raises BadRecord if they are not a question and an answer at
    least."""
    names = {"user": "question", "assistant": "answer", "system": "system message"}
    kept = []
    for message in messages:
        role = message["role"]
        text = _string(message["content"], names[role])
        text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
        if text:
            kept.append({"role": role, "content": text})
        elif role != "system":
            raise BadRecord(f"empty {names[role]}")
    roles = [message["role"] for message in kept]
    if "user" not in (roles[:1] if roles[:1] != ["system"] else roles[1:2]):
        raise BadRecord("no question")
    if roles[-2:] != ["user", "assistant"]:
        raise BadRecord("no answer")
    return kept


# --- texts ---------------------------------------------------------------------------------------


def is_validation(record: Record, share: float) -> bool:
    """Whether a text is in the share for validation, by its hash; a conversation, by that of its
    first question."""
    text = first_question(record) if isinstance(record, list) else record
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def split_of(record: Record, val: float) -> str:
    """val or train, `val` being the share for validation."""
    return "val" if is_validation(record, val) else "train"


def splits_of(val: float) -> tuple[str, ...]:
    """The splits of a dataset; without a share for validation there is only train."""
    return ("train", "val") if val else ("train",)


def first_question(messages: list[dict]) -> str:
    return next(turn["content"] for turn in messages if turn["role"] == "user")


def text_of(record: Record) -> str:
    """All the text of a record."""
    return record if isinstance(record, str) else "\n".join(turn["content"] for turn in record)


def clean(text: str) -> str:
    """A text as it is kept; the head of this file says how."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = "\n".join(map(clean_line, text.split("\n")))
    if "\n\n\n" in text:  # seldom, and a search is quicker
        text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip("\n")


def clean_line(line: str) -> str:
    line = line.rstrip(" \t\u3000")
    if line[:1] not in (" ", "\t", "\u3000"):
        return line
    body = line.lstrip(" \t\u3000")
    return body if "\u3000" in line[: len(line) - len(body)] else line


def is_whole(text: str) -> bool:
    """Whether a text is intact: no damaged byte, no half of a surrogate pair, no NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
