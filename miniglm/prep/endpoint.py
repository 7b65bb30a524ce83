"""A language model behind any OpenAI-compatible endpoint: many calls at once, whose answers are
appended to a file line by line, so that the same command goes on where it was stopped.

The key is in the environment, OPENAI_API_KEY. What is asked, and what an answer means, is left to
data/generate_qa.py and miniglm/prep/ranking.py.
"""

import asyncio
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from tqdm import tqdm

from configurator import UserError, show_path

HOPELESS = 5  # calls that fail one after another, after which it stops


@dataclass
class Settings:
    model: str = ""  # the model's name at the endpoint
    base_url: str = ""  # the endpoint, as http://127.0.0.1:7860/v1; empty: OPENAI_BASE_URL, OpenAI
    parallel: int = 8  # calls at once
    retries: int = 5  # of a call that the endpoint refuses or loses
    timeout: float = 120.0  # seconds of a try

    def __post_init__(self):
        if self.parallel < 1:
            raise UserError(f"parallel={self.parallel} must be 1 or more")
        if self.retries < 0:
            raise UserError(f"retries={self.retries} must be 0 or more")
        if self.timeout <= 0:
            raise UserError(f"timeout={self.timeout:g} must be above 0")


class Call(Protocol):
    @property
    def prompt(self) -> str: ...


C = TypeVar("C", bound=Call)


def short_hash(text: str) -> str:
    """16 digits that tell a call from others."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_client(config: Settings):
    """The client of the openai package, which tries again by itself: after 429, 5xx, lost
    connections and timeouts, longer each time, or as long as the endpoint asks."""
    try:
        import openai  # here, since nothing else needs it
    except ImportError:
        raise UserError("the openai package is missing; run python -m pip install openai") from None
    if not config.model:
        raise UserError("no model named; pass --model=, as the endpoint calls it")
    key = os.environ.get("OPENAI_API_KEY")
    elsewhere = config.base_url or os.environ.get("OPENAI_BASE_URL")
    if not key and not elsewhere:
        raise UserError("no key; set OPENAI_API_KEY, or name another endpoint by --base_url=")
    options = {"max_retries": config.retries, "timeout": config.timeout}
    return openai.AsyncOpenAI(api_key=key or "none", base_url=elsewhere or None, **options)


def ask_all(
    client,
    config: Settings,
    calls: Sequence[C],
    take: Callable[[C, str], str],
    counts: Counter,
    name: str,
    **options: object,
) -> None:
    """Asks `parallel` at a time, in order; take(call, text) gets each answer as it comes, and says
    what the bar shows. options: of the request, as temperature.

    counts["failed calls"]: those that fail after their retries, which are left for the next run.
    UserError where the endpoint refuses the request itself, or fails HOPELESS times in a row, or
    answers none."""
    try:
        asyncio.run(_ask_all(client, config, calls, take, counts, name, options))
    except* UserError as errors:
        raise errors.exceptions[0] from None
    if calls and counts["failed calls"] == len(calls):
        raise UserError("no call was answered; the reasons are above; the same command tries again")


async def _ask_all(client, config, calls, take, counts, name, options) -> None:
    import openai

    left, failed = iter(calls), 0

    async def work() -> None:
        nonlocal failed
        for call in left:
            messages = [{"role": "user", "content": call.prompt}]
            request = {"model": config.model, "messages": messages} | options
            try:
                answer = await client.chat.completions.create(**request)
                text = answer.choices[0].message.content or ""
            except (openai.APIError, AttributeError, IndexError, TypeError) as error:
                refused = getattr(error, "status_code", 0) in (400, 401, 403, 404, 405, 422)
                failed += 1
                counts["failed calls"] += 1
                if refused or failed >= HOPELESS:
                    raise UserError(f"{client.base_url}: {reason_of(error)}") from None
                bar.write(f"failed: {reason_of(error)}", file=sys.stdout)
            else:
                failed = 0
                bar.set_postfix_str(take(call, text))
            bar.update()

    with tqdm(total=len(calls), unit="call", desc=name) as bar:
        async with client, asyncio.TaskGroup() as group:
            for _ in range(min(config.parallel, len(calls))):
                group.create_task(work())


def reason_of(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{text} ({type(error).__name__})"


# --- files that are appended to ------------------------------------------------------------------


def append(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    except OSError as error:
        raise UserError(
            f"cannot write {show_path(path)}: {error.strerror}; make room, and run the same "
            "command, which goes on"
        ) from None


def whole_lines(path: Path, *names: str) -> list[dict]:
    """The lines of a file, if it is there, each with one of the names; one that a kill cut short is
    taken away."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    lines = []
    # no splitlines: JSON leaves U+2028 and U+0085 inside its texts as they are
    for number, line in enumerate(whole.decode("utf-8", "replace").split("\n")[:-1], 1):
        try:
            lines.append(json.loads(line))
            if not {*names} & {*lines[-1]}:
                raise ValueError
        except (ValueError, TypeError):
            raise UserError(f"{show_path(path)}, line {number} is damaged; delete it") from None
    return lines
