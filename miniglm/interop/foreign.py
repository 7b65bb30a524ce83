"""Models of other projects, read in place: init_from and whatever takes an out_dir take them.

    a Hugging Face directory    config.json, model.safetensors or its parts, tokenizer.json
    nanoGPT's ckpt.pt           or the directory that holds it; the tokenizer is gpt2

Names of weights are hugging_face.py's subject. Nothing is unpickled but tensors and plain values.
"""

import dataclasses
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from configurator import UserError, show_path
from miniglm.chat import SPECIAL_TOKENS, read_template
from miniglm.interop import hugging_face
from miniglm.interop.hugging_face import Weights
from miniglm.tokenizer import Tokenizer
from model import GPT, ModelConfig

GPT2_ENTRIES = 50257  # ids of GPT-2's vocabulary, which nanoGPT pads to 50,304
# what odd content raises
FAULTS = (LookupError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError)
FAULTS += (SafetensorError, OSError)


def find_foreign(path: Path) -> Path | None:
    """The model at path, a directory or a file; None if there is none."""
    return next((place for place in (path, path / "ckpt.pt") if is_foreign(place)), None)


def is_foreign(path: Path) -> bool:
    """Whether path itself is a model of another project."""
    return (path / "config.json").is_file() or (path.suffix == ".pt" and path.is_file())


def foreign_run(path: Path, tokenizer: Tokenizer) -> dict:
    """What run.json says of a model of ours: architecture, and what it was trained on."""
    with _readable(path):
        kind = "sft" if read_template(path) else "pretrain"
    architecture = dataclasses.asdict(read_config(path, tokenizer))
    dataset = {"kind": kind, "name": ""}
    return {"architecture": architecture, "settings": {}, "dataset": dataset, "progress": {}}


def load_foreign(
    path: Path, architecture: dict, device: str, changes: dict, frozen: bool = False
) -> GPT:
    """The model, float32; frozen: its blocks' matrices in the dtype of their file. architecture:
    foreign_run's; changes: to it, as dropout or a lower block_size."""
    config = ModelConfig(**architecture)
    with _readable(path):
        weights = hugging_face.from_weights(config, _read_weights(path), frozen)
        config = dataclasses.replace(config, **changes)
        if "wpe.weight" in weights:
            weights["wpe.weight"] = weights["wpe.weight"][: changes.get("block_size")]
        with torch.device("meta"):  # without weights of its own; a damaged size asks for no memory
            model = GPT(config)
        _check_shapes(weights, model)
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_weights:
        model.lm_head.weight = model.wte.weight
    return model.to(device)


def _check_shapes(weights: Weights, model: GPT) -> None:
    """Raises UserError if the weights are not the model's."""
    expected = {name: [*weight.shape] for name, weight in model.state_dict().items()}
    if model.config.tie_weights:
        del expected["lm_head.weight"]
    given = {name: [*weight.shape] for name, weight in weights.items()}
    for name in [*expected, *given]:
        wanted, has = expected.get(name, "none"), given.get(name, "missing")
        if has != wanted:
            raise UserError(f"the weights for {name} are {has}; the model has {wanted}")


def read_config(path: Path, tokenizer: Tokenizer) -> ModelConfig:
    """Its architecture, with rows for all ids of the tokenizer."""
    with _readable(path):
        if path.is_file():
            config = _nanogpt_config(_load_pickle(path), tokenizer.n_vocab)
        else:
            theirs = _read_json(path / "config.json")
            _check_rows(theirs["vocab_size"], tokenizer)
            names = {name for file in weight_files(path) for name in _names_in(file)}
            config = hugging_face.from_config(theirs, names, tokenizer.n_vocab)
        for name, hint in get_type_hints(ModelConfig).items():
            value = getattr(config, name)
            if hint in (int, int | None) and type(value) is not int:
                raise UserError(f"{name}={value!r} must be a whole number")
        return config


def _check_rows(rows: int, tokenizer: Tokenizer) -> None:
    """Raises UserError if the tokenizer has ids that the model has not, except those added here."""
    entries = [tokenizer.entry(id) for id in range(rows, tokenizer.n_vocab)]
    strange = [entry for entry in entries if entry not in SPECIAL_TOKENS]
    if strange:
        raise UserError(
            f"its tokenizer has {strange[0]} and {len(strange) - 1} more beyond "
            f"vocab_size={rows}; they do not belong together"
        )


def weight_files(path: Path) -> list[Path]:
    """The files that hold its weights. Raises UserError if one is missing."""
    if path.is_file():
        return [path]
    files = [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.is_file() and not files[0].is_file():  # transformers too looks there first
        with _readable(index):
            files = sorted({path / name for name in _read_json(index)["weight_map"].values()})
    for file in files:
        if not file.is_file():
            raise UserError(f"{show_path(file)} is missing; weights are read from safetensors only")
    return files


def _names_in(file: Path) -> list[str]:
    with _readable(file), safe_open(file, "pt") as weights:
        return [*weights.keys()]


def _read_weights(path: Path) -> Weights:
    """By Hugging Face's names, matrices as torch has them."""
    if path.is_file():
        return _without_prefix(_load_pickle(path)["model"])
    weights = {}
    for file in weight_files(path):
        with _readable(file):
            weights |= load_file(file)
    return hugging_face.transposed(weights)


# --- nanoGPT -----------------------------------------------------------------------------------


def _load_pickle(path: Path) -> dict:
    """The content of a ckpt.pt. Raises UserError if it is anything but tensors and plain values."""
    try:
        is_zip = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (UnpicklingError, *FAULTS, EOFError):
        raise UserError(
            f"{show_path(path)} is damaged, or holds more than tensors and plain values, which "
            "would be code to run; save its model and model_args alone"
        ) from None
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise UserError(f"{show_path(path)} is not nanoGPT's: it lacks model or model_args")
    return content


def _nanogpt_config(content: dict, n_vocab: int) -> ModelConfig:
    """Its GPT-2, with the exact GELU and 1e-5 in the norms."""
    shape, weights = content["model_args"], _without_prefix(content["model"])
    rows = shape["vocab_size"]
    if rows < GPT2_ENTRIES:
        raise UserError(
            f"vocab_size={rows} is not GPT-2's vocabulary, {GPT2_ENTRIES:,} entries and padding; "
            "another comes without a tokenizer"
        )
    embedding = weights["transformer.wte.weight"]
    tied = torch.equal(weights.get("lm_head.weight", embedding), embedding)
    gpt2 = {"model_type": "gpt2", "activation_function": "gelu", "tie_word_embeddings": tied}
    gpt2 |= {"n_positions": shape["block_size"], "resid_pdrop": shape.get("dropout", 0.0)}
    config = hugging_face.from_config(shape | gpt2, weights.keys(), n_vocab)
    bias = "transformer.h.0.mlp.c_fc.bias" in weights
    return dataclasses.replace(config, bias=bias, qkv_bias=bias)


def _without_prefix(weights: Weights) -> Weights:
    """By Hugging Face's names, without the prefix of torch.compile."""
    return {name.removeprefix("_orig_mod."): weight for name, weight in weights.items()}


# --- faults ------------------------------------------------------------------------------------


def _read_json(file: Path) -> dict:
    with _readable(file):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise UserError("holds no object")
        return content


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises UserError, one line with the path, for whatever is wrong with its content."""
    try:
        yield
    except UserError as error:
        known = show_path(path) in str(error)
        raise UserError(f"{'' if known else f'{show_path(path)}: '}{error}") from None
    except FAULTS as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{show_path(path)} cannot be read ({reason}); is it whole?") from None
