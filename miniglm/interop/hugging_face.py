"""Our weights and settings under Hugging Face's names, both ways: GPT-2, Llama, Qwen3.

    config, weights = to_hugging_face(model)                        for export.py
    model_config = from_config(config, names, n_vocab)              for miniglm/interop/foreign.py
    weights = from_weights(model_config, weights)

c_attn stacks the queries', keys' and values' rows, SwiGLU's c_fc those of gate and up. GPT-2 keeps
its matrices transposed, and biases that are off here are zeros there.
"""

import json
import re
from collections.abc import Collection, Iterator

import torch

from configurator import UserError
from miniglm.tokenizer import END, HIDDEN, ROLES
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
GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf"}  # theirs -> ours

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
    "norm_1": ["ln_1"],
    "attn.c_attn": ["attn.c_attn"],
    "attn.c_proj": ["attn.c_proj"],
    "norm_2": ["ln_2"],
    "mlp.c_fc": ["mlp.c_fc"],
    "mlp.c_proj": ["mlp.c_proj"],
}
# what old files keep beside the weights: masks and rotary tables
CONSTANTS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")


def chat_template(names: dict[str, str], end: str, content: str) -> str:
    """A Jinja template that writes what tokenizer.py's `render` writes. names, end: how roles and
    the end of a message are written; content: an expression for a message's."""
    return (
        template_start(names) + "{% for message in messages %}"
        "{% if message['role'] not in names %}{{ raise_exception('unknown role') }}{% endif %}"
        "{{ names[message['role']] + " + content + " + '" + end + "' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + names["assistant"] + "' }}{% endif %}"
    )


def template_start(names: dict[str, str]) -> str:
    """What our templates begin with, and no other project's."""
    written = ", ".join(f"'{role}': '{token}'" for role, token in names.items())
    return "{% set names = {" + written + "} %}"


def hiding_template(added: Collection[str]) -> str:
    """The template where the names of tokens in `added` are plain text inside a message: HIDDEN
    stands behind each character that one begins with, so that none is found, and is taken away
    again later. UserError where a name has no place for it."""
    content = "message['content']"
    for first in sorted({name[:1] for name in added}):
        if first in added:
            raise UserError(
                f"the added token {first!r} is a single character: transformers takes it for the "
                "token in a message, too; export a GGUF file, --format=gguf"
            )
        old, new = (json.dumps(text, ensure_ascii=False) for text in (first, first + HIDDEN))
        content += f" | replace({old}, {new})"
    return chat_template(ROLES, END, content)


def is_our_template(text: object) -> bool:
    return isinstance(text, str) and text.startswith(template_start(ROLES))


def family_of(config: ModelConfig) -> str:
    """qwen3, llama or gpt2. UserError, with what stands in the way, where none expresses it."""
    if config.model != "gpt":
        raise UserError(f"model={config.model!r} has no form that other tools read; gpt has")
    family = "qwen3" if config.qk_norm else "llama"
    family = "gpt2" if config.position == "learned" else family
    wanted = FAMILIES[family] | BEYOND
    if family == "gpt2":
        wanted |= {"n_kv_head": config.n_head}
        wanted |= {"mlp": config.mlp} if config.mlp in GELUS.values() else {}
    other = [f"{k}={getattr(config, k)!r}" for k, v in wanted.items() if getattr(config, k) != v]
    if other:
        raise UserError(
            f"{', '.join(other)}: no architecture of other tools has that beside "
            f"position={config.position!r}, qk_norm={config.qk_norm}"
        )
    return family


def parameters(c: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """Each parameter of ours that may be there, and theirs that it has one below the other."""
    family = family_of(c)
    if family == "gpt2":
        ends = {"wte": "transformer.wte", "wpe": "transformer.wpe", "norm": "transformer.ln_f"}
        layers, modules = "transformer.h", GPT2
    else:
        ends = {"wte": "model.embed_tokens", "norm": "model.norm"}
        layers, modules = "model.layers", LLAMA
    pairs = [(our, [their]) for our, their in ends.items()]
    if not c.tie_weights:
        pairs.append(("lm_head", ["lm_head"]))
    for layer in range(c.n_layer):
        for our, names in modules.items():
            pairs.append((f"blocks.{layer}.{our}", [f"{layers}.{layer}.{n}" for n in names]))
    for our, names in pairs:
        for kind in ("weight", "bias"):
            yield f"{our}.{kind}", [f"{name}.{kind}" for name in names]


# --- out ---------------------------------------------------------------------------------------


def to_hugging_face(model: GPT) -> tuple[dict, Weights]:
    """config.json and the weights, float32; the padding of the vocabulary is left out."""
    c = model.config
    shape = shape_of(c)
    ours = {name: weight.detach().float() for name, weight in model.named_parameters()}
    for name in ("wte.weight", "lm_head.weight"):
        if name in ours:
            ours[name] = ours[name][: c.n_vocab]
    fill = _without_biases if shape["model_type"] == "gpt2" else dict
    return shape | {"dtype": "float32"}, _to_theirs(fill(ours), c)


def _without_biases(ours: Weights) -> Weights:
    """With zeros where GPT-2 has a bias and ours has none."""
    modules = [name.removesuffix(".weight") for name in ours if name.endswith(".weight")]
    biased = [m for m in modules if m == "norm" or m.startswith("blocks.")]
    zeros = {f"{m}.bias": torch.zeros(len(ours[f"{m}.weight"])) for m in biased}
    return zeros | ours


def _to_theirs(ours: Weights, c: ModelConfig) -> Weights:
    kv = c.n_kv_head * c.head_dim
    rows = {"attn.c_attn": [c.n_embd, kv, kv], "mlp.c_fc": [c.n_hidden, c.n_hidden]}
    theirs = {}
    for our, names in parameters(c):
        if our in ours:
            module = ".".join(our.split(".")[2:-1])
            parts = ours[our].split(rows[module] if len(names) > 1 else len(ours[our]))
            theirs |= dict(zip(names, parts, strict=True))
    return transposed(theirs)


def transposed(theirs: Weights) -> Weights:
    """GPT-2's matrices the other way round; all else as it is."""
    return {
        name: weight.t() if name.startswith("transformer.h.") and weight.dim() == 2 else weight
        for name, weight in theirs.items()
    }


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
        "activation_function": "gelu" if c.mlp == "gelu_erf" else "gelu_new",
        "layer_norm_epsilon": c.norm_eps,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": 0.0,
    }


# --- in ----------------------------------------------------------------------------------------


def from_config(config: dict, names: Collection[str], n_vocab: int) -> ModelConfig:
    """The architecture that a config.json describes, with a vocabulary of n_vocab ids. names: those
    of its weights. KeyError where a size is missing; UserError where ours does not express it."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"model_type={family!r} is none of {', '.join(FAMILIES)}")
    if config.get("quantization_config"):
        raise UserError("its weights are quantized; take those in float32, float16 or bfloat16")
    shape = _of_gpt2(config) if family == "gpt2" else _of_llama(config, family)
    tied = config.get("tie_word_embeddings")
    rows = config["vocab_size"]
    return ModelConfig(
        **FAMILIES[family] | shape,
        tie_weights="lm_head.weight" not in names if tied is None else tied,
        n_vocab=n_vocab,
        vocab_size=rows if rows >= n_vocab else None,
    )


def _of_llama(config: dict, family: str) -> dict:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    bias = bool(config.get("attention_bias"))
    layers = {*(config.get("layer_types") or [])} - {"full_attention"}
    _refuse_others(
        hidden_act=(config.get("hidden_act", "silu"), "silu"),
        rope_type=(rope.get("rope_type", rope.get("type", "default")), "default"),
        partial_rotary_factor=(rope.get("partial_rotary_factor", 1.0), 1.0),
        head_dim=(config.get("head_dim") or width // heads, width // heads),
        # Qwen3's has biases in attention alone, Llama's in both or in neither
        attention_bias=(bias, bias and family == "llama"),
        mlp_bias=(bool(config.get("mlp_bias")), bias),
        use_sliding_window=(bool(config.get("use_sliding_window")), False),
        layer_types=(sorted(layers), []),
    )
    return {
        "block_size": config["max_position_embeddings"],
        "n_layer": config["num_hidden_layers"],
        "n_head": heads,
        "n_kv_head": config.get("num_key_value_heads") or heads,
        "n_embd": width,
        "n_hidden": config["intermediate_size"],
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "bias": bias,
        "qk_norm": family == "qwen3",
    }


def _of_gpt2(config: dict) -> dict:
    activation = config.get("activation_function", "gelu_new")
    _refuse_others(
        activation_function=(activation, activation if activation in GELUS else "gelu_new"),
        scale_attn_weights=(config.get("scale_attn_weights", True), True),
        scale_attn_by_inverse_layer_idx=(
            bool(config.get("scale_attn_by_inverse_layer_idx")),
            False,
        ),
        add_cross_attention=(bool(config.get("add_cross_attention")), False),
    )
    return {
        "position": "learned",
        "block_size": config["n_positions"],
        "n_layer": config["n_layer"],
        "n_head": config["n_head"],
        "n_embd": config["n_embd"],
        "n_hidden": config.get("n_inner") or 4 * config["n_embd"],
        "mlp": GELUS[activation],
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "bias": True,
        "dropout": config.get("resid_pdrop", 0.1),
    }


def _refuse_others(**values: tuple) -> None:
    """name=(theirs, what is built here)."""
    for name, (theirs, ours) in values.items():
        if theirs != ours:
            raise UserError(f"{name}={theirs!r} is not built here; {name}={ours!r} is")


def from_weights(c: ModelConfig, theirs: Weights) -> Weights:
    """Our weights, float32. UserError where some are missing, or there are others."""
    if "wte.weight" in theirs:  # some GPT-2s were saved without the outer module
        theirs = {_outer(name): weight for name, weight in theirs.items()}
    theirs = transposed({n: w for n, w in theirs.items() if not CONSTANTS.search(n)})
    if c.tie_weights:
        theirs.pop("lm_head.weight", None)
    if c.n_layer > len(theirs):
        raise UserError(f"n_layer={c.n_layer}, but there are {len(theirs)} weights; is it whole?")
    ours = {}
    for our, names in parameters(c):
        if names[0] in theirs and (c.bias or our.endswith(".weight")):
            absent = [name for name in names if name not in theirs]
            _refuse_weights(absent, "are missing")
            ours[our] = torch.cat([theirs.pop(name).float() for name in names])
    _refuse_weights(sorted(theirs), "are not built here")
    for name in ("wte.weight", "lm_head.weight"):
        if name in ours:
            ours[name] = _fit_rows(ours[name], c)
    return ours


def _outer(name: str) -> str:
    return name if name.startswith("lm_head.") else f"transformer.{name}"


def _refuse_weights(names: list[str], what: str) -> None:
    if names:
        more = " and more" if len(names) > 3 else ""
        raise UserError(f"the weights {', '.join(names[:3])}{more} {what}")


def _fit_rows(rows: torch.Tensor, c: ModelConfig) -> torch.Tensor:
    """(theirs, n_embd) -> (vocab_size, n_embd): ids that the model has no row for get the mean of
    all rows, whose logit is the mean of logits, so that nothing chooses them untrained. Rows that
    are not those of vocab_size stay as they are: their shape tells."""
    if len(rows) >= c.n_vocab or c.vocab_size - c.n_vocab >= 64:
        return rows
    added = rows.mean(dim=0).expand(max(0, c.n_vocab - len(rows)), -1)
    rows = torch.cat([rows, added])
    padding = rows.new_zeros(c.vocab_size - len(rows), rows.shape[1])
    return torch.cat([rows, padding])
