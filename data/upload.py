"""A prepared dataset or a trained model -> a repository on the Hugging Face hub.

    python data/upload.py --path=out-sanguo-sft --repo=USER/NAME
    python data/upload.py --path=data/sanguo --repo=USER/NAME --private=True

What PATH is, its files tell; a directory that export.py wrote is taken, too. The repository is
created if it does not exist, and all goes up in one commit: of a run its best checkpoint, so that
the repository, downloaded, is an out_dir that sample.py takes; of a dataset what train.py needs.
Files of the same kind from an earlier upload are deleted. The card is made of figures
(miniglm/interop/hub.py), or is PATH's own README.md. Places on this machine are taken out of the
JSON files.

The token is the hub client's: HF_TOKEN in the environment, or what `hf auth login` keeps; it needs
the right to write. HF_ENDPOINT names another hub. The repository's address goes to
PATH/hub_url.txt.
"""

import json
import os
import re
import sys
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import ROOT, UserError, command, configure, repo_path, show_path

# isort: split
import huggingface_hub
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils import validate_repo_id

from data.fetch_data import SOURCES, Source
from data_utils import Dataset, open_dataset
from miniglm.interop.download import in_one_line
from miniglm.interop.hub import CardSettings, dataset_card, export_card, model_card
from miniglm.jsonl import read_report, write_text
from miniglm.prep.writer import files_of

LINK = "hub_url.txt"
# a path that is absolute, or leads out of the repository, and its last part; several stand one
# behind a comma, with shares behind a colon
PLACE = re.compile(r"(^|,\s*)(?:~[\w.-]*|\.\.|[A-Za-z]:)?[\\/](?:[^,:]*[\\/])?([^,:\\/]+)[\\/]?")
EXPORTED = ("config.json", "generation_config.json", "model.safetensors")
EXPORTED += ("tokenizer.json", "tokenizer_config.json")


@dataclass
class Settings(CardSettings):
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
    write_text(path / LINK, f"{url}\n")
    print(f"{show_path(path)}: {len(upload.files)} files, now at {url}")


def find(name: str) -> Path:
    """The directory of a name: relative to the repository, or a dataset's under data/."""
    for path in (repo_path(name), ROOT / "data" / name) if name else ():
        if path.is_dir():
            return path
    raise UserError(f"path={name!r} is no directory; pass --path=, a dataset or an out_dir")


# --- what goes up ------------------------------------------------------------------------------


def gather(path: Path, card: CardSettings) -> Upload:
    """What goes up of a directory. Raises UserError if it is of no known kind, or damaged."""
    kinds = {"meta.json": of_dataset, "latest": of_run, "config.json": of_export}
    marks = [mark for mark in kinds if (path / mark).is_file()]
    if not marks:
        raise UserError(
            f"{show_path(path)} holds no dataset (meta.json), no run (latest), and nothing of "
            "export.py's (config.json); pass another --path="
        )
    upload = kinds[marks[0]](path, card)
    if (path / "README.md").is_file():
        upload.files["README.md"] = path / "README.md"
    return upload


def of_dataset(path: Path, card: CardSettings) -> Upload:
    data = Dataset(str(path))
    n_vocab = data.tokenizer.n_vocab  # raises UserError if tokenizer.json is another
    meta = public(data.meta)
    origins = {name: origin_of(name) for name in meta.get("sources", [])}
    lines = [
        f"`{name}`" + (f" of {origin.package}, licence: {origin.licence}" if origin else "")
        for name, origin in origins.items()
    ]
    files = {name: path / name for name in [*files_of(meta), "tokenizer.json"]}
    files["meta.json"] = json_bytes(meta)
    card = with_languages(card, data.languages)
    files["README.md"] = dataset_card(card, meta, n_vocab, lines).encode()
    bound = sorted({origin.name for origin in origins.values() if origin and origin.terms})
    terms = f"the terms of {', '.join(bound)} (data/fetch_data.py --list) bar passing it on"
    return Upload("dataset", files, "*.bin", terms if bound else "")


def origin_of(source: str) -> Source | None:
    """Where fetch_data.py had a file from, by its place in data/raw."""
    match = re.fullmatch(r"data/raw/([^/]+)/.+", source)
    return SOURCES.get(match[1]) if match else None


def of_run(path: Path, card: CardSettings) -> Upload:
    # it imports torch, which takes a second that datasets need not wait
    from miniglm.checkpoint import files_alone, load_checkpoint, read_log, read_run

    if "adapter" in read_run(path, "best"):
        raise UserError(
            f"{show_path(path)} holds an adapter, which is nothing without its base; run python "
            f"export.py --format=merged --out_dir={show_path(path)} --to=ANOTHER, and upload that"
        )
    checkpoint = load_checkpoint(path)  # raises UserError if it is damaged
    run = public(checkpoint.run)
    reports = reports_of(path, checkpoint.path.name)
    files = files_alone(checkpoint, run)
    files |= {name: json_bytes(report) for name, report in reports.items()}
    files |= {file.name: file for file in [*path.glob("*.png"), *path.glob("log.jsonl")]}
    record = next((r for r in read_log(path) if r["iter"] == run["progress"]["iter"]), {})
    # evaluation.json is a copy of one of the others
    evaluations = {(r.get("dataset"), r.get("split")): r for r in reports.values()}
    if "merged" in run:
        run["settings"]["lora_rank"] = run["merged"]["rank"]
    card = with_languages(card, languages_of(checkpoint.run["settings"]["dataset"]))
    text = model_card(card, run, checkpoint.n_params, record, [*evaluations.values()])
    return Upload("model", files | {"README.md": text.encode()}, "step-*/*")


def languages_of(dataset: str) -> list[str]:
    """Those that the dataset of a run names, if it still exists."""
    try:
        return open_dataset(dataset).languages
    except UserError:
        return []


def with_languages(card: CardSettings, languages: list[str]) -> CardSettings:
    """With the languages of the card; the hub knows zh-Hant as zh."""
    known = [name.partition("-")[0] for name in languages]
    return replace(card, language=card.language or known or ["zh"])


def reports_of(path: Path, step: str) -> dict[str, dict]:
    """The evaluations of a checkpoint by their files; says which are of another."""
    files = sorted(path.glob("evaluation*.json"))
    reports = {file: read_report(file, (), "make or delete it") for file in files}
    for file, report in reports.items():
        if report.get("checkpoint") != step:
            other = report.get("checkpoint")
            print(f"note: {show_path(file)} is of {other}, not of {step}, and stays here")
    return {f.name: public(r) for f, r in reports.items() if r.get("checkpoint") == step}


def of_export(path: Path, card: CardSettings) -> Upload:
    files = {name: path / name for name in EXPORTED}
    for file in files.values():
        if not file.is_file():
            raise UserError(f"{show_path(file)} is missing; run export.py again")
    try:
        weights = huggingface_hub.get_local_safetensors_metadata(files["model.safetensors"])
    except SafetensorsParsingError as error:
        raise UserError(f"{error}; run export.py again") from None
    n_params = sum(weights.parameter_count.values())
    config = read_report(files["config.json"], (), "run export.py again")
    files["README.md"] = export_card(with_languages(card, []), config, n_params).encode()
    return Upload("model", files)


def public(value: object, key: str = "") -> object:
    """A value of JSON without places on this machine: what lies in the repository is named from
    there, all else by its last part. Prompts are texts."""
    if isinstance(value, dict):
        return {name: public(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return value if key == "prompts" else [public(part) for part in value]
    if isinstance(value, str):
        return PLACE.sub(r"\1\2", value.replace(f"{ROOT}{os.sep}", ""))
    return value


def json_bytes(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


# --- the hub -----------------------------------------------------------------------------------


def connect(repo: str) -> huggingface_hub.HfApi:
    """The client with its token. Raises UserError if there is none, or repo is no name."""
    try:
        validate_repo_id(repo)
        _user, _name = repo.split("/")
    except ValueError:
        raise UserError(f"repo={repo!r} names no repository; pass --repo=USER/NAME") from None
    token = huggingface_hub.get_token()
    if not token:
        raise UserError("no token for the hub; run hf auth login, or set HF_TOKEN")
    return huggingface_hub.HfApi(token=token)


def send(api: huggingface_hub.HfApi, upload: Upload, config: Settings, message: str) -> str:
    """Creates the repository if need be, commits the files, and returns its address."""
    repository = {"repo_id": config.repo, "repo_type": upload.kind}
    with in_one_line(f"upload to {config.repo}"):
        url = api.create_repo(**repository, private=config.private or None, exist_ok=True)
        existing = api.repo_info(**repository)
        if config.private and not existing.private:
            raise UserError(f"{config.repo} is there and is public; take another --repo=")
        names = [file.rfilename for file in existing.siblings or []]
        stale = [n for n in names if fnmatch(n, upload.stale) and n not in upload.files]
        add, delete = huggingface_hub.CommitOperationAdd, huggingface_hub.CommitOperationDelete
        operations = [add(name, content) for name, content in upload.files.items()]
        operations += [delete(name, is_folder=False) for name in stale]
        api.create_commit(**repository, operations=operations, commit_message=message)
        return str(url)


if __name__ == "__main__":
    command(main)
