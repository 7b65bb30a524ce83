"""A model's own answers -> preferences: several to a source, ranked, the best against the worst.

    samples.jsonl   in the dataset's folder: first of what run they are, then a line a source,
                    {"split", "source", "reference", "samples", "ended", "chrf"}
    scores.jsonl    what COMET or a judge gave to them, {"call", "by", "scores"}

Training pairs come from sources of the training split, held-out ones from the validation split.
The model was fine-tuned on the former, so pairs from there would say too little of other sentences;
of the latter it has read none, at most they have chosen its `best`. The test split is not touched.
Both files are appended to as it goes; stopped, the same command goes on, and comes to the same
bytes. A sample's random numbers hang on the seed, its source's place and its own number; what is
rounded hangs on the rows beside it, too, so sources are sampled in rounds, and a round that was not
finished is begun anew.

torch and the model are imported only where there is something to sample.
"""

import dataclasses
import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from tqdm import tqdm

from configurator import UserError, locked, repo_path, show_path, written_aside
from data_utils import Dataset
from miniglm.prep import endpoint, preferences
from miniglm.prep.endpoint import append, ask_all, open_client, short_hash, whole_lines
from miniglm.prep.pipeline import print_meta
from miniglm.prep.preferences import best_and_worst, usable
from miniglm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from miniglm.checkpoint import Checkpoint

# points of 100. By a margin of 10 chrF++ 8 % of 511 sources gave a pair, by 5 25 %, by 3 53 %, of a
# translator of 4 million parameters. At temperature 0.7 its samples had 7.4 on average, at 1.0 5.4
MARGIN = 5.0
ROUND = 16  # batches of samples that are begun together; at their end rows stay empty
CHUNK = 64  # sources whose samples COMET scores before they are written down
TASK = """\
下面是一句英文、它的参考译文和{n}个候选译文。请给每个候选译文打分，从0到100：意思准确完整、用词合乎香港金融文件的得高分；漏译、错译或添加了原文没有的内容的得低分。
只写一个JSON数组，按候选的次序给出{n}个数，不写别的。

英文：{source}
参考译文：{reference}
{candidates}"""
# settings that mean nothing beside files, beside a model, and without a judge
OF_SAMPLES = ("dataset", "n_sources", "n_val", "num_samples", "temperature", "top_p", "seed")
OF_SAMPLES += ("max_new_tokens", "batch_size", "device", "rank")
OF_FILES = ("val", "tokenizer", "encoding", "strict")
OF_JUDGE = tuple(one.name for one in dataclasses.fields(endpoint.Settings))
NO_JUDGE = {"chrf": OF_JUDGE, "comet": set(OF_JUDGE) - {"model"}, "endpoint": ()}
COMET = "Unbabel/wmt22-comet-da"


@dataclass
class Settings(preferences.Settings, endpoint.Settings):
    out_dir: str = ""  # the model whose answers are ranked
    input: list[str] = field(default_factory=list)  # or files of pairs or of the page's marks: a,b
    ranked: list[str] = field(default_factory=list)  # or files of answers that are ranked: a,b
    dataset: str | None = None  # of questions with references; None is what it was trained on
    n_sources: int = 2000  # of the training split, for training pairs
    n_val: int = 200  # of the validation split, for held-out pairs
    num_samples: int = 4  # answers to each source
    temperature: float = 0.7  # of the samples, as in sample.py
    top_p: float = 1.0  # the same
    max_new_tokens: int = 256  # longest sample, tokens
    seed: int = 1337  # of the samples, and of the choice of sources
    batch_size: int = 64  # rows at once
    device: str = "auto"  # cuda, mps, cpu; auto is the first of them that is there
    model: str = ""  # the judge: its name at the endpoint; of COMET a name or a checkpoint
    rank: Literal["chrf", "comet", "endpoint"] = "chrf"  # by what; endpoint is a judge, --model=
    margin: float | None = None  # points of score, of 100, at least; None is 5, of a file 0

    def __post_init__(self):
        preferences.Settings.__post_init__(self)
        endpoint.Settings.__post_init__(self)
        given = [name for name in ("out_dir", "input", "ranked") if getattr(self, name)]
        if len(given) != 1:
            raise UserError(
                "pass one of --out_dir= (a model to sample), --input= (files of pairs), --ranked= "
                f"(files of ranked answers); there is {' and '.join(given) or 'none'}"
            )
        self._refuse(OF_FILES if self.out_dir else OF_SAMPLES, f"--{given[0]}=")
        self._refuse(("margin",) if self.input else (), "--input=")
        self._refuse(NO_JUDGE[self.rank], f"--rank={self.rank}")
        for name, least in (("n_sources", 1), ("n_val", 1), ("num_samples", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be {least} or more")
        if self.temperature == 0:
            raise UserError("temperature=0 makes all samples of a source the same; raise it")
        if self.margin is not None and self.margin < 0:
            raise UserError(f"margin={self.margin} must be 0 or more")

    def _refuse(self, names: Collection[str], beside: str) -> None:
        """UserError where one of the settings is not what it is by default."""
        for one in dataclasses.fields(self):
            if one.name in names and getattr(self, one.name) != one.default:
                raise UserError(f"--{one.name}= means nothing beside {beside}; leave it out")

    @property
    def by(self) -> str:
        """What the scores are of."""
        comet = Path(self.model or COMET)  # of a file its name alone: meta.json may be uploaded
        comet = comet.name if comet.exists() else self.model or COMET
        names = {"chrf": "chrF++", "comet": f"COMET {comet}"}
        return names.get(self.rank, f"endpoint {self.model}")


def prepare(config: Settings) -> None:
    """Samples the model of out_dir, ranks what it says, and writes the dataset."""
    from miniglm.text import load_for_sampling

    judge = open_judge(config)  # first, since it says at once what is missing
    checkpoint = load_for_sampling(config.out_dir, config.device)
    data = open_data(config, checkpoint)
    sources = choose_sources(config, data)
    with locked(config.folder / "samples.jsonl"):
        lines = sample_all(config, checkpoint, data, sources)
        results = rank_all(config, judge, checkpoint.tokenizer, lines)
    counts = {split: tell(split, results) for split in ("train", "val")}
    # the sources are the texts' own: their terms hold for what is made of them, too
    about = {name: data.meta[name] for name in ("sources", "languages") if name in data.meta}
    about |= {"dataset": show_path(data.path), "model": show_path(checkpoint.path)}
    about |= {"samples": what_of(config, checkpoint, data), "rank": config.by}
    about |= {"margin": margin_of(config), "pairs_from": counts}
    pairs = ((one.line["split"], (prompt_of(one.line), *one.pair)) for one in results if one.pair)
    meta = preferences.write(config, pairs, checkpoint.tokenizer, lambda: about)
    print_meta(config.folder, meta)


def margin_of(config: Settings) -> float:
    return MARGIN if config.margin is None else config.margin


def prompt_of(line: dict) -> list[dict]:
    return [{"role": "user", "content": line["source"]}]


# --- sources -------------------------------------------------------------------------------------


def open_data(config: Settings, checkpoint: "Checkpoint") -> Dataset:
    """The questions that the model is asked, if it can be."""
    if not checkpoint.answers:
        raise UserError(
            f"{show_path(repo_path(config.out_dir))} continues texts, it has learnt no answers; "
            "pass a fine-tuned model's --out_dir="
        )
    data = Dataset(config.dataset or checkpoint.run["settings"]["dataset"])
    if data.kind != "sft":
        raise UserError(
            f"{show_path(data.path)} has no questions with references; pass --dataset=, as "
            "finance_sft"
        )
    block_size = checkpoint.model.config.block_size
    for split in ("train", "val"):
        data.check(block_size, split)
    data.check_tokenizer(checkpoint.tokenizer, checkpoint.path)
    if config.max_tokens > block_size:
        raise UserError(
            f"max_tokens={config.max_tokens} is over the model's block_size={block_size}; pass "
            f"--max_tokens={block_size}"
        )
    return data


def choose_sources(config: Settings, data: Dataset) -> list[dict]:
    """Lines {"split", "source", "reference"}: n_val of the validation split, then n_sources of the
    training split: each time those with the smallest hashes, in their order."""
    trained, held_out = (pairs_of(data, split) for split in ("train", "val"))
    held_out = {source: held_out[source] for source in held_out if source not in trained}
    lines = []
    for split, found, count in (
        ("val", held_out, config.n_val),
        ("train", trained, config.n_sources),
    ):
        if not found:
            raise UserError(
                f"{show_path(data.path)} has no question of its own in {split}; prepare it anew, "
                "or pass another --dataset="
            )
        if count > len(found):
            print(f"{split}: all {len(found):,} sources, there are no {count:,}")
        chosen = heapq.nsmallest(
            count,
            found,
            key=lambda source: hashlib.sha256(f"{config.seed} {source}".encode()).digest(),
        )
        lines += [{"split": split, "source": s, "reference": found[s]} for s in chosen]
    return lines


def pairs_of(data: Dataset, split: str) -> dict[str, str]:
    """Source -> reference of a split's conversations; those of several turns are no such pairs."""
    pairs, others = {}, 0
    for turns in data.conversations(split):
        if len(turns) == 2:
            pairs.setdefault(turns[0]["content"], turns[1]["content"])
        else:
            others += 1
    if others:
        print(f"{split}: {others:,} conversations of several turns are no sources")
    return pairs


# --- samples -------------------------------------------------------------------------------------


def sample_all(
    config: Settings, checkpoint: "Checkpoint", data: Dataset, sources: list[dict]
) -> list[dict]:
    """The sources with their samples: those of samples.jsonl, to which the missing ones are
    appended. UserError where it was begun with other settings or another model."""
    from miniglm.answer_file import resume
    from miniglm.generation import Sampling
    from miniglm.text import complete

    names = ("max_new_tokens", "temperature", "top_p", "seed")
    sampling = Sampling(**{name: getattr(config, name) for name in names})
    path = config.folder / "samples.jsonl"
    resume(path, what_of(config, checkpoint, data))
    _, *lines = whole_lines(path, "weights_sha256", "source")
    check_sources(path, lines, sources)
    size = max(1, ROUND * config.batch_size // config.num_samples)
    if len(lines) < len(sources) and len(lines) % size:
        del lines[len(lines) // size * size :]
        keep_lines(path, 1 + len(lines))
    bar = tqdm(desc="sampling", total=len(sources), initial=len(lines), unit="source")
    for first in range(len(lines), len(sources), size):
        part = sources[first : first + size]
        prompts = [checkpoint.tokenizer.render_prompt(prompt_of(line)) for line in part]
        rest = config.num_samples, config.batch_size
        outputs = complete(checkpoint, prompts, sampling, *rest, first_prompt=first)
        for line, samples in zip(part, outputs, strict=True):
            # without the blanks around them, as all messages are kept
            texts, ended = [one.text.strip() for one in samples], [one.ended for one in samples]
            scores = [chrf(text, line["reference"]) for text in texts]
            lines.append(line | {"samples": texts, "ended": ended, "chrf": scores})
            append(path, lines[-1:])
            bar.update()
    bar.close()
    return lines


def keep_lines(path: Path, count: int) -> None:
    """Cuts a file off behind its first lines."""
    lines = path.read_bytes().split(b"\n")[:count]
    with written_aside(path) as aside:
        aside.write_bytes(b"".join(line + b"\n" for line in lines))


def check_sources(path: Path, lines: list[dict], sources: list[dict]) -> None:
    """UserError where samples are not those of the sources in the same places."""
    for number, line in enumerate(lines, 2):
        source = sources[number - 2] if number - 2 < len(sources) else {}
        if not source or {name: line.get(name) for name in source} != source:
            raise UserError(
                f"{show_path(path)}, line {number} is not of its source; delete it to begin anew"
            )


def what_of(config: Settings, checkpoint: "Checkpoint", data: Dataset) -> dict:
    """What the samples depend on. On batch_size, too: rows of another batch are rounded a little
    differently, by which 8 of 1,440 samples of a translator took another turn."""
    from miniglm.checkpoint import weights_sha256

    names = ("n_val", "n_sources", "num_samples", "batch_size")
    names += ("max_new_tokens", "temperature", "top_p", "seed")
    fingerprints = [data.meta["splits"][split]["fingerprint"] for split in ("train", "val")]
    about = {
        "weights_sha256": weights_sha256(checkpoint.path),
        "tokenizer_sha256": checkpoint.tokenizer.sha256,
        "dataset_fingerprints": fingerprints,
    }
    return about | {name: getattr(config, name) for name in names}


# --- scores --------------------------------------------------------------------------------------


def chrf(text: str, reference: str) -> float:
    """chrF++ of a sentence, 0 to 100 (Popović 2017)."""
    from miniglm.translation_scores import METRICS  # here, since files of pairs need no sacrebleu

    return round(METRICS["chrf"].sentence_score(text, [reference]).score, 4)


@dataclass(frozen=True)
class Asked:
    """Scores of some translations of a source, as COMET or a judge is asked for them."""

    by: str
    source: str
    reference: str
    texts: tuple[str, ...]

    @property
    def id(self) -> str:
        return short_hash(json.dumps(dataclasses.astuple(self)))

    @property
    def prompt(self) -> str:
        candidates = "\n".join(f"候选{n}：{text}" for n, text in enumerate(self.texts, 1))
        parts = {"source": self.source, "reference": self.reference, "candidates": candidates}
        return TASK.format(n=len(self.texts), **parts)


Take = Callable[[Asked, list[float] | None], None]  # None: the scores could not be read


def open_judge(config: Settings) -> object:
    """What gives other scores than chrF++: COMET's model, or an endpoint's client. UserError where
    it is not there."""
    if config.rank == "comet":
        from miniglm.translation_scores import load_comet

        return load_comet(config.model or COMET)
    return open_client(config) if config.rank == "endpoint" else None


def score_all(
    config: Settings, judge: object, lines: list[dict], texts_of: list[list[str]]
) -> list[list[float] | None]:
    """Scores of each line's texts. Those of COMET or a judge are in scores.jsonl, to which the
    missing ones are appended."""
    if config.rank == "chrf":
        return [
            [line["chrf"][line["samples"].index(text)] for text in texts]
            for line, texts in zip(lines, texts_of, strict=True)
        ]
    asked = [
        Asked(config.by, line["source"], line["reference"], tuple(texts))
        for line, texts in zip(lines, texts_of, strict=True)
    ]
    path = config.folder / "scores.jsonl"
    known = {line["call"]: line["scores"] for line in whole_lines(path, "call")}
    todo = [one for one in asked if len(one.texts) > 1 and one.id not in known]

    def take(one: Asked, scores: list[float] | None) -> None:
        append(path, [{"call": one.id, "by": one.by, "scores": scores}])
        known[one.id] = scores

    if todo:
        {"comet": ask_comet, "endpoint": ask_endpoint}[config.rank](config, judge, todo, take)
    # what has no other to be compared with needs no score
    return [known[one.id] if len(one.texts) > 1 else [0.0] * len(one.texts) for one in asked]


def ask_endpoint(config: Settings, client: object, todo: list[Asked], take: Take) -> None:
    counts = Counter()

    def parse(one: Asked, text: str) -> str:
        scores = parse_scores(text, len(one.texts))
        take(one, scores)
        counts["unreadable"] += scores is None
        return f"{counts['unreadable']} unreadable"

    ask_all(client, config, todo, parse, counts, "judge", temperature=0)
    if counts["failed calls"]:
        raise UserError(
            f"{counts['failed calls']:,} of {len(todo):,} calls failed; the same command asks them "
            "again"
        )


def parse_scores(text: str, count: int) -> list[float] | None:
    """The numbers of a judge's answer, that is a JSON array of `count` from 0 to 100, in a fence
    perhaps; None where it is anything else."""
    match = re.fullmatch(r"(?:```(?:json)?\s*)?(\[[^\[\]]*\])(?:\s*```)?", text.strip())
    try:
        scores = json.loads(match[1]) if match else []
    except ValueError:
        return None
    numbers = [s for s in scores if isinstance(s, int | float) and not isinstance(s, bool)]
    good = [float(s) for s in numbers if 0 <= s <= 100]
    return good if len(good) == len(scores) == count else None


def ask_comet(config: Settings, model: object, todo: list[Asked], take: Take) -> None:
    """Scores by COMET (Rei et al., 2022), times 100."""
    import torch

    gpus = int(torch.cuda.is_available())
    for first in tqdm(range(0, len(todo), CHUNK), "COMET"):
        part = todo[first : first + CHUNK]
        rows = [
            {"src": one.source, "mt": text, "ref": one.reference}
            for one in part
            for text in one.texts
        ]
        found = model.predict(rows, batch_size=config.batch_size, gpus=gpus, progress_bar=False)
        scores = iter(found.scores)
        for one in part:
            take(one, [round(100 * next(scores), 4) for _ in one.texts])


# --- pairs ---------------------------------------------------------------------------------------


class Result(NamedTuple):
    """Of a source: its line, its usable samples' scores, its pair, or why it has none."""

    line: dict
    scores: dict[str, float]
    pair: tuple[str, str] | None
    why: str


def rank_all(
    config: Settings, judge: object, tokenizer: Tokenizer, lines: list[dict]
) -> list[Result]:
    good = [
        usable(prompt_of(line), line["samples"], line["ended"], tokenizer, config.max_tokens)
        for line in lines
    ]
    given = score_all(config, judge, lines, [texts for texts, _ in good])
    results = []
    for line, (texts, faults), scores in zip(lines, good, given, strict=True):
        if scores is None:
            results.append(Result(line, {}, None, "unreadable scores"))
            continue
        score_of = dict(zip(texts, scores, strict=True))
        pair, why = best_and_worst(score_of, faults, margin_of(config))
        results.append(Result(line, score_of, pair, why))
    return results


def tell(split: str, results: list[Result]) -> dict:
    """Prints what came of a split's sources, and returns it for meta.json. UserError where no pair
    did."""
    mine = [one for one in results if one.line["split"] == split]
    pairs = [one for one in mine if one.pair]
    whys = Counter(one.why for one in mine if not one.pair)
    left_out = ", ".join(f"{n:,} {why}" for why, n in whys.most_common())
    if not pairs:
        raise UserError(
            f"none of {len(mine):,} {split} sources gave a pair ({left_out}); lower --margin=, or "
            "raise --num_samples= or --temperature="
        )
    means = [sum(one.scores[one.pair[side]] for one in pairs) / len(pairs) for side in (0, 1)]
    print(
        f"{split}: {len(mine):,} sources gave {len(pairs):,} pairs, scores "
        f"{means[0]:.1f} and {means[1]:.1f} on average" + (f"; others: {left_out}" * bool(whys))
    )
    return {"sources": len(mine), "pairs": len(pairs)} | dict(whys.most_common())
