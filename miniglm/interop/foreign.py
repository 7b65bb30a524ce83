"""Models of other projects, read where they lie: init_from and all that takes an out_dir take them.

    a Hugging Face directory    config.json, model.safetensors or its parts, tokenizer.json
    nanoGPT's ckpt.pt           or the directory that holds it; the tokenizer is gpt2

Names of weights are hugging_face.py's subject. Nothing is unpickled but tensors and plain values.
"""

import dataclasses
import json
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from configurator import UserError, show_path
from miniglm.interop.hugging_face import (
    Weights,
    from_config,
    from_weights,
    is_our_template,
    transposed,
)
from miniglm.tokenizer import SPECIAL_TOKENS, Tokenizer
from model import GPT, ModelConfig

GPT2_ENTRIES = 50257  # ids of GPT-2's vocabulary, which nanoGPT pads to 50,304
# of odd content
FAULTS = (LookupError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError)


def find_foreign(path: Path) -> Path | None:
    """The model that lies at path, a directory or a file; None where there is none."""
    candidates = (path, path / "ckpt.pt")
    return next((one for one in candidates if is_foreign(one)), None)


def is_foreign(path: Path) -> bool:
    """Whether a model of another project lies right here."""
    return (path / "config.json").is_file() or (path.suffix == ".pt" and path.is_file())


def foreign_run(path: Path, tokenizer: Tokenizer) -> dict:
    """What run.json says of a model of ours: architecture, and what it was trained on."""
    answers = path.is_dir() and any(map(is_our_template, _templates(path)))
    kind = "sft" if answers else "pretrain"
    architecture = dataclasses.asdict(read_config(path, tokenizer))
    return {"architecture": architecture, "settings": {}, "dataset": {"kind": kind}}


def load_foreign(path: Path, architecture: dict, device: str, changes: dict) -> GPT:
    """The model, float32. architecture: foreign_run's; changes: of it, as dropout or a lower
    block_size."""
    config = ModelConfig(**architecture)
    weights = _named(path, lambda: from_weights(config, _read_weights(path)))
    config = dataclasses.replace(config, **changes)
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: changes.get("block_size")]
    _named(path, lambda: _check_weights(weights, config))
    model = _named(path, lambda: GPT(config))
    model.load_state_dict(weights, strict=False)
    return model.to(device)


def _check_weights(weights: Weights, config: ModelConfig) -> None:
    """UserError where they are not the model's."""
    with torch.device("meta"):  # shapes alone, so that a damaged size asks for no memory
        wanted = GPT(config).state_dict()
    extra = sorted(weights.keys() - wanted.keys())
    if extra:
        raise UserError(f"the weights for {', '.join(extra)} are not built here")
    for name, weight in wanted.items():
        if name not in weights and not (config.tie_weights and name == "lm_head.weight"):
            raise UserError(f"no weights for {name}; is it whole?")
        if name in weights and weights[name].shape != weight.shape:
            shapes = f"{list(weights[name].shape)}, not {list(weight.shape)}"
            raise UserError(f"the weights for {name} are {shapes}")


def read_config(path: Path, tokenizer: Tokenizer) -> ModelConfig:
    """Its architecture, with rows for all ids of the tokenizer."""
    if path.is_file():
        return _named(path, lambda: _whole(_nanogpt_config(_load(path), tokenizer.n_vocab)))
    config = _read_json(path / "config.json")
    _named(path, lambda: _check_rows(config["vocab_size"], tokenizer))
    names = set()
    for file in weight_files(path):
        names |= _read_safetensors(file, _names_of)
    return _named(path, lambda: _whole(from_config(config, names, tokenizer.n_vocab)))


def _whole(config: ModelConfig) -> ModelConfig:
    """The same. UserError where a size is not a whole number."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type in (int, int | None) and type(value) is not int:
            raise UserError(f"{field.name}={value!r} must be a whole number")
    return config


def _check_rows(rows: int, tokenizer: Tokenizer) -> None:
    """UserError where the tokenizer has ids that the model has not, but for those added here."""
    entries = [tokenizer.entry(id) for id in range(rows, tokenizer.n_vocab)]
    strange = [entry for entry in entries if entry not in SPECIAL_TOKENS]
    if strange:
        raise UserError(
            f"its tokenizer has {strange[0]} and {len(strange) - 1} more beyond "
            f"vocab_size={rows}; they do not belong together"
        )


def weight_files(path: Path) -> list[Path]:
    """The files that hold its weights. UserError where one is missing."""
    if path.is_file():
        return [path]
    names = ["model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.is_file() and not (path / names[0]).is_file():  # transformers, too, looks there first
        names = _named(index, lambda: sorted({*_read_json(index)["weight_map"].values()}))
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"{show_path(index)} names {name!r} as a file")
        if not (path / name).is_file():
            raise UserError(
                f"{show_path(path / name)} is missing; weights are read from safetensors only"
            )
    return [path / name for name in names]


def _read_weights(path: Path) -> Weights:
    if path.is_file():
        return transposed(_compiled_off(_load(path)["model"]))
    parts = [_read_safetensors(file, load_file) for file in weight_files(path)]
    return {name: weight for part in parts for name, weight in part.items()}


# --- nanoGPT -----------------------------------------------------------------------------------


def _load(path: Path) -> dict:
    """The content of a ckpt.pt. UserError where it is anything but tensors and plain values."""
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (UnpicklingError, *FAULTS, EOFError, OSError):
        raise UserError(
            f"{show_path(path)} is damaged, or holds more than tensors and plain values, which "
            "would be code to run; save its model and model_args alone"
        ) from None
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise UserError(f"{show_path(path)} is not nanoGPT's: it lacks model or model_args")
    return content


def _nanogpt_config(content: dict, n_vocab: int) -> ModelConfig:
    """Its GPT-2, with the exact GELU and 1e-5 in the norms."""
    shape, weights = content["model_args"], _compiled_off(content["model"])
    rows = shape["vocab_size"]
    if rows < GPT2_ENTRIES:
        raise UserError(
            f"vocab_size={rows} is not GPT-2's vocabulary, {GPT2_ENTRIES:,} entries and padding; "
            "another comes without a tokenizer"
        )
    embedding = weights["transformer.wte.weight"]
    return ModelConfig(
        block_size=shape["block_size"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        n_embd=shape["n_embd"],
        dropout=shape.get("dropout", 0.0),
        bias="transformer.h.0.mlp.c_fc.bias" in weights,
        position="learned",
        norm="layernorm",
        norm_eps=1e-5,
        mlp="gelu_erf",
        qk_norm=False,
        tie_weights=torch.equal(weights.get("lm_head.weight", embedding), embedding),
        n_vocab=n_vocab,
        vocab_size=rows if rows >= n_vocab else None,
    )


def _compiled_off(weights: Weights) -> Weights:
    """Their names without what torch.compile writes before them: Hugging Face's."""
    return {name.removeprefix("_orig_mod."): weight for name, weight in weights.items()}


# --- files -------------------------------------------------------------------------------------


def _templates(path: Path) -> list:
    """Chat templates, where transformers keeps them."""
    settings, file = path / "tokenizer_config.json", path / "chat_template.jinja"
    found = [_read_json(settings).get("chat_template")] if settings.is_file() else []
    return found + ([file.read_text(encoding="utf-8", errors="replace")] if file.is_file() else [])


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{show_path(file)} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{show_path(file)} holds no object")
    return content


def _read_safetensors(file: Path, read):
    try:
        return read(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{show_path(file)} is damaged ({error})") from None


def _names_of(file: Path) -> set[str]:
    with safe_open(file, "pt") as weights:
        return {*weights.keys()}


def _named(path: Path, read):
    """read(), whose faults are told in one line with the path."""
    try:
        return read()
    except UserError as error:
        raise UserError(f"{show_path(path)}: {error}") from None
    except FAULTS as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{show_path(path)} cannot be read ({reason}); is it whole?") from None
