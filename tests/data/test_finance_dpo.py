"""Preferences of a model's own answers: what is sampled, ranked and kept, by a model that has
learnt a little."""

import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from sacrebleu.metrics import CHRF

from configurator import UserError, configure, locked
from data.finance import prepare_dpo as finance
from data_utils import Dataset
from miniglm.checkpoint import weights_sha256
from miniglm.generation import Sampling
from miniglm.prep import ranking
from miniglm.prep.writer import write_sft
from miniglm.text import complete, load_for_sampling
from tests.helpers import dialogue
from tests.runs import (
    contents,
    log,
    questions,
    read_json,
    toy_tokenizer,
    train_here,
)

N = {"train": 90, "val": 24, "test": 16}


@pytest.fixture(scope="module")
def answers(toys) -> Path:
    """toys with `asked`, questions in three splits, and `answers`, a model that has read some."""
    splits = {split: questions(5 + seed, n) for seed, (split, n) in enumerate(N.items())}
    write_sft(toys / "asked", toy_tokenizer(), splits, ["a test"], max_tokens=32)
    common = {"dataset": toys / "asked", "init_from": toys / "base"}
    common |= {"max_iters": 300, "eval_interval": 300}
    train_here(out_dir=toys / "answers", learning_rate=1e-2, **common)
    return toys


def prepared(folder: Path, out: Path, *words: str) -> Dataset:
    common = [f"--out_dir={folder / 'answers'}", f"--out={out}", "--device=cpu", "--batch_size=4"]
    common += ["--n_sources=60", "--n_val=20", "--max_new_tokens=20", "--temperature=1"]
    finance.main([*common, *words])
    return Dataset(str(out))


@pytest.fixture(scope="module")
def whole(answers) -> Path:
    """The dataset of a run from its beginning to its end."""
    prepared(answers, answers / "whole")
    return answers / "whole"


def lines_of(folder: Path, name: str = "samples.jsonl") -> list[dict]:
    """The lines of a file, of the samples without the first."""
    lines = (folder / name).read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines[name == "samples.jsonl" :]]


def pairs_of(data: Dataset, split: str) -> dict[str, tuple[str, str]]:
    """Source -> chosen, rejected."""
    pairs = {}
    for turns in data.conversations(split):
        source, answer = (turn["content"] for turn in turns)
        pairs[source] = (*pairs.get(source, ()), answer)
    assert all(len(pair) == 2 for pair in pairs.values())
    return pairs


# --- what is sampled -----------------------------------------------------------------------------


def test_each_source_has_its_samples_and_they_are_the_models_own(answers, whole):
    lines = lines_of(whole)
    assert Counter(line["split"] for line in lines) == {"val": 20, "train": 60}
    checkpoint = load_for_sampling(str(answers / "answers"), "cpu")
    sampling = Sampling(20, temperature=1.0)
    for number in (0, 19, 20, 79):
        prompt = checkpoint.tokenizer.render_prompt(dialogue(lines[number]["source"]))
        [outputs] = complete(checkpoint, [prompt], sampling, 4, first_prompt=number)
        assert lines[number]["samples"] == [output.text.strip() for output in outputs]
        assert lines[number]["ended"] == [output.ended for output in outputs]
    ended = [e for line in lines for e in line["ended"]]
    assert len(ended) == 320 and sum(ended) / 320 > 0.5


def test_training_pairs_are_of_trained_sources_and_held_out_ones_of_the_validation_split(
    answers, whole
):
    data, asked = Dataset(str(whole)), Dataset(str(answers / "asked"))
    sources = {split: {turns[0]["content"] for turns in asked.conversations(split)} for split in N}
    assert sources["train"] > {*pairs_of(data, "train")}
    assert sources["val"] > {*pairs_of(data, "val")}
    assert not {line["source"] for line in lines_of(whole)} & sources["test"]
    assert "val_questions_in_train" not in data.meta
    # their own sources, by which data/upload.py knows the terms of the texts
    assert data.meta["sources"] == asked.meta["sources"]
    assert data.meta["dataset"].endswith("asked")


def test_a_model_of_questions_and_texts_is_asked_the_questions(answers, tmp_path):
    dataset = f"{answers / 'asked'}:3,{answers / 'text'}:1"
    common = {"dataset": dataset, "init_from": answers / "base", "max_iters": 1}
    checkpoint = load_for_sampling(train_here(out_dir=tmp_path / "out", **common), "cpu")
    assert ranking.open_data(finance.Settings(), checkpoint).path == answers / "asked"
    checkpoint.run["settings"] = {}  # as a model of another project has
    with pytest.raises(UserError, match="names no dataset; pass --dataset="):
        ranking.open_data(finance.Settings(), checkpoint)


def test_sources_are_a_choice_by_the_seed_without_validation_sources_that_are_trained(tmp_path):
    trained, held_out = questions(1, 40), questions(2, 9)
    splits = {"train": trained, "val": [[trained[3][0], held_out[0][1]], *held_out]}
    write_sft(tmp_path / "asked", toy_tokenizer(), splits, ["a test"], max_tokens=32)
    data = Dataset(str(tmp_path / "asked"))

    def sources(**settings: int) -> list[dict]:
        settings = {"n_val": 5, "n_sources": 30} | settings
        return ranking.choose_sources(finance.Settings(**settings), data)

    assert sources(n_sources=12) == sources()[: 5 + 12]
    assert [line["split"] for line in sources()] == ["val"] * 5 + ["train"] * 30
    assert sources(seed=1) != sources() == sources()
    chosen = [line["source"] for line in sources(n_sources=999, n_val=999)]
    assert sorted(chosen[:9]) == sorted(turns[0]["content"] for turns in held_out)
    assert len({*chosen}) == len(chosen) == 9 + 40


# --- interrupted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 0.3, 0.99, 1.0])
def test_an_interrupted_run_goes_on_to_the_same_bytes(answers, whole, tmp_path, kept, monkeypatch):
    calls = []

    def noted(*arguments):
        calls.append((arguments[-1], len(arguments[1])))
        return complete(*arguments)

    monkeypatch.setattr(ranking, "complete", noted)
    content = (whole / "samples.jsonl").read_bytes()
    (tmp_path / "out").mkdir()
    place = int(kept * len(content)) if isinstance(kept, float) else kept
    (tmp_path / "out" / "samples.jsonl").write_bytes(content[:place])
    prepared(answers, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)
    # in rounds of 16 batches of 4 rows, whole ones, since rounding depends on the rows beside it
    rounds = [(first, 16) for first in range(0, 80, 16)]
    assert calls == rounds[content[:place].count(b"\n", content.index(b"\n") + 1) // 16 :]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--seed=3", "--num_samples=3", "--batch_size=5"], "seed, num_samples, batch_size"),
        (["--n_val=19", "--n_sources=59"], "n_val, n_sources"),
        (["--dataset={}/questions"], "dataset_fingerprints"),
    ],
)
def test_samples_of_another_run_are_not_mixed_in(answers, whole, words, names):
    before = contents(whole)
    message = rf"whole/samples\.jsonl was begun with other {names}; delete it to start over"
    with pytest.raises(UserError, match=message):
        prepared(answers, whole, *(word.format(answers) for word in words))
    assert contents(whole) == before


def test_a_second_run_into_the_same_folder_is_refused(answers, tmp_path):
    refused = pytest.raises(UserError, match=r"another run writes .*samples\.jsonl")
    with locked(tmp_path / "samples.jsonl"), refused:
        prepared(answers, tmp_path)


# --- what is ranked ------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0, 10])
def test_the_pairs_are_those_of_a_slow_loop(answers, whole, tmp_path, margin, capsys):
    out = shutil.copytree(whole, tmp_path / "out")
    before = (out / "samples.jsonl").read_bytes()
    data = prepared(answers, out, f"--margin={margin}")
    assert (out / "samples.jsonl").read_bytes() == before  # another margin needs no new samples
    metric, wanted = CHRF(word_order=2), {"train": {}, "val": {}}
    longest = data.meta["max_tokens"]
    for line in lines_of(out):
        rated = [
            (metric.sentence_score(text, [line["reference"]]).score, text)
            for text, ended in zip(line["samples"], line["ended"], strict=True)
            if ended
            and text
            and "\ufffd" not in text
            # longer ones, with their question, are in no pair
            and len(data.tokenizer.render(dialogue(line["source"], text))[0]) <= longest
        ]
        best, worst = max(rated, default=(0, ""))[0], min(rated, default=(0, ""))[0]
        if best - worst >= max(margin, 1e-4):
            ties = [[text for score, text in rated if score == end] for end in (best, worst)]
            wanted[line["split"]][line["source"]] = ties
    for split in ("train", "val"):
        pairs = pairs_of(data, split)
        assert pairs.keys() == wanted[split].keys() and pairs
        for source, (chosen, rejected) in pairs.items():
            assert chosen in wanted[split][source][0] and rejected in wanted[split][source][1]
        counts = dict(data.meta["pairs_from"][split])
        assert counts["pairs"] == len(pairs) and counts.pop("sources") == sum(counts.values())
    printed = capsys.readouterr().out
    assert printed.count("\n    better: ") == printed.count("\n    worse:  ") == 3


def test_meta_says_of_which_model_and_how(answers, whole):
    meta, name = read_json(whole / "meta.json"), (answers / "answers" / "best").read_text().strip()
    assert meta["model"].endswith(f"answers/{name}")
    assert meta["samples"] == json.loads((whole / "samples.jsonl").read_bytes().split(b"\n")[0])
    assert meta["samples"]["weights_sha256"] == weights_sha256(answers / "answers" / name)
    assert meta["max_tokens"] == 32  # the model's block_size, below --max_tokens=
    assert (meta["rank"], meta["kind"]) == ("chrF++", "dpo")
    assert meta["pairs_from"]["train"]["pairs"] == meta["splits"]["train"]["pairs"]


def test_the_dataset_trains_by_dpo(answers, whole, tmp_path):
    given = {"dataset": whole, "init_from": answers / "answers", "learning_rate": 3e-3}
    out = train_here(out_dir=tmp_path / "out", max_iters=60, eval_interval=30, **given)
    losses = [record["train_loss"] for record in log(out)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert sum(losses[-5:]) / 5 < math.log(2) - 0.01


# --- COMET ---------------------------------------------------------------------------------------


class Lengths:
    """Scores a translation by its length, as COMET's models are called."""

    def predict(self, rows: list[dict], **options: object) -> SimpleNamespace:
        return SimpleNamespace(scores=[len(row["mt"]) / 100 for row in rows])


def test_comets_scores_rank_and_an_interrupted_ranking_goes_on(answers, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "comet", None)  # what import finds of a missing one
    message = r"COMET is not in this environment .* -r requirements-comet\.txt"
    with pytest.raises(UserError, match=message):
        prepared(answers, tmp_path / "out", "--rank=comet")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(ranking.comet, "load_comet", lambda name: Lengths())
    words = ["--rank=comet", "--margin=2", "--n_val=16"]
    data = prepared(answers, tmp_path / "out", *words)
    assert data.meta["rank"] == "COMET Unbabel/wmt22-comet-da"
    for pair in [*pairs_of(data, "train").values(), *pairs_of(data, "val").values()]:
        assert len(pair[0]) >= len(pair[1]) + 2
    whole, path = contents(tmp_path / "out"), tmp_path / "out" / "scores.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    prepared(answers, tmp_path / "out", *words)
    assert contents(tmp_path / "out") == whole


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out_dir={}/base"], "base continues texts, it has learnt no answers"),
        (["--dataset={}/text"], "has no questions with references"),
        (["--margin=100"], "no source of the train split gave a pair"),
    ],
)
def test_bad_settings_are_one_line(answers, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        prepared(answers, tmp_path / "out", *(word.format(answers) for word in words))
    assert not (tmp_path / "out" / "meta.json").exists()


def test_a_subclass_keeps_the_bounds_of_its_parents():
    with pytest.raises(UserError, match="seed=-1 must be 0 or more"):
        configure(ranking.Settings, ["--seed=-1"])
