"""Settings from defaults, files and flags; errors of one line; atomic writes."""

import ast
import importlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from configurator import (
    ROOT,
    UserError,
    above,
    at_least,
    at_most,
    below,
    bounds_of,
    bounds_text,
    configure,
    printable,
    repo_path,
    show_path,
    user_path,
    written_aside,
)
from tests.runs import finish, start


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
class Bounded:
    beta: Annotated[float, at_least(0), below(1)] = 0.9  # AdamW
    top_p: Annotated[float, above(0), at_most(1)] = 1.0  # of the probability
    batch_size: Annotated[int, at_least(1)] = 16  # rows
    splits: Annotated[list[int], at_least(1)] = field(default_factory=lambda: [8, 2])  # shares
    patience: Annotated[int | None, at_least(1)] = None  # None is off


def config_file(folder: Path, text: str, name: str = "c.py") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def refusal(*argv: str, Defaults: type = Settings) -> str:
    """The message of the UserError that this command line raises: always one line."""
    with pytest.raises(UserError) as caught:
        configure(Defaults, list(argv))
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


def test_base_lies_between_defaults_and_the_command_line(tmp_path):
    base = {"max_iters": 20, "out_dir": "old", "a_setting_of_an_older_version": 1}
    config = configure(Settings, ["--out_dir=new"], base)
    assert (config.max_iters, config.out_dir) == (20, "new")
    path = config_file(tmp_path, "lr_decay_iters = max_iters")
    assert configure(Settings, [path], base).lr_decay_iters == 20


def test_a_file_can_use_the_settings_before_it(tmp_path):
    path = config_file(tmp_path, "lr_decay_iters = max_iters * 2")
    earlier = config_file(tmp_path, "max_iters = 30", "earlier.py")
    assert configure(Settings, [path]).lr_decay_iters == 20
    assert configure(Settings, ["--max_iters=50", path]).lr_decay_iters == 100
    assert configure(Settings, [path, "--max_iters=50"]).lr_decay_iters == 20
    assert configure(Settings, [earlier, path]).lr_decay_iters == 60


def test_calls_do_not_share_lists(tmp_path):
    path = config_file(tmp_path, "splits.append(1)")
    assert configure(Settings, [path]).splits == [8, 2, 1]
    assert configure(Settings, []) == Settings()


def test_words_without_dashes_are_names_if_there_is_such_a_setting():
    Named = make_dataclass("Named", [("names", list[str], field(default_factory=list))])
    assert configure(Named, ["sanguo", "--names=x", "gpt2"]).names == ["x", "gpt2"]


# --- types -------------------------------------------------------------------------------------


VALUES = {
    "max_iters": {"1e3": 1000},
    "learning_rate": {"1e-3": 0.001, "3": 3.0},
    "temperature": {"0": 0.0, "None": None},
    "out_dir": {"--max_iters=3": "--max_iters=3", "None": "None", "三国 演义": "三国 演义"},
    "dataset": {"None": None, "007": "007"},
    "resume": {"true": True, "False": False},
    "compile": {"None": None},
    "dtype": {"bfloat16": "bfloat16"},
    "runs": {"a,b=c": ["a", "b=c"], "['a', 'b,c']": ["a", "b,c"], "": [], "x" * 300: ["x" * 300]},
    "prompts": {"3": ["3"], "None": None},
    "splits": {"7,3": [7, 3], "1e3": [1000]},
}


@pytest.mark.parametrize("name", VALUES)
def test_a_flag_gets_the_type_of_its_setting(name):
    base = {"resume": True, "compile": True, "dataset": "x", "temperature": 1.0, "prompts": ["x"]}
    for text, value in VALUES[name].items():
        assert repr(getattr(configure(Settings, [f"--{name}={text}"], base), name)) == repr(value)
    assert configure(Settings, ["--resume"]).resume
    assert configure(Settings, ["--compile"]).compile is True


WRONG = {
    "max_iters": ["1.5", "True", "None", "", "1e400", "{[]: 1}"],
    "learning_rate": ["nan", f"1{'0' * 400}"],
    "resume": ["1"],
    "runs": ["[1]"],
    "splits": ["1.5,2", "None"],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_flag_of_the_wrong_type_is_refused_by_name(name):
    for text in WRONG[name]:
        assert name in refusal(f"--{name}={text}")
    assert "--max_iters has no value" in refusal("--max_iters")


def test_an_unknown_choice_names_the_nearest_and_all():
    message = refusal("--dtype=bfloat61")
    assert "did you mean 'bfloat16'" in message and "auto, float32, bfloat16" in message


def test_a_value_of_the_wrong_type_in_a_file_is_refused_by_both_names(tmp_path):
    lines = ["max_iters = '5'", "resume = 1", "out_dir = None", "splits = [1, None]"]
    for line in (*lines, "learning_rate = float('inf')", "dtype = 'float64'"):
        message = refusal(config_file(tmp_path, line))
        assert line.split()[0] in message
        assert "c.py" in message


def test_values_of_a_file_get_the_types_of_their_settings(tmp_path):
    text = "import math\n_k = 1e3\nmax_iters = _k * math.cos(0)\n"
    text += "learning_rate = 1\nruns = ('a', 'b')\nlr_decay_iters = None"
    config = configure(Settings, ["--lr_decay_iters=3", config_file(tmp_path, text)])
    assert repr((config.max_iters, config.learning_rate)) == "(1000, 1.0)"
    assert (config.runs, config.lr_decay_iters) == (["a", "b"], None)


def test_a_list_splits_at_commas_unless_the_whole_names_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b [1].txt").touch()
    (tmp_path / "a").touch()  # which ["a","b"] would match as a glob
    for text in ("a,b [1].txt", "a,b*.txt", str(tmp_path / "a,b [1].txt")):
        assert configure(Settings, [f"--runs={text}"]).runs == [text]
    assert configure(Settings, ['--runs=["a,b [1].txt"]']).runs == ["a,b [1].txt"]
    assert configure(Settings, ['--runs=["a","b"]']).runs == ["a", "b"]
    assert configure(Settings, ["--runs=a,b [1]"]).runs == ["a", "b [1]"]


def test_a_list_given_twice_is_refused():
    assert refusal("--runs=a,b", "--max_iters=3", "--runs=c").endswith("one, --runs=a,b,c")
    assert refusal("--splits=8,1", "--splits=2").endswith("one, --splits=8,1,2")
    assert configure(Settings, ["--prompts=None", "--prompts=a"]).prompts == ["a"]


def gbk(text: str) -> str:
    """The text as a word of the command line, written in GBK."""
    return os.fsdecode(text.encode("gbk"))


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are UTF-8, or UTF-16")
def test_text_that_is_not_utf8_is_refused_unless_it_names_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in (
        "out_dir={}",
        "dataset=FILE:{}",
        "runs=a,{}",
        "prompts={}*",
        "{}=3",
        "runs=['{}']",
    ):
        assert printable(refusal(f"--{word}".format(gbk("孔明"))))
    (tmp_path / gbk("孔明")).mkdir()
    assert "is no text in UTF-8" in refusal(f"--out_dir={gbk('孔明')}")  # which torch cannot open
    (tmp_path / gbk("曹操")).touch()
    for text in (gbk("孔明"), gbk("曹操"), gbk("曹操")[:1] + "*"):
        assert configure(Settings, [f"--runs=a,{text}"]).runs == ["a", text]
    assert configure(Settings, [f"--dataset=FILE:{gbk('曹操')}"]).dataset == f"FILE:{gbk('曹操')}"
    assert "holds a NUL" in refusal(config_file(tmp_path, "out_dir = 'a\\0'"))


# --- bounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--beta=1", "beta=1 must be 0 or more and below 1"),
        ("--top_p=0", "top_p=0 must be above 0 and 1 or less"),
        ("--batch_size=0", "batch_size=0 must be 1 or more"),
        ("--splits=3,0", "splits=[3, 0] must be 1 or more"),
        ("--patience=-1", "patience=-1 must be 1 or more"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_its_bounds(word, message):
    assert refusal(word, Defaults=Bounded) == message
    # at their bounds, and None
    configure(Bounded, ["--beta=0", "--top_p=1", "--batch_size=1", "--patience=None"])


# --- unknown names, broken files ---------------------------------------------------------------


def test_an_unknown_name_gives_the_nearest_in_flags_and_files(tmp_path):
    assert "'max_iter'; did you mean 'max_iters'?" in refusal("--max_iter=3")
    assert "did you mean 'max_iters'?" in refusal("--max-iters=3")
    assert "did you mean 'resume'?" in refusal("--resum")
    message = refusal(config_file(tmp_path, "learning_rat = 1"))
    assert re.search(r"'learning_rat' in .*c.py; did you mean 'learning_rate'\?", message)
    assert "--help" in refusal("--xyzzy=3")


@pytest.mark.parametrize(
    ("text", "line", "error"),
    [
        ("max_iters = 3\nmax_iters = = 4", 2, "SyntaxError"),
        ("\nmax_iters = max_iter", 2, "NameError"),
        ("import json\n\n\nmax_iters = json.loads('{')", 4, "JSONDecodeError"),
        ("\nraise ValueError('first\\nsecond')", 2, "ValueError"),
        ("\nexit(0)", 2, "SystemExit"),
        ("max_iters = 3\0", "[?1]", "S"),
    ],
)
def test_an_error_in_a_file_is_one_line_with_its_place(text, line, error, tmp_path):
    assert re.search(rf"c.py, line {line}: {error}", refusal(config_file(tmp_path, text)))


def test_a_missing_file_names_the_nearest_config():
    names = sorted(path.name for path in (ROOT / "config").glob("*.py"))
    message = refusal(f"config/{names[0][:-3]}")
    assert f"did you mean 'config/{names[0]}'?" in message
    assert "--key=value" in refusal("max_iters=3")
    assert "no config file" in refusal("/")
    assert "no config file ~no-such-user.py" in refusal("~no-such-user.py")


def test_a_word_that_is_no_config_file_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "b.txt", "b"):
        config_file(tmp_path, "raise RuntimeError('it was run')", name)
        hint = f"; several go between commas: --runs=a,{name}"
        assert refusal("--runs=a", name) == f"no config file {name}{hint}"
        assert refusal("--max_iters=3", name).endswith("; settings are written --key=value")
    Input = make_dataclass("Input", [("input", list[str], field(default_factory=list))])
    assert refusal("b.txt", "--input=a", Defaults=Input).endswith(": --input=FILE,b.txt")
    (tmp_path / "folder.py").mkdir()
    assert "no config file folder.py" in refusal("folder.py")


def test_a_config_file_lies_in_the_current_directory_or_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config_file(tmp_path, "max_iters = 3")
    assert configure(Settings, ["c.py"]).max_iters == 3
    path = min((ROOT / "config").glob("*.py"))
    message = refusal(f"config/{path.name}", Defaults=Bounded)
    assert f" in config/{path.name}" in message


# --- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", ["train.py", "sample.py", "data/fetch_data.py", "data/sanguo/prepare_sft.py"]
)
def test_help_lists_each_setting_with_its_default_meaning_and_bounds(script, capsys):
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit) as end:
        module.main(["--no_such_setting=1", "--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert module.__doc__.splitlines()[0] in lines
    bounds = bounds_of(module.Settings)
    for setting in fields(module.Settings):
        default = [] if setting.default is MISSING else setting.default
        flag = f"  --{setting.name}={default} "
        [line] = [line for line in lines if line.startswith(flag)]
        limits = f" ({bounds_text(bounds[setting.name])})" if setting.name in bounds else ""
        assert line.endswith(limits)
        assert len(line.removeprefix(flag).removesuffix(limits).strip()) >= 4, line


# --- scripts that use it ---------------------------------------------------------------------

SCRIPT = '''"""Runs a line of Python."""

import os
import signal
from dataclasses import dataclass

from configurator import UserError, command, configure


@dataclass
class Settings:
    line: str = "pass"  # of Python


def main(argv):
    exec(configure(Settings, argv).line)
    print("done")


if __name__ == "__main__":
    command(main)
'''


def start_script(folder: Path, word: str, *shell: str) -> subprocess.Popen:
    path = config_file(folder, SCRIPT, "script.py")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
    environment["PYTHONPATH"] = str(ROOT)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    command = [*shell, sys.executable, path, word]
    return subprocess.Popen(command, env=environment, cwd=folder, **options)


@pytest.mark.parametrize(
    ("word", "code", "line"),
    [
        ("--line=raise UserError('刘备=3 must be 4')", 1, "error: 刘备=3 must be 4\n"),
        ("--lime=pass", 1, "error: unknown setting 'lime'; did you mean 'line'?\n"),
        ("--line=raise UserError('\\x1b[2J刘备\\n\\x00')", 1, "error: \\x1b[2J刘备 \\x00\n"),
        ("--line=open('no/file')", 1, "error: No such file or directory (no/file)\n"),
        ("--line=os.kill(os.getpid(), signal.SIGINT)", 130, "interrupted\n"),
    ],
)
def test_a_script_ends_with_its_exit_code_and_at_most_one_line(word, code, line, tmp_path):
    done = finish(start_script(tmp_path, word))
    assert (done.returncode, done.stdout, done.stderr) == (code, "", line)


def test_a_bug_keeps_its_traceback(tmp_path):
    assert "Traceback" in finish(start_script(tmp_path, "--line=[][0]")).stderr


def test_a_closed_pipe_gives_no_traceback(tmp_path):
    process = start_script(tmp_path, "--line=while True: print('x' * 1000)")
    assert process.stdout.readline() == "x" * 1000 + "\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=30) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs a shell, and /dev/full")
@pytest.mark.parametrize(
    ("redirection", "line", "code", "out", "err"),
    [
        ("> /dev/full", "pass", 1, "", "error: No space left on device\n"),
        ("> /dev/full", "print('x'); raise UserError('刘备')", 1, "", "error: 刘备\n"),
        ("<&-", "import sys; print(sys.stdin.read())", 0, "\ndone\n", ""),
        (">&-", "pass", 1, "", "error: standard output is closed; redirect it to a file, or to "),
        ("2>&-", "import sys; print('x', file=sys.stderr)", 0, "done\n", ""),
        ("<&- >&- 2>&-", "pass", 1, "", ""),
        ("<<< $'\\xbf'", "print(ascii(input()))", 0, "'\\udcbf'\ndone\n", ""),
    ],
)
def test_closed_full_or_undecodable_streams_are_no_traceback(
    redirection, line, code, out, err, tmp_path
):
    shell = ["bash", "-c", f'exec "$@" {redirection}', "bash"]
    done = finish(start_script(tmp_path, f"--line={line}", *shell))
    assert (done.returncode, done.stdout) == (code, out)
    assert done.stderr.startswith(err) and len(done.stderr.splitlines()) == bool(err)


SLOW = ["train.py", "sample.py", "evaluations.py", "sample_gradio.py", "export.py", "visualize.py"]
SLOW += [f"data/{name}.py" for name in ("upload", "generate_qa", "custom/prepare")]


@pytest.mark.skipif(os.name != "posix", reason="a process cannot be sent Ctrl-C")
@pytest.mark.parametrize(
    ("script", "word", "later"),
    [("train.py", "--help", 1), ("-m", "bench", 30), *((name, "--help", 30) for name in SLOW)],
)
def test_ctrl_c_while_a_script_is_imported_is_one_line(script, word, later, monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # Python prints each import on stderr
    with start(script, word, encoding="utf-8") as process:
        lines = iter(process.stderr.readline, "")
        while "| configurator" not in next(lines):
            pass
        for _ in range(later):
            next(lines)
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert (process.returncode, err.splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in err


# --- files -------------------------------------------------------------------------------------


def test_written_aside_replaces_the_old_file_only_at_the_end(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    for content in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with pytest.raises(KeyboardInterrupt), written_aside(path) as aside:
            aside.write_text("half of the n")
            raise KeyboardInterrupt  # leaves what was there
        with written_aside(path) as aside:
            aside.write_text(content)
            assert before == (path.read_text() if path.exists() else None)
            assert aside.parent == path.parent  # a rename across disks would not be atomic
        assert path.read_text() == content
        assert list(path.parent.iterdir()) == [path]


# --- paths -------------------------------------------------------------------------------------


def test_paths_are_read_and_shown_relative_to_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert repo_path("data/sanguo") == ROOT / "data" / "sanguo"
    assert repo_path("data") == ROOT / "data"
    assert repo_path(tmp_path / "x") == tmp_path / "x"
    assert repo_path("~/x") == Path.home() / "x"
    assert repo_path("~no-such-user/x") == ROOT / "~no-such-user" / "x"
    (tmp_path / "~no-such-user").touch()
    assert user_path("~no-such-user") == tmp_path / "~no-such-user"
    assert show_path(ROOT / "data" / "sanguo" / "qa.jsonl") == "data/sanguo/qa.jsonl"
    outside = ROOT.parent / (ROOT.name + "-other") / "x"
    assert show_path(outside) == outside.as_posix()
    assert user_path("train.py") == ROOT / "train.py"
    (tmp_path / "train.py").write_text("")
    assert user_path("train.py") == tmp_path / "train.py"  # a user's own


def test_a_message_has_one_line_that_any_terminal_can_show():
    text = "“孔明”\u3000a'b\\c 😀\r\nd\x1b[31m\x00\x9b\u202e\ud800"
    assert printable(text) == "“孔明”　a'b\\c 😀 d" + r"\x1b[31m\x00\x9b\u202e\ud800"
    assert printable(os.fsdecode("孔.txt".encode("gbk"))) == r"\xbf\xd7.txt"
    assert show_path("\x1b\n.txt") == r"\x1b .txt"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"GOMP_SPINCOUNT": "10000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_threads_wait_for_a_while_unless_the_user_says_otherwise(given, wanted):
    script = "import configurator, os; print({k: os.environ[k] for k in os.environ if 'OMP_' in k})"
    environment = {k: v for k, v in os.environ.items() if "OMP_" not in k} | given
    options = {"env": environment, "cwd": ROOT, "capture_output": True, "encoding": "utf-8"}
    done = subprocess.run([sys.executable, "-c", script], check=True, **options)
    assert ast.literal_eval(done.stdout) == wanted
