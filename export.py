"""A checkpoint for other tools: a Hugging Face directory, a GGUF file, or one whole checkpoint.

    python export.py --out_dir=out-sanguo-sft --to=sanguo-hf
    python export.py --format=gguf --out_dir=out-sanguo-sft --to=sanguo.gguf
    python export.py --format=merged --out_dir=out-lora --to=out-merged    # adapter and base as one

transformers loads the directory as it loads any (AutoModelForCausalLM, AutoTokenizer, no code of
ours), llama.cpp the file. Weights are float32. The chat template writes what miniglm/tokenizer.py's
`render` writes: names of special tokens inside a message stay plain text. In the directory it sets
HIDDEN behind each `<` of a message (and what else an adopted tokenizer's added tokens begin with),
which the exported tokenizer takes away again once special tokens are found. llama.cpp takes nothing
away, so in the file the special tokens themselves have HIDDEN in their names, which no message then
holds.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configurator import UserError, command, configure, repo_path, show_path, written_aside
from miniglm.checkpoint import Checkpoint, claimed, load_checkpoint, save_checkpoint
from miniglm.interop.hugging_face import chat_template, family_of, hiding_template, to_hugging_face
from miniglm.tokenizer import (
    DIGITS_PATTERN,
    END,
    END_OF_TEXT,
    GPT2_PATTERN,
    HIDDEN,
    LLAMA3_PATTERN,
    NFC,
    QWEN2_PATTERN,
    ROLES,
    UNHIDE,
)
from model import ModelConfig

# llama.cpp's names for ways of cutting text
PRE_TOKENIZERS = {
    QWEN2_PATTERN: "qwen2",
    GPT2_PATTERN: "gpt-2",
    LLAMA3_PATTERN: "llama-bpe",
    DIGITS_PATTERN: "smollm",
}


@dataclass
class Settings:
    format: Literal["hf", "gguf", "merged"] = "hf"  # for transformers; llama.cpp; our own scripts
    out_dir: str = "out-sanguo-sft"  # the run whose best checkpoint leaves
    to: str = ""  # directory or file to write


def tokenizer_text(checkpoint: Checkpoint) -> str:
    """tokenizer.json, which lets HIDDEN vanish behind the search for special tokens."""
    content = json.loads(checkpoint.tokenizer.text)
    is_nfc = content["normalizer"] == NFC
    content["normalizer"] = {"type": "Sequence", "normalizers": [UNHIDE, NFC]} if is_nfc else UNHIDE
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
    if checkpoint.answers:
        config["chat_template"] = hiding_template(checkpoint.tokenizer.special_names)
    return config


def write_hugging_face(checkpoint: Checkpoint, to: Path) -> None:
    """A directory, written aside and renamed. UserError where the disk is full."""
    config, weights = to_hugging_face(checkpoint.model)
    ends = {
        "eos_token_id": sorted(checkpoint.tokenizer.stop_ids),
        "pad_token_id": checkpoint.tokenizer.end_of_text,
        "bos_token_id": None,
    }
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    files = {
        "config.json": config | ends,
        "generation_config.json": ends,
        "tokenizer_config.json": tokenizer_config(checkpoint),
    }
    aside = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_file(contiguous, aside / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            text = json.dumps(content, ensure_ascii=False, indent=1)
            (aside / name).write_text(text, encoding="utf-8")
        text = tokenizer_text(checkpoint)
        (aside / "tokenizer.json").write_text(text, encoding="utf-8", newline="")
        aside.rename(to)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write {show_path(to)}: {reason}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# --- GGUF --------------------------------------------------------------------------------------


def write_gguf(checkpoint: Checkpoint, to: Path) -> None:
    """A file, written aside and renamed. UserError where the disk is full, or where llama.cpp has
    no such architecture or way of cutting text."""
    c = checkpoint.model.config
    family = family_of(c)
    if c.mlp == "gelu_erf":
        raise UserError("mlp='gelu_erf': llama.cpp's GPT-2 has the tanh form, mlp='gelu', alone")
    weights = to_hugging_face(checkpoint.model)[1]
    vocabulary = gguf_vocabulary(checkpoint)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], c.n_layer)
    try:
        with written_aside(to) as aside:
            writer = gguf.GGUFWriter(aside, family)
            add_shape(writer, c, family)
            for add, value in vocabulary.items():
                getattr(writer, add)(value)
            for name, weight in weights.items():
                their = names.get_name(name, try_suffixes=(".weight", ".bias"))
                writer.add_tensor(their, for_llama_cpp(name, weight, c, family))
            try:
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            finally:
                writer.close()
    except OSError as error:
        reason = error.strerror or f"the disk is full ({error})"  # numpy tells of bytes alone
        raise UserError(f"cannot write {show_path(to)}: {reason}") from None


def add_shape(writer: gguf.GGUFWriter, c: ModelConfig, family: str) -> None:
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(c.n_layer)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(c.n_hidden)
    writer.add_head_count(c.n_head)
    if family == "gpt2":
        return writer.add_layer_norm_eps(c.norm_eps)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)


def for_llama_cpp(name: str, weight: torch.Tensor, c: ModelConfig, family: str) -> np.ndarray:
    """A weight under Hugging Face's name as llama.cpp wants it: GPT-2's matrices as ours, and for
    Llama the rows of queries and keys so that pairs which turn together are neighbours, (i, i +
    head_dim / 2) -> (2 i, 2 i + 1)."""
    if name.startswith("transformer.h.") and weight.dim() == 2:
        weight = weight.t()
    heads = {"q_proj": c.n_head, "k_proj": c.n_kv_head}.get(name.split(".")[-2])
    if family == "llama" and heads:
        pairs = weight.view(heads, 2, c.head_dim // 2, *weight.shape[1:])
        weight = pairs.transpose(1, 2).reshape(weight.shape)
    return weight.contiguous().numpy()


def gguf_vocabulary(checkpoint: Checkpoint) -> dict:
    """What the writer's methods take, by their names."""
    tokenizer, kinds = checkpoint.tokenizer, gguf.TokenType
    content = json.loads(tokenizer.text)
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    if pattern not in PRE_TOKENIZERS:
        raise UserError(f"its way of cutting text is none that llama.cpp has a name for: {pattern}")
    special = {token["id"]: hidden(token["content"]) for token in content["added_tokens"]}
    entries = {id: token for token, id in content["model"]["vocab"].items()} | special
    ids = range(tokenizer.n_vocab)
    roles = {role: hidden(name) for role, name in ROLES.items()}
    plain = f"message['content'] | replace('{HIDDEN}', '')"
    template = {"add_chat_template": chat_template(roles, hidden(END), plain)}
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
    } | (template if checkpoint.answers else {})


def hidden(name: str) -> str:
    """The name of a special token that no text holds."""
    return name[0] + HIDDEN + name[1:]


def write_merged(checkpoint: Checkpoint, to: Path) -> None:
    """An out_dir whose checkpoint is an adapter merged into its base."""
    if "adapter" not in checkpoint.run:
        raise UserError(f"{show_path(checkpoint.path)} holds a whole model, and no adapter")
    run = {key: value for key, value in checkpoint.run.items() if key != "adapter"}
    run["settings"] = run["settings"] | {"lora_rank": 0}
    run["merged"] = {part: checkpoint.run["adapter"][part] for part in ("rank", "alpha", "targets")}
    with claimed(to):
        save_checkpoint(to, checkpoint.model, [], checkpoint.tokenizer, run, is_best=True)


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if not config.to:
        raise UserError("to='' names nothing; pass --to=, a directory or for gguf a file")
    to = repo_path(config.to)
    if to.exists():
        raise UserError(f"{show_path(to)} is there; delete it, or name another --to=")
    checkpoint = load_checkpoint(repo_path(config.out_dir))
    write = {"hf": write_hugging_face, "gguf": write_gguf, "merged": write_merged}
    write[config.format](checkpoint, to)
    size = sum(file.stat().st_size for file in ([to] if to.is_file() else to.rglob("*.*")))
    print(f"{show_path(to)}: {family_of(checkpoint.model.config)}, {size / 1e6:.1f} MB, float32")


if __name__ == "__main__":
    command(main)
