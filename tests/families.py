"""Models that people stand on, in and out again, beside transformers: a table for the docs.

    python -m tests.families                       # shrunk in layers, width and vocabulary only
    python -m tests.families --full                # as they are published: 11 GB of memory, minutes
    python -m tests.families --names=qwen3,llama3  # some of them

Weights are random, since only their shape matters here, and drawn as transformers draws them. The
exit code is 1 if anything differs.
"""

import copy
import gc
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from configurator import UserError, command, configure
from miniglm.checkpoint import Checkpoint, load_checkpoint
from miniglm.generation import Sampling
from miniglm.interop.hub import table
from miniglm.interop.hugging_face import write_directory
from miniglm.text import complete
from tests.helpers import randomize
from tests.test_chat import CHATML, LLAMA, TEMPLATES, chat_differs, write_base

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TIED = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}


def sizes(layers: int, width: int, heads: int, kv_heads: int, hidden: int, rows: int) -> dict:
    return TIED | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": hidden,
        "vocab_size": rows,
    }


def rope(theta: float, positions: int, eps: float, **more) -> dict:
    parameters = {"rope_type": "default", "rope_theta": theta} | more
    return {
        "rope_parameters": parameters,
        "max_position_embeddings": positions,
        "rms_norm_eps": eps,
    }


@dataclass
class Family:
    """A published model: its config, the trl template of its chat format, the names it has."""

    name: str
    config: PretrainedConfig
    template: str = "qwen3"
    special: list[str] = field(default_factory=lambda: CHATML)


FAMILIES = {
    "qwen3": Family(
        "Qwen3-0.6B",
        Qwen3Config(**sizes(28, 1024, 16, 8, 3072, 151936), **rope(1e6, 40960, 1e-6), head_dim=128),
    ),
    "qwen2": Family(
        "Qwen2.5-0.5B",
        Qwen2Config(**sizes(24, 896, 14, 2, 4864, 151936), **rope(1e6, 32768, 1e-6)),
        "qwen2_5",
    ),
    "llama3": Family(
        "Llama-3.2-1B",
        LlamaConfig(
            **sizes(16, 2048, 32, 8, 8192, 128256), **rope(5e5, 131072, 1e-5, **LLAMA3), head_dim=64
        ),
        "llama3_2",
        LLAMA,
    ),
    "smollm2": Family(
        "SmolLM2-135M",
        LlamaConfig(**sizes(30, 576, 9, 3, 1536, 49152), **rope(1e5, 8192, 1e-5)),
        "",  # trl has none of it
    ),
    "minimind": Family(
        "MiniMind-3",
        Qwen3Config(**sizes(8, 768, 8, 4, 2432, 6400), **rope(1e6, 32768, 1e-6), head_dim=96),
        "qwen3_training",
    ),
}


@dataclass
class Settings:
    full: bool = False  # at their published sizes, one after another
    names: list[str] = field(default_factory=lambda: [*FAMILIES])  # of FAMILIES

    def __post_init__(self):
        if odd := [name for name in self.names if name not in FAMILIES]:
            raise UserError(f"names={odd[0]} is none of {', '.join(FAMILIES)}")


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """With fewer layers, less width and fewer entries; heads are as many and as wide as they were,
    so their width is not the model's divided by their number."""
    small = copy.deepcopy(config)
    heads = config.num_attention_heads
    small.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    small.num_hidden_layers, small.hidden_size, small.intermediate_size = 2, 4 * heads, 64
    small.vocab_size = 320
    if getattr(config, "layer_types", None):
        small.layer_types = config.layer_types[:2]
    return small


def write(family: Family, path: Path, full: bool) -> torch.nn.Module:
    """The model as a directory, in bfloat16's values and float32; returns transformers' own."""
    template = TEMPLATES / f"{family.template}.jinja"
    text = template.read_text(encoding="utf-8") if family.template else ""
    write_base(path, text, family.special)
    model = AutoModelForCausalLM.from_config(family.config if full else shrunk(family.config))
    if not full:
        randomize(model, 0)
    model.eval().save_pretrained(path, max_shard_size="2GB" if full else "40KB")
    return model


@torch.no_grad()
def measure(family: Family, folder: Path, full: bool) -> list[object]:
    """A row of the table; its last cell says whether all is equal."""
    base, out = folder / "base", folder / "out"
    theirs = write(family, base, full)
    ours = load_checkpoint(base)
    n_params, n_vocab, block_size = ours.n_params, ours.tokenizer.n_vocab, 64
    idx = torch.randint(300, (2, block_size), generator=torch.Generator().manual_seed(0))
    expected = theirs(idx).logits[..., :n_vocab]
    difference = (ours.model.head(ours.model(idx)) - expected).abs().max().item()
    same_ids = greedy(ours, idx[0].tolist()) == greedy_of(theirs, idx[:1], n_vocab)
    same_chat = chat_differs(base) == [] if family.template else "-"
    del theirs
    write_directory(ours.model, ours.tokenizer, ours.answers, out)
    del ours
    gc.collect()
    back = AutoModelForCausalLM.from_pretrained(out).eval()
    away = (back(idx).logits[..., :n_vocab] - expected).abs().max().item()
    limit = 1e-4 * max(1.0, expected.std().item())  # of float32's rounding
    fine = max(difference, away) < limit and same_ids and same_chat
    names = type(back).__name__, f"{n_params / 1e6:,.0f}M"
    return [*names, f"{difference:.1e}", same_ids, same_chat, f"{away:.1e}", bool(fine)]


def greedy(checkpoint: Checkpoint, prompt: list[int]) -> list[int]:
    checkpoint.tokenizer.stop_ids = ()  # 32 ids, whatever they are
    sampling = Sampling(max_new_tokens=32, temperature=0.0)
    [[output]] = complete(checkpoint, [prompt], sampling)
    return output.ids


@torch.no_grad()
def greedy_of(model: torch.nn.Module, idx: torch.Tensor, n_vocab: int) -> list[int]:
    """32 ids, each among the tokenizer's."""
    cache, ids, newest = None, [], idx
    for _ in range(32):
        output = model(newest, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        newest = output.logits[:, -1:, :n_vocab].argmax(-1)
        ids.append(newest.item())
    return ids


def measured(config: Settings) -> Iterable[tuple[str, list[object]]]:
    for name in config.names:
        with TemporaryDirectory() as folder:
            yield FAMILIES[name].name, measure(FAMILIES[name], Path(folder), config.full)
        gc.collect()


def main(argv: list[str]) -> None:
    rows = list(measured(configure(Settings, argv)))
    head = ["", "class", "parameters", "logits differ by", "32 greedy ids equal"]
    head += ["chat ids equal", "round trip differs by", "fine"]
    print(table(head, [[name, *row] for name, row in rows]))
    if wrong := [name for name, row in rows if not row[-1]]:
        raise UserError(f"not as in transformers: {', '.join(wrong)}")


if __name__ == "__main__":
    command(main)
