"""What a device can do: its precision, its peak rate of matmuls."""

import ctypes
import functools
import platform
import re
import sys
import time
import tomllib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configurator import ROOT

SIDE = 2048  # of the largest square matmul that is timed
BUDGET = 0.3  # seconds that the timing may take
PEAKS = tomllib.loads((ROOT / "miniglm" / "gpus.toml").read_text(encoding="utf-8"))  # TFLOP/s
FLOAT16_ONLY = ("V100", "V100 PCIe", "V100S PCIe", "T4")  # they emulate bfloat16


@dataclass(frozen=True)
class Peak:
    rate: float  # floating-point operations per second
    source: str  # "data sheet" or "measured"

    def __str__(self) -> str:
        return f"peak {show_rate(self.rate)}, {self.source}"


def show_rate(rate: float) -> str:
    """92.4e9 -> 92.4 GFLOP/s"""
    number, unit = (rate / 1e12, "TFLOP/s") if rate >= 1e12 else (rate / 1e9, "GFLOP/s")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def find_peak(device: str, dtype: torch.dtype) -> Peak:
    """From the data sheet for a GPU that PEAKS lists, else measured."""
    if device.startswith("cuda"):
        listed = listed_peak(torch.cuda.get_device_name(device), dtype)
        if listed:
            return Peak(listed, "data sheet")
    return measure_peak(device, dtype)


def listed_peak(name: str, dtype: torch.dtype) -> float | None:
    """Operations per second of the GPU that torch calls `name`; None if PEAKS does not list it."""
    short = short_name(name)
    if dtype not in (torch.float16, torch.bfloat16) or short not in PEAKS:
        return None
    if dtype == torch.bfloat16 and short in FLOAT16_ONLY:
        return None
    return PEAKS[short] * 1e12


def short_name(name: str) -> str:
    """NVIDIA A100-SXM4-80GB -> A100, Tesla V100-PCIE-16GB -> V100 PCIe. Laptop, MIG, D and the like
    stay: these are other devices."""
    name = re.sub(r"\b(NVIDIA|Tesla|GeForce) ", "", name)
    name = re.sub(r"[- ](SXM\d?|HBM\de?|\d+GB)\b", "", name)
    return re.sub(r"[- ]PCIE?\b", " PCIe", name, flags=re.IGNORECASE)


@functools.cache
def measure_peak(device: str, dtype: torch.dtype) -> Peak:
    """The best rate of square matmuls of growing size, up to SIDE, within BUDGET."""
    generator = torch.Generator(device).manual_seed(0)  # not the run's
    matrix = torch.rand(SIDE, SIDE, generator=generator, device=device).to(dtype)
    matrix[:64, :64] @ matrix[:64, :64]  # a GPU's first matmul loads its library
    synchronize(device)
    began, best, side = time.perf_counter(), 0.0, SIDE // 8
    while True:
        square = matrix[:side, :side].contiguous()
        synchronize(device)
        start = time.perf_counter()
        square @ square
        synchronize(device)
        now = time.perf_counter()
        best = max(best, 2 * side**3 / (now - start))
        larger = min(2 * side, SIDE)
        if now - began + (now - start) * (larger / side) ** 3 > BUDGET:
            return Peak(best, "measured")
        side = larger


def synchronize(device: str) -> None:
    """Waits until a device has finished its work; a CPU always has."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


# --- precision and memory --------------------------------------------------------------


def to_device(arrays: Iterable[np.ndarray], device: str) -> tuple[torch.Tensor, ...]:
    """Arrays -> tensors; copies to a GPU are pinned and asynchronous."""
    tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    if device.startswith("cuda"):
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)
    return tuple(t.to(device) for t in tensors)


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """The dtype of that name. auto: bfloat16 where CUDA or the CPU has it natively; else float16
    on CUDA, float32 elsewhere."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if torch.device(device).type == "cpu":
        has = torch.cpu.get_capabilities()
        native = has.get("avx512_bf16") or has.get("amx_bf16")
        return torch.bfloat16 if native else torch.float32
    if not device.startswith("cuda"):
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def autocast(dtype: str, device: str) -> AbstractContextManager:
    """Matmuls in the dtype of that name, as pick_dtype finds it; float32 changes nothing."""
    picked = pick_dtype(dtype, device)
    return torch.autocast(torch.device(device).type, picked, enabled=picked != torch.float32)


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one; by default it returns large blocks to
    the system, which then clears each page anew: an eighth of a step's time on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # M_MMAP_THRESHOLD, bytes: smaller blocks stay in the heap; older versions allow 32 MB, other C
    # libraries have no mallopt
    if mallopt and (mallopt(-3, 2**30) or mallopt(-3, 2**25)):
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes free at the heap's end


def environment(device: str) -> dict:
    """What bitwise reproducibility depends on; a resumed run says which of these differ."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    return {"torch": torch.__version__, "processor": name, "threads": torch.get_num_threads()}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    model = re.search(r"^model name\s*:(.*)", text, re.MULTILINE)
    name = model[1].strip() if model else platform.processor() or platform.machine()
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"
