"""Which device, and what it can do: its precision, its peak rate of matmuls."""

import ctypes
import functools
import os
import platform
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configurator import ROOT, UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

SIDE = 2048  # of the largest square matmul that is timed
BUDGET = 0.3  # seconds that the timing may take
PEAKS = tomllib.loads((ROOT / "miniglm" / "gpus.toml").read_text(encoding="utf-8"))  # TFLOP/s
FLOAT16_ONLY = ("V100", "V100 PCIe", "V100S PCIe", "T4")  # they emulate bfloat16
WHEELS = "https://download.pytorch.org/whl"  # torch's own index


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
    native = (torch.float16,) if short in FLOAT16_ONLY else (torch.float16, torch.bfloat16)
    return PEAKS[short] * 1e12 if short in PEAKS and dtype in native else None


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


# --- the choice of a device --------------------------------------------------------------------


def pick_device(name: str) -> str:
    """`auto` is CUDA, else MPS, else CPU. Raises UserError if a named device cannot be used."""
    try:
        device = torch.device("cuda" if name == "auto" else name)
        lack = cuda_lack(device.index) if device.type == "cuda" else None
        if name == "auto" and lack:
            print(f"note: {lack}", file=sys.stderr)
        if name == "auto" and (lack or not torch.cuda.is_available()):
            return "mps" if torch.backends.mps.is_available() else "cpu"
        if lack:
            raise RuntimeError(lack)
        if name in ("auto", "cuda") and torch.cuda.is_available():
            return "cuda"  # which GPU is not known yet where there are several processes
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name!r} cannot be used ({reason}); --device=auto picks") from None
    return name


@functools.cache
def cuda_lack(index: int | None) -> str | None:
    """Why torch cannot use an NVIDIA card of this machine, and what to install; None if it can, or
    if there is none. index: of the card; None is the current one."""
    if torch.version.hip or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    is_seen = torch.cuda.is_available()
    if is_seen and has_code(capability(index), torch.cuda.get_arch_list()):
        return None
    said = ask_driver("name,driver_version,compute_cap") or ask_driver("name,driver_version")
    if not (is_seen or said):
        return None
    card, driver, generation = [*said, *3 * ["unknown"]][:3]
    if is_seen:  # the driver may count the cards in another order
        card, generation = torch.cuda.get_device_name(index), "{}.{}".format(*capability(index))
    return (
        f"torch {torch.__version__} cannot use this machine's {card} (driver {driver}, compute "
        f"capability {generation}); to use it: {what_to_install(driver, generation)}"
    )


def ask_driver(fields: str) -> list[str]:
    """What nvidia-smi says of the first card; nothing if it cannot. Old drivers lack a field."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().partition("\n")[0].split(", ") if done.stdout.strip() else []


def has_code(capability: tuple[int, int], arches: list[str]) -> bool:
    """Whether torch's wheel, which names its code sm_75 or compute_120, has some that this GPU
    runs: of its own generation and not newer, or what the driver translates."""
    own = 10 * capability[0] + capability[1]
    for arch in arches:
        kind, number = re.match(r"([a-z]+)_(\d+)", arch).groups()
        same = kind == "compute" or int(number) // 10 == capability[0]
        if same and int(number) <= own:
            return True
    return False


def what_to_install(driver: str, generation: str) -> str:
    """generation: the compute capability. torch's wheel for CUDA 13 needs driver 580 and 7.5; that
    for CUDA 12.6 driver 525, and has code from 5.0 on, not from 10.0. Where nvidia-smi has no
    figure it writes words: then the newest is taken."""
    version, own = (
        float(figure[0]) if (figure := re.match(r"\d+(\.\d)?", text)) else newest
        for text, newest in ((driver, 580.0), (generation, 9.0))
    )
    if own < 5:
        return "an older torch, no build of this one has code for it"
    if version < 525 or (version < 580 and own >= 10):
        return f"install NVIDIA's driver {'535 to 580' if own < 7.5 else '580 or newer'}"
    wheel = "12.6" if version < 580 or own < 7.5 else "13.0"
    if torch.version.cuda == wheel:  # which is not what is wrong
        return "see CUDA_VISIBLE_DEVICES, the container, and what torch.cuda.init() says in Python"
    command = f"pip install --force-reinstall torch=={torch.__version__.partition('+')[0]}"
    return f"{command} --index-url {WHEELS}/cu{wheel.replace('.', '')}"


# --- precision and memory ----------------------------------------------------------------------


def capability(index: int | None) -> tuple[int, int]:
    """Of a CUDA device; None is the current one."""
    return torch.cuda.get_device_capability(index)


def to_device(arrays: Iterable[np.ndarray], device: str) -> tuple[torch.Tensor, ...]:
    """Arrays -> tensors; copies to a GPU are pinned and asynchronous."""
    tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    if device.startswith("cuda"):
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)
    return tuple(t.to(device) for t in tensors)


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """The dtype of that name. auto: bfloat16 where CUDA or the CPU has it natively; else float16
    on a GPU with tensor cores, float32 elsewhere."""
    if dtype != "auto":
        return getattr(torch, dtype)
    kind, index = torch.device(device).type, torch.device(device).index
    if kind == "cpu":
        has = torch.cpu.get_capabilities()
        native = has.get("avx512_bf16") or has.get("amx_bf16")
        return torch.bfloat16 if native else torch.float32
    return gpu_dtype(capability(index) if kind == "cuda" else None)


def gpu_dtype(capability: tuple[int, int] | None) -> torch.dtype:
    """By compute capability; None: not CUDA."""
    if capability is None or capability < (7, 0):
        return torch.float32
    return torch.bfloat16 if capability >= (8, 0) else torch.float16


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


def peak_memory(device: str) -> int | None:
    """Bytes that this process has taken at its highest, on a CPU with Python and torch; None where
    that cannot be asked."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_reserved(device)
    if device != "cpu" or resource is None:
        return None
    status = Path("/proc/self/status")  # Linux, whose ru_maxrss includes the parent's peak
    text = status.read_text(encoding="utf-8") if status.is_file() else ""
    if own := re.search(r"^VmHWM:\s*(\d+)", text, re.MULTILINE):
        return 1024 * int(own[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def environment(device: str) -> dict:
    """What bitwise reproducibility depends on; a resumed run says which of these differ."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {"torch": torch.__version__, "processor": name, "threads": torch.get_num_threads()}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    model = re.search(r"^model name\s*:(.*)", text, re.MULTILINE)
    name = model[1].strip() if model else platform.processor() or platform.machine()
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"
