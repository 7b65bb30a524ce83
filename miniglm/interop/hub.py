"""The card of a repository on the Hugging Face hub, its README.md: made of figures that exist.

    model_card      run.json, the log's line of that step, evaluation reports -> text
    dataset_card    meta.json -> text
    export_card     the config.json of a directory that export.py wrote -> text

The text is the template card.md. data/upload.py sends the card and the files, and takes this
machine's paths out of the figures.
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CardData, DatasetCardData, ModelCard, ModelCardData

KINDS = {
    "pretrain": "texts",
    "sft": "questions and answers",
    "dpo": "preferences, questions with a chosen and a rejected answer",
    "kto": "marks, answers that are good or bad",
}
RUN_ONLY = ("resume", "dry_run", "track", "prompts")  # settings that change no bit of a model


@dataclass
class CardSettings:
    """What a card says that no figure tells."""

    repo: str = ""  # where it goes: USER/NAME
    license: str = ""  # for the card, as apache-2.0; empty: not stated
    language: list[str] = field(default_factory=list)  # for the card; none: the dataset's, else zh

    @property
    def name(self) -> str:
        return self.repo.rpartition("/")[2]


def model_card(
    card: CardSettings, run: dict, n_params: int, record: dict, reports: list[dict]
) -> str:
    """run: run.json. record: the log's line of the same step, or {}. reports: evaluations of this
    checkpoint."""
    shape = run["architecture"]
    values = {
        "run": run,
        "n_params": n_params,
        "base": run["settings"].get("init_from", "scratch"),
        "answers": run["dataset"]["kind"] != "pretrain",
        "figures": table(["", "figure"], run_figures(run, n_params, record).items()),
        "architecture": ", ".join(f"`{name}={value}`" for name, value in shape.items()),
        "evaluation": evaluation_table(reports),
        "command": train_command(run),
    }
    data = ModelCardData(pipeline_tag="text-generation", tags=["miniglm", shape["model"]])
    return _fill("model", card, data, values)


def run_figures(run: dict, n_params: int, record: dict) -> dict[str, object]:
    """The figures of a run, by name; what it does not know is left out."""
    progress, environment = run["progress"], run.get("environment", {})
    merged = run.get("merged")
    figures = {
        "parameters": n_params,
        "vocabulary": run["architecture"]["n_vocab"],
        "dataset": f"{run['dataset'].get('name', '')} ({KINDS[run['dataset']['kind']]})",
        "adapter, merged into the weights": merged and f"rank {merged['rank']}",
        "steps": progress["iter"],
        "tokens read": progress.get("tokens"),
        "seconds of training and evaluation": round(progress.get("seconds", 0)) or None,
        "processor": environment.get("processor"),
        "torch": environment.get("torch"),
    }
    figures |= {name: v for name, v in record.items() if name.startswith(("train_loss", "val_"))}
    return {name: value for name, value in figures.items() if value not in (None, "")}


def evaluation_table(reports: list[dict]) -> str:
    """A column a report, a line a figure; "" without reports."""
    left_out = ("checkpoint", "dataset", "split", "seconds")
    names = _names_of(reports, int | float | str, left_out)
    head = [f"{report.get('dataset')}, {report.get('split')}" for report in reports]
    rows = [[f"`{name}`", *(report.get(name) for report in reports)] for name in names]
    return table(["`python evaluations.py`", *head], rows) if reports else ""


def train_command(run: dict) -> str:
    """The command that trained it, with the settings that differ from the defaults."""
    settings = run["settings"]
    names = [name for name in run.get("changed", settings) if name not in RUN_ONLY]
    return shlex.join(["python", "train.py", *(f"--{name}={settings[name]}" for name in names)])


def dataset_card(card: CardSettings, meta: dict, n_vocab: int, sources: list[str]) -> str:
    """meta: meta.json. sources: a line each."""
    splits = meta["splits"].values()
    rows = [[n, *(sizes.get(n) for sizes in splits)] for n in _names_of(splits, int)]
    known = ("kind", "tokenizer_sha256", "dtype")
    totals = {"vocabulary": n_vocab, "ids": meta["dtype"]}
    totals |= {name: meta[name] for name in _names_of([meta], str | int, known)}
    totals |= {f"skipped: {reason}": n for reason, n in meta.get("skipped", {}).items()}
    values = {"meta": meta, "content": KINDS[meta["kind"]], "sources": sources}
    values["splits"] = table(["", *meta["splits"]], rows)
    values["totals"] = table(["", "of all"], totals.items())
    data = DatasetCardData(
        pretty_name=card.name,
        task_categories=["text-generation"],
        tags=["miniglm"],
        viewer=False,  # flat arrays of ids are no table
    )
    return _fill("dataset", card, data, values)


def export_card(card: CardSettings, config: dict, n_params: int) -> str:
    """config: config.json."""
    names = _names_of([config], str | int | float)
    shape = {name: config[name] for name in names if type(config[name]) is not bool}
    rows = table(["", "config.json"], ({"parameters": n_params} | shape).items())
    tags = ["miniglm", config.get("model_type")]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags)
    return _fill("export", card, data, {"config": config, "n_params": n_params, "figures": rows})


def _fill(kind: str, card: CardSettings, data: CardData, values: dict) -> str:
    data.language, data.license = card.language, card.license or None
    template = str(Path(__file__).with_name("card.md"))
    names = {"kind": kind, "repo": card.repo, "name": card.name}
    return f"{ModelCard.from_template(data, template, **values | names)}\n"


def _names_of(records: Iterable[dict], kinds: type, left_out: Iterable[str] = ()) -> list[str]:
    """The keys of the records that have such values, each once."""
    names = (name for r in records for name, value in r.items() if isinstance(value, kinds))
    return [name for name in dict.fromkeys(names) if name not in left_out]


def table(head: list[str], rows: Iterable[Iterable]) -> str:
    """Markdown: a first column of names, then columns of figures."""
    lines = [[name, *map(shown, values)] for name, *values in rows]
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: object) -> str:
    """A figure as cards show it: 12,345, or four digits of a fraction."""
    if isinstance(value, float):
        return f"{value:.4g}"
    # a bar ends a cell, and signatures of scores have some
    text = f"{value:,}" if type(value) is int else str(value).replace("|", "\\|")
    return "" if value is None else text
