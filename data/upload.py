"""A prepared dataset or a trained model -> a repository on the Hugging Face hub.

    python data/upload.py --path=out-sanguo-sft --repo=USER/NAME
    python data/upload.py --path=data/sanguo --repo=USER/NAME --private=True

Which of them PATH is, its files tell; a directory that export.py wrote will do, too. A repository
that is not there is made, and all goes up in one commit: of a run its best checkpoint, so that the
repository, downloaded, is an out_dir that sample.py takes; of a dataset what train.py needs. What
an earlier upload left of the same kind goes. The card is made of figures (cards.py), or is PATH's
own README.md. Places on this machine are taken out of the JSON files.

The token is the hub client's: HF_TOKEN in the environment, or what `hf auth login` keeps; it needs
the right to write. HF_ENDPOINT names another hub. The repository's address goes to
PATH/hub_url.txt.
"""

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import huggingface_hub  # it reads HF_ENDPOINT where a name of it is first used
from safetensors import SafetensorError, safe_open

from configurator import ROOT, UserError, command, configure, repo_path, show_path, written_aside
from data.fetch_data import SOURCES, Source
from data_utils import Dataset, open_dataset
from miniglm.interop.hub import About, dataset_card, export_card, model_card, train_command
from miniglm.prep.writer import files_of

LINK = "hub_url.txt"
# a path that is absolute, or leads out of the repository; several stand one behind a comma, with
# shares behind a colon
PLACE = re.compile(r"(^|,\s*)((?:~[\w.-]*|\.\.|[A-Za-z]:)?[\\/][^,:]*)")
EXPORTED = ("generation_config.json", "model.safetensors", "tokenizer.json")
EXPORTED += ("tokenizer_config.json", "config.json")
ADVICE = {
    401: "; run hf auth login, or set another HF_TOKEN",
    403: "; take a token that may write there, or another --repo=",
    404: "; see --repo=, and HF_ENDPOINT if it is set",
}


@dataclass
class Settings(About):
    path: str = ""  # what to upload: a dataset, an out_dir, or what export.py wrote
    private: bool = False  # a repository that others do not see


@dataclass
class Upload:
    """What goes up: each file by its name in the repository, where it lies or what it holds."""

    kind: Literal["model", "dataset"]
    files: dict[str, Path | bytes]
    stale: str = ""  # pattern of names: other files of the repository that have such are deleted
    terms: str = ""  # why it may not be published, if so


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    path = find(config.path)
    api = connect(config.repo)
    upload = gather(path, config)
    if upload.terms and not config.private:
        raise UserError(f"{show_path(path)}: {upload.terms}; pass --private=True")
    url = send(api, upload, config, f"Upload {path.name}")
    with written_aside(path / LINK) as aside:
        aside.write_text(f"{url}\n", encoding="utf-8")
    print(f"{show_path(path)}: {len(upload.files)} files, now at {url}")


def find(name: str) -> Path:
    """The directory of a name: relative to the repository, or a dataset's under data/."""
    if not name:
        raise UserError("what is to go up? pass --path=, a dataset or an out_dir")
    places = repo_path(name), ROOT / "data" / name
    for path in places:
        if path.is_dir():
            return path
    raise UserError(f"no directory {show_path(places[0])}; pass another --path=")


# --- what goes up ------------------------------------------------------------------------------


def gather(path: Path, about: About) -> Upload:
    """What goes up of a directory. UserError where it is none that is known, or damaged."""
    kinds = {"meta.json": of_dataset, "latest": of_run, "config.json": of_export}
    for mark, of_kind in kinds.items():
        if (path / mark).is_file():
            upload = of_kind(path, about)
            break
    else:
        raise UserError(
            f"{show_path(path)} holds no dataset (meta.json), no run (latest), and nothing of "
            "export.py's (config.json); pass another --path="
        )
    if (path / "README.md").is_file():
        upload.files["README.md"] = path / "README.md"
    return upload


def of_dataset(path: Path, about: About) -> Upload:
    data = Dataset(str(path))
    n_vocab = data.tokenizer.n_vocab  # UserError where tokenizer.json is another
    about, meta = speaking(about, data.languages), public(data.meta)
    origins = {name: origin_of(name) for name in meta.get("sources", [])}
    lines = [
        f"`{name}`" + (f" of {one.package}, licence: {one.licence}" if one else "")
        for name, one in origins.items()
    ]
    files = {name: path / name for name in [*files_of(meta), "tokenizer.json"]}
    files["meta.json"] = json_bytes(meta)
    files["README.md"] = dataset_card(about, meta, n_vocab, lines).encode()
    bound = sorted({one.name for one in origins.values() if one and one.terms})
    terms = f"the terms of {', '.join(bound)} (data/fetch_data.py --list) bar passing it on"
    return Upload("dataset", files, "*.bin", terms if bound else "")


def origin_of(source: str) -> Source | None:
    """Where fetch_data.py had a file from, by its place in data/raw."""
    match = re.fullmatch(r"data/raw/([^/]+)/.+", source)
    return SOURCES.get(match[1]) if match else None


def of_run(path: Path, about: About) -> Upload:
    # torch takes a second, which datasets need not
    from miniglm.checkpoint import files_alone, load_checkpoint, read_log, read_run

    if "adapter" in read_run(path, "best"):
        raise UserError(
            f"{show_path(path)} holds an adapter, which is nothing without its base; run python "
            f"export.py --format=merged --out_dir={show_path(path)} --to=ANOTHER, and upload that"
        )
    checkpoint = load_checkpoint(path)  # UserError where it is damaged
    step, run = checkpoint.path.name, public(checkpoint.run)
    reports = reports_of(path, step)
    files = files_alone(checkpoint, run)
    files |= {name: json_bytes(report) for name, report in reports.items()}
    pictures = sorted(path.glob("*.png"))
    files |= {file.name: file for file in [*pictures, path / "log.jsonl"] if file.is_file()}
    record = next((r for r in read_log(path) if r["iter"] == run["progress"]["iter"]), {})
    # evaluation.json is a copy of one of the others
    evaluations = {(str(r.get("dataset")), str(r.get("split"))): r for r in reports.values()}
    rank = {"lora_rank": run["merged"]["rank"]} if "merged" in run else {}
    trained_by = train_command(run["settings"] | rank)
    about = speaking(about, languages_of(checkpoint.run["settings"]["dataset"]))
    evaluated = [*evaluations.values()]
    card = model_card(about, run, checkpoint.n_params, record, evaluated, trained_by)
    files["README.md"] = card.encode()
    return Upload("model", files, "step-*/*")


def languages_of(dataset: str) -> list[str]:
    """Those that the dataset of a run names, where it is still there."""
    try:
        return getattr(open_dataset(dataset), "languages", [])  # a mixture has none
    except UserError:
        return []


def speaking(about: About, named: list[str]) -> About:
    """With the languages of the card; the hub knows zh-Hant as zh."""
    known = [name.partition("-")[0] for name in named]
    return replace(about, language=about.language or known or ["zh"])


def reports_of(path: Path, step: str) -> dict[str, dict]:
    """The evaluations of a checkpoint by their files; says which are of another."""
    reports = {}
    for file in sorted(path.glob("evaluation*.json")):
        report = read_json(file)
        if report.get("checkpoint") == step:
            reports[file.name] = public(report)
        else:
            print(
                f"note: {show_path(file)} is of {report.get('checkpoint')}, not of {step}, and "
                "stays here; python evaluations.py makes another"
            )
    return reports


def of_export(path: Path, about: About) -> Upload:
    for name in ("model.safetensors", "tokenizer.json"):
        if not (path / name).is_file():
            raise UserError(f"{show_path(path / name)} is missing; run export.py again")
    try:
        with safe_open(path / "model.safetensors", "numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"{show_path(path / 'model.safetensors')} is damaged ({error}); run export.py again"
        ) from None
    config = read_json(path / "config.json")
    if "model_type" not in config:
        raise UserError(f"{show_path(path / 'config.json')} has no model_type; run export.py again")
    files = {name: path / name for name in EXPORTED if (path / name).is_file()}
    n_params = sum(map(math.prod, shapes))
    files["README.md"] = export_card(speaking(about, []), config, n_params).encode()
    return Upload("model", files)


def public(value: object, key: str = "") -> object:
    """A value of JSON without places on this machine: what lies in the repository is named from
    there, all else by its last part. Prompts are texts."""
    if isinstance(value, dict):
        return {name: public(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return value if key == "prompts" else [public(part) for part in value]
    return PLACE.sub(_shortened, value) if isinstance(value, str) else value


def _shortened(match: re.Match) -> str:
    before, place = match.groups()
    if Path(place).is_relative_to(ROOT):
        return before + show_path(place)
    return before + re.split(r"[\\/]", place.rstrip("\\/"))[-1]


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{show_path(file)} is damaged ({error}); make or delete it") from None
    if not isinstance(content, dict):
        raise UserError(f"{show_path(file)} is damaged (it holds no object); make or delete it")
    return content


def json_bytes(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


# --- the hub -----------------------------------------------------------------------------------


def connect(repo: str) -> "huggingface_hub.HfApi":
    """The client with its token. UserError where there is none, or repo is no name."""
    if repo.count("/") != 1:
        raise UserError(f"repo={repo!r} names no repository; pass --repo=USER/NAME")
    with in_one_line(repo):
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise UserError(f"repo={repo!r} names no repository: {error}") from None
        token = huggingface_hub.get_token()
        if not token:
            raise UserError("no token for the hub; run hf auth login, or set HF_TOKEN")
        if not (token.isascii() and token.isprintable()):  # the client would show it, or part of it
            raise UserError("the hub's token has signs that no token has; set another HF_TOKEN")
        return huggingface_hub.HfApi(token=token)


def send(api: "huggingface_hub.HfApi", upload: Upload, config: Settings, message: str) -> str:
    """Makes the repository where there is none, commits the files, and returns its address."""
    with in_one_line(config.repo, api.token):
        operations = [
            huggingface_hub.CommitOperationAdd(name, content)
            for name, content in upload.files.items()
        ]
        about = {"repo_id": config.repo, "repo_type": upload.kind}
        url = api.create_repo(**about, private=config.private or None, exist_ok=True)
        there = api.repo_info(**about)
        if config.private and not there.private:
            raise UserError(f"{config.repo} is there and is public; take another --repo=")
        names = [file.rfilename for file in there.siblings or []]
        operations += [
            huggingface_hub.CommitOperationDelete(name, is_folder=False)
            for name in names
            if fnmatch(name, upload.stale) and name not in upload.files
        ]
        api.create_commit(**about, operations=operations, commit_message=message)
        return str(url)


@contextmanager
def in_one_line(repo: str, token: str = "") -> Iterator[None]:
    """Whatever the client raises, as a UserError of one line, which does not have the token."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client's, its http client's, hf_xet's: they share no base
        line = " ".join(refusal(error, repo).split())
        raise UserError(line.replace(token, "...") if token else line) from error


def refusal(error: BaseException, repo: str) -> str:
    """What an answer of the hub says, or what is in the way to it."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    while isinstance(error, RuntimeError) and error.__cause__:  # "Error while uploading ..."
        error = error.__cause__
    response = getattr(error, "response", None)
    if response is None:
        reason = str(error) or type(error).__name__
        if isinstance(error, json.JSONDecodeError | KeyError):
            reason = "it does not answer as a hub does"
        advice = "; see the network, and HF_ENDPOINT"
        if reason.startswith("Invalid metadata"):  # what the client says of a README.md
            advice = ""
        elif "/xet-" in reason:  # the client asks for it wherever its package is there
            advice = "; for a hub without xet set HF_HUB_DISABLE_XET=1"
        return f"cannot upload to {repo} at {hub}: {reason.rstrip('.')}{advice}"
    said = getattr(error, "server_message", None) or response.reason_phrase
    code = response.status_code
    return f"{hub} refused {repo}: {code}, {said.rstrip('.')}{ADVICE.get(code, '')}"


if __name__ == "__main__":
    command(main)
