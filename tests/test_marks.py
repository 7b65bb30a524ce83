"""Marks: KTO's loss against trl's and a plain version, marked answers as data, and whole runs."""

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configurator import UserError
from data.custom import prepare_dpo
from data_utils import IGNORE, Dataset
from miniglm.checkpoint import load_checkpoint
from miniglm.losses import kto
from miniglm.prep.writer import write_splits
from tests.helpers import write_lines
from tests.runs import (
    assert_accumulation_is_exact,
    assert_resumes_exactly,
    log,
    marks,
    toy_tokenizer,
    train_here,
    words,
)
from train import start, steps

LORA = {"lora_rank": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def sft(toys):
    """toys with sft, a model that answers."""
    train_here(dataset=toys / "questions", init_from=toys / "base", out_dir=toys / "sft")
    return toys


def run_marks(sft, out_dir, **settings):
    common = {"dataset": sft / "marks", "init_from": sft / "sft", "learning_rate": 3e-3}
    return train_here(out_dir=out_dir, **(common | LORA | settings))


def test_loss_and_gradient_equal_trls_on_the_same_log_probabilities():
    pytest.importorskip("trl")
    from accelerate import Accelerator
    from trl import KTOTrainer

    draw = torch.Generator().manual_seed(0)
    log_p = -torch.rand(5, 9, generator=draw).requires_grad_()
    reference, crossed_reference, crossed = (
        -torch.rand(5, generator=draw) * size for size in (5, 5, 1)
    )
    good = torch.tensor([True, False, True, True, False])
    mask = torch.ones(5, 10, dtype=torch.int64)
    inputs = {"label": good, "input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    inputs |= {"ref_logps": reference, "ref_KL_logps": crossed_reference}
    outputs = SimpleNamespace(log_probs=log_p, entropy=log_p, mean_logits=log_p)
    settings = {"model": SimpleNamespace(training=True), "accelerator": Accelerator(cpu=True)}
    settings |= {"beta": 0.4, "loss_type": "kto", "calculate_KL": True, "aux_loss_enabled": False}
    settings |= {"desirable_weight": 1.0, "undesirable_weight": 1.5, "precompute_ref_logps": True}
    settings |= {"_total_train_tokens": 0, "_tp_size": 1, "_metrics": {"train": defaultdict(list)}}
    settings |= {"_compute_kl_logps": lambda *_: crossed}
    theirs = KTOTrainer._compute_loss(
        SimpleNamespace(**settings), lambda **_: outputs, inputs, False
    )
    [wanted] = torch.autograd.grad(theirs, log_p)

    kl = (crossed - crossed_reference).mean().clamp_min(0)
    assert kl > 0
    losses = kto(log_p.sum(dim=1) - reference, good, kl, 0.4)
    loss = (losses * torch.where(good, 1.0, 1.5)).mean()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    [got] = torch.autograd.grad(loss, log_p)
    assert (got - wanted).abs().max() < 1e-7 < wanted.abs().max()


def test_a_step_has_the_loss_of_a_plain_version(sft, tmp_path):
    """With an adapter that is not zero: kl from each prompt with the answer of the row before."""
    out = run_marks(sft, tmp_path / "out", max_iters=3)
    argv = words(out_dir=out, resume=True, max_iters=4, batch_size=8)
    run, state = start(argv)
    run.objective.begin(state.model, out, 3)
    [batch], counts, _ = next(steps(run, state))
    policy, base = (load_checkpoint(path, "latest").model for path in (out, sft / "sft"))
    data = run.data
    ids = [
        data.tokens["train"][a:b]
        for a, b in zip(data.bounds["train"], data.bounds["train"][1:], strict=False)
    ]
    messages = data.conversations("train")

    def ratio(row: int, other: int) -> float:
        """log p(answer of other | prompt of row) of the policy, less the base's."""
        prompt = data.tokenizer.render_prompt(messages[row][:-1])
        answer = ids[other][len(data.tokenizer.render_prompt(messages[other][:-1])) :].tolist()
        idx = torch.tensor([[*prompt, *answer]])
        log_p = [model.head(model(idx[:, :-1])).log_softmax(-1)[0] for model in (policy, base)]
        picked = [p.gather(1, idx[0, 1:, None])[len(prompt) - 1 :].sum().item() for p in log_p]
        return picked[0] - picked[1]

    rows = batch.rows.tolist()
    kl = max(0, np.mean([ratio(row, rows[n - 1]) for n, row in enumerate(rows)]))
    good = [row < 60 for row in rows]
    assert data.is_good("train", batch.rows).tolist() == good and 0 < sum(good) < len(rows)
    sigmoid = [
        1 / (1 + math.exp(-0.1 * (1 if g else -1) * (ratio(row, row) - kl)))
        for g, row in zip(good, rows, strict=True)
    ]
    losses = [(1 - s) * (1 if g else 3) for g, s in zip(good, sigmoid, strict=True)]  # 60 to 20
    sums = run.objective.sums(state.model, batch)
    parts, _ = start([*argv, "--batch_size=2", "--gradient_accumulation_steps=4"])
    parts.objective.begin(state.model, out, 3)
    four, _ = parts.objective.batches(state.progress.rows, 3)
    assert {float(x) for b in four for x in b.arrays[4]} == {float(batch.arrays[5][0])}
    assert sums["loss"].item() == pytest.approx(sum(losses), rel=1e-4)
    assert sums["kl"].item() / counts["kl"] == pytest.approx(kl, abs=1e-4)
    assert (counts["rewards_chosen"], counts["logp_rejected"]) == (sum(good), 8 - sum(good))
    rewards = [0.1 * ratio(row, row) for row, g in zip(rows, good, strict=True) if g]
    assert sums["rewards_chosen"].item() == pytest.approx(sum(rewards), abs=1e-4)


def test_good_answers_become_likelier_and_bad_ones_less_so(sft, tmp_path):
    out = run_marks(sft, tmp_path / "out", max_iters=30, batch_size=16, learning_rate=2e-2)
    first, *_, last = log(out)
    assert (first["kl"], first["rewards_chosen"]) == (0, 0)
    assert last["val_rewards_chosen"] - last["val_rewards_rejected"] > 0.3
    assert last["val_loss"] < 0.7 and last["rewards_rejected"] < -0.1  # at first it is 0.75


def test_marks_resume_and_accumulate_exactly(sft, tmp_path):
    common = {"dataset": sft / "marks", "init_from": sft / "sft", **LORA}
    assert_resumes_exactly(tmp_path, **common)
    names = ("train_loss", "logp_chosen", "logp_rejected", "grad_norm")
    assert_accumulation_is_exact(tmp_path, names, **common)


def test_records_of_every_form_become_marks(tmp_path, capsys):
    toy_tokenizer().save(tmp_path / "tokenizer.json")
    records = [{"prompt": f"刘备到{n}？", "chosen": f"荆州{n}。"} for n in range(6)]
    records += [
        {"prompt": f"刘备到{n}？", "completion": "徐州。", "label": False} for n in range(4)
    ]
    records += [{"prompt": "谁？", "chosen": "孙权。", "rejected": "吕布。"}]
    records += [
        {"prompt": "何处？", "completion": "江东。", "label": label} for label in (True, False)
    ]
    write_lines(tmp_path / "marks.jsonl", records)
    argv = [f"--{name}={tmp_path}" for name in ("tokenizer", "out")]
    argv += [f"--input={tmp_path}/marks.jsonl"]
    prepare_dpo.main([*argv, "--one_sided", "--val=0"])
    data = Dataset(str(tmp_path))
    rows = np.arange(data.n_rows("train", 32))
    texts = [messages[-1]["content"] for messages in data.conversations("train")]
    good = dict(zip(texts, data.is_good("train", rows).tolist(), strict=True))
    assert (data.kind, len(rows), data.meta["splits"]["train"]["marks"]) == ("kto", 14, 14)
    assert {good[f"荆州{n}。"] for n in range(6)} | {good["孙权。"]} == {True}
    assert not good["徐州。"] and not good["吕布。"] and texts.count("江东。") == 2
    out = capsys.readouterr().out
    assert "刘备到0？\n    better: 荆州0。\n" in out
    _, targets = data.batch(rows, 32)
    assert ((targets != IGNORE).sum(axis=1) > 0).all()
    with pytest.raises(UserError, match="--one_sided takes each by itself"):
        write_lines(tmp_path / "marks.jsonl", records[:6])
        prepare_dpo.main(argv)


def test_marks_of_one_kind_are_trained_and_their_loss_is_plain(sft, tmp_path):
    splits = {"train": marks(5, 30)[:30], "val": marks(6, 9)}
    write_splits("kto", tmp_path / "good", toy_tokenizer(), splits, ["a test"], max_tokens=32)
    out = run_marks(sft, tmp_path / "out", dataset=tmp_path / "good", max_iters=2, eval_interval=2)
    assert log(out)[-1]["val_loss"] < 1 and "rewards_rejected" not in log(out)[-1]


def test_errors_of_marks_are_one_line(sft, tmp_path):
    for settings, message in (
        ({"lora_rank": 0}, "marks need --lora_rank="),
        ({"shard": True}, "does not go with marks"),
        ({"beta": 0}, "--beta= above 0"),
        ({"batch_size": 1}, "2 rows a step"),
        ({"dataset": f"{sft}/marks:1,{sft}/text:1"}, "holds marks, which cannot be mixed"),
    ):
        with pytest.raises(UserError, match=message):
            run_marks(sft, tmp_path / "out", **settings)
