"""Files of JSON lines: what is read, what is refused in one line, and what a kill leaves."""

import pytest

from configurator import UserError
from miniglm.jsonl import append, dumps, read_records, read_report, recover, resume

RECORDS = [{"a": "谁？", "b": 1}, {"a": "x\u2028y\x85\v\r\nz"}, {"a": "", "c": "何时"}]


@pytest.mark.parametrize("mark, newline", [(b"", b"\n"), (b"\xef\xbb\xbf", b"\r\n")])
def test_records_are_those_that_were_written(tmp_path, mark, newline):
    lines = dumps(RECORDS).encode().splitlines(keepends=False)
    (tmp_path / "a.jsonl").write_bytes(mark + (newline * 2).join(lines))
    assert read_records(tmp_path / "a.jsonl", ("a",), "", optional=("c",)) == RECORDS


@pytest.mark.parametrize("bad", ["{", "[1]", '"a"', "3", "{}", '{"a": 3}', '{"a": "\\ud800"}'])
def test_a_bad_line_is_named_by_its_number(tmp_path, bad):
    (tmp_path / "a.jsonl").write_text(f'{{"a": "x"}}\n\n{bad}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: .*; mend it$"):
        read_records(tmp_path / "a.jsonl", ("a",), "mend it")


def test_a_file_without_text_is_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match=r"no file .*a\.jsonl; mend it$"):
        read_records(path, ("a",), "mend it")
    contents = {b"\xef\xbb\xbf \n": "empty", "谁？".encode("gbk"): "not UTF-8"}
    for content, words in contents.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.jsonl is {words}.*; mend it$"):
            read_records(path, ("a",), "mend it")


def test_a_file_that_is_cut_at_any_byte_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    assert resume(path, {"seed": 1}) == []
    append(path, RECORDS[:1])
    append(path, RECORDS[1:])
    content = path.read_bytes()
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = content[: size + 1].count(b"\n")  # of a line only its end may be missing
        assert resume(path, {"seed": 1}) == RECORDS[: max(0, whole - 1)]
        append(path, RECORDS[max(0, whole - 1) :])
        assert path.read_bytes() == content


def test_zeros_and_blanks_behind_the_last_line_are_removed(tmp_path):
    for rest in ("\0\0\0", " \t", "\r"):
        (tmp_path / "a.jsonl").write_text('{"a": "x"}\n' + rest, encoding="utf-8", newline="\n")
        assert recover(tmp_path / "a.jsonl", "a") == [{"a": "x"}]
        assert (tmp_path / "a.jsonl").read_bytes() == b'{"a": "x"}\n'
        (tmp_path / "a.jsonl").write_text('{"a": "x"}' + rest, encoding="utf-8", newline="\n")
        assert recover(tmp_path / "a.jsonl", "a") == [{"a": "x"}]
        assert (tmp_path / "a.jsonl").read_bytes() == b'{"a": "x"}\n'


@pytest.mark.parametrize("content", ["a text", '{"a": "x"}\na text', '{"a": "x"}\n{"b": "y"}', "5"])
def test_a_last_line_that_is_another_thing_stays(content, tmp_path):
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl, line . is damaged"):
        recover(tmp_path / "a.jsonl", "a")
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == content


@pytest.mark.parametrize("line", ["{", "[" * 10**5, "[]", '{"b": 1}', '{"a": 1}'])
def test_a_file_with_a_damaged_line_stays_as_it_was(line, tmp_path):
    path, content = tmp_path / "a.jsonl", f'{{"a": "1"}}\n{line}\n{{"a": "2"}}\n{{"a": '
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 is damaged"):
        recover(path, "a")
    assert path.read_text(encoding="utf-8") == content
    with pytest.raises(UserError, match=r"a\.jsonl is damaged"):
        read_report(path, [], "make it again")


def test_what_another_run_began_is_left_as_it_is(tmp_path):
    path = tmp_path / "a.jsonl"
    append(path, [{"seed": 1, "size": 2}, *RECORDS])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"a\.jsonl was begun with other seed; delete it to start"):
        resume(path, {"seed": 3, "size": 2})
    with pytest.raises(UserError, match="was begun with other size; delete"):
        resume(path, {"seed": 1})
    with pytest.raises(UserError, match="line 1 is damaged; delete it"):
        recover(path, "a")
    assert path.read_bytes() == before
