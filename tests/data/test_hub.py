"""fetch_data.py --hub= with the real client, and a hub on this machine."""

import io
import os
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import export
from data_utils import Dataset
from miniglm.checkpoint import load_checkpoint
from miniglm.prep.readers import find_sources
from tests.helpers import save_run, tiny_model, tiny_tokenizer
from tests.hub import TOKEN, Repository, logged_in
from tests.runs import contents, error_line, free_port, read_json, words

REPO, PAIRS = "someone/tiny-llama", "someone/pairs"


@pytest.fixture
def hub(tmp_path, run_ready, monkeypatch):
    """A hub with a model and a data set, for a client without a token."""
    with logged_in(tmp_path / "hf_home", run_ready) as hub:
        monkeypatch.delenv("HF_TOKEN")
        hub.repositories[f"models/{REPO}"] = Repository(False, model_files(tmp_path), ["one"])
        hub.repositories[f"datasets/{PAIRS}"] = Repository(False, pair_files(), ["one"])
        yield hub


def model_files(tmp_path) -> dict[str, bytes]:
    """What export.py writes, and files that no loader of ours reads."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(block_size=128, n_vocab=tokenizer.n_vocab)
    out_dir = save_run(tmp_path / "run", model, tokenizer, tmp_path, "sft")
    export.main(words(out_dir=out_dir, to=tmp_path / "exported"))
    others = {"onnx/model.safetensors": b"x", "a.bin": b"x"}
    return contents(tmp_path / "exported") | {"README.md": b"---\nlicense: mit\n---\n"} | others


WORDS = "company 公司 market 市场 hair 头发 dry 干燥 develop 发展 country 国家 law 法律 trade 贸易 "
WORDS += "report 报告 year 年度 meeting 会议 member 成员 river 河流 library 图书馆 question 问题"


def pair_files() -> dict[str, bytes]:
    """In the form of OPUS-100, WMT and the UN corpus: parquet of {"translation": {en, zh}}."""
    words_of, rng, rows = WORDS.split(), random.Random(1), []
    for _ in range(100):
        chosen = [rng.randrange(0, len(words_of), 2) for _ in range(8)]
        english, chinese = (
            " ".join(words_of[i] for i in chosen),
            "".join(words_of[i + 1] for i in chosen),
        )
        rows.append({"translation": {"en": english, "zh": chinese}})
    files = {"README.md": b"# Pairs\n"}
    for name, part in (("train-00000-of-00001", rows[:90]), ("test-00000-of-00001", rows[90:])):
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), buffer)
        files |= {f"{pair}/{name}.parquet": buffer.getvalue() for pair in ("en-zh", "zh-en")}
    return files


def fetch(hub, out, address=REPO, **settings):
    return hub.run("data/fetch_data.py", *words(hub=address, out=out, **settings))


def fetched(folder) -> dict[str, bytes]:
    """Without what the client keeps beside the files."""
    return {name: c for name, c in contents(folder).items() if not name.startswith(".cache")}


def test_of_a_model_what_the_loader_reads_comes(hub, tmp_path):
    files = hub.repositories[f"models/{REPO}"].files
    expected = {
        name: files[name] for name in files if name not in ("onnx/model.safetensors", "a.bin")
    }
    done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny-llama"
    assert fetched(folder) == expected
    size = sum(map(len, expected.values()))
    first, last = done.stdout.splitlines()
    assert first == f"{REPO}: {len(expected)} files, {size:,} bytes, licence mit"
    assert last.endswith(f"next: python train.py --init_from={folder}")
    theirs, ours = load_checkpoint(folder).model, load_checkpoint(tmp_path / "run").model
    idx = torch.arange(8)[None]
    torch.testing.assert_close(theirs(idx), ours(idx))

    hub.sent.clear()
    (folder / "config.json").write_text("{", encoding="utf-8")  # cut short
    assert fetch(hub, tmp_path).returncode == 0
    assert [name for name, *_ in hub.sent] == ["config.json"]
    assert fetched(folder) == expected


def test_a_broken_connection_is_taken_up_where_it_broke(hub, tmp_path):
    mib = 2**20  # the client writes 10 of them at a time
    files = {"README.md": b"# A large file\n", "all.bin": random.Random(1).randbytes(24 * mib)}
    hub.repositories["datasets/someone/large"] = Repository(False, files, ["one"])
    hub.faults[:] = [200, 503]  # half of it, then nothing
    line = error_line(fetch(hub, tmp_path, "datasets/someone/large"))
    assert line == (
        f"{hub.url} refused to fetch someone/large: 503, It is broken; "
        "try again, or name a mirror by HF_ENDPOINT"
    )
    assert fetched(tmp_path / "large") == {"README.md": files["README.md"]}

    hub.sent.clear()
    hub.faults[:] = [200]
    done = fetch(hub, tmp_path, "datasets/someone/large")
    assert done.returncode == 0 and done.stderr == ""
    assert fetched(tmp_path / "large") == files
    assert hub.sent == [("all.bin", 0, 12 * mib), ("all.bin", 10 * mib, 14 * mib)]


def test_patterns_choose_files_of_a_data_set(hub, tmp_path):
    pairs = hub.repositories[f"datasets/{PAIRS}"].files
    done = fetch(hub, tmp_path, f"datasets/{PAIRS}", files="en-zh/*,zh-en/test*", list=True)
    assert f"{PAIRS}: 3 files, " in done.stdout and "licence not stated" in done.stdout
    assert "zh-en/test-00000-of-00001.parquet, " in done.stdout and hub.sent == []
    assert fetch(hub, tmp_path, f"datasets/{PAIRS}", files="en-zh/*,zh-en/test*").returncode == 0
    names = {name for name in pairs if name.startswith(("en-zh/", "zh-en/test"))}
    assert fetched(tmp_path / "pairs") == {name: pairs[name] for name in names}
    line = error_line(fetch(hub, tmp_path, f"datasets/{PAIRS}", files="en-de/*"))
    assert line.startswith(f"--files=en-de/* matches no file of {PAIRS}, such as README.md, en-zh/")


def test_a_gated_model_needs_the_token(hub, tmp_path, monkeypatch):
    hub.repositories[f"models/{REPO}"].gated = True
    line = error_line(fetch(hub, tmp_path))
    assert line.startswith(f"{hub.url} refused to fetch {REPO}: 40") and "HF_TOKEN" in line
    assert not (tmp_path / "tiny-llama").exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch(hub, tmp_path).returncode == 0


def test_what_the_hub_cannot_give_is_one_line(hub, tmp_path, monkeypatch):
    hub.pretended["model.safetensors"] = 10**18
    line = error_line(fetch(hub, tmp_path))
    assert line.startswith(f"{tmp_path}/tiny-llama has no room: 1,000,000,000,000,0")
    none = f"{hub.url} refused to fetch someone/else: 40"
    assert error_line(fetch(hub, tmp_path, "someone/else")).startswith(none)
    for wrong in ("tiny-llama", "datasets/pairs", "a/b/c", "some one/x"):
        assert error_line(fetch(hub, tmp_path, wrong)).startswith(
            f"hub='{wrong}' names no repository"
        )
    hub.repositories["models/someone/old"] = Repository(False, {"a.bin": b"x"}, ["one"])
    line = error_line(fetch(hub, tmp_path, "someone/old"))
    assert line == "someone/old has no *.safetensors; name another model"
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    line = error_line(fetch(hub, tmp_path))
    assert line.startswith(f"cannot fetch {REPO} at {os.environ['HF_ENDPOINT']}: ConnectError")
    assert line.endswith("; see HF_ENDPOINT, or try again")
    assert not (tmp_path / "tiny-llama").exists()


def test_fetched_pairs_become_traditional(hub, tmp_path):
    assert fetch(hub, tmp_path, f"datasets/{PAIRS}", files="zh-en/*").returncode == 0
    sources = find_sources([f"{tmp_path}/pairs"])
    assert len(sources) == 2 and sources == find_sources([f"{tmp_path}/pairs/zh-en/*.parquet"])
    settings = {"input": tmp_path / "pairs", "out": tmp_path / "data", "vocab_size": 300}
    done = hub.run("data/translation/prepare.py", *words(**settings, val=0.1))
    assert done.returncode == 0, done.stderr
    data = Dataset(str(tmp_path / "data"))
    meta = read_json(tmp_path / "data" / "meta.json")
    assert set(meta["splits"]) == {"train", "val", "test"}
    assert sum(split["documents"] for split in meta["splits"].values()) == 100
    ids = np.fromfile(tmp_path / "data" / "train.bin", np.uint16)
    text = data.tokenizer.decode(ids.tolist())
    assert "頭髮" in text and "乾燥" in text and "發展" in text
    assert not set(text) & set("头发干")
