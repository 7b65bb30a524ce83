"""Scores of translations into Traditional Chinese, from their texts alone; no model of ours here.

    python -m miniglm.translation_scores compare --runs=out-translate-sft,out-translate-lora
    python -m miniglm.translation_scores comet --answers=out-x/answers-finance_sft-test.jsonl

BLEU and chrF++ of a corpus are sacrebleu's. It counts n-grams sentence by sentence, and the sums of
these counts give the score; so sentences are drawn or exchanged by their counts alone:

    interval   scores of as many sentences, drawn with replacement, 1,000 times: the middle 95 %
    p          two systems exchange sentences by the toss of a coin, 10,000 times: how often their
               scores lie as far apart as they really do (approximate randomization, Riezler and
               Maxwell, 2005)

compare reads what evaluations.py wrote of each run, and writes a table by phase and examples.
comet runs in an environment of its own (requirements-comet.txt); imports of what only one of the
two environments has stand in the functions that need it.
"""

import hashlib
import importlib.metadata
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric

from configurator import (
    UserError,
    command,
    configure,
    repo_path,
    run_part,
    show_path,
    user_path,
    written_aside,
)

# BLEU counts Chinese characters and English words. chrF++ counts runs of characters, and words
# between blanks: of Chinese, which has few, whole clauses, so it lies below plain chrF
METRICS = {"bleu": BLEU(tokenize="zh"), "chrf": CHRF(word_order=2)}
NAMES = {"bleu": "BLEU", "chrf": "chrF++"}
RESAMPLES = 1000  # of an interval
EXCHANGES = 10_000  # of a p
SEED = 12345  # sacrebleu's own, so that its intervals are these


# --- BLEU and chrF++ ---------------------------------------------------------------------------


def statistics(metric: Metric, answers: list[str], references: list[str]) -> np.ndarray:
    """What sacrebleu counts of each sentence, (N, k) whole numbers."""
    # these two methods are what its own tests (sacrebleu/significance.py) use
    return np.array(metric._extract_corpus_statistics(answers, [references]), np.int64)


def score_of(metric: Metric, total: np.ndarray) -> float:
    """The score, 0 to 100, of sentences whose counts sum up to total (k,)."""
    return metric._compute_score_from_stats(total.tolist()).score


def interval(metric: Metric, counts: np.ndarray) -> tuple[float, float]:
    """The ends of the score's 95 % interval, by a percentile bootstrap over sentences (N, k)."""
    draw, n = np.random.default_rng(SEED), len(counts)
    drawn = (counts[draw.integers(n, size=n)] for _ in range(RESAMPLES))
    scores = sorted(score_of(metric, some.sum(axis=0)) for some in drawn)
    outside = RESAMPLES // 40
    return scores[outside], scores[-1 - outside]


def p_value(metric: Metric, one: np.ndarray, other: np.ndarray) -> float:
    """The two-sided p of the difference between two systems' scores on the same sentences, whose
    counts (N, k) these are.

    An exchange that leaves the difference as large as it is counts, too. sacrebleu's PairedTest
    counts larger ones alone: by it a system differs from itself with p = 0.0001.
    """
    difference, totals = (other - one).astype(float), (one.sum(axis=0), other.sum(axis=0))

    def distance(moved: np.ndarray) -> float:
        return abs(score_of(metric, totals[0] + moved) - score_of(metric, totals[1] - moved))

    draw, as_far, real = np.random.default_rng(SEED), 0, distance(0)
    for rows in np.array_split(draw.integers(2, size=(EXCHANGES, len(one)), dtype=bool), 100):
        as_far += sum(distance(moved) >= real for moved in rows.astype(float) @ difference)
    return (as_far + 1) / (EXCHANGES + 1)


def signature(metric: Metric) -> str:
    """How the score and its interval were computed, in sacrebleu's words."""
    words = metric.get_signature()
    words.update("bs", RESAMPLES)
    words.update("seed", SEED)
    return str(words)


# --- a whole report ----------------------------------------------------------------------------


def simplified(text: str) -> str:
    """The Simplified characters of a text: those that go where it is converted as the datasets'
    Chinese was (miniglm/prep/parallel.py), and that are no Traditional characters themselves.

    Conversion also replaces Traditional ones: variants that Hong Kong does not write (臺, 裡, which
    going to Simplified changes), and ones that Simplified writes for others, too (后, 布, 余). So
    以后 for 以後 is not found, and 皇后, 公布 and 余先生 count as the Traditional that they are.
    """
    from miniglm.prep.parallel import TO_SIMPLIFIED, traditional

    gone = Counter(text) - Counter(traditional(text))
    return "".join(c for c in gone if TO_SIMPLIFIED.convert(c) == c and not is_traditional(c))


def is_traditional(char: str) -> bool:
    """Whether a character is among Big5's 5,401 common ones (its first level), or its second level
    calls it rare, but Hong Kong writes it: 年息五厘, 永恒."""
    code = char.encode("big5", errors="ignore")
    return b"\xa4\x40" <= code <= b"\xc6\x7e" or char in "厘恒熏蚝涂"


def corpus_scores(records: list[dict]) -> dict:
    """What evaluation.json says of translations: records {"answer", "reference", "ended"}."""
    answers = [record["answer"] for record in records]
    report = {"n": len(records)}
    for name, metric in METRICS.items():
        counts = statistics(metric, answers, [record["reference"] for record in records])
        report[name] = score_of(metric, counts.sum(axis=0))
        report[f"{name}_low"], report[f"{name}_high"] = interval(metric, counts)
        report[f"{name}_signature"] = signature(metric)
    return report | {
        "empty": share(not answer.strip() for answer in answers),
        "unfinished": share(not record["ended"] for record in records),
        "simplified": share(bool(simplified(answer)) for answer in answers),
    }


def share(found: Iterable[bool]) -> float:
    found = [*found]
    return sum(found) / len(found)


# --- what evaluations.py wrote -----------------------------------------------------------------


@dataclass
class Phase:
    """A run's translations of a split: its report, a record for each sentence, and what METRICS
    count of each, (N, k) by name."""

    run: str
    report: dict
    records: list[dict]
    counts: dict[str, np.ndarray]


def report_name(dataset: str, split: str) -> str:
    """What stands in the names of the files that evaluations.py writes of a dataset's split."""
    return re.sub(r"[^\w.-]", "_", f"{dataset}-{split}")


def read_text(path: Path, remedy: str) -> str:
    """A file's text. UserError with the remedy where there is none."""
    if not path.is_file():
        raise UserError(f"{show_path(path)} is missing; {remedy}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{show_path(path)} is not UTF-8; {remedy}") from None


def read_answers(path: Path, remedy: str) -> list[dict]:
    """The records of an answers file, at least one."""
    records = []
    for number, line in enumerate(read_text(path, remedy).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            texts = [record[key] for key in ("question", "reference", "answer")]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{show_path(path)}, line {number}: no question, reference and answer; {remedy}"
            ) from None
        records.append(record)
    if not records:
        raise UserError(f"{show_path(path)} is empty; {remedy}")
    return records


def read_report(path: Path, keys: Iterable[str], remedy: str) -> dict:
    """A JSON object that has these keys."""
    try:
        report = json.loads(read_text(path, remedy))
        missing = [key for key in keys if report.get(key) is None]
    except (ValueError, AttributeError):
        raise UserError(f"{show_path(path)} is damaged; {remedy}") from None
    if missing:
        raise UserError(f"{show_path(path)} has no {missing[0]}; {remedy}")
    return report


def read_phase(run: str, dataset: str, split: str) -> Phase:
    """UserError where a file is missing, or report and answers are not of one evaluation."""
    remedy = f"run python evaluations.py --out_dir={run} --dataset={dataset} --split={split}"
    folder, name = repo_path(run), report_name(Path(dataset).name, split)
    records = read_answers(folder / f"answers-{name}.jsonl", remedy)
    path = folder / f"evaluation-{name}.json"
    old = f"prepare {dataset} again if it is older than these scores, then {remedy}"
    report = read_report(path, REPORTED, old)
    if not all(isinstance(report[key], int | float) for key in REPORTED):
        raise UserError(f"{show_path(path)} is damaged; {remedy}")
    texts = [[record[key] for record in records] for key in ("answer", "reference")]
    counts = {key: statistics(metric, *texts) for key, metric in METRICS.items()}
    for key, metric in METRICS.items():
        if not math.isclose(score_of(metric, counts[key].sum(axis=0)), report[key]):
            raise UserError(f"{show_path(path)} is not of answers-{name}.jsonl beside it; {remedy}")
    return Phase(show_path(folder), report | read_comet(folder, name), records, counts)


def read_comet(folder: Path, name: str) -> dict:
    """COMET of the answers, and its model, where `comet` has scored them."""
    answers, path = folder / f"answers-{name}.jsonl", folder / f"comet-{name}.json"
    if not path.is_file():
        return {}
    command = f"python -m miniglm.translation_scores comet --answers={show_path(answers)}"
    remedy = f"delete it, or run {command}"
    report = read_report(path, ("comet", "model", "answers_sha256"), remedy)
    if not (isinstance(report["comet"], int | float) and isinstance(report["model"], str)):
        raise UserError(f"{show_path(path)} is damaged; {remedy}")
    if report["answers_sha256"] != sha256(answers):
        raise UserError(f"{show_path(path)} is of other answers than there are now; {remedy}")
    return {"comet": report["comet"], "comet_model": report["model"]}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- the phases of a translator ----------------------------------------------------------------

SHARES = ("empty", "unfinished", "simplified")
ENDS = [f"{name}_{end}" for name in METRICS for end in ("low", "high")]
REPORTED = ("n", "perplexity", *METRICS, *ENDS, *SHARES)  # what a report must have


def compare(config: "Settings", words: list[str]) -> None:
    """Prints the phases of --runs beside each other, and writes comparison.md and .json."""
    if words:
        raise UserError(f"compare takes no {words[0]}; pass --runs= and --datasets=")
    if not config.datasets:
        raise UserError("of which datasets? pass --datasets=, or leave it out")
    if not config.runs:
        raise UserError("which phases? pass --runs=, their out_dirs from the first to the last")
    read = [
        [read_phase(run, dataset, config.split) for run in config.runs]
        for dataset in config.datasets
    ]
    parts = []
    for dataset, phases in zip(config.datasets, read, strict=True):
        check_same(phases, dataset, config.split)
        parts.append(compared(dataset, phases, config.examples))
        print(f"{dataset}, {config.split}, {parts[-1]['n']} sentences\n\n{table(parts[-1])}\n")
    folder = repo_path(config.out)
    report = {"split": config.split, "datasets": parts}
    texts = {
        "comparison.json": json.dumps(report, ensure_ascii=False, indent=1) + "\n",
        "comparison.md": markdown(report),
    }
    for file, text in texts.items():
        with written_aside(folder / file) as path:
            path.write_text(text, encoding="utf-8")
    print(f"written to {show_path(folder)}/comparison.md")


def check_same(phases: list[Phase], dataset: str, split: str) -> None:
    """UserError unless all phases translated the same sentences in the same order."""
    first = phases[0]
    for phase in phases[1:]:
        pairs = itertools.zip_longest(first.records, phase.records, fillvalue={})
        for number, (one, other) in enumerate(pairs, 1):
            if any(one.get(key) != other.get(key) for key in ("question", "reference")):
                raise UserError(
                    f"{phase.run} translated other sentences than {first.run}, from number "
                    f"{number} on; run python evaluations.py --out_dir={phase.run} "
                    f"--dataset={dataset} --split={split}, and the same with {first.run}"
                )


def compared(dataset: str, phases: list[Phase], examples: int) -> dict:
    """What comparison.json says of a dataset: scores of each phase, p of its difference from the
    phase before, and sentences evenly from the whole split."""
    rows = []
    for before, phase in zip([None, *phases], phases, strict=False):
        keys = ("checkpoint", *REPORTED, "comet", "comet_model")
        row = {"run": phase.run} | {k: phase.report[k] for k in keys if k in phase.report}
        for key, metric in METRICS.items() if before else ():
            row[f"{key}_p"] = p_value(metric, before.counts[key], phase.counts[key])
        rows.append(row)
    records = [phase.records for phase in phases]
    n, count = len(records[0]), min(examples, len(records[0]))
    return {
        "dataset": dataset,
        "n": n,
        "signatures": {NAMES[key]: signature(metric) for key, metric in METRICS.items()},
        "phases": rows,
        "examples": [
            {key: records[0][i][key] for key in ("question", "reference")}
            | {"number": i + 1, "answers": [one[i]["answer"] for one in records]}
            for i in (number * n // count for number in range(count))
        ],
    }


def table(part: dict) -> str:
    """The scores of a dataset's phases as a Markdown table."""
    models = dict.fromkeys(row["comet_model"] for row in part["phases"] if "comet" in row)
    scores = [word for key in METRICS for word in (f"{NAMES[key]} (95 %)", "p")]
    comets = [f"COMET by {model}" for model in models]
    head = ["phase", "perplexity", *scores, *comets, "empty", "unfinished", "Simplified"]
    lines = [head, [":--", *["--:"] * (len(head) - 1)]]
    for row in part["phases"]:
        cells = [plain(row["run"]), f"{row['perplexity']:.2f}"]
        for key in METRICS:
            low, high = row[f"{key}_low"], row[f"{key}_high"]
            cells.append(f"{row[key]:.2f} ({low:.2f} to {high:.2f})")
            cells.append(f"{row[f'{key}_p']:.4f}" if f"{key}_p" in row else "")
        cells += [f"{row['comet']:.4f}" if row.get("comet_model") == m else "" for m in models]
        cells += [f"{row[key]:.1%}" for key in SHARES]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """A text as a cell of a Markdown table that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", text).replace("\n", "<br>")


def markdown(report: dict) -> str:
    """comparison.md: tables, what they mean, and the sentences side by side."""
    parts = [
        "# Translations by phase",
        f"Split {plain(report['split'])}. p is that of the difference from the phase above, by "
        f"two-sided approximate randomization with {EXCHANGES:,} exchanges; intervals are those of "
        f"{RESAMPLES:,} resamples of sentences.",
    ]
    for part in report["datasets"]:
        parts.append(f"## {plain(part['dataset'])}, {part['n']} sentences")
        parts.append(table(part))
        parts += [f"{name}: `{words}`" for name, words in part["signatures"].items()]
        for example in part["examples"]:
            names = ["source", "reference", *(plain(row["run"]) for row in part["phases"])]
            texts = [example["question"], example["reference"], *example["answers"]]
            pairs = zip(names, map(plain, texts), strict=True)
            rows = "\n".join(f"| {name} | {text} |" for name, text in pairs)
            parts.append(f"| sentence {example['number']} | |\n| :-- | :-- |\n{rows}")
    return "\n\n".join(parts) + "\n"


# --- COMET -------------------------------------------------------------------------------------


def comet(config: "Settings", words: list[str]) -> None:
    """Scores the answers of a file by a COMET model, and writes comet-NAME.json beside it."""
    if words:
        raise UserError(f"comet takes no {words[0]}; pass --answers= and --model=")
    path = user_path(config.answers)
    records = read_answers(path, "pass --answers=, a file that evaluations.py wrote")
    model = load_comet(config.model)
    import torch  # COMET brings it

    samples = [
        {"src": record["question"], "mt": record["answer"], "ref": record["reference"]}
        for record in records
    ]
    found = model.predict(
        samples, batch_size=config.batch_size, gpus=int(torch.cuda.is_available())
    )
    report = {
        "comet": float(found.system_score),
        "model": config.model,
        "unbabel_comet": importlib.metadata.version("unbabel-comet"),
        "n": len(records),
        "answers": path.name,
        "answers_sha256": sha256(path),
    }
    out = path.with_name(f"comet-{path.stem.removeprefix('answers-')}.json")
    with written_aside(out) as aside:
        aside.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"COMET {report['comet']:.4f} by {config.model}, written to {show_path(out)}")


def load_comet(name: str):
    """The COMET model of a name on the Hugging Face hub, a checkpoint file, or a folder that holds
    hparams.yaml and checkpoints/model.ckpt."""
    try:
        from comet import download_model, load_from_checkpoint
    except ImportError as error:
        raise UserError(
            f"COMET is not in this environment ({error}); it wants one of its own: python -m venv "
            ".venv-comet, then .venv-comet/bin/pip install -r requirements-comet.txt, and run this "
            "command with .venv-comet/bin/python"
        ) from None
    path = user_path(name)
    path = path / "checkpoints" / "model.ckpt" if path.is_dir() else path
    if path.suffix == ".ckpt" and not path.is_file():
        raise UserError(f"no checkpoint {show_path(path)}; pass another --model=")
    try:
        return load_from_checkpoint(str(path if path.is_file() else download_model(name)))
    except Exception as error:  # COMET itself raises nothing narrower
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"COMET's model {name} cannot be loaded ({type(error).__name__}: {reason}); it and its "
            "encoder come from the Hugging Face hub, or from the mirror that HF_ENDPOINT names; or "
            "pass --model=, a checkpoint of your own"
        ) from None


# --- the command line --------------------------------------------------------------------------

DOMAINS = ("translation_sft", "finance_sft")


@dataclass
class Settings:
    names: list[str] = field(default_factory=list)  # compare, or comet
    runs: list[str] = field(default_factory=list)  # to compare: out_dirs in their order: a,b
    datasets: list[str] = field(default_factory=lambda: [*DOMAINS])  # each by all runs: a,b
    split: str = "test"  # of them: test, val, or train
    examples: int = 3  # sentences of each dataset to show
    out: str = "out-comparison"  # directory for comparison.md and comparison.json
    answers: str = ""  # for comet: a file that evaluations.py wrote
    model: str = "Unbabel/wmt22-comet-da"  # for comet: on the Hugging Face hub, or a checkpoint
    batch_size: int = 16  # for comet: sentences at once

    def __post_init__(self):
        for name, least in (("examples", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be {least} or more")


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    run_part(config, {"compare": compare, "comet": comet}, "compare --runs=, or comet --answers=")


if __name__ == "__main__":
    command(main)
