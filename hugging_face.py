"""Our weights and settings under Hugging Face's names: GPT-2, Llama, Qwen3.

c_attn stacks the queries', keys' and values' rows, SwiGLU's c_fc those of gate and up. GPT-2 keeps
its matrices transposed, and biases that are off here are zeros there.
"""

import torch

from configurator import UserError
from model import GPT, ModelConfig

Weights = dict[str, torch.Tensor]

# what an architecture has in each family
FAMILIES = {
    "qwen3": {"norm": "rmsnorm", "mlp": "swiglu", "bias": False},
    "llama": {"norm": "rmsnorm", "mlp": "swiglu"},
    "gpt2": {"norm": "layernorm", "mlp": "gelu", "qk_norm": False},
}
BEYOND = {"logit_soft_cap": 0.0, "value_residual": False, "embedding_skip": False}
CLASSES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}

LLAMA = {  # our module -> theirs, whose rows ours has one below the other
    "norm_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "norm_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
GPT2 = {
    "norm_1": "ln_1",
    "attn.c_attn": "attn.c_attn",
    "attn.c_proj": "attn.c_proj",
    "norm_2": "ln_2",
    "mlp.c_fc": "mlp.c_fc",
    "mlp.c_proj": "mlp.c_proj",
}


def family_of(config: ModelConfig) -> str:
    """qwen3, llama or gpt2. UserError, with what stands in the way, where none expresses it."""
    if config.model != "gpt":
        raise UserError(f"model={config.model!r} has no form that other tools read; gpt has")
    family = "qwen3" if config.qk_norm else "llama"
    family = "gpt2" if config.position == "learned" else family
    wanted = FAMILIES[family] | BEYOND
    if family == "gpt2":
        wanted |= {"n_kv_head": config.n_head}
    other = [f"{k}={getattr(config, k)!r}" for k, v in wanted.items() if getattr(config, k) != v]
    if other:
        raise UserError(
            f"{', '.join(other)}: no architecture of other tools has that beside "
            f"position={config.position!r}, qk_norm={config.qk_norm}"
        )
    return family


def to_hugging_face(model: GPT) -> tuple[dict, Weights]:
    """config.json and the weights, float32; the padding of the vocabulary is left out."""
    shape = shape_of(model.config)
    ours = {name: weight.detach().float() for name, weight in model.named_parameters()}
    for name in ("wte.weight", "lm_head.weight"):
        if name in ours:
            ours[name] = ours[name][: model.config.n_vocab]
    rename = _to_gpt2 if shape["model_type"] == "gpt2" else _to_llama
    return shape | {"dtype": "float32"}, rename(ours, model.config)


def shape_of(c: ModelConfig) -> dict:
    """What a config.json says of the architecture."""
    family = family_of(c)
    common = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": c.n_vocab,
        "tie_word_embeddings": c.tie_weights,
    }
    return common | (_gpt2_shape(c) if family == "gpt2" else _llama_shape(c, family))


def _llama_shape(c: ModelConfig, family: str) -> dict:
    shape = {
        "hidden_size": c.n_embd,
        "intermediate_size": c.n_hidden,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.block_size,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "rope_theta": c.rope_theta,  # where readers older than rope_parameters look
        "hidden_act": "silu",
        "attention_bias": c.bias,
        "attention_dropout": 0.0,
    }
    return shape | ({"mlp_bias": c.bias} if family == "llama" else {})


def _gpt2_shape(c: ModelConfig) -> dict:
    return {
        "n_positions": c.block_size,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_inner": c.n_hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": c.norm_eps,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": 0.0,
    }


def _to_llama(ours: Weights, c: ModelConfig) -> Weights:
    kv = c.n_kv_head * c.head_dim
    rows = {"attn.c_attn": [c.n_embd, kv, kv], "mlp.c_fc": [c.n_hidden, c.n_hidden]}
    theirs = {
        "model.embed_tokens.weight": ours["wte.weight"],
        "model.norm.weight": ours["norm.weight"],
    }
    if not c.tie_weights:
        theirs["lm_head.weight"] = ours["lm_head.weight"]
    for layer in range(c.n_layer):
        for our, names in LLAMA.items():
            for kind in ("weight", "bias"):
                whole = ours.get(f"blocks.{layer}.{our}.{kind}")
                if whole is not None:
                    parts = whole.split(rows.get(our, len(whole)))
                    for name, part in zip(names, parts, strict=True):
                        theirs[f"model.layers.{layer}.{name}.{kind}"] = part
    return theirs


def _to_gpt2(ours: Weights, c: ModelConfig) -> Weights:
    theirs = {f"transformer.{name}.weight": ours[f"{name}.weight"] for name in ("wte", "wpe")}
    if not c.tie_weights:
        theirs["lm_head.weight"] = ours["lm_head.weight"]
    names = {"norm": "ln_f"}
    for layer in range(c.n_layer):
        names |= {f"blocks.{layer}.{our}": f"h.{layer}.{their}" for our, their in GPT2.items()}
    for our, their in names.items():
        weight = ours[f"{our}.weight"]
        theirs[f"transformer.{their}.weight"] = weight.t()  # of a norm: the same
        bias = ours.get(f"{our}.bias", weight.new_zeros(len(weight)))
        theirs[f"transformer.{their}.bias"] = bias
    return theirs
