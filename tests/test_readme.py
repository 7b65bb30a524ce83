"""READMEs and docs/: both languages agree, links and files exist, commands and settings parse."""

import functools
import importlib
import importlib.util
import re
import runpy
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import pytest

from configurator import ROOT, UserError, configure
from data.fetch_data import select
from data_utils import Dataset
from tests.runs import SOURCES

ENGLISH = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
CHINESE = ["README.zh-CN.md", *(f"docs/zh/{path.name}" for path in (ROOT / "docs/zh").glob("*.md"))]
DOCUMENTS = sorted(ENGLISH + CHINESE)
READMES = (ENGLISH[0], CHINESE[0])
TWINS = [READMES, *((f"docs/{Path(n).name}", n) for n in DOCUMENTS if re.search("zh/(?!faq)", n))]
ADDED = "data/reviews/prepare.py"  # the script that docs/extend.md shows
NOT_OURS = {ADDED, "lstm_train.py", "sample_for_test.py", "hf_link.txt", "train_pretrain.py"}

NOT_SETTINGS = {"--help", "--key=value", "--all", "--repo-type=dataset"}  # --all: of run.sh
# all that runs something, but not with what docs/extend.md has its reader add
RUNS = re.compile(r"(?:python|bash|pip|source|\.venv\S*) (?!.*(?:reviews|scalenorm))")
SUFFIX = r"\.(?:py|ipynb|sh|md|txt|json|jsonl|bin|png|safetensors|toml)(?![\w/])"
FILE = re.compile(rf"(?<![\w./*\\-])[\w.*][\w./*-]*(?:{SUFFIX}|/(?![\w./*-]))", re.ASCII)
FIGURE = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)+|(?<![\w.])\d[\d,]+\d(?![\w.])", re.ASCII)


# --- reading Markdown --------------------------------------------------------------------------


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def spans(text: str) -> list[str]:
    """The `inline code` outside code blocks."""
    prose = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    marked = re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", prose, re.DOTALL)
    return [" ".join(span.split()) for _, span in marked]


def commands(text: str) -> list[str]:
    """Lines of indented code and inline code that run something, without the notes behind them."""
    code = re.findall(r"^    .*$", re.sub(r"\\\n\s*", "", text), re.MULTILINE)
    lines = [re.split(r"\s{2,}|\s#", line.strip())[0] for line in [*code, *spans(text)]]
    lines = [re.sub(r"^(\w+=\S* )+", "", line) for line in lines]  # variables of the environment
    return [line for line in lines if RUNS.match(line)]


def files(text: str) -> set[str]:
    """Words that look like a file or, with / at the end, a folder."""
    return set(FILE.findall(text))


def test_commands_and_files_are_found():
    text = "见`bash run.sh`；`` `1`2 ``, *_idx.bin, a/b, docs/zh/; `python -m bench\nstep`, a.B\n"
    code = "    N=1 .venv/bin/pip a \\\n    --b=2  # times it\n"
    assert commands(text + code) == [".venv/bin/pip a --b=2", "bash run.sh", "python -m bench step"]
    assert files(text) == {"run.sh", "*_idx.bin", "docs/zh/"}


# --- both languages ----------------------------------------------------------------------------


@pytest.mark.parametrize(("english", "chinese"), TWINS)
def test_twins_name_the_same_commands_and_readmes_the_same_files(english, chinese):
    texts = read(english), read(chinese).replace("docs/zh/", "docs/")
    assert {*commands(texts[0])} == {*commands(texts[1])}
    if english == "README.md":
        # they link to each other; the common questions are in Chinese only
        assert files(texts[0]) ^ files(texts[1]) == {*READMES, "docs/faq.md"}


def test_the_chinese_figures_stand_in_an_english_document():
    """Figures with a point, or of three digits and more; whoever changes one changes both."""
    known = {figure for name in ENGLISH for figure in FIGURE.findall(read(name))}
    unknown = {name: sorted(set(FIGURE.findall(read(name))) - known) for name in CHINESE}
    assert unknown == {name: [] for name in CHINESE}


@pytest.mark.parametrize(("name", "other"), [READMES, READMES[::-1]])
def test_a_readme_is_one_page_and_links_to_the_other(name, other):
    lines = read(name).splitlines()
    assert len(lines) <= 230 and f"]({other})" in "".join(lines[:5])


# --- links and files ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_resolve(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path
        assert target.is_file(), f"no {link}"
        if anchor:  # as GitHub makes it of a heading
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@functools.cache
def is_there(name: str) -> bool:
    """Whether the repository has a file, or git ignores its place since scripts make it, or, for a
    name without its folder, a script speaks of it. What lies in my/ is the reader's own."""
    pattern = name.replace("NAME", "*").rstrip("/")
    ignored = ["my", *(line.rstrip("/") for line in read(".gitignore").splitlines())]
    places = [pattern, *map(str, Path(pattern).parents)]
    if any(ROOT.glob(pattern)) or any(fnmatch(p, line) for p in places for line in ignored):
        return True
    word = re.compile(rf"(?<![\w.]){re.escape(name.lstrip('*'))}(?!\w)")
    sources = (path.read_text(encoding="utf-8") for part in SOURCES for path in ROOT.glob(part))
    return "/" not in name and any(map(word.search, sources))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_named_file_is_there_or_is_made_by_scripts(name):
    prose = re.sub(r"\[[^\]]*\]\([^)]*\)|--\S+", "", read(name))  # links and flags: elsewhere
    assert [file for file in files(prose) - NOT_OURS if not is_there(file)] == []


def test_a_file_that_is_not_there_is_noticed():
    assert all(map(is_there, ("train.py", "config/", "out-x/a.png", "data/x/a.bin", "run.json")))
    assert not any(map(is_there, ("trian.py", "configs/", "data/sanguo/prepared.py", "runs.json")))


# --- commands and settings ---------------------------------------------------------------------


def parse(command: str) -> None:
    """Raises UserError or AssertionError if a command names a script, module, setting or file that
    does not exist."""
    runner, *argv = shlex.split(command)
    if runner.endswith("python") and argv[0] == "-m":
        module, *argv = [f"bench.{argv[2]}", *argv[3:]] if argv[1] == "bench" else argv[1:]
        assert importlib.util.find_spec(module)
        script = module.replace(".", "/") + ".py"
        if (ROOT / script).is_file():
            configure(settings(script), argv)
    elif runner.endswith("python"):
        config = configure(settings(argv[0]), [word for word in argv[1:] if word != "--help"])
        if argv[0] == "data/fetch_data.py":
            select(config.names)
    elif runner.endswith("pip"):
        assert {word for word in argv if word.startswith("--")} <= {"--index-url"}
        assert {word for word in argv if "==" in word} <= {*read("requirements.txt").split()}
    elif runner == "bash":
        cases = re.findall(r"case \$\{1-\} in\n(.*?)\n\s*esac", read(argv[0]), re.DOTALL)
        labels = [set(re.findall(r"^\s*([\w-]+)\)", case, re.MULTILINE)) for case in cases]
        known = [labels[-1], set().union(*labels[:-1])]  # first words; those behind them
        assert all(word in words for word, words in zip(argv[1:], known, strict=False))


def settings(script: str) -> type:
    """The Settings of a script, as data/sanguo/prepare.py."""
    assert (ROOT / script).is_file(), f"no script {script}"
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).Settings


def misspelt(command: str) -> Iterator[str]:
    """The command with a letter too many in a flag, file, module, or in a part or word of it."""
    names = r"(?<= )(?:--\w+|[\w/-]+(?=\.py|\.sh))|(?<=-m )[\w.]+|(?<=-m bench )\w+"
    for match in re.finditer(names + r"|(?<=run\.sh )[\w-]+", command, re.ASCII):
        yield f"{command[: match.end()]}q{command[match.end() :]}"


@functools.cache
def fault(command: str) -> Exception | None:
    """What is wrong with a command, if anything."""
    try:
        return parse(command)
    except (UserError, AssertionError, FileNotFoundError) as error:
        return error


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_command_parses_and_only_as_it_is_spelt(name):
    for command in dict.fromkeys(commands(read(name))):
        assert fault(command) is None, command
        for wrong in misspelt(command):
            assert fault(wrong), f"{wrong} parses, too"


def takes(script: str, flags: list[str]) -> bool:
    """Whether a script has these flags, and takes the values that they have together."""
    names = [flag[2:].partition("=")[0] for flag in flags]
    try:
        configure(settings(script), [flag for flag in flags if "=" in flag.rstrip("=")])
    except UserError as error:  # one that names none of the flags is for want of others
        if any(re.search(rf"\b{name}\b[=']", str(error)) for name in names):
            return False
    return {*names} <= {field.name for field in fields(settings(script))}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_flag_in_prose_is_a_setting(name):
    words = {word for doc in DOCUMENTS for line in commands(read(doc)) for word in line.split()}
    scripts = [word for word in words if word.endswith(".py") and not word.startswith("config/")]
    for span in spans(read(name)):
        flags = re.sub(r"^\S+\.py ", "", span).split()
        if all(flag.startswith("--") for flag in flags) and flags[0] not in NOT_SETTINGS:
            assert any(takes(script, flags) for script in scripts), f"no script takes {span}"


def test_a_flag_that_no_script_takes_is_noticed():
    assert takes("train.py", ["--optimizer=adamw", "--learning_rate=3e-3", "--patience="])
    for flags in (["--masks="], ["--optimizer=adamv"], ["--optimizer=adamw", "--vocab_size=9"]):
        assert not takes("train.py", flags)


@pytest.mark.parametrize("name", ["docs/extend.md", "docs/zh/extend.md"])
def test_the_dataset_that_one_adds_is_prepared(name, tmp_path):
    script, lines = tmp_path / ADDED, tmp_path / "reviews.txt"
    script.parent.mkdir(parents=True)
    block = re.search(r'^    """.*command\(main\)$', read(name), re.DOTALL | re.MULTILINE)[0]
    script.write_text(textwrap.dedent(block), encoding="utf-8")
    lines.write_text("坏行\n" + "\n".join(f"5\t读了{n}遍" for n in range(50)), encoding="utf-8")
    argv = [f"--input={lines}", f"--out={tmp_path}", "--vocab_size=300", "--val=0.5"]
    runpy.run_path(str(script))["main"](argv)
    assert Dataset(str(tmp_path)).meta["skipped"] == {"no tab": 1}
