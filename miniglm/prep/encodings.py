"""A raw file's bytes and the encoding of its text, both told by the content, not by the name.

gzip and zstd; UTF-8 with or without a byte order mark, GB18030, Big5, UTF-16. Records are
readers.py's business.

A text's encoding is the one in which it can be read: decoded with a wrong one, at least half of the
Chinese characters are rare, private or undefined; with the right one, about one in a hundred. This
got 600 samples of 40 characters each right, and it tolerates damage: chardet 7.7 does as well on
whole texts, but finds no encoding if ten bits in 128,000 bytes are wrong. Rare characters are no
fault where the encoding is sure: in UTF-8, which other texts are not by chance, and in the one that
was asked for if all bytes are valid in it.
"""

import codecs
import functools
import gzip
import io
import itertools
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backports import zstd

from configurator import UserError, show_path

PIECE = 2**14  # bytes looked at in each of
PIECES = 16  # places, evenly over the file
READABLE = 0.7  # the smallest share of good characters among those beyond ASCII
IN_STEP = 0.95  # the same of UTF-16
VALID = 0.98  # the same where rare characters are good ones
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # the first bytes of such a file
MARKS = {
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}
PAGE = "a page of HTML; download the file itself"
PARQUET = "a parquet file; give it the suffix .parquet"
OTHER_KINDS = {  # what begins so is no text
    "a zip archive; unpack it": rb"PK\x03\x04",  # docx, xlsx and epub too
    "a rar archive; unpack it": rb"Rar!\x1a\x07",
    "a 7z archive; unpack it": rb"7z\xbc\xaf\x27\x1c",
    "a tar archive; unpack it": rb".{257}ustar",
    "an xz file; unpack it": rb"\xfd7zXZ\0",
    "a bz2 file; unpack it": rb"BZh\d1AY&SY",
    "packed twice; unpack it": re.escape(GZIP) + b"|" + re.escape(ZSTD),
    "a document; save its text": rb"%PDF-|\{\\rtf|\xd0\xcf\x11\xe0",  # the last: .doc, .xls
    "a program": rb"\x7fELF",
    "an image": rb"\x89PNG\r\n\x1a\n\0\0\0\rIHDR|\xff\xd8\xff|GIF8[79]a",
    "a git-lfs pointer, not the file; fetch it with git lfs pull": rb"version https://git-lfs\.",
    PAGE: rb"(?i)\s*<(!doctype html|html)\b",
    PARQUET: rb"PAR1",
}
DAMAGED_FILE = (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError)


def is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith((GZIP, ZSTD))


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedIOBase]:
    """A file's bytes, decompressed if it begins as gzip or zstd does, whatever its name.

    Raises UserError if the compressed data are damaged or end early."""
    with path.open("rb") as raw:
        head = raw.read(4)
        raw.seek(0)
        file = raw
        if head.startswith(GZIP):
            file = gzip.GzipFile(fileobj=raw)
        elif head == ZSTD:
            file = zstd.ZstdFile(raw)
        try:
            yield file
        except DAMAGED_FILE as error:
            raise UserError(
                f"{show_path(path)} is damaged ({error}); get it again, or unpack what is intact"
            ) from None


def refuse_other_kinds(path: Path, form: str) -> None:
    """Raises UserError if a file's first bytes show that it is no text, or no parquet file."""
    with open_bytes(path) as file:
        head = file.read(512)
    for kind, start in OTHER_KINDS.items():
        if re.match(start, head, re.DOTALL) and kind != {"txt": PAGE, "parquet": PARQUET}.get(form):
            raise UserError(f"{show_path(path)} is {kind}")


def find_encoding(path: Path, encoding: str = "auto") -> str:
    """Python's name of a file's encoding, found or given. Raises UserError if it gives garbage.

    Reads the whole file, and looks at PIECES pieces of it."""
    with open_bytes(path) as file:
        head = file.read(PIECE)
        file.seek(0)
        marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), "")
        told = marked if encoding == "auto" else _known(encoding, head)
        pieces, is_valid = _sample(file, told)
    name = told or _guess(pieces, is_valid)
    is_sure = is_valid and name == (told or "utf-8")
    is_sure &= name == marked or not name.startswith("utf-16")  # nearly any bytes are valid in it
    in_step = encoding != "auto" or _is_in_step(pieces, name)
    if not is_sure and not (name and in_step and _is_readable(pieces, name)):
        wrong = f"as {name} it is garbage" if name else "no encoding makes it readable text"
        raise UserError(f"{show_path(path)}: {wrong}; pass --encoding=, or leave the file out")
    return name


def _known(name: str, head: bytes) -> str:
    """Python's name of an encoding that was asked for."""
    try:
        b"\xe5".decode(name, "replace")
        name = codecs.lookup(name).name
    except (LookupError, UnicodeError):
        raise UserError(f"unknown encoding={name!r}; write utf-8, gb18030, big5, ...") from None
    if name == "utf-16":  # which of the two, the mark tells, or the text
        return MARKS.get(head[:2]) or _best([(0, head)], ["utf-16-le", "utf-16-be"])[1]
    return {"utf-8-sig": "utf-8"}.get(name, name)


def _sample(file: io.BufferedIOBase, encoding: str) -> tuple[list[tuple[int, bytes]], bool]:
    """Up to PIECES pieces with more than ASCII in them, (position, bytes); and whether the whole
    file is valid in this encoding; if it is "", in UTF-8 without a NUL."""
    pieces, every, seen, position, is_valid = [], 1, 0, 0, True
    decoder = codecs.getincrementaldecoder(encoding or "utf-8")()
    for piece in itertools.chain(iter(functools.partial(file.read, PIECE), b""), [b""]):
        if not piece.isascii() or b"\0" in piece:
            if seen % every == 0:
                pieces.append((position, piece))
            seen += 1
            if len(pieces) > PIECES:
                pieces, every = pieces[::2], every * 2
        position += len(piece)
        if is_valid:
            try:
                decoder.decode(piece, final=not piece)
                is_valid = bool(encoding) or b"\0" not in piece
            except UnicodeError:
                is_valid = False
    return pieces, is_valid


def _guess(pieces: list[tuple[int, bytes]], is_valid: bool) -> str:
    """The encoding of pieces without a mark, "" if none makes them readable. is_valid: as UTF-8."""
    if _is_readable(pieces, "utf-8", share_of_all=0):
        return "utf-8"
    # else valid UTF-8 is rare characters with some bad ones among them: GB18030 was misread here
    if is_valid and _quality(pieces, "utf-8", rare=True)[0] < READABLE:
        return "utf-8"
    names = ["gb18030", "cp950", "utf-16-le", "utf-16-be"]  # cp950 is Big5 as Windows writes it
    (share, good, *_), name = _best(pieces, names)
    if share >= READABLE and good >= 4:
        return name
    return "utf-8" if _is_readable(pieces, "utf-8") else ""


def _best(pieces: list[tuple[int, bytes]], names: list[str]) -> tuple[tuple, str]:
    return max((_quality(pieces, name), name) for name in names)


def _is_readable(pieces: list, encoding: str, share_of_all: float = 0.01) -> bool:
    """Whether bad characters are few among those beyond ASCII, or very few among all: then only the
    records that hold them are left out."""
    share, _, bad, total = _quality(pieces, encoding)
    if share >= READABLE or bad <= share_of_all * total:
        return True
    return _quality(pieces, encoding, rare=True)[0] >= VALID  # half of a text on chemistry is rare


def _is_in_step(pieces: list, encoding: str) -> bool:
    """Whether no byte is lost from UTF-16: all behind it would be read as other characters."""
    return not encoding.startswith("utf-16") or _quality(pieces, encoding)[0] >= IN_STEP


def _quality(
    pieces: list[tuple[int, bytes]], encoding: str, rare: bool = False
) -> tuple[float, int, int, int]:
    """The share of good characters among the good and bad ones; how many are good, bad, in all.
    rare: whether rare ones are good."""
    counts = Counter()
    for position, piece in pieces:
        counts.update(_decode_piece(position, piece, encoding))
    good = bad = 0
    for char, count in counts.items():
        if char.isascii() and char.isprintable():
            good += count * encoding.startswith("utf-16")  # elsewhere they are no evidence
        elif char not in "\t\n\r\f\ufeff":
            is_bad = _is_han(char) and char not in common_han()
            is_bad &= not rare
            is_bad |= unicodedata.category(char) in ("Cc", "Cn", "Co", "Cs") or char == "\ufffd"
            # Yi, Hangul and others: two bytes of GB18030 or Big5, read as UTF-16
            is_bad |= "\ua000" <= char <= "\ud7ff" and encoding != "utf-8"
            good, bad = good + count * (not is_bad), bad + count * is_bad
    return good / max(1, good + bad), good, bad, counts.total()


def _decode_piece(position: int, piece: bytes, encoding: str) -> str:
    """The characters of a piece between its first and last blank or line end: it may begin or end
    within a character."""
    if not encoding.startswith("utf-16"):  # no byte below 0x30 is part of a longer character
        edges = [match.start() for match in re.finditer(rb"[\0-\x2f]", piece)] or [0]
        first = edges[0] if position else 0
        piece = piece[first : edges[-1]] if edges[-1] and len(piece) == PIECE else piece[first:]
    return piece.decode(encoding, "replace")


def _is_han(char: str) -> bool:
    return "\u3400" <= char <= "\u9fff" or "\uf900" <= char <= "\ufaff" or char >= "\U00020000"


@functools.cache
def common_han() -> frozenset[str]:
    """The 3,755 common characters of GB2312 and the 5,401 of Big5."""
    rows = [("gb2312", 0xB0, 0xD7), ("big5", 0xA4, 0xC6)]
    chars = (
        bytes([high, low]).decode(encoding, "ignore")
        for encoding, first, last in rows
        for high in range(first, last + 1)
        for low in range(0x40, 0xFF)
    )
    return frozenset(char for char in chars if len(char) == 1 and _is_han(char))
