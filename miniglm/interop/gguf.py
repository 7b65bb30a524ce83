"""GGUF, the file that llama.cpp reads.

llama.cpp finds special tokens in messages too and takes nothing away afterwards, so in the file the
special tokens themselves have HIDDEN in their names, which no message then holds.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType

from configurator import UserError
from miniglm.chat import END, HIDDEN, ROLES, chat_template
from miniglm.interop.hugging_face import family_of, to_their_names
from miniglm.tokenizer import PRE_TOKENIZERS, Tokenizer
from model import GPT, ModelConfig

TYPES = {  # how a matrix is stored, and what the file calls that
    "float32": (GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def write_gguf(
    model: GPT, tokenizer: Tokenizer, answers: bool, path: Path, dtype: str = "float32"
) -> None:
    """answers: whether it is a chat model; dtype: one of TYPES. Raises UserError if llama.cpp has
    no such architecture or split pattern, or the type does not fit a matrix."""
    c = model.config
    family = family_of(c)
    if c.mlp == "gelu_erf":
        raise UserError("mlp='gelu_erf': llama.cpp's GPT-2 has only the tanh form, mlp='gelu'")
    kind, file_type = TYPES[dtype]
    values = shape(c) | vocabulary(tokenizer)
    values |= {"add_file_type": file_type, "add_quantization_version": gguf.GGML_QUANT_VERSION}
    if answers:
        roles = {role: hidden(name) for role, name in ROLES.items()}
        plain = f"message['content'] | replace('{HIDDEN}', '')"
        values["add_chat_template"] = chat_template(roles, hidden(END), plain)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], c.n_layer)
    writer = gguf.GGUFWriter(path, family)
    try:
        for method, value in values.items():
            getattr(writer, method)(value)
        for name, weight in to_their_names(model).items():
            llama_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            array = for_llama_cpp(name, weight, c, family)
            # as llama.cpp's converter has it
            stays = array.ndim == 1 or llama_name == "position_embd.weight"
            add_tensor(writer, llama_name, array, GGMLQuantizationType.F32 if stays else kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def add_tensor(
    writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: GGMLQuantizationType
) -> None:
    """Adds an array, stored as kind. Raises UserError if its rows are no multiple of a block."""
    try:
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    except gguf.quants.QuantError:
        raise UserError(
            f"{name} has rows of {array.shape[-1]} values; q8_0 takes blocks of 32, so pass "
            "--dtype=float16"
        ) from None


def shape(c: ModelConfig) -> dict:
    """The architecture, by the writer's methods that take it."""
    values = {
        "add_block_count": c.n_layer,
        "add_context_length": c.block_size,
        "add_embedding_length": c.n_embd,
        "add_feed_forward_length": c.n_hidden,
        "add_head_count": c.n_head,
    }
    if c.norm == "layernorm":
        return values | {"add_layer_norm_eps": c.norm_eps}
    return values | {
        "add_layer_norm_rms_eps": c.norm_eps,
        "add_head_count_kv": c.n_kv_head,
        "add_key_length": c.head_dim,
        "add_value_length": c.head_dim,
        "add_rope_dimension_count": c.head_dim,
        "add_rope_freq_base": c.rope_theta,
    }


def for_llama_cpp(name: str, weight: torch.Tensor, c: ModelConfig, family: str) -> np.ndarray:
    """A weight, by Hugging Face's name. Llama's rows of queries and keys are reordered so that
    pairs which rotate together are neighbours: (i, i + head_dim / 2) -> (2 i, 2 i + 1)."""
    heads = {"q_proj": c.n_head, "k_proj": c.n_kv_head}.get(name.split(".")[-2])
    if family == "llama" and heads:
        pairs = weight.view(heads, 2, c.head_dim // 2, *weight.shape[1:])
        weight = pairs.transpose(1, 2).reshape(weight.shape)
    return weight.contiguous().numpy()


def vocabulary(tokenizer: Tokenizer) -> dict:
    """The tokenizer, by the writer's methods that take it."""
    kinds, content = gguf.TokenType, json.loads(tokenizer.text)
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    if pattern not in PRE_TOKENIZERS:
        raise UserError(f"llama.cpp has no name for the tokenizer's split pattern: {pattern}")
    special = {token["id"]: hidden(token["content"]) for token in content["added_tokens"]}
    entries = {id: token for token, id in content["model"]["vocab"].items()} | special
    ids = range(tokenizer.n_vocab)
    return {
        "add_tokenizer_model": "gpt2",  # any byte-level BPE
        "add_tokenizer_pre": PRE_TOKENIZERS[pattern],
        "add_token_list": [entries[id] for id in ids],
        "add_token_types": [kinds.CONTROL if id in special else kinds.NORMAL for id in ids],
        "add_token_merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "add_bos_token_id": tokenizer.end_of_text,
        "add_eos_token_id": tokenizer.end_of_text,
        "add_eot_token_id": tokenizer.end,
        "add_pad_token_id": tokenizer.end_of_text,
        "add_add_bos_token": False,
    }


def hidden(name: str) -> str:
    """The name of a special token, as no text contains it."""
    return name[0] + HIDDEN + name[1:]
