"""Both READMEs name the same commands and files; what they and docs/ tell one to run is parsed."""

import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from fnmatch import fnmatch

import pytest

from configurator import ROOT, UserError, configure
from data.fetch_data import select
from tests.runs import SOURCES

ENGLISH, CHINESE = "README.md", "README.zh-CN.md"
DOCUMENTS = [ENGLISH, CHINESE, *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
# what only one README has a reason to name
ONE_README_ONLY = {
    "python -m pip config set global.index-url <镜像地址>",  # pip's mirrors, for readers in China
    ENGLISH,  # each links to the other
    CHINESE,
}

RUNNERS = ("python", "bash", "pip", "source", "tensorboard")  # and what is in .venv/
SUFFIXES = "py|sh|md|txt|json|jsonl|bin|png|safetensors|toml"
FILE = re.compile(rf"(?<![\w./*\\-])([\w.*][\w./*-]*\.(?:{SUFFIXES}))(?![\w/])", re.ASCII)
FOLDER = re.compile(r"(?<![\w./*\\-])([\w.*-][\w./*-]*/)(?![\w./*-])", re.ASCII)


# --- reading Markdown --------------------------------------------------------------------------


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_lines(text: str) -> list[str]:
    """Lines of code blocks, indented or fenced; continued ones joined, shell loops unrolled."""
    lines, fenced = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line)
    code = re.sub(r"\\\n\s*", "", "\n".join(lines))
    loop = re.compile(r"for (\w+) in ([^;\n]+); do\n(.*?)\n\s*done", re.DOTALL)
    return loop.sub(unroll, code).splitlines()


def unroll(loop: re.Match) -> str:
    """The body of `for NAME in A B; do`, once with A and once with B."""
    return "\n".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split())


def spans(text: str) -> list[str]:
    """What stands in `inline code`, outside code blocks."""
    prose = re.sub(r"^ *```.*?^ *```|^    .*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands(text: str) -> list[str]:
    """Lines of code blocks and inline code that run something; notes behind them cut off."""
    found = []
    for line in [*code_lines(text), *spans(text)]:
        line = re.split(r"\s{2,}|\s#", line.strip())[0]
        line = re.sub(r"^(\w+=\S* )+", "", line)  # variables of the environment
        first, blank, _ = line.partition(" ")
        if blank and (first in RUNNERS or first.startswith(".venv")):
            found.append(line)
    return list(dict.fromkeys(found))


def files(text: str) -> set[str]:
    """Words that look like a file or, with / at the end, a folder, wherever they stand."""
    return {match[1] for pattern in (FILE, FOLDER) for match in pattern.finditer(text)}


def test_commands_are_found_in_blocks_and_inline_code():
    text = """
Run `bash run.sh` or `python train.py
--resume`, not python -m bench or `python`.

    python sample.py --start=孔明是谁？     # asks; python x.py
    OMP_NUM_THREADS=1 python -m bench step # times it
    python train.py a.py \\
        --n_layer=2   and more
    for x in 1 2; do
      python train.py --seed=$x
    done
    问：python

```
.venv/bin/pip install wandb
```
"""
    assert sorted(commands(text)) == [
        ".venv/bin/pip install wandb",
        "bash run.sh",
        "python -m bench step",
        "python sample.py --start=孔明是谁？",
        "python train.py --resume",
        "python train.py --seed=1",
        "python train.py --seed=2",
        "python train.py a.py --n_layer=2",
    ]


def test_files_are_found_between_words_of_any_language():
    text = "见run.sh、[表](docs/a.md)。`data/NAME/` has *_idx.bin; config/ torch 2.13.0, a/b, a.B"
    assert files(text) == {"run.sh", "docs/a.md", "data/NAME/", "*_idx.bin", "config/"}


# --- the same in both --------------------------------------------------------------------------


@pytest.mark.parametrize("find", [commands, files])
def test_both_readmes_name_the_same(find):
    english, chinese = (set(find(read(name))) - ONE_README_ONLY for name in (ENGLISH, CHINESE))
    lacks = {CHINESE: english - chinese, ENGLISH: chinese - english}
    lines = [f"{name} does not name {word!r}" for name in lacks for word in sorted(lacks[name])]
    assert not lines, "\n" + "\n".join(lines)


@pytest.mark.parametrize(("name", "other"), [(ENGLISH, CHINESE), (CHINESE, ENGLISH)])
def test_the_readmes_link_to_each_other_at_the_top(name, other):
    assert f"]({other})" in "".join(read(name).splitlines()[:5])


def test_the_chinese_figures_stand_in_the_readme_or_docs():
    """Figures with a point, or of three digits and more; whoever changes one changes both."""
    figure = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)+|(?<![\w.])\d[\d,]+\d(?![\w.])", re.ASCII)
    known = set(figure.findall("\n".join(read(name) for name in DOCUMENTS if name != CHINESE)))
    unknown = sorted(set(figure.findall(read(CHINESE))) - known)
    assert not unknown, f"in {CHINESE}, but in neither {ENGLISH} nor docs/: {', '.join(unknown)}"


# --- files -------------------------------------------------------------------------------------


def is_there(name: str) -> bool:
    """Whether the repository has a file, or git ignores its place since scripts make it, or, for a
    name without its folder, a script speaks of it. What lies in my/ is the reader's own."""
    pattern = name.replace("NAME", "*")
    if name.startswith("my/"):
        return True
    if ignored(pattern) or any(ROOT.glob(pattern.rstrip("/"))):
        return True
    if "/" in name:
        return False
    sources = [path for part in SOURCES for path in ROOT.glob(part)]
    word = re.compile(rf"(?<![\w.]){re.escape(name.lstrip('*'))}(?!\w)")
    return any(p.name == name or word.search(p.read_text(encoding="utf-8")) for p in sources)


def ignored(path: str) -> bool:
    """Whether a pattern of .gitignore covers path or a folder of it."""
    lines = read(".gitignore").split("\n")
    patterns = [line.rstrip("/") for line in lines if line and not line.startswith("#")]
    parts = path.rstrip("/").split("/")
    ways = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatch(way, pattern) for way in ways for pattern in patterns)


@pytest.mark.parametrize("name", [ENGLISH, CHINESE])
def test_each_named_file_is_there_or_is_made_by_scripts(name):
    missing = [file for file in sorted(files(read(name))) if not is_there(file)]
    assert not missing, f"{name} names what is not there: {', '.join(missing)}"


def test_a_file_that_is_not_there_is_noticed():
    there = ("train.py", "config/", "out-sanguo/curves.png", "data/x/train.bin", "run.json")
    assert all(map(is_there, there))
    missing = ("trian.py", "configs/", "docs/repot.md", "data/sanguo/prepared.py", "runs.json")
    assert not any(map(is_there, missing))


# --- commands ----------------------------------------------------------------------------------


def parse(command: str) -> None:
    """Raises UserError where a command names what there is not: script, module, setting, file."""
    first, *argv = shlex.split(command)
    if first == "python" and argv[0] == "-m":
        need(importlib.util.find_spec(argv[1]), f"no module {argv[1]}")
        for script in (argv[1].replace(".", "/") + end for end in (".py", "/__main__.py")):
            if (ROOT / script).is_file():
                configure(settings(script), argv[2:])
    elif first == "python":
        need((ROOT / argv[0]).is_file(), f"no script {argv[0]}")
        config = configure(settings(argv[0]), [word for word in argv[1:] if word != "--help"])
        if argv[0] == "data/fetch_data.py":
            select(config.names)
    elif first == "bash":
        need((ROOT / argv[0]).is_file(), f"no script {argv[0]}")
        known = words_of_run_sh() if argv[0] == "run.sh" else [set()]
        for word, choices in zip(argv[1:], known, strict=False):
            need(word in choices, f"{argv[0]} does not know {word}")
        need(len(argv) - 1 <= len(known), f"{argv[0]} takes no {argv[-1]}")
    elif first.endswith("pip") and "-r" in argv:
        file = argv[argv.index("-r") + 1]
        need((ROOT / file).is_file(), f"no file {file}")


def need(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def settings(script: str) -> type:
    """The Settings of a script, as data/sanguo/prepare.py."""
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).Settings


def words_of_run_sh() -> list[set[str]]:
    """The first words that run.sh knows (its last case), and the second ones (those before)."""
    cases = re.findall(r"case \$\{1-\} in\n(.*?)\n\s*esac", read("run.sh"), re.DOTALL)
    labels = [set(re.findall(r"^\s*([\w-]+)\)", case, re.MULTILINE)) for case in cases]
    return [labels[-1], set().union(*labels[:-1])]


ALL_COMMANDS = [(name, command) for name in DOCUMENTS for command in commands(read(name))]


@pytest.mark.parametrize(("name", "command"), ALL_COMMANDS)
def test_each_command_parses(name, command):
    try:
        parse(command)
    except UserError as error:
        pytest.fail(f"{name}: {command}: {error}", pytrace=False)


def misspelt(command: str) -> Iterator[str]:
    """The command with a letter too many in its script, in each config file, in each flag."""
    for name in re.findall(r"(?<= )(?:--\w+|[\w/]+(?=\.py|\.sh))", command, re.ASCII):
        yield re.sub(rf"(?<= ){name}\b", f"{name}q", command)


@pytest.mark.parametrize(("name", "command"), ALL_COMMANDS)
def test_each_command_parses_only_as_it_is_spelt(name, command):
    if command.startswith(("python", "bash")):
        for wrong in misspelt(command):
            with pytest.raises(UserError):
                parse(wrong)
                pytest.fail(f"{name}: {wrong} parses, too")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python train.py --n_layers=2", "unknown setting 'n_layers'; did you mean 'n_layer'"),
        ("python train.py config/pretrain_sango.py", "no config file config/pretrain_sango.py"),
        ("python data/sanguo/prepare.py --vocab_size=4k", "vocab_size='4k' must be a whole number"),
        ("python data/fetch_data.py sango", "unknown source 'sango'; did you mean 'sanguo'"),
        ("python -m venvs .venv", "no module venvs"),
        ("bash run.sh tests", "run.sh does not know tests"),
        ("bash run.sh test --al", "run.sh does not know --al"),
        ("bash run.sh test --all --all", "run.sh takes no --all"),
        (".venv/bin/pip install -r requirement.txt", "no file requirement.txt"),
    ],
)
def test_what_is_wrong_in_a_command_is_named(command, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(command)


# --- settings in prose -------------------------------------------------------------------------

PLACEHOLDERS = {"--help", "--key=value", "--all"}  # of all scripts; of run.sh


def check_flags(flags: list[str]) -> None:
    """UserError unless some script takes these flags together; one without a value needs a name."""
    scripts = {command.split()[1] for _, command in ALL_COMMANDS if ".py" in command.split()[1]}
    for script in sorted(scripts):
        names = {field.name for field in fields(settings(script))}
        bare = [flag for flag in flags if flag.partition("=")[2] == ""]
        try:
            configure(settings(script), [flag for flag in flags if flag not in bare])
        except UserError:
            continue
        if all(flag.lstrip("-").rstrip("=") in names for flag in bare):
            return
    raise UserError(f"no script takes {' '.join(flags)}")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_flag_in_prose_is_a_setting(name):
    for span in spans(read(name)):
        flags = re.sub(r"^\S+\.py ", "", span).split()
        if all(flag.startswith("--") for flag in flags) and not PLACEHOLDERS & set(flags):
            try:
                check_flags(flags)
            except UserError as error:
                pytest.fail(f"{name}: {error}", pytrace=False)


def test_a_flag_that_no_script_takes_is_noticed():
    check_flags(["--mask="])
    check_flags(["--optimizer=adamw", "--learning_rate=3e-3"])
    for flags in (["--masks="], ["--optimizer=adamv"], ["--optimizer=adamw", "--vocab_size=9"]):
        with pytest.raises(UserError, match="no script takes"):
            check_flags(flags)
