"""Models of other projects: the same logits as there, what does not fit named, no code run."""

import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

import evaluations
import sample
import train
from configurator import UserError
from export import main as export
from miniglm import tokenizer
from miniglm.checkpoint import load_checkpoint, weights_sha256
from miniglm.interop import foreign
from miniglm.serve.page_html import PAGE
from miniglm.tokenizer import load_tokenizer
from tests.helpers import (
    ARCHITECTURES,
    TEXT,
    logits,
    random_ids,
    randomize,
    save_run,
    tiny_model,
    tiny_tokenizer,
    write_novel,
    write_questions,
)
from tests.runs import checkpoint_file, contents, edit_json, saved
from tests.runs import words as flags

N_VOCAB = 300  # entries of the tokenizers here
SIZES = {"vocab_size": N_VOCAB, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
ROPE = SIZES | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
GPT2 = SIZES | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS = {
    "gpt2": GPT2Config(**GPT2),
    "gpt2_exact_gelu": GPT2Config(**GPT2, activation_function="gelu", layer_norm_epsilon=1e-3),
    "llama": LlamaConfig(**ROPE, rms_norm_eps=1e-4),
    "llama_bias": LlamaConfig(
        **ROPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_theta=500.0
    ),
    "llama3": LlamaConfig(**ROPE | {"rope_parameters": LLAMA3}),
    "qwen2": Qwen2Config(**ROPE | {"head_dim": 12}, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**ROPE, tie_word_embeddings=True),
    "qwen3_head_dim": Qwen3Config(**ROPE | {"head_dim": 12}, tie_word_embeddings=True),
    "qwen3_wide": Qwen3Config(**ROPE | {"vocab_size": N_VOCAB + 20}, tie_word_embeddings=False),
}


def foreign_tokenizer() -> tokenizers.ByteLevelBPETokenizer:
    """As GPT-2's: <|endoftext|>, and nothing of our chat format."""
    library = tokenizers.ByteLevelBPETokenizer()
    texts = [TEXT[i : i + 4] for i in range(0, len(TEXT), 4)]
    options = {"special_tokens": ["<|endoftext|>"], "show_progress": False}
    library.train_from_iterator(texts, N_VOCAB, **options)
    return library


def write_directory(path: Path, name: str, dtype=torch.float32, **options) -> torch.nn.Module:
    """A Hugging Face directory with random weights; returns transformers' model."""
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    randomize(model, 0)
    model.to(dtype).save_pretrained(path, **options)
    foreign_tokenizer().save(str(path / "tokenizer.json"))
    return model


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3") / "qwen3"
    write_directory(path, "qwen3")
    return path


def assert_same_logits(path: Path, peer: torch.nn.Module, n_vocab: int = N_VOCAB) -> None:
    idx = random_ids(2, 40, n_vocab=N_VOCAB)
    ours = logits(load_checkpoint(path).model, idx)[..., :n_vocab]
    with torch.no_grad():
        theirs = peer(idx).logits[..., :n_vocab]
    assert ours.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


# --- Hugging Face ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_hugging_face_directory_has_the_logits_that_transformers_has(tmp_path, name):
    assert_same_logits(tmp_path, write_directory(tmp_path, name))


def test_llama_3s_rotary_scaling_is_read_as_it_was_published(tmp_path):
    """Before transformers 5, with rope_theta beside it."""
    peer = write_directory(tmp_path, "llama3")
    old = {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    edit_json(tmp_path / "config.json", rope_parameters=None, rope_theta=100.0, **old)
    assert_same_logits(tmp_path, peer)


def test_minimind_s_own_class_is_read_as_qwen3(tmp_path):
    """Its config.json says all sizes, among much that makes no difference."""
    peer = write_directory(tmp_path, "qwen3_head_dim")
    own = {"use_moe": False, "rope_theta": 1e4, "rope_parameters": None, "flash_attn": True}
    edit_json(tmp_path / "config.json", model_type="minimind", layer_types=None, **own)
    assert_same_logits(tmp_path, peer)


def test_ids_that_were_added_are_no_likelier_than_the_mean(qwen3):
    checkpoint = load_checkpoint(qwen3)
    assert checkpoint.tokenizer.n_vocab == N_VOCAB + 4
    all_ids = logits(checkpoint.model, random_ids(1, 20, n_vocab=N_VOCAB))
    mean = all_ids[..., :N_VOCAB].mean(dim=-1, keepdim=True).expand(-1, -1, 4)
    torch.testing.assert_close(all_ids[..., N_VOCAB:], mean, rtol=0, atol=1e-4)


def test_parts_and_half_precision_are_read(tmp_path):
    write_directory(tmp_path, "llama", torch.bfloat16, max_shard_size="20KB")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 2
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_same_logits(tmp_path, peer)


def test_an_index_that_was_left_beside_the_whole_file_is_not_read(qwen3, tmp_path):
    """As transformers does it: the parts that it names are gone."""
    there = shutil.copytree(qwen3, tmp_path / "there")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (there / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert_same_logits(there, AutoModelForCausalLM.from_pretrained(there).eval())


def test_rows_beyond_the_tokenizer_serve_the_ids_that_are_added(tmp_path):
    """As in Qwen's, whose embedding is larger than its vocabulary."""
    model = write_directory(tmp_path, "qwen3_wide")
    assert_same_logits(tmp_path, model, N_VOCAB + 4)
    assert load_checkpoint(tmp_path).model.config.vocab_size == N_VOCAB + 20


def test_the_page_shows_a_directory(qwen3):
    facts = PAGE.facts(load_checkpoint(qwen3), {})
    assert "续写 continues" in facts and "context 64" in facts


def test_a_directory_is_read_once(qwen3, monkeypatch):
    read = []
    adopt, read_config = tokenizer.adopt, foreign.read_config
    monkeypatch.setattr(tokenizer, "adopt", lambda *s: read.append("tokenizer") or adopt(*s))
    monkeypatch.setattr(foreign, "read_config", lambda *s: read.append("shape") or read_config(*s))
    load_checkpoint(qwen3)
    assert read == ["tokenizer", "shape"]


CHANGES = [
    ({"model_type": "bert"}, "model_type='bert' is none of qwen3, qwen2, llama, gpt2"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not built here; hidden_act='silu' is"),
    ({"use_sliding_window": True}, "use_sliding_window=True is not built here"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type='linear'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantized"),
    ({"vocab_size": 290}, "its tokenizer has "),
    ({"num_hidden_layers": 3}, "the weights for blocks.2.norm_1.weight are missing"),
    ({"num_hidden_layers": 1}, "the weights model.layers.1."),
    ({"intermediate_size": 40}, "the weights for blocks.0.mlp.c_fc.weight are [96, 32]"),
    ({"hidden_size": None}, "cannot be read"),
    ({"num_attention_heads": 0}, "n_head=0 must be 1 or more"),
    ({"num_hidden_layers": 2.0}, "n_layer=2.0 must be a whole number"),
    ({"tie_word_embeddings": False}, "the weights for lm_head.weight are missing"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=[words for _, words in CHANGES])
def test_what_is_not_built_here_is_named_in_one_line(qwen3, tmp_path, change, words):
    there = shutil.copytree(qwen3, tmp_path / "there")
    edit_json(there / "config.json", **{"head_dim": None} | change)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        load_checkpoint(there)
    assert str(there) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_bias_that_the_model_has_not_is_named(qwen3, tmp_path):
    """Llama's options turn only the biases of matrices on."""
    there = shutil.copytree(qwen3, tmp_path / "there")
    weights = load_file(there / "model.safetensors")
    weights = {n: weight for n, weight in weights.items() if not re.search("[qk]_norm", n)}
    edit_json(there / "config.json", model_type="llama", attention_bias=True, mlp_bias=True)
    projections = [name for name in weights if "_proj" in name]
    weights |= {n.replace("weight", "bias"): torch.zeros(len(weights[n])) for n in projections}
    save_file(weights | {"model.norm.bias": torch.ones(32)}, there / "model.safetensors")
    with pytest.raises(UserError, match=r"weights for norm.bias are \[32\]; the model has none"):
        load_checkpoint(there)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, "no tokenizer"),
        ("model.safetensors", None, "weights are read from safetensors only"),
        ("model.safetensors", b"cut", "model.safetensors cannot be read"),
        ("config.json", b"{", "config.json cannot be read"),
    ],
)
def test_a_file_that_is_absent_or_damaged_is_named(qwen3, tmp_path, name, content, words):
    there = shutil.copytree(qwen3, tmp_path / "there")
    (there / name).unlink()
    if content:
        (there / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(words)):
        load_checkpoint(there)


ODD = [None, True, 0, -1, 2.0, 1.5, 7, 10**18, 1e400, "", "x", "(", "gpt2", [], [1], {}, {"a": 1}]


def put_something_odd(value: dict | list, rng: random.Random) -> None:
    """In one place of a JSON value."""
    key = rng.choice([*value] if isinstance(value, dict) else range(len(value)))
    if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.7:
        put_something_odd(value[key], rng)
    else:
        value[key] = rng.choice(ODD)


def damage(file: Path, rng: random.Random) -> None:
    """A JSON file, or the header of a safetensors file: another value somewhere."""
    content = file.read_bytes()
    is_json = file.suffix == ".json"
    start, end = (0, len(content)) if is_json else (8, 8 + int.from_bytes(content[:8], "little"))
    value = json.loads(content[start:end])
    put_something_odd(value, rng)
    text = json.dumps(value).encode()
    file.write_bytes(len(text).to_bytes(8, "little")[:start] + text + content[end:])


def test_every_damage_ends_in_a_model_or_in_one_line(qwen3, tmp_path):
    bases = [qwen3]
    tokenizer = tiny_tokenizer()
    for name in ("gpt2", "llama"):
        model = tiny_model(n_vocab=tokenizer.n_vocab, **ARCHITECTURES[name])
        save_run(tmp_path / f"{name}-out", model, tokenizer, tmp_path, "sft")
        export([f"--out_dir={tmp_path / f'{name}-out'}", f"--to={tmp_path / name}"])
        bases.append(tmp_path / name)
    loaded, lines = 0, []
    for seed in range(200):
        rng = random.Random(seed)
        there = shutil.copytree(rng.choice(bases), tmp_path / str(seed))
        name = rng.choice(["config.json", "tokenizer.json", "model.safetensors"])
        damage(there / name, rng)
        try:
            loaded += load_checkpoint(there).tokenizer.n_vocab > 0
        except UserError as error:
            lines.append(str(error))
        shutil.rmtree(there)
    assert loaded > 20 and len(lines) > 60
    assert all(len(line.splitlines()) == 1 for line in lines)


def test_the_scripts_take_a_directory_as_they_take_an_out_dir(qwen3, tmp_path, capsys):
    sample.main([f"--out_dir={qwen3}", "--start=却说", "--max_new_tokens=5", "--device=cpu"])
    assert capsys.readouterr().out.startswith("却说")
    there = shutil.copytree(qwen3, tmp_path / "there")
    data = write_novel(tmp_path / "text", load_tokenizer(there))
    with pytest.raises(UserError, match="there names no dataset; pass --dataset="):
        evaluations.main([f"--out_dir={there}", "--device=cpu"])
    evaluations.main([f"--out_dir={there}", f"--dataset={data}", "--device=cpu"])
    assert (there / "evaluation.json").is_file() and not (tmp_path / "evaluation.json").exists()


def go_on(**settings: object) -> Path:
    """Training from a model, whose shape is not named; returns the out_dir."""
    common = {"max_iters": 1, "warmup_iters": 0, "eval_interval": 1, "batch_size": 2}
    train.main(flags(**common | {"device": "cpu", "dtype": "float32"} | settings))
    return Path(settings["out_dir"])


def assert_moved(before: Path, after: Path) -> None:
    """A step of training changed the model, and did not replace it."""
    idx = random_ids(2, 16, n_vocab=N_VOCAB)
    theirs, ours = (logits(load_checkpoint(path).model, idx) for path in (before, after))
    assert 0 < (theirs - ours).abs().max() < 5


def test_training_goes_on_from_a_directory_on_data_of_its_tokenizer(qwen3, tmp_path):
    other = write_novel(tmp_path / "other", tiny_tokenizer())
    with pytest.raises(UserError, match=f"prepare it with --tokenizer={qwen3}"):
        go_on(init_from=qwen3, dataset=other, out_dir=tmp_path / "out")
    data = write_questions(tmp_path / "questions", load_tokenizer(qwen3), max_tokens=63)
    out = go_on(init_from=qwen3, dataset=data, out_dir=tmp_path / "out")
    assert load_checkpoint(out).answers
    assert_moved(qwen3, out)


def test_training_goes_on_from_a_ckpt_of_nanogpt(tmp_path):
    torch.save(nanogpt_content()[0], tmp_path / "ckpt.pt")
    data = write_novel(tmp_path / "text", load_tokenizer(tmp_path / "ckpt.pt"))
    out = go_on(init_from=tmp_path / "ckpt.pt", dataset=data, out_dir=tmp_path / "out")
    assert saved(out)["architecture"]["mlp"] == "gelu_erf"
    assert_moved(tmp_path, out)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_training_goes_on_with_shorter_rows(tmp_path, name):
    path = tmp_path / name
    write_directory(path, name)
    data = write_novel(tmp_path / "text", load_tokenizer(path))
    short = go_on(init_from=path, dataset=data, out_dir=tmp_path / "short", block_size=16)
    assert load_checkpoint(short).model.config.block_size == 16
    go_on(resume=True, out_dir=short, max_iters=2)
    with pytest.raises(UserError, match="block_size=15, but the model in"):
        go_on(resume=True, out_dir=short, block_size=15)
    with pytest.raises(UserError, match="block_size=65, but the model in"):
        go_on(init_from=path, dataset=data, out_dir=tmp_path / "long", block_size=65)


def test_an_adapters_base_stays_in_half_precision_and_no_bit_changes(tmp_path):
    half, whole = tmp_path / "half", tmp_path / "whole"
    write_directory(half, "qwen3_head_dim", torch.bfloat16)
    peer = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)
    peer.save_pretrained(whole)
    shutil.copy(half / "tokenizer.json", whole)
    data = write_questions(tmp_path / "questions", load_tokenizer(half), max_tokens=63)
    common = {"dataset": data, "lora_rank": 2, "eval_interval": 2, "lr_decay_iters": 4}
    outs = [
        go_on(init_from=base, out_dir=tmp_path / base.name / "out", max_iters=4, **common)
        for base in (half, whole)
    ]
    parts = go_on(init_from=half, out_dir=tmp_path / "parts", max_iters=2, **common)
    go_on(out_dir=parts, resume=True, max_iters=4)
    files = [checkpoint_file(out, "adapter.safetensors") for out in [*outs, parts]]
    first, *others = map(load_file, files)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    frozen = load_checkpoint(parts, "latest", merged=False, frozen=True).model
    kinds = {name: p.dtype for name, p in frozen.named_parameters() if p.dim() > 1}
    assert kinds["blocks.0.mlp.c_fc.weight"] == torch.bfloat16
    assert kinds["wte.weight"] == kinds["blocks.0.mlp.c_fc.lora_A"] == torch.float32
    models = [load_checkpoint(out).model for out in (parts, outs[1])]
    assert all(torch.equal(*pair) for pair in zip(*(m.parameters() for m in models), strict=True))
    some = go_on(init_from=half, out_dir=tmp_path / "some", lora_targets="c_attn", **common)
    assert load_checkpoint(some).model.wte.weight.dtype == torch.float32


def test_an_adapter_stands_on_a_directory(qwen3, tmp_path):
    base = shutil.copytree(qwen3, tmp_path / "base")
    data = write_novel(tmp_path / "text", load_tokenizer(base))
    before = contents(base)
    given = {"init_from": base, "dataset": data, "out_dir": tmp_path / "out" / "adapter"}
    out = go_on(**given, lora_rank=2, block_size=16, learning_rate=0.01, max_iters=2)
    assert saved(out)["adapter"]["sha256"] == weights_sha256(base)
    assert contents(base) == before
    assert load_checkpoint(out).model.config.block_size == 16
    assert_moved(base, out)


# --- nanoGPT -----------------------------------------------------------------------------------

ROWS = 50304  # GPT-2's 50,257 entries and padding


def nanogpt_content(bias: bool = True, compiled: bool = False) -> tuple[dict, torch.nn.Module]:
    """What nanoGPT's train.py saves of a tiny model, and transformers' GPT-2 with its weights."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16}
    config = GPT2Config(
        **shape, n_positions=32, vocab_size=ROWS, activation_function="gelu", bos_token_id=None
    )
    peer = AutoModelForCausalLM.from_config(config).eval()
    randomize(peer, 0)
    weights = {}
    for name, weight in peer.state_dict().items():
        if not bias and name.endswith("bias"):
            weight.zero_()
            continue
        is_linear = ".h." in name and weight.dim() == 2  # torch's, not GPT-2's transposed ones
        weights[name] = (weight.t() if is_linear else weight).clone()
    for layer in range(2):  # its mask, where torch has no attention of its own
        weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    if compiled:
        weights = {f"_orig_mod.{name}": weight for name, weight in weights.items()}
    args = shape | {"block_size": 32, "bias": bias, "vocab_size": ROWS, "dropout": 0.0}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}
    best = {"iter_num": 7, "best_val_loss": torch.tensor(3.2), "config": {"dataset": "novel"}}
    return {"model": weights, "optimizer": optimizer, "model_args": args} | best, peer


@pytest.mark.parametrize(("bias", "compiled"), [(True, False), (False, True)])
def test_a_ckpt_of_nanogpt_has_the_logits_of_its_gpt2(tmp_path, bias, compiled):
    content, peer = nanogpt_content(bias, compiled)
    torch.save(content, tmp_path / "ckpt.pt")
    idx = random_ids(2, 20, n_vocab=ROWS)
    with torch.no_grad():
        theirs = peer(idx).logits
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        checkpoint = load_checkpoint(path)
        assert checkpoint.tokenizer.sha256 == load_tokenizer("gpt2").sha256
        ours = logits(checkpoint.model, idx)
        assert ours.std() > 0.5
        torch.testing.assert_close(ours, theirs[..., : ours.shape[-1]], rtol=0, atol=1e-4)


class Attack:
    """Runs a command where it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"echo caught > {self.file}",)


def test_code_in_a_ckpt_is_refused_and_not_run(tmp_path):
    ran = tmp_path / "ran"
    torch.save({**nanogpt_content()[0], "extra": Attack(ran)}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="more than tensors and plain values, which would be code"):
        load_checkpoint(tmp_path / "ckpt.pt")
    assert not ran.exists()
    pickle.loads(pickle.dumps(Attack(ran)))  # it would have been
    assert ran.exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Attack(tmp_path / "again"), 2))
    with pytest.raises(UserError, match="which would be code to run"):
        load_checkpoint(tmp_path / "plain.pt")
    assert not (tmp_path / "again").exists()


def test_what_is_no_ckpt_of_nanogpt_is_said_in_one_line(tmp_path):
    whole = nanogpt_content()[0]
    file = tmp_path / "ckpt.pt"

    def changed(**args: object) -> dict:
        return whole | {"model_args": whole["model_args"] | args}

    cases = [
        ({"weights": {}}, "is not nanoGPT's: it lacks model or model_args"),
        (changed(vocab_size=65), "vocab_size=65 is not GPT-2's vocabulary"),
        (changed(n_layer=1), "the weights transformer.h.1."),
        (changed(n_head=3), "n_embd=16 must be a multiple of n_head=3"),
        (whole | {"model_args": {}}, "cannot be read ('vocab_size')"),
    ]
    for content, words in cases:
        torch.save(content, file)
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            load_checkpoint(tmp_path)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    torch.save(whole, file)
    for junk in (b"", b"junk" * 99, file.read_bytes()[:9999]):
        file.write_bytes(junk)
        with pytest.raises(UserError, match="is damaged, or holds more"):
            load_checkpoint(tmp_path)
