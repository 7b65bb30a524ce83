"""What a value of other people's files means: a text, or a conversation {"role", "content"}.

    "..."   {"text"}                                         a text
    {"question", "answer"}   and others in PAIRS             one question, one answer
    {"instruction", "input", "output", "history", "system"}  the same with what it refers to
    {"conversations": [{"role", "content"} or {"from", "value"} or without a role: they alternate]}
    {"prompt", "chosen", "rejected"}                         the chosen answer; texts or messages.
                                                             `preference` reads both of them
    {"translation": {"en", "zh"}}                            English is asked, Chinese answers

`messages` is another name of `conversations`; capitals make no difference. Where fields have other
names, `parse_fields` reads which plays which part. Files are readers.py's.

What is kept of a text: the line ends CRLF and CR become LF, indents made with U+3000 and blanks at
line ends go, and at most one of several empty lines stays. Indents of ordinary blanks stay, as
does U+3000 inside a line. Of a message only the blanks around it go.
"""

import ast
import hashlib
import itertools
import json
import re

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
    """reason: what is counted; detail: what else the person at the keyboard sees of it."""

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
            hint = nearest(role, FIELDS) or f"; write PART=NAME, a part is {', '.join(FIELDS)}"
            raise UserError(f"fields={text!r}: {part!r} is not understood{hint}")
        fields[role] = name
    whole = {"text", "conversations"} & {*fields} or {"question", "answer"} <= {*fields}
    if fields and not whole:
        raise UserError(f"fields={text!r} must name text, conversations, or question and answer")
    return fields


def interpret(value: object, fields: dict[str, str]) -> Record:
    """The text or the conversation that a value means. BadRecord where it means none."""
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, dict):
        raise BadRecord("wrong type", f"{type(value).__name__}, not an object")
    if isinstance(value.get("translation"), dict):
        value = value["translation"]
    record = {str(key).strip().lower(): part for key, part in value.items()}
    if fields:
        record = _chosen(record, fields)
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


def _chosen(record: dict, fields: dict[str, str]) -> dict:
    """The record with the fields that --fields= names, under the names of their parts."""
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
    """A text without the blanks around it, that is characters only; None counts as empty."""
    if value is not None and not isinstance(value, str):
        raise BadRecord("wrong type", f"{what} is {type(value).__name__}, not text")
    if value and not is_whole(value):
        raise BadRecord("damaged characters", f"in the {what}")
    return value or ""


def _question_and_answer(record: dict, question: str, answer: str) -> list[dict]:
    """One pair, what it refers to (`input`), the turns before it, and a system message."""
    asked = [record[question]]
    if "input" in record and question in ("instruction", "question"):
        asked.append(record["input"])
    messages = _history(record.get("history"))
    if isinstance(record[question], list):
        messages += _messages(record[question])
    else:
        parts = [_string(part, "question").strip() for part in asked]
        messages.append({"role": "user", "content": "\n".join(filter(None, parts))})
    messages.append({"role": "assistant", "content": record[answer]})
    return conversation(_with_system(record, messages))


def _with_system(record: dict, messages: list[dict]) -> list[dict]:
    """The messages behind the record's system message, unless they have one of their own."""
    system = _string(record.get("system"), "system message").strip()
    if not system or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _history(value: object) -> list[dict]:
    """Earlier turns [[question, answer], ...]; in a table they are written as text."""
    if isinstance(value, str) and value.strip():
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise BadRecord("wrong type", f"history: {error}") from None
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(t, list) and len(t) == 2 for t in value):
        raise BadRecord("wrong type", "history is no list of pairs")
    return [
        {"role": role, "content": text}
        for turn in value
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def preference(value: object) -> Preference:
    """The prompt's messages, the chosen and the rejected answer that a value means. One of them is
    None where it marks one answer only, as the chat page's marks do."""
    if not isinstance(value, dict):
        raise BadRecord("wrong type", f"{type(value).__name__}, not an object")
    record = {str(key).strip().lower(): part for key, part in value.items()}
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
    """The messages of the better answer, behind the prompt where they do not repeat it."""
    chosen = _messages(record["chosen"])
    prompt = record.get("prompt")
    if not prompt or any(message["role"] == "user" for message in chosen):
        return chosen
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}, *chosen]
    return _messages(prompt) + chosen


def _messages(value: object) -> list[dict]:
    """Turns {"role", "content"} or {"from", "value"} as messages; without roles they alternate."""
    if isinstance(value, str):  # as a table has it
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRecord("wrong type", f"turns: {error}") from None
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise BadRecord("wrong type", "turns are no list of objects")
    messages = []
    for number, turn in enumerate(value):
        name = turn.get("role", turn.get("from", ("user", "assistant")[number % 2]))
        if not isinstance(name, str) or name.lower() not in ROLES:
            raise BadRecord("unknown role", name)
        if "content" not in turn and "value" not in turn:
            raise BadRecord("missing field", "a turn has no content")
        content = turn["content"] if "content" in turn else turn["value"]
        messages.append({"role": ROLES[name.lower()], "content": content})
    return messages


def conversation(messages: list[dict]) -> list[dict]:
    """The messages with their texts, if they are a question and an answer at least."""
    what = {"user": "question", "assistant": "answer", "system": "system message"}
    found = []
    for message in messages:
        role = message["role"]
        text = _string(message["content"], what[role])
        text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
        if not text and role == "system":
            continue
        if not text:
            raise BadRecord(f"empty {what[role]}")
        found.append({"role": role, "content": text})
    turns = [message["role"] for message in found]
    if turns[:1] == ["system"]:
        turns = turns[1:]
    if turns[:1] != ["user"]:
        raise BadRecord("no question")
    if turns[-2:] != ["user", "assistant"]:
        raise BadRecord("no answer")
    return found


# --- texts ---------------------------------------------------------------------------------------


def is_validation(record: Record, share: float) -> bool:
    """Whether a text's hash, or that of a conversation's first question, is in the share."""
    if isinstance(record, list):
        record = next(turn["content"] for turn in record if turn["role"] == "user")
    digest = hashlib.sha256(record.encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def text_of(record: Record) -> str:
    """All the text of a record."""
    return record if isinstance(record, str) else "\n".join(turn["content"] for turn in record)


def clean(text: str) -> str:
    """A text as it is kept: see the head of this file."""
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
    """Whether a text is characters only: no damaged byte, no half of a surrogate pair, no NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
