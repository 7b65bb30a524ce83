"""A checkpoint in the formats of other tools: a Hugging Face directory, a GGUF file.

    python export.py --out_dir=out-sanguo-sft --to=sanguo-hf
    python export.py --format=gguf --out_dir=out-sanguo-sft --to=sanguo.gguf

transformers and vLLM load the directory as they load any (AutoModelForCausalLM, AutoTokenizer, no
code of ours), llama.cpp the file. Weights are float32. The chat template writes what tokenizer.py's
`render` writes: names of special tokens inside a message stay plain text. For that it sets HIDDEN
between `<` and `|`, which the exported tokenizer takes away again once special tokens are found.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file

from checkpoint import Checkpoint, load_checkpoint
from configurator import UserError, command, configure, repo_path, show_path, written_aside
from hugging_face import family_of, to_hugging_face
from tokenizer import END, END_OF_TEXT, GPT2_PATTERN, QWEN2_PATTERN, ROLES

HIDDEN = "\ue000"  # a private character, so that no text has it
ROLE_NAMES = ", ".join(f"'{role}': '{token}'" for role, token in ROLES.items())
CHAT_TEMPLATE = (
    "{% set names = {" + ROLE_NAMES + "} %}"
    "{% for message in messages %}"
    "{% if message['role'] not in names %}{{ raise_exception('unknown role') }}{% endif %}"
    "{{ names[message['role']] + message['content'] | replace('<|', '<" + HIDDEN + "|') + "
    f"'{END}'" + " }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ROLES["assistant"] + "' }}{% endif %}"
)


@dataclass
class Settings:
    format: Literal["hf", "gguf"] = "hf"  # hf: a directory; gguf: a file
    out_dir: str = "out-sanguo-sft"  # the run whose best checkpoint leaves
    to: str = ""  # directory or file to write


def tokenizer_text(checkpoint: Checkpoint) -> str:
    """tokenizer.json, which lets HIDDEN vanish behind the search for special tokens."""
    content = json.loads(checkpoint.tokenizer.text)
    content["normalizer"] = {"type": "Replace", "pattern": {"String": HIDDEN}, "content": ""}
    return json.dumps(content, ensure_ascii=False, indent=1)


def tokenizer_config(checkpoint: Checkpoint) -> dict:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": checkpoint.model.config.block_size,
        "eos_token": END if checkpoint.answers else END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        # a model that only continues has no template: all of its text is plain
        "split_special_tokens": not checkpoint.answers,
    }
    return config | ({"chat_template": CHAT_TEMPLATE} if checkpoint.answers else {})


def write_hugging_face(checkpoint: Checkpoint, to: Path) -> None:
    """A directory, written aside and renamed. UserError where something is there."""
    config, weights = to_hugging_face(checkpoint.model)
    ends = {
        "eos_token_id": sorted(checkpoint.tokenizer.stop_ids),
        "pad_token_id": checkpoint.tokenizer.end_of_text,
        "bos_token_id": None,
    }
    aside = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(contiguous, aside / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": config | ends,
        "generation_config.json": ends,
        "tokenizer_config.json": tokenizer_config(checkpoint),
    }
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (aside / name).write_text(text, encoding="utf-8")
    (aside / "tokenizer.json").write_text(tokenizer_text(checkpoint), encoding="utf-8", newline="")
    aside.rename(to)


def write_gguf(checkpoint: Checkpoint, to: Path) -> None:
    """A GGUF file by the gguf package. UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("gguf is not installed; run pip install gguf==0.19.0") from None
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    c, family = model.config, family_of(model.config)
    config, weights = to_hugging_face(model)
    with written_aside(to) as aside:
        writer = gguf.GGUFWriter(aside, family)
        writer.add_name(to.stem)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_block_count(c.n_layer)
        writer.add_context_length(c.block_size)
        writer.add_embedding_length(c.n_embd)
        writer.add_feed_forward_length(c.n_hidden)
        writer.add_head_count(c.n_head)
        if family == "gpt2":
            writer.add_layer_norm_eps(c.norm_eps)
        else:
            writer.add_head_count_kv(c.n_kv_head)
            writer.add_key_length(c.head_dim)
            writer.add_value_length(c.head_dim)
            writer.add_rope_dimension_count(c.head_dim)
            writer.add_rope_freq_base(c.rope_theta)
            writer.add_layer_norm_rms_eps(c.norm_eps)
            writer.add_vocab_size(c.n_vocab)
        add_vocabulary(writer, gguf.TokenType, checkpoint)
        arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
        names = gguf.get_tensor_name_map(arch, c.n_layer)
        for name, weight in weights.items():
            their = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(their, as_gguf(name, weight, c, family))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def as_gguf(name: str, weight: torch.Tensor, c, family: str) -> np.ndarray:
    """A weight as llama.cpp wants it: GPT-2's matrices as here, and for Llama the rows of queries
    and keys in pairs that rotate together."""
    if family == "gpt2" and weight.dim() == 2 and ".h." in name:
        weight = weight.t()
    heads = {"q_proj": c.n_head, "k_proj": c.n_kv_head}.get(name.split(".")[-2])
    if family == "llama" and heads:
        weight = weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
    return weight.contiguous().numpy()


def add_vocabulary(writer, kinds, checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer
    content = json.loads(tokenizer.text)
    special = {token["id"]: token["content"] for token in content["added_tokens"]}
    by_id = {id: token for token, id in content["model"]["vocab"].items()} | special
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    pre = {QWEN2_PATTERN: "qwen2", GPT2_PATTERN: "gpt-2"}.get(pattern)
    if pre is None:
        raise UserError("the tokenizer's split pattern is none that llama.cpp knows by name")
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([by_id[id] for id in range(tokenizer.n_vocab)])
    writer.add_token_types(
        [kinds.CONTROL if id in special else kinds.NORMAL for id in range(tokenizer.n_vocab)]
    )
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    end = tokenizer.end if checkpoint.answers else tokenizer.end_of_text
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(tokenizer.end)
    writer.add_pad_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)
    if checkpoint.answers:
        writer.add_chat_template(CHAT_TEMPLATE.replace(HIDDEN, ""))


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if not config.to:
        raise UserError("to='' names nothing; pass --to=, a directory or for gguf a file")
    to = repo_path(config.to)
    if to.exists():
        raise UserError(f"{show_path(to)} is there; delete it, or name another --to=")
    checkpoint = load_checkpoint(repo_path(config.out_dir))
    write: dict[str, Callable] = {"hf": write_hugging_face, "gguf": write_gguf}
    to.parent.mkdir(parents=True, exist_ok=True)
    write[config.format](checkpoint, to)
    size = sum(f.stat().st_size for f in ([to] if to.is_file() else to.iterdir()))
    print(f"{show_path(to)}: {family_of(checkpoint.model.config)}, {size / 1e6:.1f} MB, float32")


if __name__ == "__main__":
    command(main)
