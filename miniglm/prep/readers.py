"""Raw files of any form -> records, as a stream: no file is ever whole in memory. No tokens here.

    txt, jsonl, json, csv, tsv, tmx      each also .gz or .zst
    parquet

`find_sources` turns files, folders and globs into sources, `parts` cuts a long one at line ends so
that several processes can share it, and `records` reads it. A record is a text or a conversation:
forms.py says what its fields mean, encodings.py how its bytes are read. Bad records are counted in
a Tally, by reason.
"""

import codecs
import csv
import functools
import glob
import io
import itertools
import json
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from configurator import ROOT, UserError, expanded, show_path
from miniglm.prep.encodings import find_encoding, is_packed, open_bytes, refuse_other_kinds
from miniglm.prep.forms import KNOWN_FIELDS, BadRecord, Record, clean, interpret, is_whole, tidied

T = TypeVar("T")
FORMS = ("txt", "jsonl", "json", "csv", "tsv", "tmx", "parquet")
PASSAGE = 4096  # characters; a plain text is cut at the first line end after so many
LONG_LINE = 2 * PASSAGE  # characters; a longer line of a plain text is cut at ends of sentences
CUT = re.compile(  # over PASSAGE characters, and at most LONG_LINE
    rf"(?s:.{{{PASSAGE}}}(?:.{{0,{PASSAGE - 100}}}?"
    r"(?:(?:[。！？…；!?;]|\.(?!\d)){1,9}[”’」』）)]{0,9}|[\v\f\x85\u2028\u2029]|\u3000{2}| {32})"
    rf"|.{{0,{PASSAGE}}}))"
)
MAX_RECORD = 2**24  # characters of one line or JSON value; bounds the memory
MAX_CELL = 2**20  # characters of one cell of a csv
CHUNK = 2**18  # bytes read at once
CHECKED = 1000  # bad records of a file after which most must be good
SHOWN = 5  # bad records that are printed
DAMAGED = "\udc80"  # stands in a text for bytes that are no character of its encoding
DAMAGED_XML = "\ufdd0"  # the same inside XML, which has no surrogates; not a character either
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
    has_header: bool | None = None  # whether a table's first row names the columns; None: it tells

    @property
    def name(self) -> str:
        return show_path(self.path)

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.end is None


def find_sources(
    words: list[str], encoding: str = "auto", targets: Sequence[str] = ()
) -> list[Source]:
    """The files that words name: files, folders or globs, relative to the current directory or to
    the repository. Prints the encoding of each. Raises UserError if there is no file, or if one is
    not readable text.

    targets: as many files, whose lines answer those of the others."""
    paths = list(dict.fromkeys(itertools.chain.from_iterable(map(_find, words))))
    if not paths:
        raise UserError("no input; name a file, a folder, or a glob in quotes")
    sources = [source_of(path, encoding) for path in paths]
    _print_encodings(sources)
    if not targets:
        return sources
    answers = find_sources(list(targets), encoding)
    if len(answers) != len(sources):
        raise UserError(f"{len(sources)} files of --input=, but {len(answers)} of --target=")
    pairs = zip(sources, answers, strict=True)
    return [replace(source, target=answer) for source, answer in pairs]


def source_of(path: Path, encoding: str = "auto") -> Source:
    form = _suffix(path)
    form = form if form in FORMS else "txt"  # any unknown suffix
    refuse_other_kinds(path, form)
    return Source(path, form, "" if form == "parquet" else find_encoding(path, encoding))


def _suffix(path: Path) -> str:
    return re.sub(r"\.(gz|zst|zstd)$", "", path.name.lower()).rpartition(".")[2]


def _find(word: str) -> list[Path]:
    word = str(expanded(word))
    for base in (Path.cwd(), ROOT):
        path = base / word
        if path.is_dir():
            return _files_of_known_forms(path)
        if path.exists():
            return [path]
        if files := _glob(base, word):
            return files
    raise UserError(f"no file {word}")


def _glob(folder: Path, pattern: str) -> list[Path]:
    """The files that match, in order; ** leaves hidden ones out, and is in each folder once."""
    parts = Path(pattern).parts
    if "**" in parts:
        at = parts.index("**")
        head, tail = (str(Path(*some)) for some in (parts[:at], parts[at + 1 :] or ["*"]))
        bases = glob.glob(head, root_dir=folder)  # noqa: PTH207
        folders = (sub for base in bases for sub in _folders(folder / base))
        return sorted({file for sub in folders for file in _glob(sub, tail)})
    # Path.glob takes no absolute pattern
    names = glob.glob(pattern, root_dir=folder)  # noqa: PTH207
    return sorted(path for name in names if (path := folder / name).is_file())


def _folders(folder: Path) -> Iterator[Path]:
    """A folder and those below it, each once, although links may lead back."""
    seen = set()
    for path, names, _ in os.walk(folder, followlinks=True):
        shown = [name for name in names if not name.startswith(".")]
        names.clear()
        if (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            names += sorted(shown, key=lambda name: (Path(path, name).is_symlink(), name))
            yield Path(path)


def _files_of_known_forms(folder: Path) -> list[Path]:
    files = _glob(folder, "**")
    known = [path for path in files if _suffix(path) in FORMS]
    if len(known) < len(files):
        print(f"{show_path(folder)}: {len(files) - len(known)} files of other forms left out")
    if not known:
        raise UserError(f"{show_path(folder)} holds no file of the forms {', '.join(FORMS)}")
    return known


def _print_encodings(sources: list[Source]) -> None:
    for encoding in dict.fromkeys(source.encoding for source in sources if source.encoding):
        files = [source.name for source in sources if source.encoding == encoding]
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        print(f"{encoding}: {', '.join(files[:3])}{more}")


def parts(source: Source, size: int) -> list[Source]:
    """A text or JSON lines in parts of about `size` bytes, cut at line ends; others as they are.

    The cuts depend on the file alone. From here on, a .json file of JSON lines is a .jsonl."""
    total = source.path.stat().st_size
    if source.target or total <= 1.5 * size or is_packed(source.path):
        return [source]
    if source.form == "json" and _first_line_is_json(source):
        source = replace(source, form="jsonl")
    # where LF is one byte, which is part of no other character
    if source.form not in ("txt", "jsonl") or source.encoding.startswith(("utf-16", "utf-32")):
        return [source]
    cuts, line = [], 1
    with source.path.open("rb") as file:
        while file.tell() + size < total:
            cuts.append((file.tell(), line))
            data = file.read(size - 1) + file.readline(MAX_RECORD)
            if not data.endswith(b"\n") and file.tell() < total:  # its line ends are no LF
                return [source]
            line += data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")
        if file.tell() < total:
            cuts.append((file.tell(), line))
    ends = [start for start, _ in cuts[1:]] + [None]
    pairs = zip(cuts, ends, strict=True)
    return [replace(source, start=start, end=end, line=line) for (start, line), end in pairs]


# --- counting ------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Good records, and bad ones by reason. The first SHOWN bad ones are printed.

    Units that are read apart have a tally each: `add` them in the order of their sources."""

    strict: bool = False  # whether the first bad record stops all
    quiet: bool = False  # the first bad ones are only kept in `shown`
    good: int = 0
    bad: Counter = field(default_factory=Counter)
    aside: Counter = field(default_factory=Counter)  # good ones that are not wanted, by reason
    odd: dict[str, list] = field(default_factory=dict)  # kind of `tidied` -> [records, the first]
    shown: list[str] = field(default_factory=list)  # a line for each of the first bad ones
    _source: Source | None = None  # what is being read,
    _good: int = 0  # its good records,
    _bad: int = 0  # its bad ones
    _first: str = ""  # and what is wrong with the first

    def begin(self, source: Source) -> None:
        self._source, self._good, self._bad, self._first = source, 0, 0, ""

    def count(self, n: int = 1) -> None:
        """Counts good records."""
        self.good += n
        self._good += n

    def skip(self, line: int, error: BadRecord) -> None:
        """Counts a bad record, or one that is not wanted; line 0 is the whole file."""
        if error.is_good:
            self.count()
            self.aside[error.reason] += 1
            return
        place = f"{self._source.name}, line {line}" if line else self._source.name
        if self.strict:
            raise UserError(f"{place}: {error}")
        self.bad[error.reason] += 1
        self._bad += 1
        self._first = self._first or f"line {line}: {error}"
        self._show(f"skipped: {place}: {error}")
        if self._bad == CHECKED:
            self._check()

    def tidy(self, line: int, value: T) -> T:
        """What `tidied` makes of a record, which is counted by what it held."""
        kinds = set()
        value = tidied(value, kinds)
        for kind in kinds:
            self.odd.setdefault(kind, [0, f"{self._source.name}, line {line}"])[0] += 1
        return value

    def end(self) -> None:
        """Raises UserError if over half of the records are bad: of a file, or of a part of one."""
        if self._good or self._bad or not self._source.is_whole:
            self._check()
        else:
            self.skip(0, BadRecord("empty file"))

    def _check(self) -> None:
        if self._bad > self._good:
            raise UserError(
                f"{self._source.name}: {self._bad:,} of {self._good + self._bad:,} records are "
                f"bad, the first in {self._first}; is it what you meant? --fields= names the fields"
            )

    def add(self, other: "Tally") -> None:
        """Adds the tally of the sources that come next."""
        self.good += other.good
        self.bad += other.bad
        self.aside += other.aside
        for kind, (count, first) in other.odd.items():
            self.odd.setdefault(kind, [0, first])[0] += count
        for line in other.shown:
            self._show(line)

    def _show(self, line: str) -> None:
        if len(self.shown) < SHOWN:
            self.shown.append(line)
            if not self.quiet:
                print(line)

    def summary(self) -> str:
        """What was left out, as the end of a line; and a line for each kind of odd characters."""
        bad, aside = (
            ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common())
            for counts in (self.bad, self.aside)
        )
        aside = f"; of these not taken: {aside}" if aside else ""
        odd = (
            f"\n{n:,} records with {kind}; the first in {first}"
            for kind, (n, first) in sorted(self.odd.items())
        )
        return aside + (f"; records left out: {bad}" if bad else "") + "".join(odd)

    def meta(self) -> dict:
        """What goes into meta.json."""
        aside = {"not_taken": dict(sorted(self.aside.items()))} if self.aside else {}
        odd = {"odd_characters": {kind: n for kind, (n, _) in sorted(self.odd.items())}}
        odd = odd if self.odd else {}
        return {"records": self.good, "skipped": dict(sorted(self.bad.items()))} | aside | odd


# --- lines ---------------------------------------------------------------------------------------


def read_chunks(source: Source) -> Iterator[str]:
    """The text in pieces, its line ends LF; DAMAGED stands for bytes that are no character."""
    decode = codecs.getincrementaldecoder(source.encoding)("mark_damage")
    decoder = io.IncrementalNewlineDecoder(decode, translate=True)
    left = (source.end or sys.maxsize) - source.start
    is_first = source.start == 0
    with open_bytes(source.path) as file:
        if source.start:
            file.seek(source.start)
        while data := file.read(min(CHUNK, left)):
            text = decoder.decode(data)
            yield text.removeprefix("\ufeff") if is_first else text
            is_first, left = False, left - len(data)
        yield decoder.decode(b"", final=True)


def read_lines(source: Source, cut: int = 0) -> Iterator[tuple[int, str]]:
    """(number, line) without its end. cut: a line longer than about so many characters may come in
    pieces, see `cut_line`. Without it, raises UserError if a line is longer than MAX_RECORD."""
    number, pieces, size = source.line, [], 0
    for chunk in read_chunks(source):
        *lines, last = chunk.split("\n")
        if pieces and lines:
            lines[0] = "".join([*pieces, lines[0]])
            pieces, size = [], 0
        yield from enumerate(lines, number)
        number += len(lines)
        pieces.append(last)
        size += len(last)
        if cut and size > cut:
            *cuts, last = cut_line("".join(pieces), LONG_LINE + 100, LONG_LINE + 100)
            yield from ((number, piece) for piece in cuts)
            pieces, size = [last], len(last)
        elif size > MAX_RECORD:
            raise UserError(f"{source.name}, line {number}: over {MAX_RECORD:,} characters")
    if size:
        yield number, "".join(pieces)


def cut_line(line: str, longest: int, then: int) -> list[str]:
    """A line in pieces of over PASSAGE characters while it has more than `longest`, and what is
    left of it more than `then`."""
    pieces = []
    while len(line) > longest:
        end = CUT.match(line).end()
        pieces.append(line[:end])
        line, longest = line[end:], then
    return [*pieces, line] if line or not pieces else pieces


def passages(source: Source, tally: Tally) -> Iterator[str]:
    """A plain text in passages of whole lines, without damaged ones. The tally counts lines."""
    lines, size, before = [], 0, 0
    for number, line in read_lines(source, cut=LONG_LINE):
        for piece in cut_line(line, PASSAGE if number == before else LONG_LINE, PASSAGE):
            if number == before:  # behind a cut there is no indent
                piece = piece.lstrip(" \t\u3000")
            before = number
            if is_whole(piece):
                lines.append((number, piece))
            else:
                tally.skip(number, BadRecord("damaged characters", piece[:40]))
            size += len(piece) + 1
            if size >= PASSAGE:
                yield from _passage(lines, tally)
                lines, size = [], 0
    yield from _passage(lines, tally)


def _passage(lines: list[tuple[int, str]], tally: Tally) -> Iterator[str]:
    tidied("".join(line for _, line in lines), kinds := set())
    lines = [tally.tidy(number, line) if kinds else line for number, line in lines]
    tally.count(sum(1 for line in lines if line and not line.isspace()))
    if text := clean("\n".join(lines)):
        yield text


# --- values: what a record is in the file --------------------------------------------------------


def values(source: Source, tally: Tally) -> Iterator[tuple[int, object]]:
    """(line, value) of each record: a line of a text, a row of a table as a dict of its columns."""
    if source.target:
        return aligned(source)
    if source.form == "txt":
        return ((number, line) for number, line in read_lines(source) if line.strip())
    if source.form == "parquet":
        return _parquet_rows(source)
    if source.form in ("csv", "tsv"):
        return _table_rows(source, tally)
    if source.form == "tmx":
        return _tmx_units(source)
    if source.form == "jsonl" or _first_line_is_json(source):
        return _json_lines(source, tally)
    return _json_values(source)


def aligned(source: Source) -> Iterator[tuple[int, dict]]:
    """The lines of a source as questions, the same lines of its target as answers."""
    number = 0
    try:
        for (number, question), (_, answer) in zip(
            read_lines(source), read_lines(source.target), strict=True
        ):
            yield number, {"question": question, "answer": answer}
    except ValueError:
        raise UserError(
            f"{source.name} and {source.target.name} must be aligned line by line, "
            f"but one has more lines than the other's {number:,}"
        ) from None


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. Of fields of one name all are kept, for `fields_of` to refuse."""
    fields = dict(pairs)
    if len(fields) < len(pairs):  # blanks around a name do not count there
        fields = {name + " " * n: value for n, (name, value) in enumerate(pairs)}
    return fields


JSON = json.JSONDecoder(object_pairs_hook=_object)


def _json_lines(source: Source, tally: Tally) -> Iterator[tuple[int, object]]:
    for number, line in read_lines(source):
        if not line.strip():
            continue
        try:
            yield number, JSON.decode(line.removeprefix("\ufeff"))  # of a file put behind another
        except (ValueError, RecursionError) as error:
            tally.skip(number, BadRecord("broken JSON", error))


def _first_line_is_json(source: Source) -> bool:
    """Whether a .json file is in fact JSON lines: its first line is an object of its own."""
    line = next((line for _, line in read_lines(source, cut=MAX_RECORD) if line.strip()), "")
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


JSON_BLANKS = re.compile(r"[ \t\r\n]*")


class _JsonText:
    """A JSON text that is read as far as its next value needs.

    ijson would do this, but its fast backend knows no lines, turns half a surrogate pair into a
    question mark, and stops a whole file at a damaged byte, which here costs its own record."""

    def __init__(self, source: Source):
        self.source, self.chunks = source, read_chunks(source)
        self.text, self.at, self.line = "", 0, 1

    def broken(self, why: object) -> UserError:
        return UserError(f"{self.source.name}, line {self.line}: broken JSON ({why})")

    def peek(self) -> str:
        """The next character that is no blank, "" at the end."""
        while True:
            self._go_to(JSON_BLANKS.match(self.text, self.at).end())
            if self.at < len(self.text) or not self._read():
                return self.text[self.at : self.at + 1]

    def accept(self, mark: str) -> bool:
        """Reads this character if it comes next, and says whether it did."""
        is_next = self.peek() == mark
        self._go_to(self.at + is_next)
        return is_next

    def value(self) -> tuple[int, object]:
        """The next value and the line where it begins."""
        self.peek()
        while True:
            try:
                value, end = JSON.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                if not self._read():
                    raise self.broken(getattr(error, "msg", error)) from None
            else:
                if end < len(self.text) or not self._read():  # else a number may go on
                    line = self.line
                    self._go_to(end)
                    return line, value

    def _go_to(self, at: int) -> None:
        self.line += self.text.count("\n", self.at, at)
        self.at = at

    def _read(self) -> bool:
        """Appends as much as there is left, so that reading a long value again costs little."""
        pieces = [self.text[self.at :]]
        wanted = len(pieces[0])
        if wanted > MAX_RECORD:
            raise self.broken(f"or a value of over {MAX_RECORD:,} characters")
        while wanted >= 0 and (chunk := next(self.chunks, "")):
            pieces.append(chunk)
            wanted -= len(chunk)
        self.text, self.at = "".join(pieces), 0
        return len(pieces) > 1


def _json_values(source: Source) -> Iterator[tuple[int, object]]:
    """The elements of an array, or values one after another. Nothing can be read past a fault."""
    text = _JsonText(source)
    is_array = text.accept("[")
    while text.peek() not in ("", "]"):
        yield text.value()
        if is_array and not text.accept(","):
            break
    if is_array and not text.accept("]"):
        raise text.broken("expected , or ]")
    if text.peek():
        raise text.broken("text after the end")


def _table_rows(source: Source, tally: Tally) -> Iterator[tuple[int, dict]]:
    # in a tsv, quotation marks are characters like others
    tab_rows = ((number, line.split("\t")) for number, line in read_lines(source))
    rows = _csv_rows(source, tally) if source.form == "csv" else tab_rows
    names = None
    for number, row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if names is None:
            names = _column_names(source, row)
            if names is row:
                continue
        if len(row) != len(names):
            tally.skip(number, BadRecord("wrong number of columns", len(row)))
        else:
            yield number, dict(zip(names, row, strict=True))


def _column_names(source: Source, row: list[str]) -> list[str]:
    """The names of a table's columns by its first row: the row itself if it is a header, as that of
    a csv is, and that of a tsv if all of its cells are known names; else "1", "2", ..."""
    has_header = source.has_header
    if has_header is None:
        known = {name.strip().lower() for name in row} <= KNOWN_FIELDS - {"1", "2"}
        has_header = source.form == "csv" or known
        if not has_header and len(row) != 2:
            raise UserError(
                f"{source.name} has {len(row)} columns and no header; which are they? "
                "pass for instance --fields=question=1,answer=3"
            )
    if has_header and (twice := [name for name in row if name and row.count(name) > 1]):
        raise UserError(f"{source.name} has two columns called {twice[0]!r}; rename or remove one")
    return row if has_header else [str(n + 1) for n in range(len(row))]


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


def _tmx_units(source: Source) -> Iterator[tuple[int, dict]]:
    """Each translation unit as {language: text}, the language without its country."""
    parser = ElementTree.XMLPullParser(["start", "end"])
    number, body = 1, ElementTree.Element("body")
    try:
        for number, line in read_lines(source):
            parser.feed(line.replace(DAMAGED, DAMAGED_XML) + "\n")
            for event, element in parser.read_events():
                if element.tag == "body":
                    body = element
                elif element.tag == "tu" and event == "end":
                    yield number, _tmx_unit(element)
                    body.clear()  # else the whole file would stay in memory
        parser.close()
    except ElementTree.ParseError as error:
        raise UserError(f"{source.name}, line {number}: broken or cut off TMX ({error})") from None


def _tmx_unit(unit: ElementTree.Element) -> dict:
    texts = {}
    for variant in unit.iter("tuv"):
        names = ("{http://www.w3.org/XML/1998/namespace}lang", "lang")
        language = next((variant.get(name) for name in names if variant.get(name)), "")
        segment = variant.find("seg")
        if segment is not None:
            text = _segment_text(segment).replace(DAMAGED_XML, DAMAGED)
            texts[re.split("[-_]", language.lower())[0]] = text
    return {"translation": texts}


def _segment_text(element: ElementTree.Element) -> str:
    """Its text without formatting codes."""
    inner = "" if element.tag in ("bpt", "ept", "it", "ph", "ut") else element.text or ""
    return inner + "".join(_segment_text(child) + (child.tail or "") for child in element)


def _parquet_rows(source: Source) -> Iterator[tuple[int, dict]]:
    """Rows, one row group after another; the number of a row stands for its line."""
    import pyarrow  # takes longer to import than a small file takes to read
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source.path, page_checksum_verification=True) as file:
            batches = file.iter_batches(batch_size=256, use_threads=False)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        why = "".join(char for char in str(error) if char.isprintable())[:100]
        raise UserError(f"{source.name} is no parquet file, or damaged ({why})") from None


# --- records -------------------------------------------------------------------------------------


def records(
    source: Source, tally: Tally, fields: dict[str, str] | None = None, want: type | None = None
) -> Iterator[Record]:
    """The good records of one source. want: str or list; records of the other kind are bad."""
    if source.form == "txt" and not source.target:
        if want is list:
            raise UserError(f"{source.name} is plain text, and no conversations")
        tally.begin(source)
        yield from passages(source, tally)
        tally.end()
        return
    fields = fields or {}
    if fields:
        source = replace(source, has_header=not all(map(str.isdigit, fields.values())))
    record_of = functools.partial(interpret, fields=fields, want=want, aside=tally.aside)
    yield from converted(source, tally, record_of)


def converted(source: Source, tally: Tally, record_of: Callable[[object], T]) -> Iterator[T]:
    """What record_of makes of each value of a source (see `values`), unless it raises BadRecord:
    for datasets in a form of their own."""
    tally.begin(source)
    for line, value in values(source, tally):
        try:
            record = record_of(tally.tidy(line, value))
        except BadRecord as error:
            tally.skip(line, error)
        else:
            tally.count()
            yield record
    tally.end()


def is_text(sources: list[Source], fields: dict[str, str]) -> bool:
    """Whether the first good record is a text, not a conversation."""
    tally = Tally(quiet=True)
    for source in sources:
        for record in records(source, tally, fields):
            return isinstance(record, str)
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    raise UserError(f"there is no record in {sources[0].name}{more}{tally.summary()}")
