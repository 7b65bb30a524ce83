"""The GPT's sizes, gradients and cache. tests/interop/test_foreign.py has its logits against
those of Hugging Face's GPT-2, Llama and Qwen3 on the same weights."""

import dataclasses
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configurator import UserError
from miniglm.losses import next_token
from model import ACTIVATIONS, GPT, ModelConfig
from tests.helpers import ALL_MODELS, ARCHITECTURES, logits, random_ids, tiny_model

each_architecture = pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
each_model = pytest.mark.parametrize("options", ALL_MODELS.values(), ids=ALL_MODELS)
gpt_and_lstm = pytest.mark.parametrize(
    "options", [{"n_kv_head": 2}, {"model": "lstm"}], ids=["gpt", "lstm"]
)


def test_the_reference_model_has_45_million_parameters():
    shape = {"n_layer": 6, "n_head": 8, "n_embd": 512, "block_size": 256, "n_vocab": 50257}
    options = {"position": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False}
    config = ModelConfig(**shape, **options)
    assert config.vocab_size == 50304
    assert GPT(config).n_params() == 44_767_744


def test_parameters_are_those_counted_by_hand():
    # 64 x 8 embedding; a block: two norms of 8, two of a head's 4, q and k and v, output, SwiGLU
    block = 2 * 8 + 2 * 4 + (8 + 4 + 4) * 8 + 8 * 8 + 3 * 8 * 20
    shape = {"n_vocab": 33, "n_head": 2, "n_kv_head": 1, "n_embd": 8, "n_hidden": 20}
    assert tiny_model(**shape).n_params() == 64 * 8 + 2 * block + 8
    assert tiny_model(**shape, tie_weights=False).n_params() == 2 * 64 * 8 + 2 * block + 8


@pytest.mark.parametrize(
    "init, first, output", [("fan_in", 256**-0.5, 0), ("gpt2", 0.02, 0.02 / 8**0.5)]
)
def test_new_weights_have_the_spread_of_their_init(init, first, output):
    shape = {"n_layer": 4, "n_embd": 256, "n_vocab": 500, "tie_weights": False}
    model = GPT(ModelConfig(init=init, **shape))
    for block in model.blocks:
        for module in (block.attn, block.mlp):
            assert module.c_proj.weight.std().item() == pytest.approx(output, rel=0.05)
        for matrix in (block.attn.c_attn, block.mlp.c_fc):
            assert matrix.weight.std().item() == pytest.approx(first, rel=0.05)
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)


@each_model
def test_every_parameter_has_a_gradient(options):
    model = tiny_model(**options).train()
    model.head(model(random_ids(3, 24))).log_softmax(dim=-1)[..., 7].sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


@each_model
def test_a_token_changes_its_own_logits_and_later_ones_only(options):
    model = tiny_model(**options).double()
    idx = random_ids(2, 24)
    before = logits(model, idx)
    for at in (0, 11, 23):
        changed = idx.clone()
        changed[:, at] = (idx[:, at] + 1) % 50
        moved = (logits(model, changed) - before).abs().amax(dim=(0, 2))
        assert (moved[:at] < 1e-12).all()
        assert (moved[at:] > 1e-6).all()


@pytest.mark.parametrize("tied", [True, False])
def test_the_padding_of_the_vocabulary_has_no_logits(tied):
    model = tiny_model(n_vocab=50, tie_weights=tied)
    assert (model.lm_head.weight is model.wte.weight) == tied
    idx = random_ids(1, 5)
    with torch.no_grad():
        before = model.head(model(idx))
        model.lm_head.weight[50:] = 1e4
        assert model.lm_head.weight.shape[0] == 64
        assert before.shape == (1, 5, 50)
        assert torch.equal(model.head(model(idx)), before)


@pytest.mark.parametrize("site", ["drop", "attn.drop", "mlp.drop"])
def test_each_dropout_acts_in_training_only(site):
    model, idx = tiny_model(dropout=0.5), random_ids(1, 8)
    for name, module in model.named_modules():  # blocks.0.attn.drop
        if isinstance(module, torch.nn.Dropout) and name.split(".", 2)[-1] != site:
            module.p = 0.0
    assert torch.equal(model(idx), tiny_model()(idx))
    model.train()
    assert not torch.allclose(model(idx), model(idx), atol=1e-3)


@each_model
@pytest.mark.parametrize("chunks", [[24], [1] * 24, [1, 23], [5, 1, 1, 9, 8], [16, 1, 7]])
@torch.no_grad()
def test_cached_chunks_of_any_size_equal_one_pass(options, chunks):
    model = tiny_model(**options).double()
    idx = random_ids(3, 24)
    cache = model.new_cache(3)
    hidden = torch.cat([model(part, cache) for part in idx.split(chunks, dim=1)], dim=1)
    assert cache.lengths == [24, 24, 24]
    assert (hidden - model(idx)).abs().max() < 1e-12


def ragged_cache(model: GPT, idx: torch.Tensor, lengths: list[int]):
    """A cache of the first lengths[row] tokens of each row, read in one padded batch."""
    cache = model.new_cache(len(lengths))
    model(idx[:, : max(lengths)], cache, lengths)
    return cache


@each_model
@torch.no_grad()
def test_rows_of_different_lengths_go_on_as_each_alone(options):
    model = tiny_model(**options).double()
    lengths = [9, 1, 14, 14]
    idx = random_ids(4, 24)
    cache = ragged_cache(model, idx, lengths)
    whole = model(idx)
    for T in (1, 3, 1, 2):
        rows = torch.arange(4)[:, None]
        places = torch.tensor(cache.lengths)[:, None] + torch.arange(T)
        hidden = model(idx[rows, places], cache)
        assert (hidden - whole[rows, places]).abs().max() < 1e-12
    assert cache.lengths == [length + 7 for length in lengths]


@pytest.mark.parametrize("dropped", [[0], [1], [3], [3, 0], [0, 0, 0], [2, 1]])
@gpt_and_lstm
@torch.no_grad()
def test_dropping_a_row_leaves_the_others_and_moves_the_last_into_its_place(options, dropped):
    model = tiny_model(**options).double()
    lengths, idx = [3, 8, 5, 6], random_ids(4, 24)
    cache, rows = ragged_cache(model, idx, lengths), [0, 1, 2, 3]
    for row in dropped:
        cache.drop_row(row)
        rows[row] = rows[-1]
        rows.pop()
    assert cache.lengths == [lengths[row] for row in rows]
    next_ids = idx[rows, cache.lengths][:, None]
    wanted = model(idx)[rows, cache.lengths][:, None]
    assert (model(next_ids, cache) - wanted).abs().max() < 1e-12


@gpt_and_lstm
@torch.no_grad()
def test_copied_rows_go_on_as_their_source_does(options):
    model = tiny_model(**options).double()
    idx = random_ids(3, 24)
    source = ragged_cache(model, idx, [7, 2, 12])
    others = random_ids(5, 24, seed=1)
    cache = ragged_cache(model, others, [20, 9, 1, 15, 3])
    cache.copy_rows(source, [2, 0, 0, 1], [0, 1, 3, 4])
    assert cache.lengths == [12, 7, 1, 7, 2]
    texts = [idx[2, :13], idx[0, :8], others[2, :2], idx[0, :8], idx[1, :3]]
    hidden = model(torch.stack([text[-1:] for text in texts]), cache)
    for row, text in enumerate(texts):
        assert (hidden[row, 0] - model(text[None])[0, -1]).abs().max() < 1e-12
    assert source.lengths == [7, 2, 12]


@gpt_and_lstm
@pytest.mark.parametrize("lengths", [[22, 22], [5, 22]])
def test_a_context_beyond_block_size_is_refused(lengths, options):
    model = tiny_model(**options)
    cache = ragged_cache(model, random_ids(2, 24), lengths)
    model(random_ids(2, 2), cache)
    with pytest.raises(ValueError, match="block_size=24"):
        model(random_ids(2, 1), cache)
    with pytest.raises(ValueError, match="block_size=24"):
        model(random_ids(2, 25))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"n_embd": 100, "n_head": 6}, "n_embd=100 must be a multiple of n_head=6"),
        ({"n_head": 4, "n_kv_head": 8}, "n_head=4 must be a multiple of n_kv_head=8"),
        ({"n_embd": 12, "n_head": 4}, "head_dim=3 must be even"),
        ({"n_embd": 12, "n_head": 4, "head_dim": 5}, "head_dim=5 must be even"),
        ({"model": "lstm", "n_layer": 0}, "n_layer=0 must be 1 or more"),
    ],
)
def test_an_impossible_shape_is_named_in_one_line(options, words):
    with pytest.raises(UserError, match=f"^{words}"):
        ModelConfig(n_vocab=50, **options)


def test_an_odd_head_is_fine_where_nothing_rotates():
    options = {"n_embd": 12, "n_head": 4, "position": "learned"}
    assert tiny_model(**options)(random_ids(1, 3)).shape == (1, 3, 12)


def test_a_config_survives_the_round_trip_through_a_dict():
    config = ModelConfig(n_vocab=50, n_embd=192, n_head=6, n_kv_head=2)
    assert (config.n_hidden, config.vocab_size) == (512, 64)
    assert ModelConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize("tie_weights", [True, False])
def test_flops_per_token_are_torchs_count_less_the_masked_half_of_attention(tie_weights):
    model = tiny_model(block_size=16, tie_weights=tie_weights)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.head(model(random_ids(2, 16))).sum().backward()
    c = model.config
    masked = 12 * c.n_layer * c.n_embd * 16 / 2  # torch multiplies all pairs of positions
    assert counter.get_total_flops() == 2 * 16 * (model.flops_per_token(16) + masked)


def test_activations_by_their_formulas():
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    tanh = torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))
    wanted = {"gelu": x / 2 * (1 + tanh), "gelu_erf": x * (1 + torch.erf(x / 2**0.5)) / 2}
    wanted["relu2"] = x.clamp(min=0) ** 2
    for name, activation in ACTIVATIONS.items():
        assert torch.allclose(activation(x), wanted[name], atol=1e-12), name


@each_architecture
def test_checkpointed_activations_give_the_same_gradients(options):
    idx, targets = random_ids(2, 20), random_ids(2, 20, seed=1)

    def gradients(checkpoint_activations: bool) -> list[torch.Tensor]:
        model = tiny_model(**options | {"dropout": 0.3}).train()
        model.checkpoint_activations = checkpoint_activations
        torch.manual_seed(0)
        next_token(model, idx, targets, torch.arange(40)).backward()
        return [weight.grad for weight in model.parameters()]

    for kept, anew in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(kept, anew)


def test_checkpointed_activations_keep_less_for_the_backward_pass():
    def kept(checkpoint_activations: bool) -> int:
        model = tiny_model(n_layer=6).train()
        model.checkpoint_activations = checkpoint_activations
        sizes = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(random_ids(8, 24))
        return sum(sizes.values())

    assert kept(True) < 0.3 * kept(False)
