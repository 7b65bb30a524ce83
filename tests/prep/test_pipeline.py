"""Units and processes: the same dataset however it is made, and none that is half."""

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from configurator import UserError
from data_utils import Dataset
from miniglm.prep import pipeline
from miniglm.prep import writer as data_writer
from miniglm.prep.forms import split_of
from miniglm.prep.pipeline import Settings, prepare, read_records
from miniglm.prep.readers import Tally, find_sources, parts, read_lines, records
from miniglm.prep.writer import write_pretrain, write_sft
from tests.helpers import TEXT, dialogue, tiny_tokenizer, write_lines
from tests.reads import in_named_files, kills_itself
from tests.runs import contents, start, wait_for
from tests.test_checkpoint import kills

LINES = TEXT.splitlines()
linux_only = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills itself as Unix does")


@pytest.fixture
def small(monkeypatch):
    """Units and blocks so small that a test has many of each."""
    monkeypatch.setattr(pipeline, "UNIT", 3000)
    monkeypatch.setattr(data_writer, "BLOCK", 200)


@pytest.fixture(scope="module")
def tokenizer_at(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tiny_tokenizer().save(path)
    return path


def questions(count: int, kinds: int, seed: int = 0) -> list[list[dict]]:
    """Conversations, of so many kinds: others are repeated."""
    draw = random.Random(seed)
    numbers = [draw.randrange(kinds) for _ in range(count)]
    return [dialogue(f"第{n}回说的是什么？", f"说的是{LINES[n % 5][:20]}。") for n in numbers]


def write_jsonl(path: Path, values: list) -> Path:
    return write_lines(path, [v if isinstance(v, str) else {"messages": v} for v in values])


def prepared(out: Path, files: list[Path], kind: str, **settings) -> Dataset:
    config = Settings([str(file) for file in files], str(out), **{"val": 0.2} | settings)
    prepare(config, partial(read_records, want=str if kind == "pretrain" else list), kind)
    return Dataset(str(out))


# --- parts of a file -----------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_parts_of_a_file_have_its_lines_and_their_numbers(encoding, end, tmp_path):
    text = ("椅上倍增，不一而足。\n\n" + TEXT.replace("楚、", "上一。\n")) * 3
    path = tmp_path / "a.txt"
    path.write_bytes(text.replace("\n", end).encode(encoding))
    [source] = find_sources([str(path)], encoding.removesuffix("-sig"))
    whole = list(read_lines(source))
    assert "\n".join(line for _, line in whole) == text.removesuffix("\n")
    for size in (1, 100, 1000):
        found = parts(source, size)
        assert list(itertools.chain.from_iterable(map(read_lines, found))) == whole
        assert found[0].start == 0
        assert [part.end for part in found] == [part.start for part in found[1:]] + [None]
        if end == "\r" or encoding == "utf-16":  # not cut, since its line ends are no LF bytes
            assert found == [source]
        else:
            assert len(found) == len(whole) if size == 1 else len(found) >= len(text) / size


def test_only_texts_and_json_lines_are_cut(tmp_path):
    for name in ("a.csv", "a.tsv"):
        (tmp_path / name).write_text("text\n" + "甲\n" * 500, encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(["甲"] * 500))
    (tmp_path / "b.json").write_text('{"text": "甲"}\n' * 500)
    (tmp_path / "c.txt").write_text("甲乙丙丁" * 500, encoding="utf-8")
    found = {source.path.name: parts(source, 100) for source in find_sources([str(tmp_path)])}
    assert {name for name, cut in found.items() if len(cut) > 1} == {"b.json"}
    assert {part.form for part in found["b.json"]} == {"jsonl"}
    assert [text for part in found["b.json"] for text in records(part, Tally())] == ["甲"] * 500


def test_units_depend_on_the_files_alone(tmp_path, small):
    for name, size in (("a", 100), ("b", 10_000), ("c", 2000), ("d", 900), ("e", 200)):
        (tmp_path / f"{name}.txt").write_text(("y" * 99 + "\n") * (size // 100))
    units = pipeline.plan(find_sources([str(tmp_path)]))
    assert [[(part.path.stem, part.start) for part in unit] for unit in units] == [
        [("a", 0)],
        *([("b", start)] for start in (0, 3000, 6000, 9000)),
        [("c", 0), ("d", 0)],
        [("e", 0)],
    ]


# --- processes -----------------------------------------------------------------------------------


def write_texts(folder: Path) -> list[Path]:
    """Texts of two forms, with repeated ones and bad ones."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(LINES, k=3)) + str(draw.randrange(60)) for _ in range(120)]
    values = [{"text": text} for text in texts]
    for place in (3, 50, 90):
        values[place] = "{"
    first = write_lines(folder / "a.jsonl", values)
    return [first, write_lines(folder / "b.txt", texts, "gb18030"), first]


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_any_number_of_processes_gives_the_same_bytes(kind, tmp_path, small, capsys):
    if kind == "pretrain":
        files = write_texts(tmp_path)
    else:
        files = [write_jsonl(tmp_path / "q.jsonl", [*questions(150, 100), "{", *questions(50, 60)])]
    found, said = [], []
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        data = prepared(out, files, kind, vocab_size=320, processes=processes)
        found.append(contents(data.path))
        said.append(capsys.readouterr().out.replace(str(out), "OUT"))
    assert found[0] == found[1] == found[2]
    assert said[0] == said[1] == said[2]
    assert len(pipeline.plan(find_sources([str(file) for file in files]))) > 5
    assert data.meta["skipped"] == {"broken JSON": 3 if kind == "pretrain" else 1}
    assert not list(tmp_path.glob("*/prepare.tmp"))


@pytest.mark.parametrize(("val", "small_split"), [(1e-9, "val"), (1 - 1e-9, "train")])
@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_of_few_records_one_goes_to_each_split(kind, val, small_split, tmp_path, small):
    """From any number of processes the same, and equal questions together."""
    texts = [json.dumps({"text": f"第{n}段。" + TEXT}, ensure_ascii=False) for n in range(9)]
    turns = [dialogue(f"第{n % 9}问？", LINES[n % 5] + str(n)) for n in range(90)]
    file = write_jsonl(tmp_path / "a.jsonl", texts if kind == "pretrain" else turns)
    for name in "13":
        settings = {"vocab_size": 300, "val": val, "processes": int(name)}
        data = prepared(tmp_path / name, [file], kind, **settings)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    if kind == "pretrain":
        assert data.meta["splits"][small_split]["documents"] == 1
    else:
        questions = [question["content"] for question, _ in data.conversations(small_split)]
        assert (len(questions), len({*questions})) == (10, 1)


def test_bad_records_are_told_with_their_lines_in_the_order_of_the_input(
    tmp_path, small, tokenizer_at, capsys
):
    values = questions(300, 300)
    bad = [2, 80, 81, 170, 260, 299]
    for place in bad:
        values[place] = '{"q": "谁？", "a": ""}'
    path = write_jsonl(tmp_path / "a.jsonl", values)
    settings = {"tokenizer": str(tokenizer_at), "processes": 2}
    data = prepared(tmp_path / "out", [path], "sft", **settings)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert said == [f"skipped: {path}, line {place + 1}: empty answer" for place in bad[:5]]
    assert (data.meta["records"], data.meta["skipped"]) == (294, {"empty answer": 6})
    before = contents(data.path)
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: empty answer"):
        prepared(tmp_path / "out", [path], "sft", strict=True, **settings)
    assert contents(data.path) == before


def test_over_half_bad_in_a_part_of_a_file_stops(tmp_path, small, tokenizer_at):
    values = questions(300, 300)
    values[140:] = ['{"x": "有字而无答案，亦无问题，仅占篇幅耳。"}'] * 160
    path = write_jsonl(tmp_path / "a.jsonl", values)
    with pytest.raises(UserError, match=r"a.jsonl: \d+ of \d+ .* first in line 141: missing field"):
        prepared(tmp_path / "out", [path], "sft", tokenizer=str(tokenizer_at), processes=2)
    assert not (tmp_path / "out").exists()


@linux_only
def test_a_process_that_dies_is_a_line(tmp_path, small, tokenizer_at):
    files = [str(file) for file in write_texts(tmp_path)]
    config = Settings(files, str(tmp_path / "out"), str(tokenizer_at), processes=2)
    message = "was killed, perhaps for lack of memory; try --processes=1"
    with pytest.raises(UserError, match=message):
        prepare(config, kills_itself, "pretrain")
    assert not (tmp_path / "out").exists()


# --- killed --------------------------------------------------------------------------------------


@linux_only
def test_a_killed_run_leaves_what_was_there_and_no_process(tmp_path, small, tokenizer_at):
    path = write_jsonl(tmp_path / "a.jsonl", questions(400, 400))
    settings = {"tokenizer": str(tokenizer_at), "processes": 1}
    out = tmp_path / "out"
    before = contents(prepared(out, [path], "sft", **settings).path)
    other = write_jsonl(tmp_path / "b.jsonl", questions(400, 400, seed=1))
    paths = map(str, (other, out, tokenizer_at))
    options = {"stdout": subprocess.DEVNULL, "start_new_session": True}
    run = start("-m", "tests.reads", *paths, **options)
    wait_for(lambda: len(list(out.glob("prepare.tmp/*.rows"))) > 2, run)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 60
    while is_group_alive(run.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (out / "prepare.tmp").is_dir()
    left = {name: content for name, content in contents(out).items() if "prepare.tmp" not in name}
    assert left == before
    Dataset(str(out))
    data = prepared(out, [other], "sft", **settings)
    assert set(contents(data.path)) == set(before)
    assert data.fingerprint != json.loads(before["meta.json"])["splits"]["train"]["fingerprint"]


def is_group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@linux_only
def test_killed_at_any_file_operation_no_mixture_is_accepted(tmp_path):
    tokenizer = tiny_tokenizer()

    def write(out: Path, texts: list[str]) -> str:
        splits = {"train": texts[:3], "val": texts[3:]}
        return write_pretrain(out, tokenizer, splits, [])["splits"]["train"]["fingerprint"]

    old, found = write(tmp_path / "out", LINES), []
    for state in kills(lambda state: write(state, LINES[::-1]), tmp_path / "out"):
        try:
            found.append(Dataset(str(state)).fingerprint)
        except UserError as error:
            assert "meta.json is missing" in str(error)
            found.append(None)
        new = write(state, LINES[::-1])
        assert Dataset(str(state)).fingerprint == new
        assert not (state / "prepare.tmp").exists()
    assert [*dict.fromkeys(found)] == [old, None, new]


def test_two_runs_into_one_dataset_do_not_disturb_each_other(tmp_path):
    tokenizer, out = tiny_tokenizer(), tmp_path / "out"
    second = {"train": LINES[3:], "val": LINES[:1]}

    def texts() -> Iterator[str]:
        yield LINES[0]
        with pytest.raises(UserError, match=r"another run writes .*out; wait for it"):
            write_pretrain(out, tokenizer, second, [])
        yield LINES[1]

    write_pretrain(out, tokenizer, {"train": texts(), "val": LINES[2:3]}, [])
    assert tokenizer.decode(Dataset(str(out)).tokens["train"].tolist()) == "".join(LINES[:2])
    write_pretrain(out, tokenizer, second, [])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- duplicates ----------------------------------------------------------------------------------


def test_of_equal_records_the_first_stays_across_units_and_files(tmp_path, small, tokenizer_at):
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", questions(200, 150, seed))
        for seed, name in enumerate("abc")
    ]
    data = prepared(tmp_path / "out", files, "sft", tokenizer=str(tokenizer_at), processes=1)
    seen, expected, repeated = set(), {"train": [], "val": []}, {"train": 0, "val": 0}
    for turns in itertools.chain.from_iterable(questions(200, 150, seed) for seed in range(3)):
        split = split_of(turns, 0.2)
        if str(turns) in seen:
            repeated[split] += 1
        else:
            expected[split].append(turns)
        seen.add(str(turns))
    for split in ("train", "val"):
        assert data.conversations(split) == expected[split]
        assert data.meta["splits"][split]["skipped: duplicate"] == repeated[split]
    assert sum(repeated.values()) > 300


@pytest.mark.parametrize("dedup_val", [False, True])
def test_a_validation_question_that_is_trained_is_told_or_moved(
    dedup_val, tmp_path, small, tokenizer_at, capsys
):
    train = [dialogue(f"第{n}问？", "一答。") for n in range(100)]
    val = [dialogue(f"第{n}问？", "又一答。") for n in range(90, 120)]
    splits = {"train": train, "val": val}
    files = [str(write_jsonl(tmp_path / f"{split}.jsonl", splits[split])) for split in splits]
    paths = files, str(tmp_path / "out"), str(tokenizer_at)
    config = Settings(*paths, dedup_val=dedup_val, processes=1)
    meta = prepare(config, in_named_files, "sft")
    data, moved = Dataset(str(tmp_path / "out")), val[:10] if dedup_val else []
    assert data.conversations("train") == train + moved
    assert data.conversations("val") == val[len(moved) :]
    assert meta["val_questions_moved_to_train" if moved else "val_questions_in_train"] == 10
    assert "10 validation questions" in capsys.readouterr().out


# --- fingerprints ------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_rows_one_by_one(tmp_path, small):
    tokenizer = tiny_tokenizer()
    turns = [dialogue(f"第{n}问？", LINES[n % 5][: n % 7 + 1]) for n in range(140)]
    meta = write_sft(tmp_path, tokenizer, {"train": turns[:120], "val": turns[120:]}, [], 99)
    digest, position = hashlib.sha256(), 0
    for ids, mask in map(tokenizer.render, turns[:120]):
        position += len(ids)
        for part in (np.array(ids, np.uint16), np.array(mask, np.uint8), np.uint64(position)):
            digest.update(part.tobytes())
    assert meta["splits"]["train"]["fingerprint"] == digest.hexdigest()


# --- Ray -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_ray_cluster_of_two_workers_gives_the_same_bytes(tmp_path, small, capsys):
    pytest.importorskip("ray", reason="pip install ray")
    from ray.cluster_utils import Cluster

    files = write_texts(tmp_path)
    expected = prepared(tmp_path / "local", files, "pretrain", vocab_size=320, processes=1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        ray_engine = {"engine": "ray", "address": cluster.address}
        data = prepared(tmp_path / "ray", files, "pretrain", vocab_size=320, **ray_engine)
        assert contents(data.path) == contents(expected.path)
        with pytest.raises(UserError, match=r"a\.jsonl, line 4: broken JSON"):
            prepared(tmp_path / "strict", files, "pretrain", strict=True, **ray_engine)
    finally:
        cluster.shutdown()


def test_without_ray_its_engine_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    files = write_texts(tmp_path)
    with pytest.raises(UserError, match="--engine=ray needs Ray; pip install ray"):
        prepared(tmp_path / "out", files, "pretrain", engine="ray")
