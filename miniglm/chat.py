"""The chat formats: ours, and the own one of a base model. Token ids are tokenizer.py's.

Ours is

    <|user|>孔明是谁？<|end|><|assistant|>孔明是诸葛亮的字。<|end|>

and has three roles: reasoning, tools, their calls and results are text between tags, see `plain`.

A base that has learnt another format brings it as a Jinja template, rendered here as transformers
renders it. Each turn must open with a special token, the role and one fixed text, and close with
a special token, as in ChatML (Qwen, MiniMind, SmolLM2) and Llama 3:

    <|im_start|>assistant\\n ... <|im_end|>
    <|start_header_id|>assistant<|end_header_id|>\\n\\n ... <|eot_id|>

A message is {"role": system, user, assistant or tool, "content"}, with "reasoning_content" and
"tool_calls" of an assistant; "tools" stands in the first. Names of special tokens inside a message
are plain text: HIDDEN keeps them from being found, and is taken away afterwards.
"""

import functools
import json
import re
from collections.abc import Collection
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from configurator import UserError

END_OF_TEXT = "<|endoftext|>"  # ends a document
END = "<|end|>"  # ends a message
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = [END_OF_TEXT, *ROLES.values(), END]
HIDDEN = "\ue000"  # a private character that no text has
QUESTION, ANSWER = "\ue001", "\ue002"  # stand for messages where a template is looked at
NO_REASONING = "<think>\n\n</think>\n\n"  # what templates write for it
CALL = "<tool_call>\n{}\n</tool_call>"
RESULT = "<tool_response>\n{}\n</tool_response>"
FAULTS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError)
GENERATION = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")  # tags of templates for training


class ChatTemplate:
    """A base's own format. source: Jinja; names: its bos_token and eos_token; control: the names of
    its special tokens. Raises ValueError if it cannot be used.

    start, tail: the texts around a role; end: the name of the token that closes a turn.
    """

    def __init__(self, source: str, names: dict[str, str], control: Collection[str]):
        self.names = names
        longest_first = sorted(control or "\0", key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)))
        try:
            # its tags are transformers' own; here the ids tell what is trained
            self.template = environment().from_string(
                GENERATION.sub(lambda m: f"{m[1]}{'endif' if m[2] else 'if true'}{m[3]}", source)
            )
            texts = {"user": QUESTION, "assistant": ANSWER}
            turns = [{"role": role, "content": text} for role, text in texts.items()]
            asked, prompt = self.text(turns[:1]), self.text(turns[:1], asks=True)
            answered = self.text(turns)
        except (jinja2.TemplateError, UserError) as error:
            raise ValueError(f"its chat template cannot be rendered ({error})") from None
        opening, role, tail = prompt.removeprefix(asked).partition("assistant")
        closing = self.control.search(answered.partition(ANSWER)[2])
        self.start, self.tail = opening, tail.partition("<think>")[0]
        if not (role and self.control.fullmatch(opening) and self.tail and closing):
            raise ValueError(
                "the turns of its chat template do not have the form of ChatML or Llama 3; delete "
                "it to have this project's own format"
            )
        self.end = closing[0]

    def text(self, messages: list[dict], asks: bool = False) -> str:
        """What the template makes of messages; asks: and of the request for an answer, one without
        reasoning. Raises UserError if it refuses them."""
        options = {"add_generation_prompt": asks, "enable_thinking": False} | self.names
        try:
            tools = self._hide(messages[0].get("tools") or None)
            return self.template.render(messages=self._hide(messages), tools=tools, **options)
        except FAULTS as error:
            shown, why = str(messages[-1]["content"])[:20], " ".join(str(error).split())
            raise UserError(f"the chat template refuses {shown!r}... ({why})") from None

    def _hide(self, value: object) -> object:
        """With HIDDEN inside each name of a special token."""
        if isinstance(value, dict):
            return {key: self._hide(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self._hide(part) for part in value]
        return self.control.sub(lambda m: hidden(m[0]), value) if isinstance(value, str) else value


@functools.cache
def environment() -> ImmutableSandboxedEnvironment:
    """As transformers has it, but for strftime_now: rows would depend on the day."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = _raise
    return made


def to_json(value: object, **options) -> str:
    return json.dumps(value, **{"ensure_ascii": False} | options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def hidden(name: str) -> str:
    """The name of a special token, as no text contains it."""
    return name[0] + HIDDEN + name[1:]


def read_template(folder: Path) -> dict[str, str]:
    """The chat template of a Hugging Face directory as "template", its bos_token and eos_token;
    empty if there is none. Raises ValueError if a file is damaged."""
    file, apart = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{file.name} beside it holds no object")
    template = config.get("chat_template")
    if apart.is_file():
        template = apart.read_text(encoding="utf-8")
    if isinstance(template, list):  # several, by name
        named = {part.get("name"): part for part in template if isinstance(part, dict)}
        template = named.get("default", {}).get("template")
    if template and not isinstance(template, str):
        raise ValueError(f"the chat_template in {file.name} is no text")
    names = {key: config.get(key) for key in ("bos_token", "eos_token")}
    names = {key: v.get("content") if isinstance(v, dict) else v for key, v in names.items()}
    names = {key: v for key, v in names.items() if isinstance(v, str)}
    return names | {"template": template} if template else {}


# --- ours --------------------------------------------------------------------------------------


def plain(messages: list[dict]) -> list[dict]:
    """Messages in our three roles, all they hold in "content": tags as Qwen writes them."""
    turns = []
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if reasoning := message.get("reasoning_content"):
            content = f"<think>\n{reasoning}\n</think>\n\n{content}"
        calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
        calls = [{key: call.get(key) for key in ("name", "arguments")} for call in calls]
        content = "\n".join(filter(None, [content, *(CALL.format(to_json(c)) for c in calls)]))
        if role == "tool":
            role, content = "user", RESULT.format(content)
            if number and messages[number - 1]["role"] == "tool":
                turns[-1]["content"] += f"\n{content}"
                continue
        if number == 0 and message.get("tools"):
            tools = "\n".join(["<tools>", *map(to_json, message["tools"]), "</tools>"])
            if role != "system":
                turns.append({"role": "system", "content": tools})
            else:
                content = f"{content}\n\n{tools}" if content else tools
        turns.append(message | {"role": role, "content": content})
    return turns


def chat_template(names: dict[str, str], end: str, content: str) -> str:
    """A Jinja template that writes what tokenizer.py's `render` writes. names, end: how roles and
    the end of a message are written; content: an expression for a message's."""
    return (
        template_start(names) + "{% for message in messages %}"
        "{% if message['role'] not in names %}{{ raise_exception('unknown role') }}{% endif %}"
        "{{ names[message['role']] + " + content + " + '" + end + "' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + names["assistant"] + "' }}{% endif %}"
    )


def template_start(names: dict[str, str]) -> str:
    """How our templates begin, and no other project's."""
    written = ", ".join(f"'{role}': '{token}'" for role, token in names.items())
    return "{% set names = {" + written + "} %}"


def is_ours(template: str) -> bool:
    return template.startswith(template_start(ROLES))


def hiding_template(added: Collection[str]) -> str:
    """The template that sets HIDDEN behind each character that a token in `added` begins with, so
    that none is found inside a message. Raises UserError if a name has no room for it."""
    content = "message['content']"
    for first in sorted({name[:1] for name in added}):
        if first in added:
            raise UserError(
                f"the added token {first!r} is a single character: transformers takes it for the "
                "token in a message, too; export a GGUF file, --format=gguf"
            )
        old, new = (json.dumps(text, ensure_ascii=False) for text in (first, first + HIDDEN))
        content += f" | replace({old}, {new})"
    return chat_template(ROLES, END, content)
