"""Settings from defaults, files and flags; one-line errors; files that are whole or not there."""

import importlib
import os
import subprocess
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest

from configurator import (
    ROOT,
    UserError,
    configure,
    repo_path,
    show_path,
    user_path,
    written_aside,
)


@dataclass
class Settings:
    max_iters: int = 10  # steps
    learning_rate: float = 1e-3  # at its highest
    lr_decay_iters: int | None = None  # steps; None is max_iters
    temperature: float | None = None  # None is 0.8
    out_dir: str = "out"  # checkpoints
    dataset: str | None = None  # a name
    resume: bool = False  # go on
    compile: bool | None = None  # None: on CUDA
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights
    runs: list[str] = field(default_factory=list)  # directories
    prompts: list[str] | None = None  # of samples; None is the first
    splits: list[int] = field(default_factory=lambda: [8, 2])  # shares


@dataclass
class NoSettings:
    nothing: int = 0  # that a config file of the repository sets


@dataclass
class NamedSettings:
    names: list[str] = field(default_factory=list)  # what to do
    out: str = "data"  # where


def config_file(folder: Path, text: str, name: str = "c.py") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def refusal(*argv: str) -> str:
    """The message of the UserError that these words give: always one line."""
    with pytest.raises(UserError) as caught:
        configure(Settings, list(argv))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- order -------------------------------------------------------------------------------------


def test_the_last_word_wins_among_files_and_flags(tmp_path):
    five = config_file(tmp_path, "max_iters = 5", "five.py")
    six = config_file(tmp_path, "max_iters = 6", "six.py")
    assert configure(Settings, []).max_iters == 10
    assert configure(Settings, [five, six]).max_iters == 6
    assert configure(Settings, [six, five]).max_iters == 5
    assert configure(Settings, [five, "--max_iters=7"]).max_iters == 7
    assert configure(Settings, ["--max_iters=7", five]).max_iters == 5
    assert configure(Settings, ["--max_iters=7", "--max_iters=8"]).max_iters == 8


def test_a_file_changes_only_what_it_assigns(tmp_path):
    path = config_file(tmp_path, "out_dir = 'out-b'")
    config = configure(Settings, ["--max_iters=7", "--dataset=a", path])
    assert (config.max_iters, config.dataset, config.out_dir) == (7, "a", "out-b")


def test_base_lies_between_defaults_and_words(tmp_path):
    base = {"max_iters": 20, "out_dir": "old", "a_setting_of_an_older_version": 1}
    config = configure(Settings, ["--out_dir=new"], base)
    assert (config.max_iters, config.out_dir) == (20, "new")
    path = config_file(tmp_path, "lr_decay_iters = max_iters")
    assert configure(Settings, [path], base).lr_decay_iters == 20


def test_a_file_can_use_the_settings_that_stand_so_far(tmp_path):
    path = config_file(tmp_path, "lr_decay_iters = max_iters * 2")
    earlier = config_file(tmp_path, "max_iters = 30", "earlier.py")
    assert configure(Settings, [path]).lr_decay_iters == 20
    assert configure(Settings, ["--max_iters=50", path]).lr_decay_iters == 100
    assert configure(Settings, [path, "--max_iters=50"]).lr_decay_iters == 20
    assert configure(Settings, [earlier, path]).lr_decay_iters == 60
    both = config_file(tmp_path, "max_iters = 40\nlr_decay_iters = max_iters", "both.py")
    assert configure(Settings, [both]).lr_decay_iters == 40


def test_a_file_may_import_modules_and_keep_names_with_an_underscore(tmp_path):
    path = config_file(tmp_path, "import math\n_half = 8\nmax_iters = math.isqrt(_half * 8)")
    assert configure(Settings, [path]).max_iters == 8


def test_nothing_is_left_over_from_an_earlier_call(tmp_path):
    path = config_file(tmp_path, "runs.append('out-a')\nsplits.append(1)")
    assert configure(Settings, [path]).runs == ["out-a"]
    assert configure(Settings, [path]).splits == [8, 2, 1]
    assert configure(Settings, []) == Settings()


def test_words_without_dashes_are_names_where_there_is_such_a_setting():
    config = configure(NamedSettings, ["sanguo", "--out=x", "gpt2"])
    assert (config.names, config.out) == (["sanguo", "gpt2"], "x")


# --- types -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("--max_iters=1e3", 1000),
        ("--max_iters=1_000", 1000),
        ("--max_iters=-1", -1),
        ("--learning_rate=1e-3", 0.001),
        ("--learning_rate=3", 3.0),
        ("--lr_decay_iters=None", None),
        ("--lr_decay_iters=5", 5),
        ("--temperature=None", None),
        ("--temperature=0", 0.0),
        ("--out_dir=a=b", "a=b"),
        ("--out_dir=--max_iters=3", "--max_iters=3"),
        ("--out_dir=None", "None"),
        ("--out_dir=1e3", "1e3"),
        ("--out_dir=", ""),
        ("--out_dir=三国 演义", "三国 演义"),
        ("--dataset=None", None),
        ("--dataset=007", "007"),
        ("--resume", True),
        ("--resume=true", True),
        ("--resume=True", True),
        ("--resume=false", False),
        ("--resume=False", False),
        ("--compile=false", False),
        ("--compile=None", None),
        ("--dtype=bfloat16", "bfloat16"),
        ("--runs=a,b=c", ["a", "b=c"]),
        ("--runs=['a', 'b,c']", ["a", "b,c"]),
        ("--runs=", []),
        ("--prompts=却说,话说", ["却说", "话说"]),
        ("--prompts=", []),
        ("--prompts=None", None),
        ("--splits=7,3", [7, 3]),
        ("--splits=[1]", [1]),
        ("--splits=3", [3]),
        ("--splits=1e3", [1000]),
        ("--runs=3", ["3"]),
        ("--prompts=却说", ["却说"]),
    ],
)
def test_a_flag_becomes_its_settings_type(word, value):
    start = {"resume": value is not True, "dataset": "x", "temperature": 1.0, "lr_decay_iters": 1}
    found = getattr(configure(Settings, [word], start), word[2:].partition("=")[0])
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "word",
    [
        "--max_iters=1.5",
        "--max_iters=True",
        "--max_iters=None",
        "--max_iters=ten",
        "--max_iters=",
        "--max_iters=1e400",
        "--max_iters={[]: 1}",
        "--max_iters",
        "--learning_rate=True",
        "--learning_rate=nan",
        "--learning_rate=-inf",
        "--learning_rate=1e400",
        f"--learning_rate=1{'0' * 400}",
        "--learning_rate=1,5",
        "--temperature=none",
        "--resume=1",
        "--resume=yes",
        "--resume=",
        "--resume=None",
        "--compile",
        "--runs=[1]",
        "--splits=1.5,2",
        "--splits=1.5",
        "--splits=True",
        "--splits=ten",
        "--splits=",
        "--splits=None",
        "--out_dir",
    ],
)
def test_a_flag_of_the_wrong_type_is_refused_by_its_name(word):
    assert word[2:].partition("=")[0] in refusal(word)


@pytest.mark.parametrize(
    "line",
    [
        "max_iters = 1.5",
        "max_iters = True",
        "max_iters = '5'",
        "learning_rate = '1e-3'",
        "learning_rate = False",
        "learning_rate = float('nan')",
        "learning_rate = float('inf')",
        "learning_rate = 10 ** 400",
        "resume = 1",
        "out_dir = None",
        "dataset = 3",
        "dtype = 'float64'",
        "runs = 'out'",
        "splits = [1, None]",
        "splits = 3",
    ],
)
def test_a_file_with_a_value_of_the_wrong_type_is_refused_by_both_names(line, tmp_path):
    message = refusal(config_file(tmp_path, line))
    assert line.split()[0] in message
    assert "c.py" in message


def test_values_of_a_file_become_their_settings_types(tmp_path):
    text = "max_iters = 1e3\nlearning_rate = 1\nruns = ('a', 'b')\nlr_decay_iters = None"
    config = configure(Settings, ["--lr_decay_iters=3", config_file(tmp_path, text)])
    assert (config.max_iters, config.learning_rate) == (1000, 1.0)
    assert (config.runs, config.lr_decay_iters) == (["a", "b"], None)
    assert type(config.max_iters) is int
    assert type(config.learning_rate) is float


def test_a_choice_that_is_none_names_the_nearest_and_all():
    message = refusal("--dtype=bfloat61")
    assert "did you mean 'bfloat16'" in message
    assert "auto, float32, bfloat16" in message
    assert "did you mean" not in refusal("--dtype=half")


# --- unknown names, broken files ---------------------------------------------------------------


def test_an_unknown_name_gives_the_nearest_in_flags_and_files(tmp_path):
    assert "'max_iter'; did you mean 'max_iters'?" in refusal("--max_iter=3")
    assert "did you mean 'max_iters'?" in refusal("--max-iters=3")
    assert "did you mean 'resume'?" in refusal("--resum")
    message = refusal(config_file(tmp_path, "learning_rat = 1"))
    assert "'learning_rat' in " in message
    assert "c.py; did you mean 'learning_rate'?" in message
    assert "--help" in refusal("--xyzzy=3")


@pytest.mark.parametrize(
    ("text", "line", "error"),
    [
        ("max_iters = 3\nmax_iters = = 4", 2, "SyntaxError"),
        ("max_iters = 3\n  resume = True", 2, "IndentationError"),
        ("\n\nmax_iters = 1 / 0", 3, "ZeroDivisionError"),
        ("\nmax_iters = max_iter", 2, "NameError"),
        ("def _f():\n    return 1 / 0\n\n\nmax_iters = 3\n\nmax_iters = _f()", 2, "ZeroDivision"),
        ("import json\n\n\nmax_iters = json.loads('{')", 4, "JSONDecodeError"),
        ("import fractions\n\nmax_iters = fractions.Fraction('x')", 3, "ValueError"),
        ("\nraise ValueError('first\\nsecond')", 2, "ValueError"),
    ],
)
def test_a_broken_file_is_told_with_its_line_and_in_one(text, line, error, tmp_path):
    message = refusal(config_file(tmp_path, text))
    assert f"c.py, line {line}: {error}" in message


def test_a_missing_file_names_the_nearest_config():
    names = sorted(path.name for path in (ROOT / "config").glob("*.py"))
    message = refusal(f"config/{names[0][:-3]}")
    assert f"did you mean 'config/{names[0]}'?" in message
    assert "--key=value" in refusal("max_iters=3")
    assert "no config file" in refusal("/")


def test_a_config_file_is_found_beside_the_caller_or_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config_file(tmp_path, "max_iters = 3")
    assert configure(Settings, ["c.py"]).max_iters == 3
    path = min((ROOT / "config").glob("*.py"))
    with pytest.raises(UserError, match=f"unknown setting .* in config/{path.name}"):
        configure(NoSettings, [f"config/{path.name}"])


# --- help --------------------------------------------------------------------------------------

SCRIPTS = [
    "train.py",
    "sample.py",
    "evaluations.py",
    "visualize.py",
    "data/fetch_data.py",
    "data/sanguo/prepare.py",
    "data/sanguo/prepare_sft.py",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_each_setting_with_its_default_and_a_meaning(script, capsys):
    name = script.removesuffix(".py").replace("/", ".")
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        module.main(["--no_such_setting=1", "--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert module.__doc__.splitlines()[0] in lines
    for setting in fields(module.Settings):
        default = [] if setting.default is MISSING else setting.default
        start = f"  --{setting.name}={default} "
        [line] = [line for line in lines if line.startswith(start)]
        assert len(line.removeprefix(start).strip()) >= 4, f"{line!r} says nothing"


# --- a script that uses it ---------------------------------------------------------------------

SCRIPT = '''"""Does one thing, or fails in a way that is named."""

import os
import signal
import sys
from dataclasses import dataclass

from configurator import UserError, command, configure


@dataclass
class Settings:
    fault: str = "none"  # which


def main(argv):
    fault = configure(Settings, argv).fault
    print("began")
    if fault == "user":
        raise UserError("刘备=3 must be 4; write 4")
    if fault == "file":
        open("no/such/file")
    if fault == "bug":
        [][0]
    if fault == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if fault == "pipe":
        while True:
            print("x" * 1000)
    print("done")


if __name__ == "__main__":
    command(main)
'''


def script(folder: Path, *argv: str, **options) -> subprocess.CompletedProcess:
    config_file(folder, SCRIPT, "script.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, str(folder / "script.py"), *argv]
    return subprocess.run(
        words, capture_output=True, encoding="utf-8", env=environment, cwd=folder, **options
    )


def test_a_script_without_a_fault_ends_with_0(tmp_path):
    done = script(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "began\ndone\n", "")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("--fault=user", "error: 刘备=3 must be 4; write 4\n"),
        ("--fualt=user", "error: unknown setting 'fualt'; did you mean 'fault'?\n"),
        ("--fault=file", "error: No such file or directory (no/such/file)\n"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_1(word, line, tmp_path):
    done = script(tmp_path, word)
    assert (done.returncode, done.stderr) == (1, line)


def test_our_own_mistake_keeps_its_traceback(tmp_path):
    done = script(tmp_path, "--fault=bug")
    assert done.returncode == 1
    assert "IndexError" in done.stderr
    assert "Traceback" in done.stderr


def test_an_interrupt_is_one_word_and_no_traceback(tmp_path):
    done = script(tmp_path, "--fault=interrupt")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_reader_that_goes_away_leaves_no_traceback(tmp_path):
    config_file(tmp_path, SCRIPT, "script.py")
    process = subprocess.Popen(
        [sys.executable, "script.py", "--fault=pipe"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert process.stdout.readline() == b"began\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=30) == 1


def test_a_real_script_fails_in_one_line_from_another_directory(tmp_path):
    prepare = ROOT / "data" / "sanguo" / "prepare.py"
    done = subprocess.run(
        [sys.executable, str(prepare), "--vocab_size=4k"],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: vocab_size='4k' must be a whole number\n"


# --- files -------------------------------------------------------------------------------------


def test_written_aside_replaces_the_old_file_only_at_the_end(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with written_aside(path) as aside:
        aside.write_text("first")
        assert not path.exists()
        assert aside.parent == path.parent  # a rename over another disk would not be atomic
    with written_aside(path) as aside:
        aside.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_written_aside_leaves_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), written_aside(path) as aside:
        aside.write_text("half of the n")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_aside_leaves_nothing_where_nothing_was(tmp_path):
    with pytest.raises(KeyboardInterrupt), written_aside(tmp_path / "file.txt") as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# --- paths -------------------------------------------------------------------------------------


def test_the_paths_of_settings_lie_in_the_repository_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert repo_path("data/sanguo") == ROOT / "data" / "sanguo"
    assert repo_path("data") == ROOT / "data"
    assert repo_path(tmp_path / "x") == tmp_path / "x"
    assert repo_path("~/x") == Path.home() / "x"


def test_a_users_own_file_lies_where_one_stands_else_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert user_path("train.py") == ROOT / "train.py"
    (tmp_path / "train.py").write_text("")
    assert user_path("train.py") == tmp_path / "train.py"
    assert user_path(tmp_path / "y") == tmp_path / "y"


def test_messages_show_paths_of_the_repository_without_its_place():
    assert show_path(ROOT / "data" / "sanguo" / "qa.jsonl") == "data/sanguo/qa.jsonl"
    outside = ROOT.parent / (ROOT.name + "-other") / "x"
    assert show_path(outside) == outside.as_posix()
