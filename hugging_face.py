"""Our weights and settings under Hugging Face's names, both ways: GPT-2, Llama, Qwen3.

    config, weights = to_hugging_face(model)        for export.py
    model_config, weights = from_hugging_face(config, weights)     for train.py's init_from

c_attn stacks the queries', keys' and values' rows, SwiGLU's c_fc those of gate and up. GPT-2 keeps
its matrices transposed, and biases that are off here are zeros there.
"""

import torch

from configurator import UserError
from model import GPT, ModelConfig

Weights = dict[str, torch.Tensor]

# what of an architecture is not the default in each family, and so has to be just that
FAMILIES = {
    "qwen3": {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
    | {"qk_norm": True},
    "llama": {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": False},
    "gpt2": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False},
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
    wanted = FAMILIES["gpt2" if config.position == "learned" else "qwen3"] | BEYOND
    if config.position == "rope" and not config.qk_norm:
        wanted = FAMILIES["llama"] | BEYOND
    if config.position == "learned":
        wanted |= {"n_kv_head": config.n_head}
    other = [f"{k}={getattr(config, k)!r}" for k, v in wanted.items() if getattr(config, k) != v]
    if other:
        raise UserError(
            f"{', '.join(other)}: no architecture of other tools has that beside "
            f"position={config.position!r}, qk_norm={config.qk_norm}"
        )
    return next(name for name, values in FAMILIES.items() if values.items() <= wanted.items())


# --- out ---------------------------------------------------------------------------------------


def to_hugging_face(model: GPT) -> tuple[dict, Weights]:
    """config.json and the weights, float32; the padding of the vocabulary is left out."""
    c = model.config
    family = family_of(c)
    ours = {name: weight.detach().float() for name, weight in model.named_parameters()}
    for name in ("wte.weight", "lm_head.weight"):
        if name in ours:
            ours[name] = ours[name][: c.n_vocab]
    common = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "dtype": "float32",
        "vocab_size": c.n_vocab,
        "tie_word_embeddings": c.tie_weights,
    }
    if family == "gpt2":
        return common | _gpt2_shape(c), _to_gpt2(ours, c)
    return common | _llama_shape(c, family), _to_llama(ours, c)


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
    for layer, our, kind, names in _llama_names(c):
        whole = ours.get(f"blocks.{layer}.{our}.{kind}")
        if whole is not None:
            parts = whole.split(rows.get(our, len(whole)))
            theirs |= dict(zip(names, parts, strict=True))
    return theirs


def _llama_names(c: ModelConfig):
    """(layer, our module, weight or bias, their names)."""
    for layer in range(c.n_layer):
        for our, names in LLAMA.items():
            for kind in ("weight", "bias"):
                yield layer, our, kind, [f"model.layers.{layer}.{name}.{kind}" for name in names]


def _to_gpt2(ours: Weights, c: ModelConfig) -> Weights:
    theirs = {f"transformer.{name}.weight": ours[f"{name}.weight"] for name in ("wte", "wpe")}
    if not c.tie_weights:
        theirs["lm_head.weight"] = ours["lm_head.weight"]
    for our, their in _gpt2_names(c):
        weight = ours[f"{our}.weight"]
        theirs[f"{their}.weight"] = weight.t()  # of a norm: the same
        theirs[f"{their}.bias"] = ours.get(f"{our}.bias", weight.new_zeros(len(weight)))
    return theirs


def _gpt2_names(c: ModelConfig) -> list[tuple[str, str]]:
    names = [("norm", "transformer.ln_f")]
    for layer in range(c.n_layer):
        names += [
            (f"blocks.{layer}.{our}", f"transformer.h.{layer}.{their}")
            for our, their in GPT2.items()
        ]
    return names


# --- in ----------------------------------------------------------------------------------------


def from_hugging_face(config: dict, weights: Weights) -> tuple[ModelConfig, Weights]:
    """A ModelConfig and our weights. UserError where ours cannot express the architecture."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"model_type={family!r} is none of {', '.join(FAMILIES)}")
    read = _from_gpt2 if family == "gpt2" else _from_llama
    try:
        model_config, ours = read(config, family, weights)
    except KeyError as error:
        raise UserError(f"{error} is missing in it; is the directory whole?") from None
    expected = GPT(model_config).state_dict().keys() - (
        {"lm_head.weight"} if model_config.tie_weights else set()
    )
    if expected != ours.keys():
        raise UserError(f"its weights are not {family}'s: {sorted(expected ^ ours.keys())[:3]}")
    return model_config, ours


def _from_llama(config: dict, family: str, theirs: Weights) -> tuple[ModelConfig, Weights]:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    bias = bool(config.get("attention_bias"))
    _check(
        {
            "hidden_act": (config.get("hidden_act", "silu"), "silu"),
            "rope_type": (kind, "default"),
            "head_dim": (
                config.get("head_dim") or config["hidden_size"] // heads,
                config["hidden_size"] // heads,
            ),
            "mlp_bias": (bool(config.get("mlp_bias")), bias),
            "use_sliding_window": (bool(config.get("use_sliding_window")), False),
        }
    )
    c = ModelConfig(
        block_size=config["max_position_embeddings"],
        n_layer=config["num_hidden_layers"],
        n_head=heads,
        n_kv_head=config.get("num_key_value_heads") or heads,
        n_embd=config["hidden_size"],
        n_hidden=config["intermediate_size"],
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        norm_eps=config["rms_norm_eps"],
        bias=bias,
        tie_weights=config.get("tie_word_embeddings", False),
        n_vocab=config["vocab_size"],
        vocab_size=config["vocab_size"],
        **{name: value for name, value in FAMILIES[family].items() if name != "bias"},
    )
    ours = {
        "wte.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
    }
    if not c.tie_weights:
        ours["lm_head.weight"] = theirs["lm_head.weight"]
    for layer, our, kind, names in _llama_names(c):
        if names[0] in theirs:
            ours[f"blocks.{layer}.{our}.{kind}"] = torch.cat([theirs[name] for name in names])
    return c, ours


def _from_gpt2(config: dict, family: str, theirs: Weights) -> tuple[ModelConfig, Weights]:
    # some checkpoints were saved without the outer module
    if "wte.weight" in theirs:
        theirs = {
            name if name == "lm_head.weight" else f"transformer.{name}": w
            for name, w in theirs.items()
        }
    _check(
        {
            "activation_function": (config.get("activation_function", "gelu_new"), "gelu_new"),
            "scale_attn_by_inverse_layer_idx": (
                bool(config.get("scale_attn_by_inverse_layer_idx")),
                False,
            ),
        }
    )
    c = ModelConfig(
        block_size=config["n_positions"],
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        n_embd=config["n_embd"],
        n_hidden=config.get("n_inner") or 4 * config["n_embd"],
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        bias=True,
        tie_weights=config.get("tie_word_embeddings", True),
        n_vocab=config["vocab_size"],
        vocab_size=config["vocab_size"],
        **FAMILIES[family],
    )
    ours = {f"{name}.weight": theirs[f"transformer.{name}.weight"] for name in ("wte", "wpe")}
    if not c.tie_weights:
        ours["lm_head.weight"] = theirs["lm_head.weight"]
    for our, their in _gpt2_names(c):
        for kind in ("weight", "bias"):
            ours[f"{our}.{kind}"] = theirs[f"{their}.{kind}"].t()
    return c, ours


def _check(wanted: dict[str, tuple]) -> None:
    for name, (value, ours) in wanted.items():
        if value != ours:
            raise UserError(f"{name}={value!r} is not built here; {ours!r} is")
