"""Preferences: the loss against trl's and a plain version, the data's pairs, and whole runs."""

import json
import math
import random
import shutil
import signal
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configurator import UserError
from data.custom import prepare_dpo
from data_utils import IGNORE, Dataset
from miniglm.checkpoint import load_checkpoint
from miniglm.devices import to_device
from miniglm.lora import adapter_weights, add_adapters
from miniglm.losses import dpo, reference_log_prob, sequence_log_prob
from miniglm.objectives import Batch, Preferences
from miniglm.prep import writer as data_writer
from miniglm.prep.forms import BadRecord, preference
from miniglm.prep.writer import (
    Form,
    Skipped,
    fit_pair,
    merge,
    working_folder,
    write_dpo,
    write_unit,
)
from tests.helpers import dialogue, tiny_model, tiny_tokenizer
from tests.runs import (
    TINY,
    assert_same_run,
    log,
    start,
    toy_tokenizer,
    train_here,
    weights,
    words,
    write_pairs,
)
from tests.runs import preferences as preferences_of
from tests.test_checkpoint import lines_of_log, posix, wait_for
from tests.test_losses import Largest, ragged_batch
from train import Settings, steps
from train import start as start_run


def pair_batch(rows: list[int], T: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with so many trained targets, chosen before rejected."""
    return to_device(ragged_batch(rows, T, seed), "cpu")


# --- the loss ----------------------------------------------------------------------------------


def plain_log_prob(model: torch.nn.Module, idx: torch.Tensor, targets: torch.Tensor):
    """All logits at once, a row at a time."""
    rows = []
    for ids, wanted in zip(idx, targets, strict=True):
        log_p = model.head(model(ids[None]))[0].log_softmax(-1)
        places = (wanted != IGNORE).nonzero()[:, 0]
        rows.append(log_p[places, wanted[places]].sum())
    return torch.stack(rows)


def plain_loss(log_p, reference, lengths, beta, form):
    """The sum over pairs, each written out; ipo's log-probabilities are means over tokens."""
    total = 0
    for pair in range(len(log_p) // 2):
        ratios = [log_p[row] - reference[row] for row in (2 * pair, 2 * pair + 1)]
        if form == "ipo":
            ratios = [ratio / lengths[2 * pair + side] for side, ratio in enumerate(ratios)]
        d = ratios[0] - ratios[1]
        plain = torch.log1p(torch.exp(-beta * d))
        total = total + ((d - 1 / (2 * beta)) ** 2 if form == "ipo" else plain)
    return total


@pytest.mark.parametrize(("form", "beta"), [("sigmoid", 0.1), ("sigmoid", 2.0), ("ipo", 0.5)])
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_loss_and_gradients_equal_a_plain_version_in_float64(form, beta, lora_rank):
    rows = [7, 12, 3, 5, 12, 1]
    idx, targets = pair_batch(rows)
    model, base = tiny_model(n_kv_head=2).double(), tiny_model(n_kv_head=2).double()
    if lora_rank:
        add_adapters(model, lora_rank, 4.0, ["blocks"])
        with torch.no_grad():
            for weight in adapter_weights(model).values():
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    else:
        base = tiny_model(seed=1, n_kv_head=2).double()
    with torch.no_grad():
        reference = plain_log_prob(base, idx, targets)
    given = [] if lora_rank else [reference.view(-1, 2)]
    config = Settings(dtype="float32", dpo_beta=beta, dpo_loss=form)
    batch = Batch("loss", np.arange(len(rows) // 2), (idx, targets, *given))
    sums = Preferences(config, None, "cpu").sums(model, batch)
    (sums["loss"] + 0.3 * sums["loss_sft"]).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    log_p = plain_log_prob(model, idx, targets)
    loss = plain_loss(log_p, reference, rows, beta, form)
    (loss - 0.3 * log_p[::2].sum()).backward()
    assert sums["loss"].item() == pytest.approx(loss.item(), rel=1e-10)
    assert sums["loss_sft"].item() == pytest.approx(-log_p[::2].sum().item(), rel=1e-10)
    largest = max(p.grad.abs().max() for p in trained.values())
    assert largest > 1e-2
    for name, parameter in trained.items():
        assert (ours[name] - parameter.grad).abs().max() < 1e-10 * largest, name


@pytest.mark.parametrize("form", ["sigmoid", "ipo"])
def test_loss_and_gradient_equal_trls_on_the_same_log_probabilities(form):
    pytest.importorskip("trl")
    from accelerate import Accelerator
    from trl import DPOTrainer

    lengths = torch.tensor([5, 9, 3, 1, 7, 7])
    generator = torch.Generator().manual_seed(0)
    inside = torch.arange(9) < lengths[:, None]  # (rows, T)
    log_p = torch.where(inside, -torch.rand(len(lengths), 9, generator=generator), 0.0)
    log_p.requires_grad_()
    reference = -5 * torch.rand(len(lengths) // 2, 2, generator=generator)
    # ours has pairs side by side, trl's all chosen ones first
    order = torch.cat([torch.arange(0, len(lengths), 2), torch.arange(1, len(lengths), 2)])
    outputs = SimpleNamespace(log_probs=log_p[order], entropy=log_p, mean_logits=log_p)
    outputs.is_top1 = inside
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=Accelerator(cpu=True), beta=0.4
    )
    settings = {"label_smoothing": 0.0, "loss_weights": [1.0]}
    settings |= {"loss_types": [form], "f_divergence_type": "reverse_kl", "ld_alpha": None}
    settings |= {"precompute_ref_logps": True, "use_weighting": False, "aux_loss_enabled": False}
    settings |= {"_total_train_tokens": 0, "_tp_size": 1}
    vars(trainer).update(settings)
    trainer._metrics = {"train": Lists()}
    mask = F.pad(inside[order].long(), (1, 0))
    inputs = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask}
    for side, name in enumerate(("chosen", "rejected")):
        inputs[f"ref_{name}_logps"] = reference[:, side]
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    [wanted] = torch.autograd.grad(theirs, log_p)

    policy = log_p.sum(dim=1).view(-1, 2)
    counts = lengths.view(-1, 2) if form == "ipo" else 1
    losses = dpo(policy / counts, reference / counts, 0.4, form)
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    [got] = torch.autograd.grad(losses.mean(), log_p)
    assert (got - wanted)[inside].abs().max() < 1e-6 < wanted.abs().max()


class Lists(dict):
    """What trl appends its measures to."""

    def __missing__(self, key):
        return self.setdefault(key, [])


def test_the_loss_worked_by_hand():
    # the policy has doubled the odds: d = log 2, so sigmoid(d) = 2/3
    policy = torch.tensor([[math.log(0.2), math.log(0.1)]])
    reference = torch.tensor([[math.log(0.1), math.log(0.1)]])
    assert dpo(policy, reference, 1.0).item() == pytest.approx(math.log(3 / 2), rel=1e-6)
    ipo = dpo(policy, reference, 0.5, "ipo").item()
    assert ipo == pytest.approx((math.log(2) - 1) ** 2, rel=1e-5)
    assert dpo(reference, reference, 0.1).item() == pytest.approx(math.log(2))


def test_prompt_tokens_add_nothing_to_either_log_probability():
    tokenizer = tiny_tokenizer()
    model = tiny_model(n_vocab=tokenizer.n_vocab, block_size=128).double()
    prompt = dialogue("谁弄权？", "宦官曹节等弄权。", "帝御何殿？")
    both = [[*prompt, {"role": "assistant", "content": text}] for text in ("温德殿。", "大殿。")]
    start = len(tokenizer.render_prompt(prompt))
    for messages in both:
        ids = torch.tensor(tokenizer.render(messages)[0])
        log_p = model.head(model(ids[None, :-1]))[0].log_softmax(-1)
        answer = log_p[range(start - 1, len(ids) - 1), ids[start:]].sum()  # and its end
        targets = ids[1:].clone()
        targets[: start - 1] = IGNORE
        found = sequence_log_prob(model, ids[None, :-1], targets[None])
        assert found.item() == pytest.approx(answer.item(), rel=1e-10)


def test_rows_of_many_chunks_have_the_same_gradients_and_bounded_logits():
    model = tiny_model(block_size=300, n_vocab=3000, n_layer=1).double()
    found = {}
    for rows in (4, 8):
        idx, targets = pair_batch([300] * rows, T=300)
        weighting = torch.linspace(-2, 1, rows, dtype=torch.float64)
        with Largest() as largest:
            (sequence_log_prob(model, idx, targets) * weighting).sum().backward()
        assert largest.numel == 512 * model.config.vocab_size
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        (plain_log_prob(model, idx, targets) * weighting).sum().backward()
        for name, parameter in model.named_parameters():
            difference = (found[name] - parameter.grad).abs().max()
            assert difference < 1e-10 * parameter.grad.abs().max(), name
        model.zero_grad()


def test_an_lstms_log_probabilities_are_those_of_its_logits():
    model, batch = tiny_model(model="lstm").double(), pair_batch([7, 0, 12, 3])
    found, wanted = sequence_log_prob(model, *batch), plain_log_prob(model, *batch)
    assert found[1] == 0
    assert torch.allclose(found, wanted, rtol=1e-10)


def test_a_frozen_head_gets_no_gradient_and_an_adapter_on_it_its_own():
    model = tiny_model(tie_weights=False).double()
    add_adapters(model, 3, 4.0, ["lm_head"])
    torch.nn.init.normal_(model.lm_head.lora_B)
    batch = pair_batch([7, 12])
    sequence_log_prob(model, *batch)[0].backward()
    found = model.lm_head.lora_A.grad.clone()
    assert model.lm_head.weight.grad is None
    model.zero_grad()
    plain_log_prob(model, *batch)[0].backward()
    assert torch.allclose(found, model.lm_head.lora_A.grad, rtol=1e-10)


def test_under_autocast_the_gradients_are_near_those_in_float32():
    model, batch, found = tiny_model(), pair_batch([7, 12]), {}
    for enabled in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            log_p = sequence_log_prob(model, *batch)
        log_p[0].backward()  # outside, as train.py's
        found[enabled] = model.wte.weight.grad.clone()
    assert log_p.dtype == torch.float32
    error = (found[True] - found[False]).norm() / found[False].norm()
    assert 0 < error < 0.05


def test_the_reference_is_the_model_without_adapters_and_without_dropout():
    model, batch = tiny_model(dropout=0.3), pair_batch([7, 12])
    wanted = plain_log_prob(tiny_model(), *batch).detach()
    add_adapters(model, 3, 4.0, ["blocks"])
    torch.nn.init.normal_(model.blocks[0].attn.c_attn.lora_B)
    model.train()
    assert torch.allclose(reference_log_prob(model, *batch), wanted, rtol=1e-5)
    assert model.training and model.drop.training
    assert not torch.allclose(sequence_log_prob(model.eval(), *batch), wanted, rtol=1e-2)


# --- the data ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def ask(*texts: str) -> list[dict]:
    return dialogue(*texts)


def write(folder, tokenizer, train, val=None, max_tokens=128):
    pairs = {"train": train, "val": val or [(ask("谁弄权？"), "曹节。", "张让。")]}
    meta = write_dpo(folder, tokenizer, pairs, ["test"], max_tokens)
    return Dataset(str(folder)), meta


def test_rows_are_chosen_and_rejected_side_by_side_with_the_last_answer_trained(
    tmp_path, tokenizer
):
    prompt = ask("谁弄权？", "宦官曹节等弄权。", "帝御何殿？")
    pairs = [(prompt, "温德殿。", "大殿。"), (ask("谁？"), "窦武。", "陈蕃。")]
    data, meta = write(tmp_path / "data", tokenizer, pairs)
    assert (data.kind, data.n_rows("train", 128), data.n_rows("val", 128)) == ("dpo", 2, 1)
    assert meta["question_end"] == "？"
    idx, targets = data.batch(np.array([1, 0]), 128)
    wanted = [[*pairs[n][0], *ask("", text)[1:]] for n in (1, 0) for text in pairs[n][1:]]
    assert idx.shape == targets.shape == (4, len(tokenizer.render(wanted[2])[0]) - 1)
    for row, messages in enumerate(wanted):
        ids, _ = tokenizer.render(messages)
        assert [*idx[row, :1], *idx[row, 1 : len(ids) - 1]] == ids[:-1]
        trained = targets[row][targets[row] != IGNORE].tolist()
        assert trained == [*tokenizer.encode(messages[-1]["content"]), tokenizer.end]
        place = len(tokenizer.render_prompt(messages[:-1])) - 1
        assert (targets[row, place : place + len(trained)] == trained).all()
    assert data.input_tokens(np.array([0, 1]), 128) == sum(
        len(tokenizer.render(messages)[0]) - 1 for messages in wanted
    )


def test_what_is_long_is_fitted_with_one_prompt_for_both(tokenizer):
    prompt = ask("谁弄权？", "宦官曹节等弄权。", "帝御何殿？")
    short, long = "温德殿。", "温德殿。帝惊倒，左右急救入宫，百官俱奔避。" * 2

    def size(*messages):
        return len(tokenizer.render([*messages])[0])

    answers = [{"role": "assistant", "content": text} for text in (short, long)]
    whole, last = size(*prompt, answers[1]), size(prompt[-1], answers[1])
    for chosen, rejected in ((short, long), (long, short)):
        pair = prompt, chosen, rejected
        both, how, _ = fit_pair(tokenizer, pair, whole)
        assert (both[0][:-1], how) == (prompt, "")
        both, how, rendered = fit_pair(tokenizer, pair, last)
        assert rendered == [tokenizer.render(messages) for messages in both]
        assert (both[0][:-1], how) == (prompt[-1:], "cut: oldest turns")
        assert both[0][:-1] == both[1][:-1]
        assert [messages[-1]["content"] for messages in both] == [chosen, rejected]
        both, how, _ = fit_pair(tokenizer, pair, last - 1)
        assert how == "cut: answer"
        cut = both[0 if chosen == long else 1][-1]["content"]
        assert long.startswith(cut) and cut.endswith("。") and cut != long
    with pytest.raises(Skipped, match="too long"):
        fit_pair(tokenizer, (prompt, short, long), 12)
    # both are cut at the same sentence
    pair = prompt[-1:], "温德殿。" + "一" * 99, "温德殿。" + "二" * 99
    limit = size(prompt[-1], answers[0])
    with pytest.raises(Skipped, match="equal answers"):
        fit_pair(tokenizer, pair, limit)


def test_repeated_pairs_and_equal_answers_are_counted(tmp_path, tokenizer):
    one, equal = (ask("谁？"), "窦武。", "陈蕃。"), (ask("谁？"), "窦武。", "窦武。")
    _, meta = write(
        tmp_path / "data", tokenizer, [one, one, equal], [one, (ask("何？"), "甲", "乙")]
    )
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    assert (train["pairs"], train["skipped: duplicate"], train["skipped: equal answers"]) == (
        1,
    ) * 3
    assert (val["pairs"], val["skipped: duplicate"]) == (1, 1)


def test_pairs_stay_whole_in_units_and_buckets(tmp_path, tokenizer, monkeypatch):
    draw = random.Random(0)
    numbers = [draw.randrange(40) for _ in range(90)]
    pairs = [(ask(f"第{n}回？"), "窦武。" * (1 + n % 3), f"陈蕃{n % 7}。") for n in numbers]
    splits = [("val" if n % 5 == 0 else "train") for n in numbers]
    given = {name: [p for p, s in zip(pairs, splits, strict=True) if s == name] for name in splits}
    wanted = {}  # of equal pairs the first
    for pair, split in zip(pairs, splits, strict=True):
        wanted[pair[0][0]["content"]] = (pair, split)
    write_dpo(tmp_path / "plain", tokenizer, given, ["test"], 64)
    monkeypatch.setattr(data_writer, "BLOCK", 100)
    form = Form("dpo", 64)
    with working_folder(tmp_path / "out") as folder:
        units = [folder / f"{first:02}" for first in range(0, 90, 9)]
        records = list(zip(splits, pairs, strict=True))
        for number, unit in enumerate(units):
            write_unit(unit, records[9 * number :][:9], tokenizer, form)
        merge(tmp_path / "out", units, Counter(), tokenizer, form, {})
    plain, data = Dataset(str(tmp_path / "plain")), Dataset(str(tmp_path / "out"))
    assert data.meta["splits"]["train"] == plain.meta["splits"]["train"]
    for split in ("train", "val"):
        rows = [
            [*prompt, {"role": "assistant", "content": answer}]
            for (prompt, *answers), own in wanted.values()
            for answer in answers
            if own == split
        ]
        assert data.conversations(split) == plain.conversations(split) == rows
        assert data.meta["splits"][split]["pairs"] == len(rows) // 2 < splits.count(split)
    train = np.arange(data.n_rows("train", 64))
    for one, other in zip(data.batch(train, 64), plain.batch(train, 64), strict=True):
        assert (one == other).all()


def test_batches_of_pairs_hold_each_pair_once_an_epoch_and_depend_on_nothing_else(tmp_path):
    data = Dataset(str(write_pairs(tmp_path / "pairs")))
    n = data.n_rows("train", 32)
    rows = np.concatenate([data.step_rows(1, start, 7, 32) for start in range(0, 2 * n, 7)])
    assert sorted(rows[:n]) == [*range(n)] != [*rows[:n]]
    again = Dataset(str(tmp_path / "pairs"))
    assert (again.step_rows(1, 14, 7, 32) == rows[14:21]).all()
    seen = [pairs for pairs, _ in data.pair_batches("train", 8)]
    assert sorted(np.concatenate(seen)) == [*range(n)]
    for pairs, (idx, _) in data.pair_batches("val", 3):
        assert len(idx) == 2 * len(pairs)


Q, PICKED, OTHER = ask("谁弄权？"), "曹节。", "张让。"


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"prompt": "谁弄权？", "chosen": "曹节。", "rejected": "张让。"}, (Q, PICKED, OTHER)),
        ({"prompt": Q, "chosen": "曹节。", "rejected": "张让。"}, (Q, PICKED, OTHER)),
        (
            {"prompt": Q, "chosen": ask("", PICKED)[1:], "rejected": ask("", OTHER)[1:]},
            (Q, PICKED, OTHER),
        ),
        (
            {"chosen": ask("谁弄权？", PICKED), "rejected": ask("谁弄权？", OTHER)},
            (Q, PICKED, OTHER),
        ),
        ({"question": "谁弄权？", "chosen": PICKED, "rejected": OTHER}, (Q, PICKED, OTHER)),
        ({"prompt": Q, "chosen": PICKED}, (Q, PICKED, None)),
        ({"prompt": "谁弄权？", "rejected": OTHER}, (Q, None, OTHER)),
        (
            {"system": "s", "prompt": "谁弄权？", "chosen": PICKED, "rejected": OTHER},
            ([{"role": "system", "content": "s"}, *Q], PICKED, OTHER),
        ),
    ],
)
def test_forms_of_preferences(value, wanted):
    assert preference(value) == wanted


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"prompt": "谁？"}, "missing field"),
        ({"chosen": PICKED, "rejected": OTHER}, "missing field"),
        ({"chosen": ask("谁？", PICKED), "rejected": ask("何？", OTHER)}, "two prompts"),
        ({"prompt": "谁？", "chosen": PICKED, "rejected": ""}, "empty answer"),
        ({"prompt": "谁？", "chosen": PICKED, "rejected": 3}, "wrong type"),
        ("谁？", "wrong type"),
    ],
)
def test_bad_preferences_have_a_reason(value, reason):
    with pytest.raises(BadRecord) as error:
        preference(value)
    assert error.value.reason == reason


def test_marks_of_the_page_and_files_of_pairs_become_a_dataset(tmp_path, capsys):
    tokenizer = toy_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    marks = [
        {"prompt": dialogue(f"刘备到{n}？"), kind: f"{text}{n}。"}
        for n in range(40)
        for kind, text in (("chosen", "荆州"), ("rejected", "徐州"))
    ]
    marks += [{"prompt": dialogue("刘备到7？"), "rejected": "洛阳。"}]
    marks += [
        {"prompt": f"曹操到{n}？", "chosen": "许昌。", "rejected": "江东。"} for n in range(9)
    ]
    lines = [json.dumps(mark, ensure_ascii=False) for mark in marks] + ["{"]
    (tmp_path / "marks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "out"
    argv = [f"--input={tmp_path}/marks.jsonl", f"--out={out}", f"--tokenizer={tmp_path}"]
    prepare_dpo.main([*argv, "--val=0.3"])
    printed = capsys.readouterr().out
    assert "90 good records; of these not taken: 1 without a counterpart; records left" in printed
    data = Dataset(str(out))
    pairs = [data.meta["splits"][split]["pairs"] for split in ("train", "val")]
    assert sum(pairs) == 49 and min(pairs) > 5
    assert (data.meta["records"], data.meta["skipped"]) == (90, {"broken JSON": 1})
    assert data.meta["not_taken"] == {"without a counterpart": 1}
    answers = [messages[-1]["content"][:2] for messages in data.conversations("train")]
    assert set(answers[::2]) == {"荆州", "许昌"} and set(answers[1::2]) == {"徐州", "江东"}
    with pytest.raises(UserError, match="no record is for val"):
        prepare_dpo.main([*argv, "--val=1e-9"])


# --- runs --------------------------------------------------------------------------------------

LORA = {"lora_rank": 4, "lora_alpha": 8}
each_way = pytest.mark.parametrize("lora", [{}, LORA], ids=["full", "lora"])


@pytest.fixture(scope="module")
def sft(toys):
    """A folder with pairs, and sft, a model that answers."""
    write_pairs(toys / "pairs")
    common = {"dataset": toys / "questions", "init_from": toys / "base", "max_iters": 40}
    train_here(out_dir=toys / "sft", dropout=0.1, **common)
    train_here(out_dir=toys / "sft_lora", **common, **LORA, learning_rate=1e-2)
    return toys


def run_dpo(sft, out_dir, **settings):
    common = {"dataset": sft / "pairs", "init_from": sft / "sft", "learning_rate": 3e-3}
    return train_here(out_dir=out_dir, **(common | settings))


@each_way
@pytest.mark.parametrize("base", ["sft", "sft_lora"])
def test_a_run_starts_at_log_2_and_learns_the_preference(sft, tmp_path, base, lora):
    rate = 1e-2 if lora else 3e-3
    out = run_dpo(sft, tmp_path / "out", init_from=sft / base, learning_rate=rate, **lora)
    first, last = log(out)[0], log(out)[-1]
    assert first["train_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert last["val_loss"] < 0.6 and last["val_accuracy"] > 0.9 and last["val_margin"] > 0.2
    assert load_checkpoint(out).answers


@each_way
def test_the_log_says_what_a_slow_loop_says_of_the_held_out_pairs(sft, tmp_path, lora):
    options = {"dpo_beta": 0.3, "dpo_sft_weight": 0.5}
    out = run_dpo(sft, tmp_path / "out", batch_size=3, **options, **lora)
    data = Dataset(str(sft / "pairs"))
    base, model = load_checkpoint(sft / "sft").model, load_checkpoint(out, "latest").model
    rows = []
    for pair in range(data.n_rows("val", 32)):
        [(_, (idx, targets))] = [
            (p, batch) for p, batch in data.pair_batches("val", 1) if p[0] == pair
        ]
        with torch.no_grad():
            batch = torch.tensor(idx), torch.tensor(targets)
            both = [plain_log_prob(one, *batch).double() for one in (model, base)]
        rows.append((*both[0], *(0.3 * (both[0] - both[1])), (targets[0] != IGNORE).sum()))
    chosen, rejected, reward, other, lengths = np.array(rows).T
    wanted = {
        "logp_chosen": chosen.mean(),
        "logp_rejected": rejected.mean(),
        "rewards_chosen": reward.mean(),
        "rewards_rejected": other.mean(),
        "margin": (reward - other).mean(),
        "accuracy": (reward > other).mean(),
        "loss_sft": -chosen.sum() / lengths.sum(),
    }
    wanted["loss"] = np.log1p(np.exp(other - reward)).mean()
    for name, value in wanted.items():
        assert log(out)[-1][f"val_{name}"] == pytest.approx(value, rel=1e-3), name


@each_way
def test_accumulated_micro_batches_of_pairs_equal_the_full_batch(sft, tmp_path, lora):
    common = lora | {"max_iters": 3, "learning_rate": 1e-4, "warmup_iters": 0}
    common |= {"dpo_sft_weight": 0.5}
    once = run_dpo(sft, tmp_path / "once", batch_size=8, **common)
    parts = {"batch_size": 2, "gradient_accumulation_steps": 4}
    four = run_dpo(sft, tmp_path / "four", **parts, **common)
    for name, weight in weights(once).items():
        assert (weight - weights(four)[name]).abs().max() < 1e-6
    for a, b in zip(log(once), log(four), strict=True):
        for name in ("train_loss", "train_loss_sft", "grad_norm", "logp_chosen"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)


@each_way
def test_a_run_in_three_parts_equals_one_in_one(sft, tmp_path, lora):
    common = lora | {"dropout": 0.1, "lr_decay_iters": 15, "eval_interval": 3}
    common |= {"gradient_accumulation_steps": 2, "dpo_sft_weight": 0.1}
    whole = run_dpo(sft, tmp_path / "whole", max_iters=15, **common)
    parts = run_dpo(sft, tmp_path / "parts", max_iters=3, **common)
    train_here(out_dir=parts, resume=True, max_iters=9)
    train_here(out_dir=parts, resume=True, max_iters=15)
    assert_same_run(whole, parts)


@posix
@each_way
def test_a_killed_run_ends_in_the_bits_of_one_never_killed(sft, tmp_path, lora):
    common = {"max_iters": 40, "eval_interval": 4, "dropout": 0.1, **lora}
    whole = run_dpo(sft, tmp_path / "whole", **common)
    out = tmp_path / "out"
    common |= {"dataset": sft / "pairs", "init_from": sft / "sft", "learning_rate": 3e-3}

    process = start("train.py", *words(out_dir=out, **(TINY | common)))
    wait_for(lambda: lines_of_log(out) > 10, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    train_here(out_dir=out, resume=True)
    assert_same_run(whole, out)


def test_the_reference_is_computed_once_and_a_run_that_lost_it_stops(sft, tmp_path, capsys):
    out = run_dpo(sft, tmp_path / "out", max_iters=2)
    assert "reading pairs with the model as it is" in capsys.readouterr().out
    written = (out / "reference.safetensors").read_bytes()
    train_here(out_dir=out, resume=True, max_iters=4)
    assert "reading pairs" not in capsys.readouterr().out
    assert (out / "reference.safetensors").read_bytes() == written
    adapted = run_dpo(sft, tmp_path / "adapted", max_iters=2, **LORA)
    assert not (adapted / "reference.safetensors").exists()
    (out / "reference.safetensors").unlink()
    with pytest.raises(UserError, match=r"has lost its reference\.safetensors"):
        train_here(out_dir=out, resume=True, max_iters=6)


def test_held_out_pairs_that_were_prepared_anew_stop_a_run(sft, tmp_path):
    data = shutil.copytree(sft / "pairs", tmp_path / "pairs")
    out = run_dpo(sft, tmp_path / "out", dataset=data, max_iters=1)
    pairs = {"train": preferences_of(3, 60), "val": preferences_of(5, 9)}
    write_dpo(data, toy_tokenizer(), pairs, ["a test"], max_tokens=32)
    with pytest.raises(UserError, match=r"pairs/val\.bin is not what this run began with"):
        train_here(out_dir=out, resume=True, max_iters=2)


def test_the_reference_of_another_model_is_not_taken(sft, tmp_path):
    # what a run that was killed before its first checkpoint leaves behind
    out = run_dpo(sft, tmp_path / "out", max_iters=1)
    left = tmp_path / "left"
    left.mkdir()
    shutil.copy(out / "reference.safetensors", left)
    run_dpo(sft, left, max_iters=1, init_from=sft / "sft_lora")
    assert log(left)[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (left / "reference.safetensors").read_bytes() != (
        out / "reference.safetensors"
    ).read_bytes()


def test_dropout_is_off_unless_it_is_asked_for(sft, tmp_path):
    given = {"init_from": sft / "sft", "out_dir": tmp_path / "out", "device": "cpu"}
    for dataset, asked, dropout in (
        ("pairs", {}, 0),
        ("pairs", {"dropout": 0.2}, 0.2),
        ("questions", {}, 0.1),
    ):
        run, _ = start_run(words(dataset=sft / dataset, **given, **asked))
        assert run.config.dropout == dropout


def test_batches_hold_the_reference_of_their_own_pairs(sft, tmp_path):
    settings = {"dataset": sft / "pairs", "init_from": sft / "sft", "out_dir": tmp_path / "out"}
    run, state = start_run(words(**settings, batch_size=3, device="cpu"))
    n = run.data.n_rows("train", 32)
    run.objective.reference = {"train": torch.arange(2.0 * n).view(n, 2)}
    [batch], counts, _ = next(steps(run, state))
    idx, targets, reference = batch.arrays
    assert counts["loss"] == 3 and counts["loss_sft"] == (targets[::2] != IGNORE).sum()
    assert {"margin", "accuracy", "logp_chosen"} < counts.keys()
    for pair, (chosen, _) in enumerate(reference):
        row = int(chosen) // 2
        wanted, _ = run.data.batch(np.array([row]), 32)
        assert (idx[2 * pair : 2 * pair + 2, : wanted.shape[1]].numpy() == wanted).all()


def test_validation_does_not_depend_on_the_batch_size(sft):
    data, model = Dataset(str(sft / "pairs")), load_checkpoint(sft / "sft").model
    scores = []
    for batch_size in (1, 7, 99):
        objective = Preferences(Settings(batch_size=batch_size, dtype="float32"), data, "cpu")
        objective.reference = {"val": torch.zeros(data.n_rows("val", 0), 2)}
        scores.append(objective.evaluate(model))
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], rel=1e-5)


def test_errors_of_preferences_are_one_line(sft, tmp_path):
    out = tmp_path / "out"
    for settings, message in (
        ({"init_from": "scratch"}, "preferences change a trained model"),
        ({"dataset": f"{sft}/pairs:1,{sft}/text:1"}, "preferences, which cannot be mixed"),
        ({"dpo_beta": 0}, "dpo_beta=0 must be above 0"),
        ({"lora_rank": 2, "lora_targets": "lm_head", "lora_dropout": 0.1}, "computed twice"),
    ):
        with pytest.raises(UserError, match=message):
            run_dpo(sft, out, **settings)
    with pytest.raises(UserError, match="dpo_loss='kto' must be one of sigmoid, ipo"):
        run_dpo(sft, out, dpo_loss="kto")
