"""JSON Lines: an object a line, in UTF-8; and JSON reports, an object a file.

Long commands append to a file of lines as they go. Killed at any moment, the same command resumes:
a last line that was cut short is removed, and where the file has a header, its first line, that
tells whether the file belongs to the same run. What is written whole is written aside and renamed.
"""

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from configurator import UserError, show_path, written_aside


def read_text(path: Path, remedy: str) -> str:
    """A file's text. Raises UserError, with the remedy, if it is missing, empty or not UTF-8."""
    if not path.is_file():
        raise UserError(f"no file {show_path(path)}; {remedy}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{show_path(path)} is not UTF-8 ({error}); {remedy}") from None
    if not text.strip():
        raise UserError(f"{show_path(path)} is empty; {remedy}")
    return text


def read_lines(path: Path, remedy: str) -> list[tuple[int, str]]:
    """(number, line) of the lines that are not blank."""
    # no splitlines: JSON leaves U+2028 and U+0085 inside its texts as they are
    lines = enumerate(read_text(path, remedy).split("\n"), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_records(
    path: Path, texts: Sequence[str], remedy: str, optional: Sequence[str] = ()
) -> list[dict]:
    """The objects of a file, each with a text under these keys; those under the optional ones may
    be missing. Raises UserError at the first other line."""
    records = []
    for number, line in read_lines(path, remedy):
        try:
            record = json.loads(line)
            given = [key for key in optional if record.get(key) is not None]
            "".join([record[key] for key in (*texts, *given)]).encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"{show_path(path)}, line {number}: no object with texts under "
                f"{', '.join(texts)}; {remedy}"
            ) from None
        records.append(record)
    return records


def read_report(path: Path, keys: Sequence[str], remedy: str) -> dict:
    """A file's one object, which has these keys."""
    try:
        report = json.loads(read_text(path, remedy))
        missing = {*keys} - report.keys()
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{show_path(path)} is damaged; {remedy}") from None
    if missing:
        raise UserError(f"{show_path(path)} has no {min(missing)}; {remedy}")
    return report


def dumps(records: Iterable[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_text(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


def write(path: Path, records: Iterable[dict]) -> None:
    write_text(path, dumps(records))


def write_report(path: Path, report: dict) -> None:
    write_text(path, json.dumps(report, ensure_ascii=False, indent=1) + "\n")


# --- files that are appended to ------------------------------------------------------------------


def append(path: Path, records: Iterable[dict]) -> None:
    """Adds lines to a file, of whose last one the end may be missing. Raises UserError if the disk
    is full."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(max(0, file.seek(0, 2) - 1))
            end = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(end + dumps(records).encode())
    except OSError as error:
        raise UserError(f"cannot write {show_path(path)}: {error.strerror}; make room") from None


def recover(path: Path, key: str = "") -> list[dict]:
    """The records of a file that was appended to, [] if there is none; a last line that was cut
    short is removed from the file, one that only lacks its end gets it. Raises UserError if another
    line is damaged or has no text under the key."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content.rstrip(b"\0\t\r ")  # a power loss may leave zeros
    *lines, last = whole.decode("utf-8", "replace").split("\n")
    is_cut = last.startswith("{") and _object(last) is None
    lines += [last] if last and not is_cut else []
    records = [_object(line, key) for line in lines]
    if None in records:
        raise UserError(f"{show_path(path)}, line {records.index(None) + 1} is damaged; delete it")
    keep = whole.rfind(b"\n") + 1 if is_cut else len(whole)
    if keep < len(content):
        with path.open("r+b") as file:
            file.truncate(keep)
    if keep:
        append(path, [])  # the end of the last line, if it lacks one
    return records


def _object(line: str, key: str = "") -> dict | None:
    """The object of a line; None if it is none, or has no text under the key."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(line)
        if isinstance(value, dict) and (not key or isinstance(value.get(key), str)):
            return value


def resume(path: Path, header: dict) -> list[dict]:
    """The records behind the header of a file that is appended to; begins it if there is none.
    Raises UserError if it was begun with another header."""
    begun, *records = recover(path) or [None]
    if begun is None:
        append(path, [header])
    elif begun != header:
        different = [key for key in header | begun if begun.get(key) != header.get(key)]
        raise UserError(
            f"{show_path(path)} was begun with other {', '.join(different)}; delete it to start "
            "over"
        )
    return records
