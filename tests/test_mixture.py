"""Mixtures of datasets in one run, and the curriculum whose configs use them."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import evaluations
import train
from configurator import ROOT, UserError, configure
from data_utils import PERIOD, Dataset, Mixture, open_dataset
from miniglm.prep.writer import write_pretrain
from tests.runs import (
    log,
    novel,
    read_json,
    saved,
    toy_tokenizer,
    train_here,
    words,
)

BLOCK = 16


@pytest.fixture(scope="module")
def sets(toys) -> Path:
    """text (400 sentences), small (60), other (100, another vocabulary), questions and pairs."""
    for name, seed, size, vocab in (("small", 5, 60, 320), ("other", 6, 100, 300)):
        texts = {"train": [novel(seed, size)], "val": [novel(seed + 10, 20)]}
        write_pretrain(toys / name, toy_tokenizer(vocab), texts, ["a test"])
    return toys


def mixture(sets: Path, *shares: str) -> Mixture:
    return open_dataset(",".join(f"{sets}/{share}" for share in shares))


def owners(rows: np.ndarray) -> list[int]:
    return (rows >> 48).tolist()


def test_each_period_has_exactly_its_shares(sets):
    data = mixture(sets, "text:2", "small:.5")
    rows = data.step_rows(1, 0, 3 * PERIOD, BLOCK)
    for period in np.split(rows, 3):
        assert np.bincount(owners(period)).tolist() == [800, 200]
    assert owners(rows[:PERIOD]) != owners(rows[PERIOD : 2 * PERIOD])
    early = [owners(part).count(1) for part in np.split(rows, 30)]
    assert max(early) < 40  # 20 of each 100 are expected


def test_the_rows_do_not_depend_on_the_size_of_a_step(sets):
    data = mixture(sets, "text:2", "small:1")
    whole = data.step_rows(3, 0, 4000, BLOCK)
    for start, count in itertools.product((0, 993, 2100), (1, 64, 1500)):
        assert (data.step_rows(3, start, count, BLOCK) == whole[start : start + count]).all()
    assert (data.step_rows(4, 0, 4000, BLOCK) != whole).any()


def test_rows_are_shown_with_their_dataset(sets):
    data = mixture(sets, "text:1", "small:1")
    rows = np.array([7, 5 + (1 << 48), 3])
    assert data.show_rows(rows) == (
        f"the rows from tokens 7, 3 of {sets}/text/train and "
        f"the rows from tokens 5 of {sets}/small/train"
    )


def test_each_dataset_is_read_as_if_alone(sets):
    data = mixture(sets, "text:2", "small:1")
    rows = data.step_rows(3, 0, 900, BLOCK)
    for number, name in enumerate(("text", "small")):
        alone = Dataset(f"{sets}/{name}")
        own = rows[np.array(owners(rows)) == number]
        expected = alone.step_rows(3, 0, len(own), BLOCK)
        assert (own & (2**48 - 1)).tolist() == expected.tolist()
        for mixed, plain in zip(data.batch(own, BLOCK), alone.batch(expected, BLOCK), strict=True):
            assert (mixed == plain).all()
    idx, targets = data.batch(rows[:50], BLOCK)
    assert idx.shape == targets.shape == (50, BLOCK)
    assert (idx[:, 1:] == targets[:, :-1]).all()
    for row in range(50):
        assert (data.batch(rows[row : row + 1], BLOCK)[0][0] == idx[row]).all()


def test_validation_is_that_of_all(sets):
    mixed = mixture(sets, "text:2", "small:1").eval_batches("val", BLOCK, 4)
    alone = [Dataset(f"{sets}/{name}").eval_batches("val", BLOCK, 4) for name in ("text", "small")]
    for (idx, targets), (want, want_targets) in zip(mixed, itertools.chain(*alone), strict=True):
        assert (idx == want).all() and (targets == want_targets).all()


def test_other_shares_have_another_fingerprint(sets):
    shares = [("text:2", "small:1"), ("text:1", "small:1"), ("small:1", "text:2"), ("text:1",)]
    assert len({mixture(sets, *share).fingerprint for share in shares}) == 4
    assert mixture(sets, "text:4", "small:2").fingerprint == mixture(sets, *shares[0]).fingerprint


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (("text:1", "pairs:1"), "pairs holds pairs, which cannot be mixed"),
        (("text:1", "other:1"), "other has another tokenizer than "),
        (("text:1", "small:0"), "each share must be above 0"),
        (("text:5000", "small:1"), "a share is under 1 of 1,000"),
        (("text:1", "small"), r"small' is no NAME:SHARE, as in news:3,novels:1"),
        (("text:1", "small:-1"), r"small:-1' is no NAME:SHARE"),
    ],
)
def test_a_mixture_that_cannot_be_is_one_line(shares, message, sets):
    with pytest.raises(UserError, match=message):
        mixture(sets, *shares)


def test_a_run_of_a_mixture_is_evaluated_on_all_and_not_resumed_with_other_shares(sets, tmp_path):
    dataset = f"{sets}/text:2,{sets}/small:1"
    out = train_here(out_dir=tmp_path / "out", dataset=dataset, max_iters=2)
    assert saved(out)["dataset"]["name"] == dataset
    evaluations.main([f"--out_dir={out}"])
    parts = [Dataset(f"{sets}/{name}").tokens["val"] for name in ("text", "small")]
    assert read_json(out / "evaluation.json")["tokens"] == sum(len(part) - 1 for part in parts)
    other = f"{sets}/text:1,{sets}/small:1"
    with pytest.raises(UserError, match=r"text:1.* is not what this run .* that was .*text:2"):
        train_here(out_dir=out, resume=True, dataset=other)


def test_of_questions_with_texts_beside_them_the_questions_are_evaluated(sets, tmp_path):
    dataset = f"{sets}/questions:3,{sets}/text:1"
    out = train_here(out_dir=tmp_path / "out", dataset=dataset, max_iters=1)
    evaluations.main([f"--out_dir={out}", "--max_new_tokens=4"])
    report = read_json(out / "evaluation-questions-val.json")
    assert report["dataset"].endswith("questions") and "rouge_l" in report


# --- the curriculum ------------------------------------------------------------------------------

STAGES = sorted((ROOT / "config" / "curriculum").glob("*.py"))


def test_each_stage_starts_from_the_one_before_and_learns(sets, tmp_path):
    """At a tiny size, with toy datasets in place of the real ones."""
    names = {"sohu_news": "text", "zhihu": "small", "jinyong": "text", "jinyong_three": "small"}
    names |= {"zhihu_sft": "questions", "jinyong_sft": "questions"}
    configs = [configure(train.Settings, [str(path)]) for path in STAGES]
    assert [config.dataset.split(":")[0] for config in configs] == [*names]
    tiny = {"device": "cpu", "dtype": "float32", "max_iters": 6, "batch_size": 4}
    tiny |= {"eval_interval": 6, "log_interval": 1, "warmup_iters": 2}
    shape = words(n_layer=1, n_head=2, n_embd=16, block_size=32)
    before, init_from, losses = "scratch", "scratch", []
    for path, config in zip(STAGES, configs, strict=True):
        assert config.init_from == before
        mixed = re.sub(r"[a-z_]+", lambda match: f"{sets}/{names[match[0]]}", config.dataset)
        paths = {"out_dir": tmp_path / path.stem, "init_from": init_from, "dataset": mixed}
        train.main([str(path), *shape, *words(**tiny | paths)])
        losses.append(log(paths["out_dir"])[-1]["train_loss"])
        before, init_from, shape = config.out_dir, paths["out_dir"], []
    assert losses[3] < losses[0]
