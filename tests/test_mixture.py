"""Several datasets in one run, and the curriculum of configs that is made of them."""

import itertools
from pathlib import Path

import numpy as np
import pytest

import evaluations
import train
from configurator import ROOT, UserError, configure
from data_utils import PERIOD, Dataset, Mixture, open_dataset
from miniglm.prep.writer import write_pretrain
from tests.runs import (
    checkpoint_file,
    log,
    novel,
    read_json,
    saved,
    toy_tokenizer,
    train_here,
    weights,
    words,
    write_pairs,
    write_toys,
)

BLOCK = 16


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """text (400 sentences), small (60), other (100, another vocabulary) and questions."""
    folder = tmp_path_factory.mktemp("sets")
    write_toys(folder)
    write_pairs(folder / "pairs")
    for name, seed, size, vocab in (("small", 5, 60, 320), ("other", 6, 100, 300)):
        texts = {"train": [novel(seed, size)], "val": [novel(seed + 10, 20)]}
        write_pretrain(folder / name, toy_tokenizer(vocab), texts, ["a test"])
    return folder


def mixture(sets: Path, *shares: str) -> Mixture:
    return open_dataset(",".join(f"{sets}/{share}" for share in shares))


def owners(rows: np.ndarray) -> list[int]:
    return (rows >> 48).tolist()


def test_each_period_has_exactly_its_shares(sets):
    data = mixture(sets, "text:2", "small:.5")
    rows = data.step_rows(1, 0, 3 * PERIOD, BLOCK)
    for period in np.split(rows, 3):
        assert owners(period).count(0) == 800
        assert owners(period).count(1) == 200
    assert owners(rows[:PERIOD]) != owners(rows[PERIOD : 2 * PERIOD])
    early = [owners(part).count(1) for part in np.split(rows, 30)]
    assert max(early) < 40  # 20 of each 100 are expected


@pytest.mark.parametrize("count", [1, 7, 64, 1500])
def test_the_rows_do_not_depend_on_the_size_of_a_step(count, sets):
    data = mixture(sets, "text:2", "small:1")
    whole = data.step_rows(3, 0, 4000, BLOCK)
    for start in (0, 993, 2100):
        assert (data.step_rows(3, start, count, BLOCK) == whole[start : start + count]).all()
    assert (data.step_rows(4, 0, 4000, BLOCK) != whole).any()


def test_rows_are_shown_by_the_dataset_that_they_lie_in(sets):
    data = mixture(sets, "text:1", "small:1")
    rows = data.step_rows(1, 0, 9, BLOCK)
    parts = [
        (name, [str(row - (number << 48)) for row in rows.tolist() if row >> 48 == number])
        for number, name in enumerate(("text", "small"))
    ]
    assert data.show_rows(rows) == " and ".join(
        f"the rows from tokens {', '.join(numbers)} of {sets}/{name}/train"
        for name, numbers in parts
    )


def test_each_dataset_is_read_as_if_alone(sets):
    data = mixture(sets, "text:2", "small:1")
    rows = data.step_rows(3, 0, 900, BLOCK)
    for number, name in enumerate(("text", "small")):
        alone = Dataset(f"{sets}/{name}")
        own = rows[np.array(owners(rows)) == number]
        expected = alone.step_rows(3, 0, len(own), BLOCK)
        assert (own & (2**48 - 1)).tolist() == expected.tolist()
        for one, other in zip(data.batch(own, BLOCK), alone.batch(expected, BLOCK), strict=True):
            assert (one == other).all()
    idx, targets = data.batch(rows[:50], BLOCK)
    assert idx.shape == targets.shape == (50, BLOCK)
    assert (idx[:, 1:] == targets[:, :-1]).all()
    for row in range(50):
        assert (data.batch(rows[row : row + 1], BLOCK)[0][0] == idx[row]).all()


def test_validation_is_that_of_all(sets):
    data = mixture(sets, "text:2", "small:1")
    found = list(data.eval_batches("val", BLOCK, 4))
    alone = [Dataset(f"{sets}/{name}").eval_batches("val", BLOCK, 4) for name in ("text", "small")]
    for one, other in zip(found, itertools.chain(*alone), strict=True):
        assert (one[0] == other[0]).all()
        assert (one[1] == other[1]).all()


def test_other_shares_have_another_fingerprint(sets):
    shares = [("text:2", "small:1"), ("text:1", "small:1"), ("small:1", "text:2"), ("text:1",)]
    assert len({mixture(sets, *share).fingerprint for share in shares}) == 4
    assert mixture(sets, "text:4", "small:2").fingerprint == mixture(sets, *shares[0]).fingerprint


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (("text:1", "pairs:1"), "pairs holds preferences, which cannot be mixed"),
        (("text:1", "other:1"), "other has another tokenizer than "),
        (("text:1", "small:0"), "each share must be above 0"),
        (("text:5000", "small:1"), "a share is under 1 of 1,000"),
        (("text:1", "nowhere:1"), r"nowhere/meta\.json is missing"),
        (("text:1", "small"), r"small' is no NAME:SHARE, as in news:3,novels:1"),
        (("text:1", "small:-1"), r"small:-1' is no NAME:SHARE"),
    ],
)
def test_what_cannot_be_mixed_is_a_line(shares, message, sets):
    with pytest.raises(UserError, match=message):
        mixture(sets, *shares)


def test_a_resumed_run_of_a_mixture_ends_in_the_same_bits(sets, tmp_path):
    dataset = f"{sets}/text:2,{sets}/small:1"
    whole = train_here(out_dir=tmp_path / "whole", dataset=dataset)
    train_here(out_dir=tmp_path / "cut", dataset=dataset, max_iters=10, lr_decay_iters=20)
    cut = train_here(out_dir=tmp_path / "cut", resume=True, max_iters=20)
    for one, other in zip(weights(whole).values(), weights(cut).values(), strict=True):
        assert (one == other).all()
    assert saved(whole)["dataset"]["name"] == dataset
    evaluations.main([f"--out_dir={cut}"])
    report = read_json(cut / "evaluation.json")
    parts = [Dataset(f"{sets}/{name}").tokens["val"] for name in ("text", "small")]
    assert report["tokens"] == sum(len(tokens) - 1 for tokens in parts)
    other = f"{sets}/text:1,{sets}/small:1"
    with pytest.raises(UserError, match="is not what this run was trained on"):
        train.main(words(out_dir=tmp_path / "cut", resume=True, dataset=other))


# --- the curriculum ------------------------------------------------------------------------------

STAGES = sorted((ROOT / "config" / "curriculum").glob("*.py"))


def test_each_stage_goes_on_from_the_one_before():
    configs = [configure(train.Settings, [str(path)]) for path in STAGES]
    assert [config.init_from for config in configs] == [
        "scratch",
        *(config.out_dir for config in configs[:-1]),
    ]
    assert len({config.out_dir for config in configs}) == len(STAGES) == 6
    assert [config.dataset.split(":")[0] for config in configs] == [
        *("sohu_news", "zhihu", "jinyong", "jinyong_three"),
        *("zhihu_sft", "jinyong_sft"),
    ]


def test_the_stages_run_one_after_another(sets, tmp_path):
    """Each at a tiny size, on toy datasets in the place of its own."""
    names = {"sohu_news": "text", "zhihu": "small", "jinyong": "text", "jinyong_three": "small"}
    names |= {"zhihu_sft": "questions", "jinyong_sft": "questions"}
    shape = words(n_layer=1, n_head=2, n_embd=16, block_size=32)
    losses = []
    for number, path in enumerate(STAGES):
        config = configure(train.Settings, [str(path)])
        shares = [word.split(":") for word in config.dataset.split(",")]
        mixed = ",".join(":".join([f"{sets}/{names[name]}", *rest]) for name, *rest in shares)
        out_dir = tmp_path / str(number)
        init_from = tmp_path / str(number - 1) if number else "scratch"
        tiny = {"out_dir": out_dir, "init_from": init_from, "dataset": mixed, "device": "cpu"}
        tiny |= {"max_iters": 6, "batch_size": 4, "eval_interval": 6, "log_interval": 1}
        tiny |= {"warmup_iters": 2, "dtype": "float32"}
        train.main([str(path), *(shape if number == 0 else []), *words(**tiny)])
        losses.append(log(out_dir)[-1]["train_loss"])
    assert checkpoint_file(out_dir, "model.safetensors").is_file()
    assert losses[3] < losses[0]
