"""Raw files of any form -> records, as a stream: no file is ever whole in memory. No tokens here.

    txt, jsonl, json, csv, tsv, tmx, parquet      each also .gz or .zst

`find_sources` turns files, folders and globs into sources, `parts` cuts a long one at line ends,
`records` reads one of them, so that several processes can share them. A record is a text, or a
conversation: what its fields mean is in forms.py, its encoding in encodings.py. What is no good
record is counted in a Tally, with a reason.
"""

import codecs
import csv
import glob
import gzip
import io
import itertools
import json
import re
import shutil
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from backports import zstd

from configurator import ROOT, UserError, show_path
from miniglm.prep.encodings import find_encoding, open_bytes
from miniglm.prep.forms import KNOWN_FIELDS, BadRecord, Record, clean, interpret, is_whole

T = TypeVar("T")
FORMS = ("txt", "jsonl", "json", "csv", "tsv", "tmx", "parquet")
PASSAGE = 4096  # characters; a plain text is cut at the first line end after so many
LONG_LINE = 2**16  # characters; a plain text's line is cut after so many
MAX_RECORD = 2**24  # characters of one line or JSON value; bounds the memory
MAX_CELL = 2**20  # characters of one cell of a csv
CHUNK = 2**18  # bytes read at once
LINES = ("txt", "jsonl", "tsv")  # forms whose lines stand for themselves
# encodings in which a line end is one code, wherever it stands, and the type of that
LINE_ENDS = dict.fromkeys(("utf-8", "ascii", "gb18030", "gbk", "gb2312", "big5", "cp950"), "u1")
LINE_ENDS |= {"utf-16-le": "<u2", "utf-16-be": ">u2"}
DAMAGED = "\udc80"  # stands in a text where bytes are no character of its encoding
DAMAGED_XML = "\ufdd0"  # the same inside XML, which has no surrogates; no character either
codecs.register_error("mark_damage", lambda error: (DAMAGED, error.end))


# --- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    path: Path
    form: str  # one of FORMS
    encoding: str = ""  # Python's name; none for parquet
    target: "Source | None" = None  # a file that answers this one line by line
    start: int = 0  # of a part: the place of its first byte
    end: int | None = None  # of a part: the place behind its last byte
    line: int = 1  # of a part: the number of its first line
    first: str = ""  # of a later part of a table: the first line of the file

    @property
    def name(self) -> str:
        return show_path(self.path)

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.end is None


def find_sources(
    words: list[str], encoding: str = "auto", targets: Sequence[str] = ()
) -> list[Source]:
    """The files that words name: files, folders, globs, relative to the current directory or to
    the repository. Prints which encoding each has. UserError where there is none, or garbage.

    targets: as many files, whose lines answer those of the others."""
    paths = list(dict.fromkeys(itertools.chain.from_iterable(map(_find, words))))
    if not paths:
        raise UserError("no input; name a file, a folder, or a glob in quotes")
    sources = []
    for path in paths:
        form = form_of(path)
        if form == "parquet":
            sources.append(Source(path, form))
        else:
            sources.append(Source(path, form, find_encoding(path, encoding)))
    _print_encodings(sources)
    if not targets:
        return sources
    answers = find_sources(list(targets), encoding)
    if len(answers) != len(sources):
        raise UserError(f"{len(sources)} files of --input=, but {len(answers)} of --target=")
    return [replace(one, target=other) for one, other in zip(sources, answers, strict=True)]


def form_of(path: Path) -> str:
    """The form that a file's name tells; any unknown suffix is plain text."""
    form = _suffix(path)
    return form if form in FORMS else "txt"


def _suffix(path: Path) -> str:
    return re.sub(r"\.(gz|zst|zstd)$", "", path.name.lower()).rpartition(".")[2]


def _find(word: str) -> list[Path]:
    word = str(Path(word).expanduser())
    for base in (Path.cwd(), ROOT):
        path = base / word
        if path.is_dir():
            return _folder(path)
        if path.exists():
            return [path]
        # Path.glob takes no absolute pattern
        found = [base / name for name in glob.glob(word, root_dir=base, recursive=True)]  # noqa: PTH207
        if found := sorted(path for path in found if path.is_file()):
            return found
    raise UserError(f"no file {word}")


def _folder(folder: Path) -> list[Path]:
    """The files of known forms in a folder and those below, hidden ones left out."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    known = [path for path in files if _suffix(path) in FORMS]
    if len(known) < len(files):
        print(f"{show_path(folder)}: {len(files) - len(known)} files of other forms left out")
    if not known:
        raise UserError(f"{show_path(folder)} holds no file of the forms {', '.join(FORMS)}")
    return known


def _print_encodings(sources: list[Source]) -> None:
    names = {}
    for source in sources:
        if source.encoding:
            names.setdefault(source.encoding, []).append(source.name)
    for encoding, files in names.items():
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        print(f"{encoding}: {', '.join(files[:3])}{more}")


def parts(source: Source, size: int) -> list[Source]:
    """A source of lines in parts of some `size` bytes, cut at line ends; others as they are.

    Depends on the file alone. A .json file of lines is one of lines from here on."""
    if source.target or source.path.stat().st_size <= 1.5 * size:
        return [source]
    if source.form == "json" and _first_line_is_json(source):
        source = replace(source, form="jsonl")
    with open_bytes(source.path) as file:
        is_packed = isinstance(file, gzip.GzipFile | zstd.ZstdFile)
    if source.form not in LINES or source.encoding not in LINE_ENDS or is_packed:
        return [source]
    marks = _cuts(source, size)
    ends = [start for start, _ in marks[1:]] + [None]
    first = next((line for _, line in read_lines(source, cut=MAX_CELL) if line.strip()), "")
    return [
        replace(source, start=start, end=end, line=line, first=first if tabs and start else "")
        for (start, line), end in zip(marks, ends, strict=True)
        for tabs in [source.form == "tsv"]
    ]


def _cuts(source: Source, size: int) -> list[tuple[int, int]]:
    """(place, number) of the lines where the parts begin."""
    unit = np.dtype(LINE_ENDS[source.encoding])
    marks, position, line = [(0, 1)], 0, 1
    whole = source.path.stat().st_size
    with source.path.open("rb") as file:
        while data := file.read(CHUNK):
            while data.endswith(np.array(13, unit).tobytes()) and (
                more := file.read(unit.itemsize)
            ):
                data += more  # its line end may be CRLF
            codes = np.frombuffer(data, unit, len(data) // unit.itemsize)
            ends = codes == 10
            is_cr = codes == 13
            ends |= is_cr & ~np.append(ends[1:], False)
            places = position + (np.flatnonzero(ends) + 1) * unit.itemsize
            while (next_one := np.searchsorted(places, marks[-1][0] + size)) < len(places):
                marks.append((int(places[next_one]), line + int(next_one) + 1))
            position, line = position + len(data), line + len(places)
    return [mark for mark in marks if mark[0] < whole]


# --- counting ------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Good records, and bad ones by reason. The first `show` bad ones are printed.

    Several tallies of some sources each make one: `add` them in the order of the sources."""

    strict: bool = False  # whether the first bad record stops all
    show: int = 5
    say: bool = True  # print them; else they are kept in `shown`
    good: int = 0
    bad: Counter = field(default_factory=Counter)
    aside: Counter = field(default_factory=Counter)  # good ones that are not wanted, by reason
    shown: list[str] = field(default_factory=list)  # of the first bad ones, a line each
    files: list[tuple] = field(default_factory=list)  # (source, good, bad, what was wrong first)
    _source: Source | None = None
    _before: tuple[int, Counter] = (0, Counter())
    _first: str = ""  # what was wrong first in this file

    def begin(self, source: Source) -> None:
        self._source, self._before, self._first = source, (self.good, self.bad.copy()), ""

    def skip(self, line: int, error: BadRecord) -> None:
        """Counts a bad record; line 0: the whole file."""
        name = self._source.name
        where = f"{name}, line {line}" if line else name
        if self.strict:
            raise UserError(f"{where}: {error}")
        self.bad[error.reason] += 1
        self._first = self._first or f"line {line}: {error}"
        self._show(f"skipped: {where}: {error}")
        # of a later part it is not known what stands before it
        if self._source.start == 0 and self._here()[1].total() == 1000:
            self.check()

    def end(self) -> None:
        """UserError where over half of a file's records are bad."""
        if self._source.is_whole:
            self._finish()
        self.files.append((self._source, *self._here(), self._first))

    def check(self) -> None:
        good, bad = self._here()[0], self._here()[1].total()
        if bad > good:
            raise UserError(
                f"{self._source.name}: {bad:,} of {good + bad:,} records are bad, the first in "
                f"{self._first}; is it what you meant? --fields= names the fields"
            )

    def add(self, other: "Tally") -> None:
        """Adds the tally of the sources that come next. UserError where over half of the records
        of a file are bad whose parts lie in several tallies."""
        self.aside += other.aside
        for line in other.shown:
            self._show(line)
        for source, good, bad, first in other.files:
            if source.start == 0:
                self.begin(source)
            self.good += good
            self.bad += bad
            self._first = self._first or first
            if not source.is_whole and source.end is None:
                self._finish()
            elif not source.is_whole and self._here()[1].total() >= 1000:
                self.check()

    def _finish(self) -> None:
        if self._here() == (0, Counter()):
            self.skip(0, BadRecord("empty file"))
        else:
            self.check()

    def _show(self, line: str) -> None:
        if len(self.shown) < self.show:
            self.shown.append(line)
            if self.say:
                print(line)

    def summary(self) -> str:
        """What was left out, as the end of a line."""
        bad, aside = (
            ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common())
            for counts in (self.bad, self.aside)
        )
        aside = f"; of these not taken: {aside}" if aside else ""
        return aside + (f"; records left out: {bad}" if bad else "")

    def meta(self) -> dict:
        """What goes into meta.json."""
        aside = {"not_taken": dict(sorted(self.aside.items()))} if self.aside else {}
        return {"records": self.good, "skipped": dict(sorted(self.bad.items()))} | aside

    def _here(self) -> tuple[int, Counter]:
        """The good and the bad records of this file so far."""
        return self.good - self._before[0], self.bad - self._before[1]


# --- lines ---------------------------------------------------------------------------------------


def read_chunks(source: Source) -> Iterator[str]:
    """The text in pieces, its line ends LF; DAMAGED stands for bytes that are no character."""
    decode = codecs.getincrementaldecoder(source.encoding)("mark_damage")
    decoder = io.IncrementalNewlineDecoder(decode, translate=True)
    left = None if source.end is None else source.end - source.start
    with open_bytes(source.path) as file:
        if source.start:
            file.seek(source.start)
        start = source.start == 0
        while data := file.read(CHUNK if left is None else min(CHUNK, left)):
            text = decoder.decode(data)
            yield text.removeprefix("\ufeff") if start else text
            start = False
            left = None if left is None else left - len(data)
        yield decoder.decode(b"", final=True)


def read_lines(source: Source, cut: int = 0) -> Iterator[tuple[int, str]]:
    """(number, line) without its end. cut: a line that is longer comes in pieces of about so many
    characters; without it one of over MAX_RECORD is a UserError."""
    number, parts, size = source.line, [], 0
    for chunk in read_chunks(source):
        *lines, rest = chunk.split("\n")
        if parts and lines:
            lines[0] = "".join([*parts, lines[0]])
            parts, size = [], 0
        yield from enumerate(lines, number)
        number += len(lines)
        parts.append(rest)
        size += len(rest)
        if cut and size > cut:
            yield number, "".join(parts)
            parts, size = [], 0
        elif size > MAX_RECORD:
            raise UserError(f"{source.name}, line {number}: over {MAX_RECORD:,} characters")
    if size:
        yield number, "".join(parts)


def passages(source: Source, tally: Tally) -> Iterator[str]:
    """A plain text in passages of whole lines; what is counted are its lines."""
    lines, size = [], 0
    for number, line in read_lines(source, cut=LONG_LINE):
        lines.append((number, line))
        size += len(line) + 1
        if size >= PASSAGE:
            if text := _passage(lines, tally):
                yield text
            lines, size = [], 0
    if text := _passage(lines, tally):
        yield text


def _passage(lines: list[tuple[int, str]], tally: Tally) -> str:
    """The text of lines (number, line), without those that are damaged."""
    text = "\n".join(line for _, line in lines)
    if not is_whole(text):  # seldom; all at once is quicker than line by line
        damaged = [(number, line) for number, line in lines if not is_whole(line)]
        for number, line in damaged:
            tally.skip(number, BadRecord("damaged characters", line[:40]))
        lines = [one for one in lines if one not in damaged]
        text = "\n".join(line for _, line in lines)
    tally.good += sum(1 for _, line in lines if line and not line.isspace())
    return clean(text)


# --- values: what a record is in the file --------------------------------------------------------


def values(
    source: Source, tally: Tally, has_header: bool | None = None
) -> Iterator[tuple[int, object]]:
    """(line, value) of each record; a row of a table is a dict of its columns.

    has_header: whether a table's first row names the columns, else they are "1", "2", ...; None:
    that of a csv does, and that of a tsv if these are all known names.
    """
    if source.form == "parquet":
        return _parquet_rows(source)
    if source.form in ("csv", "tsv"):
        return _table_rows(source, tally, has_header)
    if source.form == "tmx":
        return _tmx_units(source)
    if source.form == "jsonl" or _first_line_is_json(source):
        return _json_lines(source, tally)
    return _json_values(source)


def _json_lines(source: Source, tally: Tally) -> Iterator[tuple[int, object]]:
    for number, line in read_lines(source):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            tally.skip(number, BadRecord("broken JSON", error))


def _first_line_is_json(source: Source) -> bool:
    """Whether a .json file is in fact one of lines: the first is an object of its own."""
    line = next((line for _, line in read_lines(source, cut=MAX_RECORD) if line.strip()), "")
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


JSON = json.JSONDecoder()
JSON_BLANKS = re.compile(r"[ \t\r\n]*")


class _JsonText:
    """A JSON text that is read as far as its next value needs."""

    def __init__(self, source: Source):
        self.source, self.chunks = source, read_chunks(source)
        self.buffer, self.at, self.line, self.ended = "", 0, 1, False

    def broken(self, why: object) -> UserError:
        return UserError(f"{self.source.name}, line {self.line}: broken JSON ({why})")

    def peek(self) -> str:
        """The next character that is no blank, "" at the end."""
        while True:
            self._go_to(JSON_BLANKS.match(self.buffer, self.at).end())
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._read():
                return ""

    def skip(self) -> None:
        self._go_to(self.at + 1)

    def value(self) -> tuple[int, object]:
        """The next value and the line where it begins."""
        self.peek()
        while True:
            try:
                value, end = JSON.raw_decode(self.buffer, self.at)
                if end < len(self.buffer) or not self._read():  # else a number may go on
                    line = self.line
                    self._go_to(end)
                    return line, value
            except json.JSONDecodeError as error:
                # a value that is cut by the buffer's end fails there, or at its last string
                may_go_on = error.pos > len(self.buffer) - 16 or "Untermin" in error.msg
                if not (may_go_on and self._read()):
                    raise self.broken(error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self.broken(error) from None

    def _go_to(self, at: int) -> None:
        self.line += self.buffer.count("\n", self.at, at)
        self.at = at

    def _read(self) -> bool:
        """Appends as much as there is left, so that reading a long value again costs little."""
        if self.ended:
            return False
        rest, size = [self.buffer[self.at :]], 0
        if len(rest[0]) > MAX_RECORD:
            raise UserError(f"{self.source.name}, line {self.line}: over {MAX_RECORD:,} characters")
        while size < max(1, len(rest[0])) and not self.ended:
            chunk = next(self.chunks, None)
            self.ended = chunk is None
            rest.append(chunk or "")
            size += len(rest[-1])
        self.buffer, self.at = "".join(rest), 0
        return size > 0


def _json_values(source: Source) -> Iterator[tuple[int, object]]:
    """The elements of an array, or values one after another. Nothing can be read past a fault."""
    text = _JsonText(source)
    if text.peek() != "[":
        while text.peek():
            yield text.value()
        return
    text.skip()
    mark = "," if text.peek() != "]" else "]"
    if mark == "]":
        text.skip()
    while mark == ",":
        yield text.value()
        mark = text.peek()
        text.skip()
    if mark != "]" or text.peek():
        raise text.broken("expected , or ]" if mark != "]" else "text after the array")


def _table_rows(
    source: Source, tally: Tally, has_header: bool | None
) -> Iterator[tuple[int, dict]]:
    rows = _csv_rows(source, tally) if source.form == "csv" else _tab_rows(source)
    if source.first:  # a later part: a header counts for it too, a first row has been read
        rows = itertools.chain([(0, source.first.split("\t"))], rows)
    names = None
    for number, row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if names is None:
            asked = has_header is not None
            if has_header if asked else source.form == "csv" or _is_header(row):
                names = row
                continue
            names = [str(n + 1) for n in range(len(row))]
            if number == 0:
                continue
            if not asked and len(row) != 2:
                raise UserError(
                    f"{source.name} has {len(row)} columns and no header; which are they? "
                    "pass for instance --fields=question=1,answer=3"
                )
        if len(row) != len(names):
            tally.skip(number, BadRecord("wrong number of columns", len(row)))
        else:
            yield number, dict(zip(names, row, strict=True))


def _tab_rows(source: Source) -> Iterator[tuple[int, list[str]]]:
    """Lines cut at each tab; a quotation mark in them is a character as others."""
    return ((number, line.split("\t")) for number, line in read_lines(source))


def _csv_rows(source: Source, tally: Tally) -> Iterator[tuple[int, list[str]]]:
    """Rows, which may span lines. After a broken one the next line is read as a row of its own, so
    that a lost quotation mark costs its own line and not those behind it."""
    csv.field_size_limit(MAX_CELL)
    lines, again = read_lines(source), deque()
    while True:
        taken = []

        def take(taken: list = taken) -> Iterator[str]:
            while line := again.popleft() if again else next(lines, None):
                taken.append(line)
                yield line[1] + "\n"

        try:
            row = next(csv.reader(take(), strict=True), None)
        except csv.Error as error:
            tally.skip(taken[0][0], BadRecord("broken CSV", error))
            again.extendleft(reversed(taken[1:]))
            continue
        if row is None:
            return
        yield taken[0][0], row


def _is_header(row: list[str]) -> bool:
    return {name.strip().lower() for name in row} <= KNOWN_FIELDS - {"1", "2"}


def _tmx_units(source: Source) -> Iterator[tuple[int, dict]]:
    """Each translation unit as {language: text}, the language without its country."""
    parser = ElementTree.XMLPullParser(["start", "end"])
    path = []
    for number, line in read_lines(source):
        try:
            parser.feed(line.replace(DAMAGED, DAMAGED_XML) + "\n")
            for event, element in parser.read_events():
                if event == "start":
                    path.append(element)
                    continue
                path.pop()
                if element.tag == "tu":
                    yield number, _tmx_unit(element)
                if path and all(outer.tag != "tu" for outer in path):
                    path[-1].remove(element)
        except ElementTree.ParseError as error:
            raise UserError(f"{source.name}, line {number}: broken TMX ({error})") from None
    try:
        parser.close()
    except ElementTree.ParseError as error:
        raise UserError(f"{source.name} is broken or cut off ({error})") from None


def _tmx_unit(unit: ElementTree.Element) -> dict:
    found = {}
    for variant in unit.iter("tuv"):
        names = ("{http://www.w3.org/XML/1998/namespace}lang", "lang")
        language = next((variant.get(name) for name in names if variant.get(name)), "")
        segment = variant.find("seg")
        if segment is not None:
            text = _segment_text(segment).replace(DAMAGED_XML, DAMAGED)
            found[re.split("[-_]", language.lower())[0]] = text
    return {"translation": found}


def _segment_text(element: ElementTree.Element) -> str:
    """Its text without the codes of the formatting."""
    inner = "" if element.tag in ("bpt", "ept", "it", "ph", "ut") else element.text or ""
    return inner + "".join(_segment_text(child) + (child.tail or "") for child in element)


def _parquet_rows(source: Source) -> Iterator[tuple[int, dict]]:
    """Rows, of one row group after another; their number stands for the line."""
    import pyarrow  # here, since it takes longer to import than a small file to read
    import pyarrow.parquet

    number = itertools.count(1)
    try:
        with _unpacked(source.path) as file:
            parquet = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
            for batch in parquet.iter_batches(batch_size=256, use_threads=False):
                for row in batch.to_pylist():
                    yield next(number), row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        why = "".join(char for char in str(error) if char.isprintable())[:100]
        raise UserError(f"{source.name} is no parquet file, or damaged ({why})") from None


@contextmanager
def _unpacked(path: Path) -> Iterator[io.BufferedIOBase]:
    """A file that can be read at any place; a compressed one is unpacked to the disk."""
    with open_bytes(path) as file:
        if not isinstance(file, gzip.GzipFile | zstd.ZstdFile):
            yield file
            return
        with tempfile.TemporaryFile() as whole:
            shutil.copyfileobj(file, whole)
            whole.seek(0)
            yield whole


# --- records -------------------------------------------------------------------------------------


def records(
    source: Source,
    tally: Tally,
    fields: dict[str, str] | None = None,
    want: type | None = None,
) -> Iterator[Record]:
    """The good records of one source. want: str or list, where the others count as bad."""
    tally.begin(source)
    if source.form == "txt" and not source.target:
        if want is list:
            raise UserError(f"{source.name} is plain text, and no conversations")
        yield from passages(source, tally)
        tally.end()
        return
    fields = fields or {}
    has_header = not all(name.isdigit() for name in fields.values()) if fields else None
    found = aligned(source) if source.target else values(source, tally, has_header)

    def record_of(value: object) -> Record:
        record = interpret(value, fields)
        if want and not isinstance(record, want):
            kinds = ["no conversation", "no text"]
            raise BadRecord(kinds[isinstance(record, list)])
        return record

    yield from _good(found, tally, record_of)


def converted(source: Source, tally: Tally, record_of: Callable[[object], T]) -> Iterator[T]:
    """What record_of makes of each value of a source, or each line of a plain text, where it does
    not raise BadRecord: for datasets of a form of their own."""
    tally.begin(source)
    is_plain = source.form == "txt" and not source.target
    lines = ((number, line) for number, line in read_lines(source) if line.strip())
    found = aligned(source) if source.target else values(source, tally)
    yield from _good(lines if is_plain else found, tally, record_of)


def _good(
    found: Iterator[tuple[int, object]], tally: Tally, record_of: Callable[[object], T]
) -> Iterator[T]:
    for line, value in found:
        try:
            record = record_of(value)
        except BadRecord as error:
            tally.skip(line, error)
        else:
            tally.good += 1
            yield record
    tally.end()


def aligned(source: Source) -> Iterator[tuple[int, dict]]:
    """The lines of a source as questions, the same lines of its target as answers."""
    lines = itertools.zip_longest(
        read_lines(source), read_lines(source.target), fillvalue=(0, None)
    )
    for (number, asked), (other, answer) in lines:
        if asked is None or answer is None:
            names = [source.name, source.target.name]
            longer, shorter = names if answer is None else names[::-1]
            raise UserError(
                f"{longer} has more lines than the {max(number, other) - 1:,} of {shorter}; "
                "they must be aligned line by line"
            )
        yield number, {"question": asked, "answer": answer}


def is_text(sources: list[Source], fields: dict[str, str]) -> bool:
    """Whether the first good record is a text, not a conversation."""
    for source in sources:
        for record in records(source, Tally(show=0), fields):
            return isinstance(record, str)
    raise UserError("there is no record in the input")
