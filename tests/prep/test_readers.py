"""Each form of file and each encoding, from files written here; damage is never silent."""

import bz2
import gzip
import json
import lzma
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from configurator import UserError
from miniglm.prep import readers
from miniglm.prep.encodings import PIECE, find_encoding
from miniglm.prep.forms import BadRecord, clean, interpret, parse_fields, split_of
from miniglm.prep.readers import Tally, find_sources, is_text, records
from miniglm.prep.writer import write_pretrain
from tests.helpers import TEXT, dialogue, tiny_tokenizer, write_lines

TRADITIONAL = """\
話說天下大勢，分久必合，合久必分。周末七國分爭，併入於秦。及秦滅之後，楚、漢分爭，又併入於漢。
漢朝自高祖斬白蛇而起義，一統天下，後來光武中興，傳至獻帝，遂分為三國。推其致亂之由，殆始於桓、靈二帝。
"""
TEXTS = ["玄德曰：“汝何名？”", "飞曰：\t“张飞！”\n再拜。", '"quoted", and 中文, \\ too', "😀𦩷"]


def read(path: Path, encoding: str = "auto", fields: str = "") -> list:
    """All records of a file, none of which may be bad."""
    [source] = find_sources([str(path)], encoding)
    return list(records(source, Tally(strict=True), parse_fields(fields)))


def counted(path: Path, **options) -> tuple[list, Tally]:
    tally = Tally()
    [source] = find_sources([str(path)])
    return list(records(source, tally, **options)), tally


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    lines = [[*rows[0]], *(row.values() for row in rows)]
    quoted = (['"' + cell.replace('"', '""') + '"' for cell in line] for line in lines)
    return write_text(path, "".join(",".join(cells) + "\n" for cells in quoted))


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


# --- forms of files ------------------------------------------------------------------------------

PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress}


def packed(path: Path, suffix: str) -> Path:
    """The file, or a compressed one beside it."""
    other = path.with_name(path.name + suffix)
    other.write_bytes(PACKERS[suffix](path.read_bytes()))
    return other


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_plain_text_comes_in_passages_of_whole_lines(suffix, tmp_path):
    found = read(packed(write_text(tmp_path / "a.txt", TEXT * 40), suffix))
    assert "".join(text + "\n" for text in found) == TEXT * 40
    assert all(4096 <= len(text) < 4096 + 100 for text in found[:-1])
    assert len(found) > 2


def test_json_and_lines_are_the_same_whatever_the_size_of_the_chunks(tmp_path, monkeypatch):
    rows = [{"text": t, "n": [12345, -1.5e10, True, None, {"a": '\\u4e2d\n"'}]} for t in TEXTS]
    (tmp_path / "a.txt").write_bytes("甲\r\n乙\r\r丙\n\n丁😀".encode("gb18030"))
    lines = [(1, "甲"), (2, "乙"), (3, ""), (4, "丙"), (5, ""), (6, "丁😀")]
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(readers, "CHUNK", size)
        source = readers.Source(tmp_path / "a.txt", "txt", "gb18030")
        assert list(readers.read_lines(source)) == lines
        for indent in (None, 1):
            path = write_text(tmp_path / "a.json", json.dumps(rows, indent=indent))
            [source] = find_sources([str(path)])
            assert [value for _, value in readers.values(source, Tally())] == rows


def test_tab_separated_pairs_need_no_header_and_keep_quotation_marks(tmp_path):
    path = write_text(tmp_path / "a.tsv", 'He said "yes.\t他说“是”。\nNo.\t"不。\n')
    assert read(path) == [dialogue('He said "yes.', "他说“是”。"), dialogue("No.", '"不。')]
    assert read(path, fields="question=2,answer=1")[1] == dialogue('"不。', "No.")
    assert read(write_text(path, "question\tanswer\nNo.\t不。\n")) == [dialogue("No.", "不。")]
    write_text(path, "问\t答\nNo.\t不。\n")
    assert read(path, fields="question=问,answer=答") == [dialogue("No.", "不。")]


def test_a_table_of_unknown_columns_asks_which_they_are(tmp_path):
    path = write_text(tmp_path / "a.tsv", "1\tNo.\t2\t不。\n")
    with pytest.raises(UserError, match=r"4 columns and no header.*--fields=question=1"):
        read(path)
    assert read(path, fields="question=2,answer=4") == [dialogue("No.", "不。")]
    path = write_csv(tmp_path / "a.csv", [{"标题": "No.", "正文": "不。"}])
    with pytest.raises(UserError, match=r"missing field .it has 标题, 正文"):
        read(path)
    assert read(path, fields="text=正文") == ["不。"]


def test_a_lost_quotation_mark_costs_its_own_row(tmp_path):
    rows = ["question,answer", "甲,乙", '"丙,丁', "戊,己", '"庚"x,辛', '"a\nb",c', "壬,癸,子"]
    found, tally = counted(write_text(tmp_path / "a.csv", "\n".join(rows) + "\n"))
    assert found == [dialogue("甲", "乙"), dialogue("戊", "己"), dialogue("a\nb", "c")]
    assert tally.bad == {"broken CSV": 2, "wrong number of columns": 1}


TMX = """\
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE tmx SYSTEM "tmx14.dtd">
<tmx version="1.4"><header srclang="en"/><body>
<tu><tuv xml:lang="en-US"><seg>A <bpt i="1">&lt;b&gt;</bpt>bold<ept i="1">&lt;/b&gt;</ept> word
&amp; more</seg></tuv>
<tuv xml:lang="zh-CN"><seg>一个<hi>粗体</hi>词</seg></tuv></tu>
<tu><tuv lang="ZH"><seg>不。</seg></tuv><tuv lang="EN"><seg>No.</seg></tuv></tu>
</body></tmx>
"""


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16"])
def test_translation_units_are_pairs_whatever_the_file_says_of_its_encoding(encoding, tmp_path):
    path = tmp_path / "a.tmx"
    path.write_text(TMX, encoding=encoding)
    pairs = [dialogue("A bold word\n& more", "一个粗体词"), dialogue("No.", "不。")]
    assert read(path, encoding=encoding) == pairs
    assert read(path, encoding, "question=zh,answer=en")[1] == dialogue("不。", "No.")


def test_a_damaged_translation_unit_is_left_out_and_a_broken_file_stops(tmp_path):
    path = tmp_path / "a.tmx"
    path.write_bytes(TMX.encode().replace("粗".encode(), "粗".encode()[:2]))
    found, tally = counted(path)
    assert (found, tally.bad) == ([dialogue("No.", "不。")], {"damaged characters": 1})
    for text in (TMX[:-20], TMX.replace("</tu>", "</tv>"), ""):
        with pytest.raises(UserError, match=r"a\.tmx, line \d: broken"):
            read(write_text(path, text))


def test_line_aligned_files_are_pairs(tmp_path):
    english, chinese = tmp_path / "a.en", tmp_path / "a.zh"
    english.write_bytes(b"Yes.\r\nNo.\r\n")
    chinese.write_text("是。\n不。", encoding="gb18030")
    [source] = find_sources([str(english)], targets=[str(chinese)])
    assert list(records(source, Tally())) == [dialogue("Yes.", "是。"), dialogue("No.", "不。")]
    write_text(chinese, "是。\n")
    [source] = find_sources([str(english)], targets=[str(chinese)])
    with pytest.raises(UserError, match=r"a\.en and .*a\.zh must be aligned .* 1$"):
        list(records(source, Tally()))
    with pytest.raises(UserError, match="1 files of --input=, but 2 of --target="):
        find_sources([str(english)], targets=[str(chinese), str(english)])


# --- which files ---------------------------------------------------------------------------------


def test_a_file_a_folder_a_glob_and_a_list_are_found_in_order(tmp_path, capsys, monkeypatch):
    for name in ("b.txt", "a.txt", "sub/c.jsonl.gz", ".hidden.txt", "a.png", "sub/.git/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(tmp_path / name, '{"text": "甲"}\n')

    def names(*words: str) -> list[str]:
        found = find_sources(list(words))
        return [source.path.relative_to(tmp_path).as_posix() for source in found]

    monkeypatch.chdir(tmp_path)
    assert names(str(tmp_path)) == ["a.txt", "b.txt", "sub/c.jsonl.gz"]
    assert "1 files of other forms left out" in capsys.readouterr().out
    assert names("*.txt") == ["a.txt", "b.txt"] == names(f"{tmp_path}/[ab].txt")
    assert names("**/*.gz", "b.txt", "b.txt") == ["sub/c.jsonl.gz", "b.txt"]
    for word in ("no.txt", "*.csv", "**x/[", "sub/.git/e"):
        with pytest.raises(UserError, match="no file"):
            find_sources([word])
    with pytest.raises(UserError, match="no input"):
        find_sources([])
    (tmp_path / "only").mkdir()
    with pytest.raises(UserError, match="holds no file of the forms txt"):
        find_sources(["only"])


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_walk_through_links_that_lead_back_ends_with_each_file_once(tmp_path):
    data = tmp_path / "data"
    for name in ("b.txt", "sub/a.txt", "sub/deep/c.txt"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(data / name, TEXT)
    (data / "a_link").symlink_to(data / "sub")
    (data / "sub" / "loop").symlink_to(data)
    (data / "sub" / "deep" / "loop").symlink_to(data / "sub")
    (tmp_path / "named").symlink_to(data)

    def names(word: str) -> list[str]:
        return [source.path.relative_to(tmp_path).as_posix() for source in find_sources([word])]

    once = ["b.txt", "sub/a.txt", "sub/deep/c.txt"]
    assert names(f"{tmp_path}/data/**/*.txt") == [f"data/{name}" for name in once]
    assert names(f"{tmp_path}/named") == [f"named/{name}" for name in once]
    assert names(f"{tmp_path}/data/a_link/*.txt") == ["data/a_link/a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="its file names are Unicode")
def test_a_name_that_is_no_utf8_is_read_and_shown_in_hexadecimal(tmp_path, capsys):
    name = os.fsdecode("三国.txt".encode("gbk"))
    folder, tokenizer = tmp_path / "in", tiny_tokenizer()
    folder.mkdir()
    write_text(folder / name, TEXT)
    for word in (str(folder), f"{folder}/*.txt", f"{folder}/**", f"{folder}/{name}"):
        [source] = find_sources([word])
        texts = {"train": records(source, Tally())}
        meta = write_pretrain(tmp_path / "out", tokenizer, texts, [source.name])
        assert meta["sources"] == [f"{folder.as_posix()}/\\xc8\\xfd\\xb9\\xfa.txt"]
        capsys.readouterr().out.encode()


KINDS = {
    "zip archive; unpack it": b"PK\3\4\x14\0\0\0",
    "tar archive; unpack it": b"a.txt".ljust(257, b"\0") + b"ustar\0" + b"00",
    "xz file; unpack it": lzma.compress(TEXT.encode()),
    "bz2 file; unpack it": bz2.compress(TEXT.encode()),
    "packed twice; unpack it": gzip.compress(gzip.compress(TEXT.encode())),
    "7z archive": b"7z\xbc\xaf\x27\x1c\0\4",
    "rar archive": b"Rar!\x1a\7\1\0",
    "document; save its text": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "program": b"\x7fELF\2\1\1",
    "image": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "git-lfs pointer, not the file; fetch it": b"version https://git-lfs.github.com/spec/v1\n",
    "page of HTML; download the file itself": b"\n<!DOCTYPE html>\n<html><body>404</body></html>",
    "parquet file; give it the suffix .parquet": b"PAR1\x15\4",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_file_of_another_kind_is_named_by_its_first_bytes(pack, kind, tmp_path):
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        (tmp_path / name).write_bytes(pack(KINDS[kind]))
        if (name == "a.txt" and "HTML" in kind) or (name == "a.parquet" and "parquet" in kind):
            continue
        with pytest.raises(UserError, match=rf"a\.\w+ is (an? )?{kind}"):
            read(tmp_path / name)
    assert read(write_text(tmp_path / "a.txt", "BZhang 7z Rar!\n")) == ["BZhang 7z Rar!"]


# --- encodings -----------------------------------------------------------------------------------

ENCODED = [
    (TEXT, "utf-8", "utf-8"),
    (TEXT, "utf-8-sig", "utf-8"),
    (TEXT, "gb18030", "gb18030"),
    (TRADITIONAL, "gb18030", "gb18030"),
    (TRADITIONAL, "big5", "cp950"),
    (TRADITIONAL, "utf-8", "utf-8"),
    (TEXT, "utf-16", "utf-16-le"),
    (TEXT, "utf-16-le", "utf-16-le"),
    (TEXT, "utf-16-be", "utf-16-be"),
    ("Only ASCII.\n" * 9, "utf-16-be", "utf-16-be"),
    ("Only ASCII.\n" * 9, "ascii", "utf-8"),
]


@pytest.mark.parametrize(("text", "encoding", "name"), ENCODED)
def test_each_encoding_is_told_by_the_content_and_printed(text, encoding, name, tmp_path, capsys):
    path = tmp_path / "a.txt"
    for end in ("\n", "\r\n", "\r"):
        path.write_bytes(text.replace("\n", end).encode(encoding))
        assert read(path) == [text.rstrip("\n")]
        assert capsys.readouterr().out == f"{name}: {path}\n"


def test_a_long_file_is_told_by_pieces_that_may_cut_a_character(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"plain\n" * 60_000 + TEXT.encode("gb18030") + b"plain\n" * 60_000)
    assert find_encoding(path) == "gb18030"
    for text, encoding, name in ENCODED[2:9]:
        data = text.encode(encoding)
        many = data * (3 * PIECE // len(data) + 1)
        path.write_bytes(b"x" + many if "16" not in encoding else many)
        assert find_encoding(path) == name


def test_an_override_is_taken_and_a_wrong_one_refused(tmp_path):
    path = write_text(tmp_path / "a.txt", TEXT)
    assert read(path, encoding="UTF8") == [TEXT.rstrip("\n")]
    for wrong in ("gb18030", "big5", "utf-16", "utf-16-be"):
        with pytest.raises(UserError, match=rf"a\.txt: as {wrong}.* it is garbage"):
            read(path, encoding=wrong)
    for unknown in ("utf9", "hex", "idna", "undefined"):
        with pytest.raises(UserError, match=f"unknown encoding='{unknown}'"):
            read(path, encoding=unknown)


RARE = {
    "烷烃烯烃炔烃芳烃，醇酚醚醛酮羧酸酯胺酰胺腈，苯萘蒽菲，吡啶嘧啶嘌呤吲哚喹啉。\n": "gb18030",
    "香港嘅嘢,佢哋唔係咁講㗎\n": "big5hkscs",
    "\ue000\ue001 烃\n": "gb18030",
    "烃\ufffd\ufffd\ufffd\n": "gb18030",
    "㐂㐄㐅㐆㐇\n": "utf-32",
}


@pytest.mark.parametrize("text", RARE)
def test_rare_characters_are_no_fault_where_the_encoding_is_sure(text, tmp_path):
    path = tmp_path / "a.txt"
    for name in ("utf-8", "utf-8-sig", RARE[text], "utf-16", "utf-32"):
        path.write_bytes((text * 600).encode(name))
        is_told = name.startswith("utf-") and name != "utf-32"
        for encoding in ("auto", name) if is_told else (name,):
            assert "\n".join(read(path, encoding)) + "\n" == text * 600, (name, encoding)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_if_all_behind_a_lost_byte_is_garbage(encoding, tmp_path):
    data = ("The king of Wei rode on to the river. 天下大勢。\n" * 50).encode(encoding)
    (tmp_path / "a.txt").write_bytes(data)
    assert len(read(tmp_path / "a.txt")[0]) > 2000
    (tmp_path / "b.txt").write_bytes(("㐂㐄㐅㐆㐇\n" * 50).encode(encoding))
    assert read(tmp_path / "b.txt", encoding)[0].startswith("㐂㐄㐅㐆㐇\n")
    for lost in (101, len(data) // 2):
        (tmp_path / "a.txt").write_bytes(data[:lost] + data[lost + 1 :])
        with pytest.raises(UserError, match=r"a\.txt: .*; pass --encoding=, or leave"):
            read(tmp_path / "a.txt")


def test_a_nul_costs_its_line_where_the_encoding_was_asked_for(tmp_path):
    path = write_text(tmp_path / "a.txt", "one\ntwo\0\nthree\n")
    with pytest.raises(UserError, match="no encoding makes it readable"):
        read(path)
    list(records(readers.source_of(path, "utf-8"), tally := Tally()))
    assert (tally.good, tally.bad) == (2, {"damaged characters": 1})


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    latin = ("Déjà vu à la façade brûlée, où l'été était gênant. " * 20).encode("latin-1")
    mojibake = TEXT.encode().decode("gb18030", "replace").encode()
    for data in (random.Random(0).randbytes(3000), bytes(500), b"\x89PNG\r\n\x1a\n\0\0", mojibake):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.txt: no encoding makes it readable.*--encoding="):
            read(path)
    path.write_bytes(latin)
    with pytest.raises(UserError, match="no encoding makes it readable"):
        read(path)
    assert read(path, encoding="latin-1") == [latin.decode("latin-1").rstrip()]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [(TEXT, "utf-8"), (TEXT, "gb18030"), (next(iter(RARE)) * 601, "utf-8")],
)
def test_a_line_with_damaged_bytes_is_left_out_and_counted(text, encoding, tmp_path, capsys):
    path, lines = tmp_path / "a.txt", text.splitlines()
    middle = len(lines) // 2
    data = [line.encode(encoding) for line in lines]
    data[middle] = data[middle][:9] + b"\xff" + data[middle][10:]
    path.write_bytes(b"\n".join(data))
    found, tally = counted(path)
    assert "\n".join(found).split("\n") == lines[:middle] + lines[middle + 1 :]
    assert (tally.good, tally.bad) == (len(lines) - 1, {"damaged characters": 1})
    assert f"skipped: {path}, line {middle + 1}: damaged" in capsys.readouterr().out


# --- texts ---------------------------------------------------------------------------------------


def test_texts_and_text_files_are_cleaned_as_the_head_of_forms_says(tmp_path):
    raw = "\n　　却说　玄德 \r\n \u3000飞曰\u3000\r\r\r\r    code:\n\tx = 1　\n"
    assert clean(raw) == "却说　玄德\n飞曰\n\n    code:\n\tx = 1"
    (tmp_path / "a.txt").write_bytes(raw.encode("gb18030"))
    assert read(tmp_path / "a.txt") == [clean(raw)]


NOVEL = """第一回　桃园结义
　　话说天下大势。{gap}周末七国分争，併入于秦。\tx
    def f():
        return 1                                        # columns
a\t\tb\t\t
白日依山尽，
  黄河入海流。"""


@pytest.mark.parametrize(
    "gap", ["　　", "　　　　", " " * 80, "\u2028", "\u2029　　", "\f", "\v", "\x85"]
)
def test_what_parts_paragraphs_inside_a_line_is_a_line_end_in_texts_of_each_form(gap, tmp_path):
    text, apart = NOVEL.replace("{gap}", gap), NOVEL.replace("{gap}", "\n")
    assert clean(text) == apart.replace("\n　　", "\n").replace("b\t\t", "b")
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "a.txt").write_bytes(text.encode(encoding))
        path = write_lines(tmp_path / "a.jsonl", [{"text": text}])
        assert read(tmp_path / "a.txt") == [clean(text)] == read(path)


@pytest.mark.parametrize("gap", ["", "　　", " " * 80])
def test_a_novel_in_one_line_comes_in_documents_of_whole_sentences(gap, tmp_path):
    sentences = [f"第{n}句，玄德曰：“汝何名，何处人也，欲何往？”" for n in range(4000)]
    text, found = gap.join(sentences), []
    for encoding in ("utf-8", "gb18030", "utf-16"):
        (tmp_path / "a.txt").write_bytes(text.encode(encoding))
        found.append(read(tmp_path / "a.txt"))
        assert "".join(found[-1]).replace("\n", "") == "".join(sentences)
        assert all(passage[0] == "第" and passage[-1] == "”" for passage in found[-1])
        assert max(map(len, found[-1])) < 4200
    assert found[0] == found[1] == found[2]


def test_a_bad_byte_in_a_novel_of_one_line_costs_its_passage(tmp_path):
    data = ("玄德曰：“汝何名？”" * 40_000).encode()
    (tmp_path / "a.txt").write_bytes(data[:500_000] + b"\xff" + data[500_000:])
    found, tally = counted(tmp_path / "a.txt")
    assert tally.bad == {"damaged characters": 1}
    assert 0 < 400_000 - sum(map(len, found)) < 4200


# --- odd characters ------------------------------------------------------------------------------

ODD = {
    "甲\u200b乙\ufeff丙\u2060": ("甲乙丙", "zero-width characters, removed"),
    "\x1b[31m甲\x1b[0m\x1b]0;title\a乙": ("甲乙", "control characters, removed"),
    "甲\x07乙\x1b丙\x9d": ("甲乙丙", "control characters, removed"),
    "甲\ufffd": ("甲\ufffd", "U+FFFD or 锟斤拷, kept"),
    "锟斤拷锟斤拷": ("锟斤拷锟斤拷", "U+FFFD or 锟斤拷, kept"),
    "甲&nbsp;乙": ("甲&nbsp;乙", "HTML, kept"),
    "甲<br/>乙": ("甲<br/>乙", "HTML, kept"),
    "甲\ue123": ("甲\ue123", "private-use characters, kept"),
    "👨\u200d👩 烫 a < b & c <T> &x; \u200c": (None, None),
}


@pytest.mark.parametrize("text", ODD)
def test_odd_characters_are_removed_or_kept_and_counted_in_texts_and_turns_of_each_form(
    text, tmp_path
):
    expected, kind = ODD[text]
    expected = expected or text
    rows = [{"text": TEXT}, {"text": text}]
    pairs = [{"question": "谁？", "answer": "我。"}, {"question": text, "answer": text}]
    (tmp_path / "a.txt").write_bytes((TEXT + text).encode())
    files = {tmp_path / "a.txt": (f"{TEXT}{expected}", 6)}
    files[write_lines(tmp_path / "a.jsonl", rows)] = (expected, 2)
    files[write_parquet(tmp_path / "a.parquet", rows)] = (expected, 2)
    files[write_lines(tmp_path / "b.jsonl", pairs)] = (dialogue(expected, expected), 2)
    for path, (record, line) in files.items():
        found, tally = counted(path)
        assert (found[-1], tally.bad) == (record, {})
        both = Tally()
        both.add(tally)
        both.add(tally)
        shown = f"\n2 records with {kind}; the first in {path}, line {line}" if kind else ""
        assert both.summary() == shown
        assert both.meta().get("odd_characters") == ({kind: 2} if kind else None)


def test_two_fields_of_one_name_cost_their_record(tmp_path):
    good, twice = '{"question": "谁？", "answer": "孔明。"}', '"content": "甲", "content": "乙"'
    turns = (
        f'{{"messages": [{{"role": "user", {twice}}}, {{"role": "assistant", "content": "丙"}}]}}'
    )
    lines = [good, good.replace("{", '{"question": "甲？", '), turns, good, good]
    for name, text in (("a.jsonl", "\n".join(lines)), ("a.json", f"[{','.join(lines)}]")):
        found, tally = counted(write_text(tmp_path / name, text))
        assert (len(found), tally.bad) == (3, {"two fields of one name": 2})


def test_json_lines_put_one_behind_another_lose_the_mark_between_them(tmp_path):
    path = write_text(tmp_path / "a.jsonl", '\ufeff{"text": "甲"}\n\ufeff{"text": "乙"}\n')
    assert read(path) == ["甲", "乙"]


def test_control_characters_of_the_input_are_shown_and_not_printed(tmp_path, capsys):
    path = write_text(tmp_path / "a.txt", TEXT + "\x1b[2J甲\0乙\n")
    counted(path)
    assert "line 6: damaged characters (\\x1b[2J甲\\x00乙)\n" in capsys.readouterr().out
    for value in ({"\x1b[31m": 1}, {"conversations": [{"role": "\x1b\0", "content": ""}]}):
        with pytest.raises(BadRecord) as caught:
            interpret(value, {})
        assert str(caught.value).isprintable()


def test_long_lines_come_in_bounded_pieces_and_long_records_stop(tmp_path, monkeypatch):
    found = read(write_text(tmp_path / "a.txt", "却说孔明" * 100_000))
    assert "".join(found) == "却说孔明" * 100_000
    assert max(map(len, found)) < 2 * readers.LONG_LINE + readers.CHUNK
    monkeypatch.setattr(readers, "MAX_RECORD", 1000)
    monkeypatch.setattr(readers, "CHUNK", 100)
    path = write_lines(tmp_path / "a.jsonl", [{"text": "甲"}, {"text": "乙" * 5000}])
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: over 1,000 characters"):
        read(path)
    path = write_text(tmp_path / "a.json", json.dumps(["甲", "乙" * 5000], ensure_ascii=False))
    with pytest.raises(UserError, match=r"a\.json, line 1: .*over 1,000 characters"):
        read(path)


# --- forms of records ----------------------------------------------------------------------------

CASES = Path(__file__).with_name("records.jsonl").read_text(encoding="utf-8").split("\n")[:-1]


@pytest.mark.parametrize("case", CASES)
def test_each_value_means_the_record_beside_it_or_has_the_reason(case):
    case = json.loads(case)
    if "record" in case:
        record = interpret(case["value"], {})
        turns = [[*turn.values()] for turn in record if isinstance(record, list)]
        assert (turns or record) == case["record"]
        return
    with pytest.raises(BadRecord) as caught:
        interpret(case["value"], {})
    assert caught.value.reason == case["reason"]
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_turns_that_are_nested_too_deep_have_a_reason():
    with pytest.raises(BadRecord, match="wrong type"):
        interpret({"conversations": "[" * 10_000}, {})


def test_fields_override_what_the_keys_say():
    record = {
        "text": "x",
        "问": "谁？",
        "答": "孔明。",
        "Body": "甲",
        "dialog": dialogue("谁？", "我。"),
    }
    assert interpret(record, parse_fields("question=问,answer=答")) == dialogue("谁？", "孔明。")
    assert interpret(record, parse_fields("text=Body")) == "甲"
    assert interpret(record, parse_fields("conversations=dialog")) == dialogue("谁？", "我。")
    with pytest.raises(BadRecord, match=r"missing field .*回答"):
        interpret(record, parse_fields("question=问,answer=回答"))
    with pytest.raises(UserError, match="did you mean 'question'"):
        parse_fields("qestion=a,answer=b")
    with pytest.raises(UserError, match="must name text, conversations, or question and answer"):
        parse_fields("system=a")


def test_the_split_depends_on_the_first_question_alone():
    asked = [dialogue(f"第{n}问？", "甲。") for n in range(400)]
    other = [dialogue(f"第{n}问？", "乙。", "再问？", "丙。") for n in range(400)]
    splits = [split_of(record, 0.1) for record in asked]
    assert splits == [split_of(record, 0.1) for record in other]
    assert 20 < splits.count("val") < 60
    wider = [split_of(record, 0.3) for record in asked]
    assert {more for split, more in zip(splits, wider, strict=True) if split == "val"} == {"val"}


# --- counting ------------------------------------------------------------------------------------


def test_bad_records_are_counted_by_reason_and_the_first_five_shown(tmp_path, capsys):
    good = json.dumps({"question": "谁？", "answer": "孔明。"})
    bad = ['{"question": "谁？"', "[]", '{"question": "谁？", "answer": ""}', '{"q": 1}', "x", "y"]
    path = write_text(tmp_path / "a.jsonl", "\n".join([good, *bad, "", *[good] * 6]))
    found, tally = counted(path)
    assert found == [dialogue("谁？", "孔明。")] * 7
    reasons = {"broken JSON": 3, "wrong type": 1, "empty answer": 1, "missing field": 1}
    assert (tally.good, tally.bad) == (7, reasons)
    assert tally.meta() == {"records": 7, "skipped": reasons}
    shown = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert [line.split(": ")[1] for line in shown] == [f"{path}, line {n}" for n in range(2, 7)]
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: broken JSON"):  # strict
        read(path)


@pytest.mark.parametrize("bad", [5, 3000])
def test_over_half_bad_stops_anyway(bad, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "甲"}] * 4 + [{"txt": "甲"}] * bad)
    seen = min(bad, readers.CHECKED)
    message = rf"{seen:,} of {seen + 4:,} records are bad.* line 5: missing"
    with pytest.raises(UserError, match=message):
        counted(path)
    write_lines(path, [{"text": "甲"}] * 4 + [{"txt": "甲"}] * 4)
    assert len(counted(path)[0]) == 4


def test_records_of_the_other_kind_are_bad(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "甲"}, {"q": "乙", "a": "丙"}])
    assert counted(path, want=str)[1].bad == {"no text": 1}
    assert counted(path, want=list)[1].bad == {"no conversation": 1}
    assert is_text(find_sources([str(path)]), {})
    with pytest.raises(UserError, match="plain text, and no conversations"):
        counted(write_text(tmp_path / "a.txt", "甲"), want=list)


def test_an_empty_file_is_counted(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz"):
        found, tally = counted(write_text(tmp_path / name, ""))
        assert (found, tally.bad) == ([], {"empty file": 1})


def test_broken_json_of_an_array_stops_at_its_line(tmp_path):
    whole = json.dumps([{"text": text} for text in TEXTS], indent=1, ensure_ascii=False)
    third = whole.index('{\n  "text": "\\"quoted')
    line, last = (text.count("\n") + 1 for text in (whole[:third], whole))
    for wrong, number in (
        (whole[:third] + whole[third:].replace('too"', "too", 1), line),  # its text has no end
        (whole[: third + 30], line),
        (whole[:-1], last),
        (whole + "]", last),
        ("[1 2]", 1),
    ):
        path = write_text(tmp_path / "a.json", wrong)
        with pytest.raises(UserError, match=rf"a\.json, line {number}: broken JSON"):
            counted(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_that_end_early_or_are_damaged_stop(suffix, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": str(n)} for n in range(2000)])
    data = packed(path, suffix).read_bytes()
    (tmp_path / "b.jsonl").write_bytes(data)  # told by the content, not by the name
    assert len(read(tmp_path / "b.jsonl")) == 2000
    damaged = tmp_path / f"c.jsonl{suffix}"
    for wrong in (data[:-1], data[: len(data) // 2], data[:20], data + b"more bytes of another"):
        damaged.write_bytes(wrong)
        with pytest.raises(UserError, match=r"c\.jsonl\.(gz|zst) is damaged"):
            read(damaged)


def test_a_parquet_file_that_is_none_stops(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"text": "甲"}] * 9)
    data = path.read_bytes()
    for wrong in (b"", b"PAR1", data[:-9], data[:40], b"x" * 100, gzip.compress(data)):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=r"a\.parquet is no parquet file, or damaged"):
            read(path)
