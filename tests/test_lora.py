"""Adapters: what they leave alone, what they equal, and how their checkpoints stand on a base."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import export
from configurator import UserError, show_path
from miniglm.checkpoint import has_checkpoint, load_checkpoint, read_run
from miniglm.decoding import pack
from miniglm.lora import adapter_weights, adapters, adapters_off, add_adapters, find_targets, merge
from miniglm.losses import next_token
from tests.helpers import ARCHITECTURES, logits, random_ids, tiny_model
from tests.runs import (
    assert_resumes_exactly,
    checkpoint_file,
    contents,
    edit_run,
    flip_bit,
    log,
    pointer,
    saved,
    train_here,
    weights,
)

ADAPTER = {"lora_rank": 3, "lora_alpha": 6, "learning_rate": 3e-3}
UNTIED_LSTM = {"model": "lstm", "tie_weights": False}


def randomize_adapters(model: torch.nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter_weights(model).values():
            weight.normal_(0, 0.2, generator=generator)


def adapted(targets: list[str], **options) -> torch.nn.Module:
    """A tiny model whose adapters matter."""
    model = tiny_model(**options)
    add_adapters(model, 3, 6.0, targets)
    randomize_adapters(model)
    return model


# --- the layer ---------------------------------------------------------------------------------

MODELS = {name: (["blocks"], options) for name, options in ARCHITECTURES.items()}
MODELS["head"] = (["blocks", "lm_head"], {"tie_weights": False})
MODELS["lstm"] = (["lm_head"], UNTIED_LSTM)
each_model = pytest.mark.parametrize(("targets", "options"), MODELS.values(), ids=MODELS)


@each_model
def test_at_the_start_the_output_is_the_bases_to_the_bit(targets, options):
    model, idx = tiny_model(**options), random_ids(3, 12)
    before = logits(model, idx)
    add_adapters(model, 3, 6.0, targets)
    assert torch.equal(logits(model, idx), before)


@each_model
def test_merged_equals_wrapped_and_switched_off_equals_the_base(targets, options):
    idx = random_ids(3, 12)
    base, model = tiny_model(**options), adapted(targets, **options)
    wrapped = logits(model, idx)
    assert (wrapped - logits(base, idx)).abs().max() > 0.1
    with adapters_off(model):
        assert torch.equal(logits(model, idx), logits(base, idx))
    assert torch.equal(logits(model, idx), wrapped)
    merge(model)
    assert not adapters(model)
    assert [*model.state_dict()] == [*base.state_dict()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (logits(model, idx) - wrapped).abs().max() < 1e-5 * wrapped.abs().max()


def test_outputs_and_gradients_equal_pefts_on_the_same_weights():
    peft = pytest.importorskip("peft")
    ours, theirs = adapted(["c_attn", "mlp"], n_kv_head=2), tiny_model(n_kv_head=2)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "mlp.c_fc", "mlp.c_proj"])
    peft.inject_adapter_in_model(config, theirs)
    parameters = {
        name.replace("base_layer.", "").replace(".default.weight", ""): parameter
        for name, parameter in theirs.named_parameters()
    }
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert trained == adapter_weights(ours).keys()
    with torch.no_grad():
        for name, weight in adapter_weights(ours).items():
            parameters[name].copy_(weight)
    idx = random_ids(3, 12)
    assert (logits(ours, idx) - logits(theirs, idx)).abs().max() < 1e-5
    for model in (ours, theirs):
        next_token(model, idx[:, :-1], idx[:, 1:], torch.arange(33)).backward()
    with_gradient = {name for name, p in ours.named_parameters() if p.grad is not None}
    assert with_gradient == trained
    for name, weight in adapter_weights(ours).items():
        wanted = parameters[name].grad
        assert (weight.grad - wanted).abs().max() < 1e-5 * wanted.abs().max(), name


def test_dropout_is_of_what_the_adapter_reads():
    model = tiny_model()
    add_adapters(model, 3, 6.0, ["c_fc"])
    for adapter in adapters(model).values():
        adapter.drop.p = 0.5
    randomize_adapters(model)
    idx = random_ids(2, 12)
    plain = logits(model, idx)
    model.train()
    assert not torch.equal(logits(model, idx), plain)
    with adapters_off(model):
        assert torch.equal(logits(model, idx), logits(tiny_model(), idx))


def test_targets_are_parts_of_names():
    model = tiny_model(tie_weights=False)
    assert find_targets(model, ["c_attn"]) == ["blocks.0.attn.c_attn", "blocks.1.attn.c_attn"]
    targets = ["blocks.0.mlp.c_proj", "blocks.1.mlp.c_proj", "lm_head"]
    assert find_targets(model, ["mlp.c_proj", "lm_head"]) == targets
    assert len(find_targets(model, ["blocks.0", "blocks"])) == 8


@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        ({}, "c_atn", "lora_targets=c_atn is no Linear .* did you mean 'c_attn'"),
        ({}, "lm_head", "tie_weights=True"),
        (UNTIED_LSTM, "blocks", "lora_targets=blocks is no Linear .* it has lm_head"),
    ],
)
def test_targets_that_cannot_be_are_refused(options, target, message):
    with pytest.raises(UserError, match=message):
        find_targets(tiny_model(**options), [target])


def test_an_adapter_is_never_packed_away():
    idx = random_ids(2, 12)
    packed = pack(copy.deepcopy(adapted(["blocks"])))
    with torch.no_grad():
        assert torch.allclose(packed(idx), adapted(["blocks"])(idx), atol=1e-4)


def test_frozen_products_count_without_their_own_gradient():
    model = adapted(["blocks"], block_size=16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.head(model(random_ids(2, 16))).sum().backward()
    masked = 12 * 2 * 32 * 16 / 2  # torch multiplies all pairs of positions
    # the embedding is frozen, so the first products send no gradient to it
    first = model.blocks[0].attn.c_attn
    spared = 2 * (first.weight.numel() + first.lora_A.numel())
    counted = 2 * 16 * (model.flops_per_token(16) + masked - spared)
    assert counter.get_total_flops() == counted


# --- runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft(toys):
    """A run whose best checkpoint adapters stand on, and one of these."""
    base = toys / "base"
    adapter = train_here(
        dataset=toys / "questions", init_from=base, out_dir=toys / "adapter", **ADAPTER
    )
    return base, adapter


def test_training_leaves_the_base_alone_and_saves_the_adapter_only(toys, tmp_path):
    base = shutil.copytree(toys / "base", tmp_path / "base")
    before = contents(base)
    out = train_here(
        dataset=toys / "questions", init_from=base, out_dir=tmp_path / "out", **ADAPTER
    )
    after = contents(base)
    assert after.pop("bases").decode() == f"{pointer(base, 'best')} {out}\n"
    assert after == before
    folder = out / pointer(out, "latest")
    assert not (folder / "model.safetensors").exists()
    sizes = {name: checkpoint_file(out, name).stat().st_size for name in contents(folder)}
    trained = sum(weight.numel() for weight in weights(out).values())
    assert trained == 2 * 3 * ((32 + 96) + (32 + 32) + (32 + 128 * 1) + (64 + 32))
    assert sizes["adapter.safetensors"] < 4 * trained + 4096
    assert sizes["optimizer.safetensors"] < 8 * trained + 12288  # two moments, and a header
    about = saved(out)["adapter"]
    assert about["base"] == f"../base/{pointer(base, 'best')}"
    assert (about["rank"], about["alpha"], about["targets"]) == (3, 6.0, ["blocks"])
    assert log(out)[-1]["train_loss"] < log(out)[0]["train_loss"] - 0.1


def test_what_loads_an_adapter_gets_a_plain_merged_model(sft):
    base, adapter = sft
    idx = random_ids(2, 20)
    plain, merged = load_checkpoint(base), load_checkpoint(adapter)
    apart = load_checkpoint(adapter, merged=False)
    assert not adapters(merged.model) and len(adapters(apart.model)) == 8
    assert merged.n_params == plain.n_params
    difference = logits(merged.model, idx) - logits(apart.model, idx)
    assert difference.abs().max() < 1e-5
    assert (logits(merged.model, idx) - logits(plain.model, idx)).abs().max() > 0.05
    assert merged.answers


def test_an_adapters_run_in_three_parts_equals_one_in_one(toys, tmp_path):
    common = ADAPTER | {"dataset": toys / "questions", "init_from": toys / "base"}
    assert_resumes_exactly(tmp_path, dropout=0.1, gradient_accumulation_steps=2, **common)


def test_a_new_adapter_stands_on_the_merged_one(sft, tmp_path):
    base, first = sft
    common = {"dataset": base.parent / "questions", "init_from": first, "max_iters": 1}
    common |= {"learning_rate": 0}
    second = train_here(out_dir=tmp_path / "second", **(ADAPTER | common))
    idx = random_ids(2, 20)
    # and full training from an adapter trains the merged model
    full = train_here(out_dir=tmp_path / "full", **common)
    merged = logits(load_checkpoint(first).model, idx)
    for out in (second, full):
        assert torch.equal(logits(load_checkpoint(out).model, idx), merged)


def test_a_base_that_trains_on_keeps_what_an_adapter_stands_on(toys, tmp_path):
    base = train_here(dataset=toys / "text", out_dir=tmp_path / "base", max_iters=4)
    common = {"dataset": toys / "questions", "init_from": base, "max_iters": 2}
    adapter = train_here(out_dir=tmp_path / "out", **(ADAPTER | common))
    stood = saved(adapter)["adapter"]["base"]
    train_here(out_dir=base, resume=True, max_iters=24)
    assert pointer(base, "best") != Path(stood).name
    assert sorted(path.name for path in base.glob("step-*")) == sorted(
        {Path(stood).name, pointer(base, "latest"), pointer(base, "best")}
    )
    load_checkpoint(adapter)
    train_here(out_dir=adapter, resume=True, max_iters=4)


def test_a_base_that_moved_alone_or_changed_gives_one_clear_line(sft, tmp_path):
    base, adapter = (shutil.copytree(run, tmp_path / run.name) for run in sft)
    load_checkpoint(adapter)  # they moved together
    best = base / Path(saved(adapter)["adapter"]["base"]).name
    flip_bit(best / "model.safetensors")
    with pytest.raises(UserError, match=rf"{best}/model\.safetensors is damaged \(its sha"):
        load_checkpoint(adapter)
    edit_run(best, sha256={})  # as a base that was trained anew
    with pytest.raises(UserError, match=f"is an adapter of {best}, which has changed since; rest"):
        load_checkpoint(adapter)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"is an adapter of {best}, which is not there; put it"):
        train_here(out_dir=adapter, resume=True)


WRONG = [{"rank": "x"}, {"alpha": None}, {"targets": 3}, {"base": 3}]


@pytest.mark.parametrize("adapter", [None, {"base": "../base"}, *WRONG])
def test_a_damaged_run_json_of_an_adapter_is_named(sft, tmp_path, adapter):
    _, out = (shutil.copytree(run, tmp_path / run.name) for run in sft)
    whole = saved(out, "best")["adapter"] if adapter in WRONG else {}
    edit_run(out / pointer(out, "best"), adapter=adapter and whole | adapter)
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        load_checkpoint(out)


def test_a_merged_checkpoint_is_whole_and_the_same_model(sft, tmp_path, capsys):
    _, adapter = sft
    to = tmp_path / "merged"
    export.main(["--format=merged", f"--out_dir={adapter}", f"--to={to}"])
    assert capsys.readouterr().out.startswith(show_path(to))
    assert "adapter" not in read_run(to, "best")
    assert read_run(to, "best")["merged"]["rank"] == ADAPTER["lora_rank"]
    idx = random_ids(2, 20)
    whole, merged = (load_checkpoint(out).model for out in (adapter, to))
    assert torch.equal(logits(merged, idx), logits(whole, idx))
    on = train_here(
        dataset=adapter.parent / "questions", init_from=to, out_dir=tmp_path / "on", max_iters=1
    )
    assert has_checkpoint(on)


def test_errors_of_adapters_are_one_line(sft, tmp_path):
    base, adapter = sft
    data = base.parent / "questions"
    for argv, message in [
        ([f"--out_dir={adapter}"], "names nothing"),
        ([f"--out_dir={adapter}", f"--to={base}"], "is there"),
        ([f"--out_dir={base}", f"--to={tmp_path / 'merged'}"], "no adapter"),
    ]:
        with pytest.raises(UserError, match=message):
            export.main(["--format=merged", *argv])
    with pytest.raises(UserError, match="lora_rank=2 changes a trained model"):
        train_here(dataset=data, out_dir=tmp_path / "a", lora_rank=2)
    with pytest.raises(UserError, match=r"lora_rank=9, but .* has lora_rank=3"):
        train_here(out_dir=adapter, resume=True, lora_rank=9)


def test_a_dry_run_tells_what_is_trained_and_marks_no_base(toys, tmp_path, capsys):
    base = shutil.copytree(toys / "base", tmp_path / "base")
    (base / "bases").unlink(missing_ok=True)
    common = {"dataset": toys / "questions", "init_from": base, "out_dir": tmp_path / "out"}
    train_here(**common, **ADAPTER, dry_run=True)
    trained = 2 * 3 * ((32 + 96) + (32 + 32) + (32 + 128) + (64 + 32))
    assert f", {trained:,} of them trained\n" in capsys.readouterr().out
    assert not (base / "bases").exists() and not (tmp_path / "out").exists()
