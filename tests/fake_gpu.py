"""Training steps and decoding on tensors that say they are on a GPU, and hold nothing.

    python -m tests.fake_gpu TOYS

Shapes, dtypes and devices are those of a run on CUDA, on a CPU build of torch; what needs a value,
and so would wait for a GPU, raises an error. Prints a line for each case.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace at;
using namespace c10;
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override {
    return Stream(Stream::DEFAULT, getDevice());
  }
  Stream exchangeStream(Stream) const noexcept override {
    return Stream(Stream::DEFAULT, getDevice());
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
"""


def load_guard() -> None:
    """What a CPU build lacks to differentiate on CUDA; before torch, which looks for it once."""
    torch_dir = Path(find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD, encoding="utf-8")
        flags = f"-shared -fPIC -std=c++20 -I{torch_dir}/include {source} -o {library}"
        flags += f" -L{torch_dir}/lib -Wl,-rpath,{torch_dir}/lib -lc10 -ltorch_cpu"
        subprocess.run([os.environ.get("CXX", "g++"), *flags.split()], check=True)
        ctypes.CDLL(str(library))


if __name__ == "__main__":
    load_guard()

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import train
from data_utils import open_dataset
from miniglm.attention import attend
from miniglm.decoding import Decoder
from miniglm.distributed import ALONE, LossModule
from miniglm.lora import add_adapters
from miniglm.optim import make_optimizers
from miniglm.stages import OBJECTIVES
from model import GPT, ModelConfig
from tests.watch import Watch

SHAPE = {"n_layer": 2, "n_head": 4, "n_kv_head": 1, "n_embd": 64, "block_size": 64}


def begin(dataset: Path | str, **settings) -> tuple[train.Run, train.State]:
    config = train.Settings(dataset=str(dataset), batch_size=8, max_iters=20, **SHAPE, **settings)
    data = open_dataset(config.dataset)
    with torch.device("cuda"):
        model = GPT(ModelConfig(n_vocab=data.tokenizer.n_vocab, **SHAPE))
    if config.lora_rank:
        add_adapters(model, config.lora_rank, 4.0, ["blocks"])
    objective = OBJECTIVES[data.kind](config, data, "cuda")
    if data.kind == "dpo" and not config.lora_rank:  # log-probabilities that were computed before
        given = np.zeros((8, 2), np.float32)
        objective.with_reference = lambda batch, _: batch._replace(arrays=(*batch.arrays, given))
    scaler = torch.amp.GradScaler("cuda", enabled=config.dtype == "float16")
    loss, optimizers = LossModule(model, objective.sums), make_optimizers(model, config, "cuda")
    state = train.State(model, loss, optimizers, scaler, train.Progress())
    return train.Run(config, Path(), data, objective, "cuda", ALONE, None), state


def step(dataset: Path | str, **settings) -> list[str]:
    """One of train.py's steps and its batches, up to the first value that the host wants."""
    run, state = begin(dataset, **settings)
    with Watch() as watch, suppress(DataDependentOutputException):
        batches, counts, _ = next(train.steps(run, state))
        losses, norm = train.train_step(run, state, batches, counts)
        assert norm.device.type == losses["loss"].device.type == "cuda"
    return watch.waits + watch.doubles


def judge(dataset: Path) -> list[str]:
    """The same for an evaluation, and for what DPO computes first; both want values."""
    run, state = begin(dataset)
    with Watch() as watch, suppress(DataDependentOutputException):
        if dataset.name == "pairs":
            run.objective.log_probs(state.model, "val")
        run.objective.evaluate(state.model)
    return watch.doubles


def decode(dataset: Path, static: bool) -> list[str]:
    """Prompts of two lengths, and a token for each."""
    model = begin(dataset)[1].model.eval()
    with Watch() as watch, torch.no_grad():
        cache = model.new_cache(2)
        idx = torch.zeros(2, 9, dtype=torch.int64, device="cuda")
        model.head(model(idx, cache, [9, 4]))
        decoder, at = Decoder(model), torch.zeros(2, dtype=torch.int64, device="cuda")
        parts = [part.unbind() if static else part for part in (cache.all_k, cache.all_v)]
        assert decoder._run(idx[:, 0], at, *parts).device.type == "cuda"
    return watch.waits + watch.doubles


def attention(device: str, capability: tuple[int, int]) -> list[str]:
    """What torch's own attention is given in float16."""
    seen, torchs = [], torch.nn.functional.scaled_dot_product_attention

    def note(q, k, v, attn_mask, is_causal, enable_gqa):
        seen.append(f"{k.shape[1]} heads of keys, {'causal' if is_causal else 'masked'}")
        return q

    torch.cuda.get_device_capability = lambda index=None: capability
    torch.nn.functional.scaled_dot_product_attention = note
    q, k = (torch.zeros(1, n, 8, 16, dtype=torch.float16, device=device) for n in (4, 1))
    attend(q, k, k, is_causal=True)
    torch.nn.functional.scaled_dot_product_attention = torchs
    return seen


def main(toys: Path) -> None:
    torch.Tensor.pin_memory = lambda self: self
    torch.cuda.get_device_capability = lambda index=None: (8, 0)
    torch.backends.cuda.is_flash_attention_available = lambda: True
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.set_num_threads(1)
    text, questions, pairs = (toys / name for name in ("text", "questions", "pairs"))
    cases = {
        "text": lambda: step(text),
        "text in float32": lambda: step(text, dtype="float32", gradient_accumulation_steps=2),
        "text in float16": lambda: step(text, dtype="float16"),
        "activations again": lambda: step(text, checkpoint_activations=True, dropout=0.1),
        "short rows": lambda: step(text, short_block=8, optimizer="adamw"),
        "questions": lambda: step(questions),
        "questions and text": lambda: step(f"{questions}:1,{text}:1"),
        "questions, adapter": lambda: step(questions, lora_rank=2),
        "pairs": lambda: step(pairs),
        "pairs, adapter": lambda: step(pairs, lora_rank=2, dpo_sft_weight=0.5),
        "decoding": lambda: decode(text, static=False),
        "static decoding": lambda: decode(text, static=True),
        "evaluating text": lambda: judge(text),
        "evaluating pairs": lambda: judge(pairs),
        "attention of a T4": lambda: attention("cuda", (7, 5)),
        "attention of an A100": lambda: attention("cuda", (8, 0)),
        "attention of a Mac": lambda: attention("mps", (8, 0)),
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, case in cases.items():
            print(f"{name}: {', '.join(case()) or 'ok'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
