"""Our models as Hugging Face has them, both ways: GPT-2, Llama, Qwen2, Qwen3.

    write_directory(model, tokenizer, answers, path)      for export.py
    config, weights = to_hugging_face(model)              what that directory says and holds
    model_config = from_config(config, names, n_vocab)    for miniglm/interop/foreign.py
    weights = from_weights(model_config, weights)

A family is a table of names. c_attn stacks the rows of queries, keys and values, SwiGLU's c_fc
those of gate and up. GPT-2 stores its matrices transposed, and has zeros for biases that are off
here.

The template of our chat format writes what miniglm/tokenizer.py's `render` writes: names of special
tokens inside a message stay plain text. It sets HIDDEN behind each `<` of a message (and whatever
else an adopted tokenizer's added tokens begin with), and the exported tokenizer removes HIDDEN once
special tokens have been found. A base's own template and tokenizer go out as they came.
"""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from configurator import UserError
from miniglm.chat import hiding_template
from miniglm.tokenizer import NFC, UNHIDE, Tokenizer
from model import GPT, ModelConfig

Weights = dict[str, torch.Tensor]


# our settings that a family fixes
ROPE = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu"}
FAMILIES = {
    "qwen3": ROPE | {"qk_norm": True, "bias": False, "qkv_bias": False},
    "qwen2": ROPE | {"qk_norm": False, "bias": False, "qkv_bias": True},
    "llama": ROPE | {"qk_norm": False},
    "gpt2": {"position": "learned", "norm": "layernorm", "qk_norm": False, "bias": True},
}
CLASSES = {family: f"{family.capitalize()}ForCausalLM" for family in FAMILIES}
CLASSES["gpt2"] = "GPT2LMHeadModel"
SAME = {"minimind": "qwen3"}  # MiniMind-3's own class, under the same names
# our rope_scaling's values, which Llama alone has
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
GELUS = {"gelu": "gelu_new", "gelu_erf": "gelu"}  # our mlp -> GPT-2's activation_function

# names of ours -> those of Llama and Qwen, those of GPT-2
SETTINGS = {
    "block_size": ("max_position_embeddings", "n_positions"),
    "n_layer": ("num_hidden_layers", "n_layer"),
    "n_head": ("num_attention_heads", "n_head"),
    "n_kv_head": ("num_key_value_heads", ""),
    "n_embd": ("hidden_size", "n_embd"),
    "head_dim": ("head_dim", ""),
    "n_hidden": ("intermediate_size", "n_inner"),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon"),
    "rope_theta": ("rope_theta", ""),
    "bias": ("attention_bias", ""),
    "dropout": ("", "resid_pdrop"),
}
OUTER = {
    "wte": ("model.embed_tokens", "transformer.wte"),
    "wpe": ("", "transformer.wpe"),
    "norm": ("model.norm", "transformer.ln_f"),
    "lm_head": ("lm_head", "lm_head"),
}
LAYER = {  # several names are one stack of rows in ours
    "norm_1": ("input_layernorm", "ln_1"),
    "attn.c_attn": ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn.c_attn"),
    "attn.c_proj": ("self_attn.o_proj", "attn.c_proj"),
    "attn.q_norm": ("self_attn.q_norm", ""),
    "attn.k_norm": ("self_attn.k_norm", ""),
    "norm_2": ("post_attention_layernorm", "ln_2"),
    "mlp.c_fc": ("mlp.gate_proj mlp.up_proj", "mlp.c_fc"),
    "mlp.c_proj": ("mlp.down_proj", "mlp.c_proj"),
}
# what transformers takes where a config.json does not say
DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "activation_function": "gelu_new",
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.1,
}
# masks and rotary tables that old files keep beside the weights
CONSTANTS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")


def family_of(config: ModelConfig) -> str:
    """A key of FAMILIES. Raises UserError, naming the settings, if none of them fits."""
    if config.model != "gpt":
        raise UserError(f"model={config.model!r} has no form that other tools read; gpt has")
    family = "qwen2" if config.qkv_bias and not config.bias else "llama"
    family = "qwen3" if config.qk_norm else family
    family = "gpt2" if config.position == "learned" else family
    wanted = FAMILIES[family] | ({} if family == "llama" else {"rope_scaling": None})
    if family == "gpt2":
        mlp = config.mlp if config.mlp in GELUS else "gelu"
        # biases that are off become zeros
        wanted = wanted | {"n_kv_head": config.n_head, "mlp": mlp, "bias": config.bias}
        wanted |= {"qkv_bias": config.bias, "head_dim": config.n_embd // config.n_head}
    other = [f"{k}={getattr(config, k)!r}" for k, v in wanted.items() if getattr(config, k) != v]
    if other:
        raise UserError(
            f"{', '.join(other)}: no architecture of other tools has that beside "
            f"position={config.position!r}, qk_norm={config.qk_norm}"
        )
    return family


def names_in(family: str, table: dict[str, tuple[str, str]]) -> dict[str, str]:
    """The column of a table that is the family's, without what it lacks."""
    columns = {ours: theirs[family == "gpt2"] for ours, theirs in table.items()}
    return {ours: theirs for ours, theirs in columns.items() if theirs}


def parameters(c: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """Each parameter of ours that may exist, and those of theirs whose rows it stacks."""
    family = family_of(c)
    modules = {our: [their] for our, their in names_in(family, OUTER).items()}
    if c.tie_weights:
        del modules["lm_head"]
    for layer in range(c.n_layer):
        prefix = f"transformer.h.{layer}" if family == "gpt2" else f"model.layers.{layer}"
        for our, names in names_in(family, LAYER).items():
            modules[f"blocks.{layer}.{our}"] = [f"{prefix}.{name}" for name in names.split()]
    for our, names in modules.items():
        for kind in ("weight", "bias"):
            yield f"{our}.{kind}", [f"{name}.{kind}" for name in names]


def transposed(weights: Weights) -> Weights:
    """With GPT-2's matrices, by their names there, the other way round."""
    return {
        name: w.t() if name.startswith(("transformer.h.", "h.")) and w.dim() == 2 else w
        for name, w in weights.items()
    }


# --- out ---------------------------------------------------------------------------------------


def write_directory(
    model: GPT, tokenizer: Tokenizer, answers: bool, path: Path, dtype: str = "float32"
) -> None:
    """A directory that transformers loads. answers: whether it is a chat model; dtype: torch's name
    of the weights'."""
    config, weights = to_hugging_face(model, dtype)
    ends = {
        "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.end_of_text,
        "bos_token_id": None,
    }
    path.mkdir(parents=True)
    files = {"config.json": config | ends, "generation_config.json": ends}
    files |= tokenizer_files(tokenizer, answers, model.config.block_size)
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(contiguous, path / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (path / name).write_text(text, encoding="utf-8", newline="")


def to_hugging_face(model: GPT, dtype: str = "float32") -> tuple[dict, Weights]:
    """config.json and the weights, without the padding of the vocabulary."""
    weights = transposed(to_their_names(model))
    weights = {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
    return shape_of(model.config) | {"dtype": dtype}, weights


def to_their_names(model: GPT) -> Weights:
    """The weights by their names in the family, matrices as torch has them."""
    c = model.config
    ours = {name: weight.detach().float() for name, weight in model.named_parameters()}
    for name in {"wte.weight", "lm_head.weight"} & ours.keys():
        ours[name] = ours[name][: c.n_vocab]
    has_biases = family_of(c) == "gpt2"
    kv = c.n_kv_head * c.head_dim
    # of gate, up; of queries, keys, values
    rows = {2: [c.n_hidden] * 2, 3: [c.n_head * c.head_dim, kv, kv]}
    theirs = {}
    for our, names in parameters(c):
        weight = ours.get(our)
        if weight is None and has_biases and our.startswith(("norm.", "blocks.")):
            weight = torch.zeros(len(ours[our.replace("bias", "weight")]))
        if weight is not None:
            theirs |= zip(names, weight.split(rows.get(len(names), len(weight))), strict=True)
    return theirs


def shape_of(c: ModelConfig) -> dict:
    """What config.json says of the architecture."""
    family = family_of(c)
    shape = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": c.n_vocab,
        "tie_word_embeddings": c.tie_weights,
    }
    shape |= {theirs: getattr(c, ours) for ours, theirs in names_in(family, SETTINGS).items()}
    if family == "gpt2":
        more = {"embd_pdrop": c.dropout, "attn_pdrop": 0.0}
    else:  # readers older than rope_parameters look for these two beside it
        scaled = {"rope_type": "default"}
        if c.rope_scaling:
            scaled = {"rope_type": "llama3"} | dict(zip(LLAMA3, c.rope_scaling, strict=True))
        more = {"rope_parameters": scaled | {"rope_theta": c.rope_theta}}
        more |= {"rope_scaling": scaled} if c.rope_scaling else {}
    return shape | _implied(c) | more


def _implied(c: ModelConfig) -> dict:
    """What follows from a family or from other settings; a config.json that says otherwise
    describes a model that is not built here."""
    if c.position == "learned":
        return {
            "activation_function": GELUS[c.mlp],
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        }
    return {
        "hidden_act": "silu",
        "attention_bias": c.bias,
        "mlp_bias": c.bias,  # Llama has biases in both or in neither
        "use_sliding_window": False,
    }


def tokenizer_files(tokenizer: Tokenizer, answers: bool, block_size: int) -> dict[str, dict]:
    """tokenizer.json and tokenizer_config.json, by name."""
    content = json.loads(tokenizer.text)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "eos_token": tokenizer.special[tokenizer.end if answers else tokenizer.end_of_text],
        "pad_token": tokenizer.special[tokenizer.end_of_text],
        "clean_up_tokenization_spaces": False,
    }
    if chat := content.pop("chat", None):
        config |= {"chat_template": chat.pop("template")} | chat
        return {"tokenizer.json": content, "tokenizer_config.json": config}
    # a model that only continues text has no template: all of its text is plain
    config["split_special_tokens"] = not answers
    if answers:
        config["chat_template"] = hiding_template(tokenizer.special.values())
    return {"tokenizer.json": unhiding(content), "tokenizer_config.json": config}


def unhiding(tokenizer: dict) -> dict:
    """A tokenizer.json that removes HIDDEN after the search for special tokens."""
    is_nfc = tokenizer["normalizer"] == NFC
    both = {"type": "Sequence", "normalizers": [UNHIDE, NFC]}
    return tokenizer | {"normalizer": both if is_nfc else UNHIDE}


# --- in ----------------------------------------------------------------------------------------


def from_config(config: dict, names: Collection[str], n_vocab: int) -> ModelConfig:
    """The architecture that a config.json describes, with a vocabulary of n_vocab ids. names: those
    of its weights. Raises KeyError if a size is missing, UserError if ours does not express it."""
    family = config.get("model_type")
    family = SAME.get(family, family)
    if family not in FAMILIES:
        raise UserError(f"model_type={family!r} is none of {', '.join(FAMILIES)}")
    if config.get("quantization_config"):
        raise UserError("its weights are quantized; take those in float32, float16 or bfloat16")
    # before transformers 5 rope_parameters were called rope_scaling, and rope_type just type
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    given = config | {"rope_type": rope.get("type")} | rope
    theirs = DEFAULTS | {key: value for key, value in given.items() if value is not None}
    settings = {our: theirs[their] for our, their in names_in(family, SETTINGS).items()}
    if family == "gpt2":
        if theirs["activation_function"] == "gelu_pytorch_tanh":
            theirs["activation_function"] = "gelu_new"  # the same function
        settings["mlp"] = "gelu_erf" if theirs["activation_function"] == "gelu" else "gelu"
    if theirs.get("rope_type") == "llama3" and family == "llama":
        settings["rope_scaling"] = [theirs[name] for name in LLAMA3]
    tied = theirs.get("tie_word_embeddings", "lm_head.weight" not in names)
    rows = theirs["vocab_size"]
    c = ModelConfig(
        **settings | FAMILIES[family],
        tie_weights=tied,
        n_vocab=n_vocab,
        vocab_size=rows if rows >= n_vocab else None,
    )
    _refuse_others(theirs, c)
    return c


def _refuse_others(theirs: dict, c: ModelConfig) -> None:
    rope_type = "llama3" if c.rope_scaling else "default"
    built = _implied(c) | {"rope_type": rope_type, "partial_rotary_factor": 1.0}
    built["layer_types"] = ["full_attention"]
    layer_types = sorted({"full_attention", *theirs.get("layer_types", [])})
    for name, ours in built.items():
        value = (theirs | {"layer_types": layer_types}).get(name, ours)
        if value != ours:
            raise UserError(f"{name}={value!r} is not built here; {name}={ours!r} is")


def from_weights(c: ModelConfig, theirs: Weights, frozen: bool = False) -> Weights:
    """Our weights, float32; frozen: the blocks' matrices in their own dtype. theirs: matrices as
    torch has them, of which those that were read are removed. Raises UserError if some of a stack
    are missing, or there are others."""
    if "wte.weight" in theirs:  # some GPT-2s were saved without the outer module
        outer = {name: f"transformer.{name}" for name in theirs if not name.startswith("lm_head.")}
        theirs = {outer.get(name, name): weight for name, weight in theirs.items()}
    theirs = {name: weight for name, weight in theirs.items() if not CONSTANTS.search(name)}
    if c.tie_weights:
        theirs.pop("lm_head.weight", None)
    if c.n_layer > len(theirs):
        raise UserError(f"n_layer={c.n_layer}, but there are {len(theirs)} weights; is it whole?")
    ours = {}
    for our, names in parameters(c):
        has = c.qkv_bias if our.endswith("c_attn.bias") else c.bias or our.endswith(".weight")
        if names[0] in theirs and has:
            _refuse_weights([name for name in names if name not in theirs], "are missing")
            parts = [theirs.pop(name) for name in names]
            if not (frozen and our.startswith("blocks.") and parts[0].dim() > 1):
                parts = [part.float() for part in parts]
            ours[our] = torch.cat(parts)
    _refuse_weights(sorted(theirs), "are not built here")
    for name in {"wte.weight", "lm_head.weight"} & ours.keys():
        ours[name] = _fit_rows(ours[name], c)
    return ours


def _refuse_weights(names: list[str], what: str) -> None:
    if names:
        more = " and more" if len(names) > 3 else ""
        raise UserError(f"the weights {', '.join(names[:3])}{more} {what}")


def _fit_rows(rows: torch.Tensor, c: ModelConfig) -> torch.Tensor:
    """(theirs, n_embd) -> (vocab_size, n_embd): ids that the model has no row for get the mean of
    all rows, whose logit is the mean of logits, so that untrained nothing chooses them. Rows that
    do not belong to vocab_size stay as they are: their shape tells."""
    if len(rows) >= c.n_vocab or c.vocab_size - c.n_vocab >= 64:
        return rows
    added = rows.mean(dim=0).expand(c.n_vocab - len(rows), -1)
    padding = rows.new_zeros(c.vocab_size - c.n_vocab, rows.shape[1])
    return torch.cat([rows, added, padding])
