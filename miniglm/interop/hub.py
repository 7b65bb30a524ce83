"""The card of a repository on the Hugging Face hub, its README.md: made of figures that are there.

    model_card      run.json, the log's line of that step, evaluation reports -> text
    dataset_card    meta.json -> text
    export_card     the config.json of a directory that export.py wrote -> text

What goes up with it is upload.py's, which also takes this machine's paths out of the figures.
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import huggingface_hub

KINDS = {
    "pretrain": "texts",
    "sft": "questions and answers",
    "dpo": "preferences, questions with a chosen and a rejected answer",
}
CODE = "MiniGLM, scripts that train small Chinese language models"
LIMITS = """\
- It knows a part of what its training data say, and nothing else. Nothing checks what it writes: it
  is fluent where it is wrong.
- Nothing was done to keep from its output what is harmful, private or unfair in those data."""


@dataclass
class About:
    """What no figure tells."""

    repo: str = ""  # where it goes: USER/NAME
    license: str = ""  # for the card, as apache-2.0; empty: not stated
    language: list[str] = field(default_factory=list)  # for the card; none: the dataset's, else zh

    @property
    def name(self) -> str:
        return self.repo.rpartition("/")[2]


def model_card(
    about: About, run: dict, n_params: int, record: dict, reports: list[dict], command: str
) -> str:
    """run: run.json. record: the log's line of the same step, or {}. reports: evaluations of this
    checkpoint. command: what trained it, see `train_command`."""
    settings, data = run["settings"], run["dataset"]
    architecture = run["architecture"]
    answers = data["kind"] in ("sft", "dpo")
    base = settings.get("init_from", "scratch")
    origin = "from scratch" if base == "scratch" else f"on from the model in `{base}`"
    words = "QUESTION" if answers else "TEXT"
    head = front_matter(
        about, pipeline_tag="text-generation", tags=["miniglm", architecture["model"]]
    )
    return f"""{head}
# {about.name}

{"An LSTM" if architecture["model"] == "lstm" else "A GPT"} of {n_params:,} parameters, trained \
{origin}. It {"answers questions" if answers else "continues texts"}. The code is {CODE}.

## Figures

{table(["", "figure"], run_figures(run, n_params, record).items())}

Architecture: {architecture_text(architecture)}

## Evaluation

{evaluation_table(reports)}

## Training

    {command}

The dataset goes by its name or place on the machine that trained it.

## Use

With a checkout of that code:

    hf download {about.repo} --local-dir=out-{about.name}
    python sample.py --out_dir=out-{about.name} --start={words}

`--init_from=out-{about.name}` trains on from it; what `--resume` needs besides is not here.

## Limits

{LIMITS}
- It sees the last {architecture["block_size"]:,} tokens of a text.

{license_section(about)}"""


def run_figures(run: dict, n_params: int, record: dict) -> dict[str, object]:
    """The figures of a run, by name; what it does not know is left out."""
    progress, merged = run["progress"], run.get("merged")
    environment = run.get("environment", {})
    figures = {
        "parameters": n_params,
        "vocabulary": run["architecture"]["n_vocab"],
        "dataset": f"{run['dataset'].get('name', '')} ({KINDS[run['dataset']['kind']]})",
        "mixed in": (run.get("mix") or {}).get("name"),
        "adapter, merged into the weights": merged and f"rank {merged['rank']}",
        "steps": progress["iter"],
        "tokens read": progress.get("tokens"),
        "seconds of training and evaluation": round(progress.get("seconds", 0)) or None,
        "computed with": ", ".join(
            str(environment[key]) for key in ("processor", "precision") if key in environment
        ),
        "torch": environment.get("torch"),
    }
    figures |= {
        key: value for key, value in record.items() if key.startswith(("train_loss", "val_"))
    }
    return {name: value for name, value in figures.items() if value not in (None, "")}


def architecture_text(architecture: dict) -> str:
    from model import LSTM_READS  # torch takes a second, which datasets need not

    of_lstm = LSTM_READS | {"n_vocab", "vocab_size"}
    is_lstm = architecture["model"] == "lstm"
    names = [name for name in architecture if name in of_lstm or not is_lstm]
    return ", ".join(f"`{name}={architecture[name]}`" for name in names)


def evaluation_table(reports: list[dict]) -> str:
    """A column a report, a line a figure."""
    if not reports:
        return "Not evaluated."
    left_out = {"checkpoint", "dataset", "split", "seconds"}
    names = dict.fromkeys(
        key
        for report in reports
        for key, value in report.items()
        if isinstance(value, int | float | str) and key not in left_out
    )
    head = [f"{report.get('dataset')}, {report.get('split')}" for report in reports]
    rows = [[f"`{name}`", *(report.get(name) for report in reports)] for name in names]
    return table(["`python evaluations.py`", *head], rows)


def train_command(settings: dict) -> str:
    """The command line of a run's settings: those that differ from the defaults."""
    from train import Settings  # torch takes a second, which datasets need not

    left_out = {"resume", "dry_run", "track", "prompts"}  # they change no bit of a run
    # a run that is older than the setting `optimizer` had AdamW
    given = {"optimizer": "adamw"} | settings
    flags = [
        f"--{f.name}={flag_text(given[f.name])}"
        for f in fields(Settings)
        if f.name in given and f.name not in left_out and given[f.name] != f.default
    ]
    return shlex.join(["python", "train.py", *flags])


def flag_text(value: object) -> str:
    """A setting's value as the command line takes it."""
    if isinstance(value, list) and value and not any("," in str(part) for part in value):
        return ",".join(map(str, value))
    return str(value)


def dataset_card(about: About, meta: dict, n_vocab: int, sources: list[str]) -> str:
    """meta: meta.json. sources: a line each."""
    head = front_matter(
        about,
        pretty_name=about.name,
        task_categories=["text-generation"],
        tags=["miniglm"],
        viewer=False,  # flat arrays of ids are no table
    )
    splits = meta["splits"]
    names = dict.fromkeys(
        key for sizes in splits.values() for key, value in sizes.items() if isinstance(value, int)
    )
    rows = [[name, *(sizes.get(name) for sizes in splits.values())] for name in names]
    others = {
        key: value
        for key, value in meta.items()
        if isinstance(value, str | int) and key not in ("kind", "tokenizer_sha256", "dtype")
    }
    skipped = {f"skipped: {why}": n for why, n in meta.get("skipped", {}).items()}
    return f"""{head}
# {about.name}

Token ids: {KINDS[meta["kind"]]}. The code that made them and trains on them is {CODE}.

{table(["", *splits], rows)}

{table(["", "of all"], ({"vocabulary": n_vocab, "ids": meta["dtype"]} | others | skipped).items())}

`tokenizer.json` has sha256 `{meta["tokenizer_sha256"]}`.

## Sources

{chr(10).join(f"- {line}" for line in sources)}

## Use

With a checkout of that code:

    hf download {about.repo} --repo-type=dataset --local-dir=data/{about.name}
    python train.py --dataset={about.name}

Each split is a flat array, `numpy.memmap("train.bin", "{meta["dtype"]}", "r")`; more than 2^28
tokens lie in several files, one behind another. `*_mask.bin` is 1 where a token is trained,
`*_idx.bin` has the bounds of rows (uint64).

{license_section(about)}"""


def export_card(about: About, config: dict, n_params: int) -> str:
    """config: config.json."""
    head = front_matter(
        about,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["miniglm", config["model_type"]],
    )
    shape = {
        key: value
        for key, value in config.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool)
    }
    return f"""{head}
# {about.name}

A {config["model_type"]} of {n_params:,} parameters, trained and exported with {CODE}.

{table(["", "config.json"], ({"parameters": n_params} | shape).items())}

## Use

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("{about.repo}")
    model = AutoModelForCausalLM.from_pretrained("{about.repo}")

## Limits

{LIMITS}

{license_section(about)}"""


def front_matter(about: About, **more: object) -> str:
    """The metadata that the hub reads, YAML between two lines of ---."""
    data = huggingface_hub.CardData(language=about.language, license=about.license or None, **more)
    return f"---\n{data.to_yaml()}\n---\n"


def license_section(about: About) -> str:
    stated = about.license or (
        "Not stated yet. Whoever publishes this states it, here and as `license:` above; that of "
        "the training data may bind it."
    )
    return f"## Licence\n\n{stated}\n"


def table(head: list[str], rows: Iterable[Iterable]) -> str:
    """Markdown: a first column of names, then columns of figures."""
    lines = [[name, *map(shown, values)] for name, *values in rows]
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: object) -> str:
    """A figure as cards show it: 12,345, or four digits of what is no whole number."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    # a bar ends a cell, and signatures of scores have some
    return f"{value:,}" if type(value) is int else str(value).replace("|", "\\|")
