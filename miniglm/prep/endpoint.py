"""Many calls at once to a language model behind any OpenAI-compatible endpoint.

The key is in the environment, OPENAI_API_KEY. What is asked, and what an answer means, is left to
data/generate_qa.py and miniglm/prep/ranking.py.
"""

import asyncio
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

from tqdm import tqdm

from configurator import UserError, above, at_least

HOPELESS = 5  # calls that fail one after another, after which it stops


@dataclass
class Settings:
    model: str = ""  # the model's name at the endpoint
    base_url: str = ""  # the endpoint, as http://127.0.0.1:7860/v1; empty: OPENAI_BASE_URL, OpenAI
    parallel: Annotated[int, at_least(1)] = 8  # calls at once
    retries: Annotated[int, at_least(0)] = 5  # of a call that the endpoint refuses or loses
    timeout: Annotated[float, above(0)] = 120.0  # seconds of a try


class Call(Protocol):
    @property
    def prompt(self) -> str: ...


def short_hash(text: str) -> str:
    """16 hexadecimal digits that identify a call."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_client(config: Settings):
    """The client of the openai package, which retries by itself: after 429, 5xx, lost connections
    and timeouts, waiting longer each time, or as long as the endpoint asks."""
    try:
        import openai  # here, since nothing else needs it
    except ImportError:
        raise UserError("the openai package is missing; run python -m pip install openai") from None
    if not config.model:
        raise UserError("no model named; pass --model=, as the endpoint calls it")
    key = os.environ.get("OPENAI_API_KEY")
    url = config.base_url or os.environ.get("OPENAI_BASE_URL")
    if not key and not url:
        raise UserError("no key; set OPENAI_API_KEY, or name another endpoint by --base_url=")
    options = {"max_retries": config.retries, "timeout": config.timeout}
    return openai.AsyncOpenAI(api_key=key or "none", base_url=url or None, **options)


def ask_all(
    client,
    config: Settings,
    calls: Sequence[Call],
    take: Callable[[Call, str], str],
    counts: Counter,
    name: str,
    **options: object,
) -> None:
    """Asks `parallel` at a time, in order; take(call, text) gets each answer as it comes, and
    returns a note for the progress bar. options: of the request, such as temperature.

    counts["failed calls"]: those that fail after their retries, which are left for the next run.
    Raises UserError if the endpoint refuses the request itself, fails HOPELESS times in a row, or
    answers no call."""
    try:
        asyncio.run(_ask_all(client, config, calls, take, counts, name, options))
    except* UserError as errors:
        raise errors.exceptions[0] from None
    if calls and counts["failed calls"] == len(calls):
        raise UserError(
            "no call was answered, for the reasons above; run the same command to try again"
        )


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
