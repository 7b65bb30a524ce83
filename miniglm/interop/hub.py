"""The card of a repository on the Hugging Face hub, its README.md: made of figures that exist.

    model_card      run.json, the log's line of that step, evaluation reports -> text
    dataset_card    meta.json -> text
    export_card     the config.json of a directory that export.py wrote -> text

The texts are the templates in cards/. data/upload.py sends the card and the files, and takes this
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
}
CODE = "MiniGLM, scripts that train small Chinese language models"
LIMITS = """\
- It knows a part of what its training data say, and nothing else. Nothing checks what it writes: it
  is fluent where it is wrong.
- Nothing was done to keep harmful, private or unfair content of those data from its output."""
NO_LICENCE = (
    "Not stated yet. Whoever publishes this states it, here and as `license:` above; that of the "
    "training data may bind it."
)
LSTM_FIELDS = ("model", "block_size", "n_layer", "n_embd", "norm", "norm_eps", "bias")
LSTM_FIELDS += ("tie_weights", "dropout", "n_vocab", "vocab_size")
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
    architecture = run["architecture"]
    is_lstm = architecture["model"] == "lstm"
    names = [name for name in architecture if name in LSTM_FIELDS or not is_lstm]
    data = ModelCardData(pipeline_tag="text-generation", tags=["miniglm", architecture["model"]])
    return _fill(
        "model.md",
        card,
        data,
        n_params=n_params,
        base=run["settings"].get("init_from", "scratch"),
        answers=run["dataset"]["kind"] in ("sft", "dpo"),
        architecture=architecture,
        architecture_text=", ".join(f"`{name}={architecture[name]}`" for name in names),
        figures=table(["", "figure"], run_figures(run, n_params, record).items()),
        evaluation=evaluation_table(reports),
        command=train_command(run),
    )


def run_figures(run: dict, n_params: int, record: dict) -> dict[str, object]:
    """The figures of a run, by name; what it does not know is left out."""
    progress, environment = run["progress"], run.get("environment", {})
    merged = run.get("merged")
    figures = {
        "parameters": n_params,
        "vocabulary": run["architecture"]["n_vocab"],
        "dataset": f"{run['dataset'].get('name', '')} ({KINDS[run['dataset']['kind']]})",
        "mixed in": (run.get("mix") or {}).get("name"),
        "adapter, merged into the weights": merged and f"rank {merged['rank']}",
        "steps": progress["iter"],
        "tokens read": progress.get("tokens"),
        "seconds of training and evaluation": round(progress.get("seconds", 0)) or None,
        "processor": environment.get("processor"),
        "precision": environment.get("precision"),
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
    """The command that trained it: the settings that differ from the defaults; all of them if
    run.json does not say which those are."""
    settings = run["settings"]
    names = [name for name in run.get("changed", settings) if name not in RUN_ONLY]
    return shlex.join(["python", "train.py", *(f"--{name}={settings[name]}" for name in names)])


def dataset_card(card: CardSettings, meta: dict, n_vocab: int, sources: list[str]) -> str:
    """meta: meta.json. sources: a line each."""
    data = DatasetCardData(
        pretty_name=card.name,
        task_categories=["text-generation"],
        tags=["miniglm"],
        viewer=False,  # flat arrays of ids are no table
    )
    splits = meta["splits"].values()
    rows = [[n, *(sizes.get(n) for sizes in splits)] for n in _names_of(splits, int)]
    totals = {"vocabulary": n_vocab, "ids": meta["dtype"]}
    known = ("kind", "tokenizer_sha256", "dtype")
    totals |= {name: meta[name] for name in _names_of([meta], str | int, known)}
    totals |= {f"skipped: {reason}": n for reason, n in meta.get("skipped", {}).items()}
    return _fill(
        "dataset.md",
        card,
        data,
        content=KINDS[meta["kind"]],
        meta=meta,
        splits=table(["", *meta["splits"]], rows),
        totals=table(["", "of all"], totals.items()),
        sources=sources,
    )


def export_card(card: CardSettings, config: dict, n_params: int) -> str:
    """config: config.json."""
    family = config.get("model_type")
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["miniglm", family]
    )
    shape = {name: config[name] for name in _names_of([config], str | int | float)}
    figures = {"parameters": n_params} | {k: v for k, v in shape.items() if type(v) is not bool}
    rows = table(["", "config.json"], figures.items())
    return _fill("export.md", card, data, family=family, n_params=n_params, figures=rows)


def _fill(template: str, card: CardSettings, data: CardData, **values: object) -> str:
    data.language, data.license = card.language, card.license or None
    common = {"code": CODE, "limits": LIMITS, "licence": card.license or NO_LICENCE}
    path = Path(__file__).parent / "cards" / template
    values |= common | {"repo": card.repo, "name": card.name}
    return f"{ModelCard.from_template(data, str(path), **values)}\n"


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
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    # a bar ends a cell, and signatures of scores have some
    return f"{value:,}" if type(value) is int else str(value).replace("|", "\\|")
