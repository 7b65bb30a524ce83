"""The command line: settings, one-line errors, and files that are written whole or not at all.

Settings are a dataclass of defaults, then config files and --key=value flags; the last one wins.

    @dataclass
    class Settings:
        max_iters: int = 2000  # steps of the optimizer
        beta1: Annotated[float, at_least(0), below(1)] = 0.9  # AdamW
        patience: Annotated[int | None, at_least(1)] = None  # evaluations; None is off

    config = configure(Settings, ["config/small.py", "--max_iters=500"])

A config file is plain Python assignments, and may use the settings that stand so far. The comment
behind a field is its help text, to which --help adds the bounds. What the settings mean is left to
the scripts. They import this before torch: from then on, Ctrl-C ends them in one line.
"""

import ast
import contextlib
import dataclasses
import difflib
import errno
import glob
import inspect
import itertools
import os
import re
import runpy
import shutil
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# turns in which a thread of torch that waits for work looks for it, before it sleeps (libgomp, on
# Linux): it wakes late where none are, and keeps others from a busy processor where there are many
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
T = typing.TypeVar("T")


class UserError(Exception):
    """An error that the user can fix; one line: what, which value, what to do."""


def expanded(path: str | Path) -> Path:
    """The path with the home folder for ~; where no user has it, ~name is an ordinary name."""
    return Path(os.path.expanduser(path))  # noqa: PTH111, which raises an error there


def repo_path(path: str | Path) -> Path:
    """A setting's path: relative to the repository, whatever the current directory."""
    return ROOT / expanded(path)


def user_path(path: str | Path) -> Path:
    """A user's own file: relative to the current directory, else to the repository."""
    path = expanded(path)
    return path.absolute() if path.exists() else ROOT / path


def is_text(text: str) -> bool:
    """Whether it has no undecodable bytes, for which Python has surrogates."""
    return text == text.encode(errors="replace").decode()


def printable(text: str) -> str:
    r"""text for a message of one line: control characters as \x1b, undecodable bytes as \xb9."""
    line = re.sub(r"[\r\n]+", " ", text)
    shown = (c if c.isprintable() or c == "\u3000" else ascii(c)[1:-1] for c in line)
    return re.sub(r"\\udc([89a-f])", r"\\x\1", "".join(shown))  # surrogates stand for the bytes


def show_path(path: str | Path) -> str:
    """A path for messages: with /, and relative to the repository if it lies inside."""
    path = Path(path)
    return printable((path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix())


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a path beside path, for a file or a directory; renames it to path at the end, or
    removes it on error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # a directory that a killed run has left
    try:
        yield aside
        aside.replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(target: Path, lock: Path | None = None) -> Iterator[Callable[[], bool]]:
    """Holds target for this process; the lock dies with it. Yields a function that tells whether
    the lock is still held, since its file may be deleted and created again.

    lock: the file that is locked, by default one beside target. Raises UserError if a living
    process holds target, OSError if the file cannot be created.
    """
    lock = lock or target.with_name(target.name + ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = _open_locked(target, lock)
    can_tell = _is_open_as(file, lock)  # not on every network file system

    def is_held() -> bool:
        return not can_tell or _is_open_as(file, lock)

    try:
        yield is_held
    finally:
        if is_held():
            with contextlib.suppress(OSError):  # Windows does not delete open files
                lock.unlink()
        file.close()


def _open_locked(target: Path, lock: Path) -> typing.BinaryIO:
    for attempt in itertools.count():
        file = lock.open("a+b")
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                file.close()
                raise UserError(
                    f"another run writes {show_path(target)}; wait for it, or name another"
                ) from None
            # some cluster file systems cannot lock
            print(
                f"note: {show_path(lock)} cannot be locked ({error.strerror}); start one run only"
            )
        if _is_open_as(file, lock) or attempt == 9:
            return file
        file.close()  # its holder has just deleted it


def _is_open_as(file: typing.BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


@dataclasses.dataclass(frozen=True)
class Bound:
    """A limit of a number, declared beside its field: Annotated[int, at_least(1)]. It applies to
    each number of a list, and not to None."""

    words: str
    holds: Callable[[float], bool]


def at_least(low: float) -> Bound:
    return Bound(f"{low:g} or more", lambda x: x >= low)


def at_most(high: float) -> Bound:
    return Bound(f"{high:g} or less", lambda x: x <= high)


def above(low: float) -> Bound:
    return Bound(f"above {low:g}", lambda x: x > low)


def below(high: float) -> Bound:
    return Bound(f"below {high:g}", lambda x: x < high)


def bounds_of(Defaults: type) -> dict[str, tuple[Bound, ...]]:
    """The bounds of each field that has any. A subclass keeps its parents', or sets others."""
    classes = [typing.get_type_hints(c, include_extras=True) for c in reversed(Defaults.__mro__)]
    fields = itertools.chain.from_iterable(hints.items() for hints in classes)
    return {name: hint.__metadata__ for name, hint in fields if hasattr(hint, "__metadata__")}


def bounds_text(bounds: tuple[Bound, ...]) -> str:
    return " and ".join(bound.words for bound in bounds)


def check_bounds(Defaults: type, values: dict) -> None:
    """Raises UserError if a value of these fields is out of its bounds."""
    for name, bounds in bounds_of(Defaults).items():
        value = values[name]
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if not all(bound.holds(number) for bound in bounds for number in numbers):
            shown = f"{value:g}" if isinstance(value, float) else value
            raise UserError(f"{name}={shown} must be {bounds_text(bounds)}")


def configure(Defaults: type[T], argv: list[str], base: dict | None = None) -> T:
    """An instance of the dataclass Defaults: its defaults, then base, then argv left to right.

    base holds settings that a checkpoint brings. A word of argv without dashes is a config file,
    *.py, or an entry of `names` where Defaults has that field. --help prints all settings and
    exits. Raises UserError for an unknown name (with the nearest one), a value of the wrong type, a
    list that two flags set, or text that is not UTF-8 and names no file.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(Defaults))
        raise SystemExit(0)
    hints = typing.get_type_hints(Defaults)
    values = defaults_of(Defaults) | {k: v for k, v in (base or {}).items() if k in hints}
    flags = {}
    for before, word in zip(["", *argv], argv, strict=False):
        if word.startswith("-"):
            [(name, value)] = _read_flag(word, hints).items()
            if isinstance(value, list) and flags.get(name):
                both = ",".join(map(str, flags[name] + value))
                raise UserError(f"--{name}= is given twice; write one, --{name}={both}")
            flags[name] = values[name] = value
        elif "names" in hints:
            values["names"] = values["names"] + _parse("names", word, hints["names"])
        elif word.endswith(".py") and user_path(word).is_file():
            values.update(_read_file(word, values, hints))
        else:
            raise UserError(f"no config file {word}{_meant(word, before, hints)}")
    check_bounds(Defaults, values)
    return Defaults(**values)


def help_text(Defaults: type) -> str:
    """The script's description, and a line for each setting: --name=default and its meaning."""
    description = inspect.cleandoc(sys.modules[Defaults.__module__].__doc__ or "")
    fields = defaults_of(Defaults)
    width = max(len(f"--{name}={value}") for name, value in fields.items())
    meanings, bounds = field_comments(Defaults), bounds_of(Defaults)
    lines = []
    for name, value in fields.items():
        limits = f" ({bounds_text(bounds[name])})" if name in bounds else ""
        flag = f"--{name}={value}"
        lines.append(f"  {flag:<{min(width, 36)}}  {meanings.get(name, '')}{limits}")
    return "\n".join([description, "", "settings (in config files without the dashes):", *lines])


def field_comments(Defaults: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, inherited fields included."""
    comments = {}
    for cls in reversed(Defaults.__mro__[:-1]):
        for line in inspect.getsource(cls).splitlines():
            if match := re.match(r"    (\w+): [^#]*#\s*(.+)", line):
                comments[match[1]] = match[2]
    return comments


def in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` if there is a similar name, else nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def command(main: Callable[[list[str]], None]) -> None:
    """Runs a script's main(argv). A UserError or a full disk is one line on stderr and exit 1."""
    try:
        if signal.getsignal(signal.SIGINT) is _interrupted_early:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _prepare_streams()
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {printable(str(error))}")
    except BrokenPipeError:  # the reader of a pipe (`| head`) is gone
        sys.exit(1)
    except OSError as error:
        name = f" ({show_path(error.filename)})" if error.filename else ""
        sys.exit(f"error: {printable(str(error.strerror or error))}{name}")
    except (MemoryError, RuntimeError) as error:
        if not (reason := no_memory(error)):
            raise
        lower = "lower --batch_size=, for train.py raise --gradient_accumulation_steps= as much"
        sys.exit(f"error: out of memory ({printable(reason)}); {lower}, or take a smaller model")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        try:
            sys.stdout.flush()
        except (OSError, AttributeError):  # drops what Python would try to write again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _prepare_streams() -> None:
    """UTF-8 whatever the console. A closed stdin is empty; a closed stdout is refused."""
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    if sys.stdout is None:
        raise UserError("standard output is closed; redirect it to a file, or to /dev/null")
    with contextlib.suppress(OSError):  # something has been read from it
        sys.stdin.reconfigure(errors="surrogateescape")  # see is_text
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # Windows consoles differ


def _interrupted_early(signum: int, frame: types.FrameType | None) -> None:
    """Ctrl-C before a script's command() runs. No exception: imports may catch or wrap it."""
    if getattr(sys.modules["__main__"], "command", None) is not command:
        signal.default_int_handler(signum, frame)
    os.write(2, b"interrupted\n")
    os._exit(130)


def no_memory(error: Exception) -> str:
    """The first line of an error if it reports that memory ran out, else nothing."""
    reports = "out of memory|not enough memory|allocate memory"  # of CUDA and MPS; of CPUs
    if not isinstance(error, MemoryError) and not re.search(reports, str(error)):
        return ""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def defaults_of(Defaults: type) -> dict:
    """The fields' own defaults; a setting that follows another has None."""
    return {
        f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default
        for f in dataclasses.fields(Defaults)
    }


def _read_flag(word: str, hints: dict[str, type]) -> dict:
    """--key=value, or a bare --key for a yes-or-no setting."""
    name, equals, text = word.lstrip("-").partition("=")
    _check_name(name, hints, "")
    if not equals and bool not in (hints[name], *typing.get_args(hints[name])):
        raise UserError(f"--{name} has no value; write --{name}=VALUE")
    return {name: _parse(name, text, hints[name]) if equals else True}


def _meant(word: str, before: str, hints: dict[str, type]) -> str:
    """What was meant by a word that is no config file, and by the one before."""
    near = nearest(word, (show_path(path) for path in ROOT.glob("config/**/*.py")))
    name, _, text = before.lstrip("-").partition("=")
    if _kind(hints.get(name, int)) != list[str]:
        name, text = "input", "FILE"
    if near or name not in hints or "=" in word:
        return near or "; settings are written --key=value"
    return f"; several go between commas: --{name}={text},{word}"


def _read_file(word: str, values: dict, hints: dict[str, type]) -> dict:
    path = user_path(word)
    try:
        names = runpy.run_path(str(path), init_globals=dict(values))
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        raise UserError(f"{word}, line {line or '?'}: {in_a_line(error)}") from None
    settings = {}
    for name, value in names.items():
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue
        _check_name(name, hints, f" in {word}")
        settings[name] = _convert(name, value, hints[name], f" in {word}")
    return settings


def _check_name(name: str, hints: dict[str, type], where: str) -> None:
    if name not in hints:
        near = nearest(name, hints) or "; --help lists them all"
        raise UserError(f"unknown setting {name!r}{where}{near}")


def _parse(name: str, text: str, hint: type) -> object:
    """A flag's text as a value: Python's own notation if the type is not text; a,b for a list of
    texts, but the name of a file is one."""
    kind = _kind(hint)
    if text == "None" and kind is not hint:
        return None
    if kind is str or typing.get_origin(kind) is typing.Literal:
        _check_text(name, text, os.path.isfile)  # some libraries take no such folder
        return _convert(name, text, kind, "")
    if kind == list[str] and (not text.startswith("[") or _names(text, os.path.exists)):
        parts = [text] if "," in text and _names(text, _matches) else text.split(",")
        for part in parts:
            _check_text(name, part, _matches)
        return [part for part in parts if part]
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, TypeError):
        value = text
    if typing.get_origin(kind) is list and isinstance(value, int | float):
        value = [value]  # as --runs=a is a list of one
    return _convert(name, value, kind, "")


def _check_text(name: str, text: str, is_there: Callable[[Path], bool]) -> None:
    """Raises UserError for text that is not UTF-8, but a file's name is what it is."""
    if not is_text(text) and not _names(text.removeprefix("FILE:"), is_there):
        raise UserError(f"{name}={text} is no text in UTF-8, nor the name of a file")


def _names(text: str, is_there: Callable[[Path], bool]) -> bool:
    """Whether it is there under this name, in the current directory or the repository."""
    return any(is_there(base / expanded(text)) for base in (Path.cwd(), ROOT))


def _matches(path: Path) -> bool:
    # pathlib's functions raise an error if a name is too long
    return os.path.exists(path) or bool(glob.glob(str(path), recursive=True))  # noqa: PTH110, PTH207


def _kind(hint: type) -> type:
    """The type of a field's values besides None: int of `int | None`."""
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    # `Literal[...] | None` is typing's own Union
    return options[0] if typing.get_origin(hint) in (types.UnionType, typing.Union) else hint


def _convert(name: str, value: object, hint: type, where: str) -> object:
    """value as the field's type. An int serves as a float, 1e3 as an int. Raises UserError if it is
    of another type."""
    kind, options = _kind(hint), typing.get_args(_kind(hint))
    if value is None and kind is not hint:
        return None
    if typing.get_origin(kind) is typing.Literal:
        if value in options:
            return value
        near = nearest(str(value), map(str, options))
        choices = ", ".join(map(str, options))
        raise UserError(f"{name}={value!r}{where} must be one of {choices}{near}")
    if typing.get_origin(kind) is list:
        if isinstance(value, list | tuple):
            return [_convert(name, item, options[0], where) for item in value]
    elif isinstance(value, bool):
        if kind is bool:
            return value
    elif kind is float and isinstance(value, int | float):
        if abs(value) <= sys.float_info.max:
            return float(value)
    elif kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif isinstance(value, kind):
        if "\0" in str(value):
            raise UserError(f"{name}={value!r}{where} holds a NUL")
        return value
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    raise UserError(f"{name}={value!r}{where} must be {words.get(kind, str(kind))}")


with contextlib.suppress(ValueError):  # where it is imported in a thread
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted_early)
