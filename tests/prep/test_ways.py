"""Many ways to write the same records give the same prepared bytes: the form of the record and of
the file, the encoding, the line ends, the compression. Each value of one meets each of the others.

What a way cannot hold: Big5 has neither emoji nor simplified characters; a tsv neither tabs nor
line ends inside a text; pairs have one turn, so all conversations here do; a txt has no records, so
it is one text. Parquet has no encoding, and is what the others are compared with.
"""

import json
import random
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from data.custom import prepare
from tests.helpers import dialogue, tiny_tokenizer
from tests.prep.test_readers import PACKERS, TRADITIONAL, write_parquet
from tests.runs import contents

PIECES = [*TRADITIONAL.replace("\n", "，").split("，"), "He said", " ", '"', "'", "a,b", "\\n"]
RICH = ["😀", "𦩷", "为汉", "\u2028", "&<"]  # not in Big5, but the last
BREAKS = ["\n", "\t", "\n\n", "　"]  # not in a tsv


def as_json(row: tuple[str, str]) -> str:
    return json.dumps(dict(zip(("Question", "Answer"), row, strict=True)), ensure_ascii=False)


def as_cells(row: tuple[str, str]) -> str:
    return ",".join('"' + text.replace('"', '""') + '"' for text in row)


def as_unit(row: tuple[str, str]) -> str:
    return "<tu>{}{}</tu>".format(*map(TUV.format, ("en", "zh-HK"), map(escape, row)))


TUV = '<tuv xml:lang="{}"><seg>{}</seg></tuv>'
FORMS = {  # what a file begins with, has between two rows, and ends with; a row
    "a.txt": ("", "\n", "\n", "".join),
    "a.jsonl": ("", "\n", "\n", as_json),
    "a.tsv": ("", "\n", "\n", "\t".join),
    "array.json": ("[\n", ",\n", "\n]\n", as_json),
    "values.json": ("", "\n", "\n", lambda row: as_json(row).replace('", "', '",\n"')),
    "a.csv": ("Question,Answer\n", "\n", "\n", as_cells),
    "a.tmx": ("<tmx>\n<body>\n", "\n", "\n</body>\n</tmx>\n", as_unit),
}
RECORDS = {  # of JSON lines
    "text.jsonl": lambda q, a: {"text": f"{q}{a}"},
    "alpaca.jsonl": lambda q, a: {"instruction": q, "input": "", "output": a},
    "content.jsonl": lambda q, a: {"messages": dialogue(q, a)},
    "value.jsonl": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"value": a}]},
}
TEXTS = ("a.txt", "text.jsonl")
ENCODINGS = ("utf-8", "utf-8-sig", "gb18030", "big5", "utf-16-le", "utf-16-be")
ENDS = ("\n", "\r\n", "\r")
WAYS = [  # each value meets each of the others
    (form, encoding, ENDS[(f + e) % 3], [*PACKERS][(f + 2 * e) % 3])
    for f, form in enumerate([*FORMS, *RECORDS])
    for e, encoding in enumerate(ENCODINGS)
]


def rows_of(form: str, encoding: str) -> list[tuple[str, str]]:
    """A hundred pairs of texts, or a long one."""
    more = RICH * (encoding != "big5") + BREAKS * (form != "a.tsv")
    draw, (count, size) = random.Random(str(more)), (1, 300) if form in TEXTS else (100, 12)

    def text() -> str:
        return "".join(draw.choices(PIECES + more, k=size))

    return [(f"{number}{text()}", f"{text()}。") for number in range(count)]


def text_of(form: str, rows: list[tuple[str, str]]) -> str:
    """The content of a file."""
    if form in RECORDS:
        return "\n".join(json.dumps(RECORDS[form](*row), ensure_ascii=False) for row in rows)
    start, between, end, write = FORMS[form]
    return start + between.join(map(write, rows)) + end


def prepared(folder: Path, file: Path) -> dict:
    """The arrays, and what meta.json says of them."""
    words = [f"--input={file}", f"--tokenizer={folder}", f"--out={folder / 'out'}", "--val=0"]
    prepare.main([*words, "--strict", "--processes=1"])
    files = contents(folder / "out")
    arrays = {name: content for name, content in files.items() if name.endswith(".bin")}
    return arrays | json.loads(files["meta.json"])["splits"]


@pytest.mark.parametrize("form", [*FORMS, *RECORDS])
def test_each_way_to_write_records_gives_the_same_bytes(form, tmp_path):
    tiny_tokenizer().save(tmp_path / "tokenizer.json")
    for _, encoding, end, pack in (way for way in WAYS if way[0] == form):
        rows = rows_of(form, encoding)
        plain = RECORDS["text.jsonl" if form in TEXTS else "alpaca.jsonl"]
        file = write_parquet(tmp_path / "a.parquet", [plain(*row) for row in rows])
        expected = prepared(tmp_path, file)
        mark = "\ufeff" if encoding.startswith("utf-16") else ""
        text = mark + text_of(form, rows).replace("\n", end)
        (tmp_path / f"{form}{pack}").write_bytes(PACKERS[pack](text.encode(encoding)))
        assert prepared(tmp_path, tmp_path / f"{form}{pack}") == expected, (encoding, end, pack)
