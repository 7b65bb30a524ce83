"""GGUF, the file that llama.cpp reads, and a Modelfile, with which Ollama takes it.

llama.cpp finds special tokens in messages too and takes nothing away afterwards. In our chat format
the special tokens themselves have HIDDEN in their names there, which no message then holds. A base
with a format of its own keeps its names and its template, and finds them in messages, too.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import QuantError, quantize

from configurator import UserError
from miniglm.chat import END, HIDDEN, ROLES, chat_template, environment, hidden
from miniglm.interop.hugging_face import family_of, to_their_names
from miniglm.tokenizer import PRE_TOKENIZERS, Tokenizer
from model import GPT, ModelConfig, rotary_frequencies

TYPES = {  # how a matrix is stored, and what the file calls that
    "float32": (GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# what stands for messages where a template is looked at
TALK = {"\ue001": "system", "\ue002": "user", "\ue003": "assistant", "\ue004": "user"}
GO_TEMPLATE = (
    "{{ if .System }}%s{{ .System }}%s{{ else }}%s{{ end }}"
    '{{ range .Messages }}{{ if eq .Role "user" }}%s{{ .Content }}%s'
    '{{ else if eq .Role "assistant" }}%s{{ .Content }}%s{{ end }}{{ end }}%s'
)


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
    values = shape(c) | vocabulary(tokenizer, answers)
    values |= {"add_file_type": file_type, "add_quantization_version": gguf.GGML_QUANT_VERSION}
    if answers:
        values["add_chat_template"] = template_of(tokenizer)
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
            stored = GGMLQuantizationType.F32 if stays else kind
            writer.add_tensor(llama_name, quantize(array, stored), raw_dtype=stored)
        if c.rope_scaling:
            writer.add_tensor("rope_freqs.weight", rope_divisors(c))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except QuantError as error:  # rows that are no multiple of 32
        raise UserError(f"{llama_name}: {error}; pass --dtype=float16") from None
    finally:
        writer.close()


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


def rope_divisors(c: ModelConfig) -> np.ndarray:
    """What llama.cpp divides the frequencies of rope_theta alone by, (head_dim / 2,), float32."""
    plain = rotary_frequencies(replace(c, rope_scaling=None))
    return (plain / rotary_frequencies(c)).float().numpy()


def for_llama_cpp(name: str, weight: torch.Tensor, c: ModelConfig, family: str) -> np.ndarray:
    """A weight, by Hugging Face's name. Llama's rows of queries and keys are reordered so that
    pairs which rotate together are neighbours: (i, i + head_dim / 2) -> (2 i, 2 i + 1)."""
    heads = {"q_proj": c.n_head, "k_proj": c.n_kv_head}.get(name.split(".")[-2])
    if family == "llama" and heads:
        pairs = weight.view(heads, 2, c.head_dim // 2, *weight.shape[1:])
        weight = pairs.transpose(1, 2).reshape(weight.shape)
    return weight.contiguous().numpy()


def vocabulary(tokenizer: Tokenizer, answers: bool) -> dict:
    """The tokenizer, by the writer's methods that take it."""
    kinds, content = gguf.TokenType, json.loads(tokenizer.text)
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    if pattern not in PRE_TOKENIZERS:
        raise UserError(f"llama.cpp has no name for the tokenizer's split pattern: {pattern}")
    entries = {id: token for token, id in content["model"]["vocab"].items()}
    types = [kinds.NORMAL] * tokenizer.n_vocab
    for token in content["added_tokens"]:
        entries[token["id"]] = token["content"] if tokenizer.chat else hidden(token["content"])
        types[token["id"]] = kinds.CONTROL if token["special"] else kinds.USER_DEFINED
    id_of = {name: id for id, name in tokenizer.special.items()}
    names = tokenizer.chat.names if tokenizer.chat else {}
    return {
        "add_tokenizer_model": "gpt2",  # any byte-level BPE
        "add_tokenizer_pre": PRE_TOKENIZERS[pattern],
        "add_token_list": [entries[id] for id in range(tokenizer.n_vocab)],
        "add_token_types": types,
        "add_token_merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "add_bos_token_id": id_of.get(names.get("bos_token"), tokenizer.end_of_text),
        # llama.cpp stops at all three, older Ollamas at the first only
        "add_eos_token_id": tokenizer.end if answers else tokenizer.end_of_text,
        "add_eot_token_id": tokenizer.end,
        "add_eom_token_id": tokenizer.end_of_text,
        "add_pad_token_id": tokenizer.end_of_text,
        "add_add_bos_token": False,
    }


def template_of(tokenizer: Tokenizer) -> str:
    """The Jinja template, with the names that special tokens have in the file."""
    if tokenizer.chat:
        return json.loads(tokenizer.text)["chat"]["template"]
    roles = {role: hidden(name) for role, name in ROLES.items()}
    return chat_template(roles, hidden(END), f"message['content'] | replace('{HIDDEN}', '')")


# --- Ollama ------------------------------------------------------------------------------------


def modelfile(tokenizer: Tokenizer, name: str) -> str:
    """Ollama's description of the file `name` beside it, greedy as answers are here."""
    lines = [f"FROM ./{name}", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    if tokenizer.chat:  # Ollama would drop HIDDEN from this line
        lines.append(f'PARAMETER stop "{tokenizer.chat.end}"')
    if template := go_template(tokenizer):  # else Ollama takes the file's own
        lines.append(f'TEMPLATE """{template}"""')
    return "\n".join([*lines, ""])


def go_template(tokenizer: Tokenizer) -> str:
    """A Go template that writes what template_of's does for messages without tools, reasoning, and
    blanks at their ends; "" if that does not write each message once."""
    talk = [{"role": role, "content": mark} for mark, role in TALK.items()]
    parts = re.split(f"[{''.join(TALK)}]", file_text(tokenizer, talk, asks=True))
    if len(parts) != 5:
        return ""
    default, close = file_text(tokenizer, talk[1:2], asks=False).split(talk[1]["content"])
    answer, user, request = (part.removeprefix(close) for part in parts[2:])
    system, default = (part.removesuffix(user) for part in (parts[1], default))
    texts = parts[0], system, default, user, close, answer, close, request
    return GO_TEMPLATE % tuple(map(go, texts))


def file_text(tokenizer: Tokenizer, messages: list[dict], asks: bool) -> str:
    """What template_of's template writes."""
    if tokenizer.chat:
        return tokenizer.chat.text(messages, asks)
    template = environment().from_string(template_of(tokenizer))
    return template.render(messages=messages, add_generation_prompt=asks)


def go(text: str) -> str:
    """A text as a constant in a Go template; Ollama drops what is not printable elsewhere."""
    quoted = json.dumps(text, ensure_ascii=False)
    quoted = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in quoted)
    return f"{{{{ {quoted} }}}}" if text else ""
