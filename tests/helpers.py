"""Small models, texts and datasets that several tests share."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from lstm_model import LSTM
from miniglm import compiling
from miniglm.checkpoint import MODELS, save_checkpoint
from miniglm.prep.writer import write_pretrain, write_sft
from miniglm.tokenizer import Tokenizer, train_tokenizer
from model import GPT, ModelConfig
from tests.runs import dialogue

TEXT = """\
话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。及秦灭之后，楚、汉分争，又并入于汉。
汉朝自高祖斩白蛇而起义，一统天下，后来光武中兴，传至献帝，遂分为三国。推其致乱之由，殆始于桓、灵二帝。
桓帝禁锢善类，崇信宦官。及桓帝崩，灵帝即位，大将军窦武、太傅陈蕃共相辅佐。时有宦官曹节等弄权，窦武、陈蕃谋诛之，
机事不密，反为所害，中涓自此愈横。建宁二年四月望日，帝御温德殿。方升座，殿角狂风骤起。
只见一条大青蛇，从梁上飞将下来，蟠于椅上。帝惊倒，左右急救入宫，百官俱奔避。须臾，蛇不见了。
"""

LACK = compiling.what_lacks("cpu")
NEEDS_COMPILER = pytest.mark.skipif(LACK is not None, reason=str(LACK))

# every option away from its default at least once
ARCHITECTURES = {
    "qwen3": {},
    "gpt2": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True}
    | {"qk_norm": False, "dropout": 0.3},
    "llama": {"qk_norm": False, "n_kv_head": 2, "rope_theta": 500.0, "tie_weights": False},
    "qwen2": {"qk_norm": False, "qkv_bias": True, "n_kv_head": 2, "head_dim": 10}
    | {"rope_scaling": [8.0, 1.0, 4.0, 8.0]},
    "one_kv_head": {"n_kv_head": 1, "norm": "layernorm", "mlp": "gelu", "n_hidden": 40},
    "learned_gqa": {"position": "learned", "n_kv_head": 2, "bias": True, "norm_eps": 1e-3}
    | {"mlp": "gelu_erf"},
    "relu2": {"mlp": "relu2"},
}
ALL_MODELS = ARCHITECTURES | {
    "lstm": {"model": "lstm"},
    "lstm_untied": {"model": "lstm", "n_layer": 1, "norm": "layernorm", "norm_eps": 1e-3}
    | {"bias": True, "tie_weights": False, "dropout": 0.3},
}


def tiny_model(seed: int = 0, **options) -> GPT | LSTM:
    """A model in eval mode whose weights are all random and large enough to matter."""
    shape = {"n_layer": 2, "n_embd": 32, "block_size": 24, "n_vocab": 50}
    if options.get("model") != "lstm":
        shape["n_head"] = 4
    config = ModelConfig(**shape | options)
    model = MODELS[config.model](config).eval()
    randomize(model, seed)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Norm weights and biases too: what stands at 1 or 0 hides its absence."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            std = 0.3 if "wte" in name or "wpe" in name or "embed" in name else 0.25
            weight.normal_(0, std, generator=generator)
        elif "bias" in name:
            weight.normal_(0, 0.3, generator=generator)
        else:
            weight.uniform_(0.5, 1.5, generator=generator)


@torch.no_grad()
def logits(model: GPT | LSTM, idx: torch.Tensor) -> torch.Tensor:
    return model.head(model(idx))


def random_ids(*shape: int, n_vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randint(n_vocab, shape, generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 320)


def write_lines(path: Path, lines: Iterable, encoding: str = "utf-8") -> Path:
    """Texts as they are, other values as JSON."""
    texts = [x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(texts) + "\n", encoding=encoding, newline="")
    return path


def write_novel(out: Path, tokenizer: Tokenizer) -> Path:
    lines = TEXT.splitlines()
    write_pretrain(out, tokenizer, {"train": lines[:3], "val": lines[3:]}, ["test"])
    return out


QUESTIONS = {
    "train": [
        dialogue("汉朝自谁起义？", "自高祖斩白蛇而起义。"),
        dialogue("谁弄权？", "宦官曹节等弄权。"),
        dialogue("帝御何殿？", "温德殿。", "殿角如何？", "狂风骤起，一条大青蛇飞将下来。"),
    ],
    "val": [
        dialogue("谁谋诛宦官？", "窦武、陈蕃谋诛之。"),
        dialogue("谁弄权于汉？", "曹节。"),
    ],
}


def write_questions(
    out: Path, tokenizer: Tokenizer, conversations: dict = QUESTIONS, max_tokens: int = 128
) -> Path:
    write_sft(out, tokenizer, conversations, ["test"], max_tokens)
    return out


def save_run(
    out_dir: Path, model: GPT | LSTM, tokenizer: Tokenizer, dataset: Path, kind: str
) -> Path:
    run = {
        "progress": {"iter": 5},
        "settings": {"dataset": str(dataset), "keep_last": 1},
        "dataset": {"kind": kind},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save_checkpoint(out_dir, model, [optimizer], tokenizer, run, is_best=True)
    return out_dir
