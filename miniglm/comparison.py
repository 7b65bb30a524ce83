"""The phases of a translator beside each other: `python evaluations.py --compare=RUNS`.

Reads what evaluations.py, and perhaps comet.py, wrote about each run; writes the tables, and some
sentences side by side, to comparison.md and comparison.json.
"""

import itertools
import re
from pathlib import Path

from configurator import UserError, repo_path, show_path
from miniglm import jsonl, metrics
from miniglm.comet import TEXTS

SHARES = ("empty", "unfinished", "simplified")
SCORES = [f"{key}{part}" for key in metrics.METRICS for part in ("", "_low", "_high")]
TYPES = dict.fromkeys(("perplexity", *SCORES, *SHARES), int | float)  # of what a report holds
TYPES |= {f"{key}_signature": str for key in metrics.METRICS}
COMET = {"comet": int | float, "comet_model": str}


def compare(runs: list[str], datasets: list[str], split: str, examples: int, folder: Path) -> None:
    """Prints the scores of the runs, in their order, and writes comparison.md and .json."""
    phases_of = {dataset: [read_phase(run, dataset, split) for run in runs] for dataset in datasets}
    parts = []
    for dataset, phases in phases_of.items():
        check_same(phases, dataset, split)
        parts.append(compared(dataset, phases, examples))
        print(f"{dataset}, {split}, {parts[-1]['n']} sentences\n\n{table(parts[-1])}\n")
    report = {"split": split, "datasets": parts}
    jsonl.write_report(folder / "comparison.json", report)
    jsonl.write_text(folder / "comparison.md", markdown(report))
    print(f"written to {show_path(folder)}/comparison.md")


def report_name(dataset: str, split: str) -> str:
    """A dataset's split in the names of its report's files."""
    return re.sub(r"[^\w.-]", "_", f"{dataset}-{split}")


Phase = tuple[dict, list[dict]]  # a run's scores on a split, and a record for each sentence


def read_phase(run: str, dataset: str, split: str) -> Phase:
    remedy = f"run python evaluations.py --out_dir={run} --dataset={dataset} --split={split}"
    folder, name = repo_path(run), report_name(Path(dataset).name, split)
    records = jsonl.read_records(folder / f"answers-{name}.jsonl", TEXTS, remedy)
    file = folder / f"evaluation-{name}.json"
    report = jsonl.read_report(file, ("perplexity", "bleu"), remedy)
    for key, kind in (TYPES | (COMET if "comet" in report else {})).items():
        if not isinstance(report.get(key), kind):
            raise UserError(f"{show_path(file)} has a damaged {key}, or none; {remedy}")
    return {"run": show_path(folder)} | report, records


def check_same(phases: list[Phase], dataset: str, split: str) -> None:
    """Raises UserError unless all phases translated the same sentences in the same order."""
    asked = [[(r["question"], r["reference"]) for r in records] for _, records in phases]
    for (row, _), sentences in zip(phases, asked, strict=True):
        if sentences != asked[0]:
            raise UserError(
                f"{row['run']} translated other sentences than {phases[0][0]['run']}; run python "
                f"evaluations.py --out_dir={row['run']} --dataset={dataset} --split={split}, and "
                "the same with the other"
            )


def compared(dataset: str, phases: list[Phase], examples: int) -> dict:
    """comparison.json's part of a dataset: scores of each phase, p of its difference from the phase
    before, and sentences evenly from the whole split."""
    rows, records = [row for row, _ in phases], phases[0][1]
    answers = [[record["answer"] for record in translated] for _, translated in phases]
    references = [record["reference"] for record in records]
    for row, (before, after) in zip(rows[1:], itertools.pairwise(answers), strict=True):
        for key, metric in metrics.METRICS.items():
            row[f"{key}_p"] = metrics.p_value(metric, before, after, references)
    n, count = len(records), min(examples, len(records))
    return {
        "dataset": dataset,
        "n": n,
        "phases": rows,
        "examples": [
            {key: records[i][key] for key in ("question", "reference")}
            | {"number": i + 1, "answers": [texts[i] for texts in answers]}
            for i in (number * n // count for number in range(count))
        ],
    }


def table(part: dict) -> str:
    """The scores of a dataset's phases as a Markdown table."""
    models = dict.fromkeys(row["comet_model"] for row in part["phases"] if "comet" in row)
    scores = [word for key in metrics.METRICS for word in (f"{metrics.NAMES[key]} (95 %)", "p")]
    comets = [f"COMET by {model}" for model in models]
    head = ["phase", "perplexity", *scores, *comets, "empty", "unfinished", "Simplified"]
    lines = [head, [":--", *["--:"] * (len(head) - 1)]]
    for row in part["phases"]:
        cells = [plain(row["run"]), f"{row['perplexity']:.2f}"]
        for key in metrics.METRICS:
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
        f"two-sided approximate randomization with {metrics.EXCHANGES:,} exchanges; intervals are "
        f"those of {metrics.RESAMPLES:,} resamples of sentences.",
    ]
    for part in report["datasets"]:
        parts.append(f"## {plain(part['dataset'])}, {part['n']} sentences")
        parts.append(table(part))
        row = part["phases"][0]
        parts += [f"{name}: `{row[f'{key}_signature']}`" for key, name in metrics.NAMES.items()]
        for example in part["examples"]:
            names = ["source", "reference", *(plain(row["run"]) for row in part["phases"])]
            texts = [example["question"], example["reference"], *example["answers"]]
            pairs = zip(names, map(plain, texts), strict=True)
            rows = "\n".join(f"| {name} | {text} |" for name, text in pairs)
            parts.append(f"| sentence {example['number']} | |\n| :-- | :-- |\n{rows}")
    return "\n\n".join(parts) + "\n"
