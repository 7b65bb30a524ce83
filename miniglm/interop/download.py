"""A repository of the Hugging Face hub -> a directory here, by the hub's own client.

data/fetch_data.py says where it goes. HF_ENDPOINT names a mirror, HF_TOKEN (or hf auth login) a
token. A connection that breaks is taken up where it broke; of a run that ended, whole files stay.
data/upload.py, too, tells by `in_one_line` what a hub refuses.
"""

import glob
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.logging import set_verbosity_error

from configurator import UserError, show_path

# of a model, what --init_from= reads, and its card; folders hold other forms of the same weights
MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "chat_template.jinja"]
MODEL_FILES += ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
MODEL_FILES += ["README.md", "LICENSE*"]
ADVICE = {
    401: "; see its name, run hf auth login, or set another HF_TOKEN",
    403: "; a gated one wants its terms accepted on its page, a token the right to write",
    404: "; see its name (datasets/OWNER/NAME is a data set), and HF_ENDPOINT if it is set",
    503: "; try again, or name a mirror by HF_ENDPOINT",
}


@dataclass
class Repository:
    kind: Literal["model", "dataset"]
    name: str  # OWNER/NAME
    commit: str
    licence: str  # as the card names it, or "not stated"
    sizes: dict[str, int]  # bytes of the chosen files, by their paths in it


def look_up(address: str, patterns: list[str]) -> Repository:
    """The repository of OWNER/NAME, or of datasets/OWNER/NAME, with the files that match a pattern;
    without patterns a model's MODEL_FILES, or all of a data set's. Raises UserError."""
    name = address.removeprefix("datasets/")
    kind = "model" if name == address else "dataset"
    try:
        validate_repo_id(name)
        _owner, _name = name.split("/")
    except ValueError:
        advice = "--hub=OWNER/NAME for a model, --hub=datasets/OWNER/NAME for a data set"
        raise UserError(f"hub={address!r} names no repository; pass {advice}") from None
    api = huggingface_hub.HfApi()
    with in_one_line(f"fetch {name}"):
        info = api.repo_info(name, repo_type=kind, files_metadata=True)
        if info.gated:
            api.auth_check(name, repo_type=kind)
    card = info.card_data or {}
    licence = card.get("license_name") or card.get("license") or "not stated"
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = patterns or (MODEL_FILES if kind == "model" else ["[!.]*"])  # not .gitattributes
    chosen = {n: size for n, size in sizes.items() if any(fnmatchcase(n, p) for p in wanted)}
    if kind == "model" and not patterns:
        chosen = {n: size for n, size in chosen.items() if "/" not in n}
        if not any(n.endswith(".safetensors") for n in chosen):
            raise UserError(f"{name} has no *.safetensors; name another model")
    if not chosen:
        some = ", ".join([*sizes][:5]) or "none"
        raise UserError(f"--files={','.join(patterns)} matches no file of {name}, such as {some}")
    return Repository(kind, name, info.sha, str(licence), chosen)


def lacking(repository: Repository, folder: Path) -> list[str]:
    """The files that are not in folder in their size."""
    paths = {name: folder / name for name in repository.sizes}
    sizes = {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
    return [name for name, size in repository.sizes.items() if sizes.get(name) != size]


def download(repository: Repository, folder: Path) -> None:
    """Brings the files to folder; those of this commit that are whole are left alone. Raises
    UserError if the disk has no room, or a file cannot be fetched."""
    names = lacking(repository, folder)
    needed = sum(repository.sizes[name] for name in names)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if needed > (free := shutil.disk_usage(there).free):
        advice = f"{needed:,} bytes are to come, {free:,} are free; make room, or pass --out="
        raise UserError(f"{show_path(folder)} has no room: {advice}")
    for name in names:  # the client trusts a file that it has written, even one cut short since
        (folder / name).unlink(missing_ok=True)
    set_verbosity_error()  # its warnings say what the error does
    with in_one_line(f"fetch {repository.name}"):
        files = [glob.escape(name) for name in repository.sizes]
        which = {"repo_type": repository.kind, "revision": repository.commit}
        which |= {"local_dir": folder, "allow_patterns": files}
        huggingface_hub.snapshot_download(repository.name, **which)
    if names := lacking(repository, folder):  # without a connection it returns what is there
        raise UserError(f"{repository.name}: {names[0]} did not come whole; run it again")


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Raises a UserError of one line, without the token, for whatever the client raises while it
    is to do `what`, say "upload to OWNER/NAME"."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client's, its http client's, hf_xet's: they share no base
        line = " ".join(refusal(error, what).split())
        raise UserError(line.replace(huggingface_hub.get_token() or "\n", "...")) from error


def refusal(error: BaseException, what: str) -> str:
    """What an answer of the hub says, or why there is none, and what to do."""
    hub = huggingface_hub.constants.ENDPOINT
    # "Error while uploading ...", but not what is wrong with a card
    while error.__cause__ and not hasattr(error, "response") and type(error) is not ValueError:
        error = error.__cause__
    response = getattr(error, "response", None)
    if response is not None:
        code = response.status_code
        said = getattr(error, "server_message", None) or response.reason_phrase
        return f"{hub} refused to {what}: {code}, {said.rstrip('.')}{ADVICE.get(code, '')}"
    return f"cannot {what} at {hub}: {type(error).__name__}: {error}; see HF_ENDPOINT, or try again"
