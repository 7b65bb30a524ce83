"""Whether torch.compile can be used here and pays, and what is compiled instead if it fails.

Training, generation and serving all ask `decide`. It counts work and looks for a compiler, never at
a clock, so that the same run on the same machine has the same bits. What compiling saves is what is
around the matmuls, about as long on one processor as on another, so one limit serves all.
"""

import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

# operations of training that take a CPU half a minute longer as they are, which compiling takes
LEAST = 1e13


def decide(wanted: bool | None, device: str, work: float) -> tuple[bool, str]:
    """Whether to compile, and why. wanted: as set, None if not; work: operations that are left."""
    if wanted is False:
        return False, "compile=False"
    if lack := what_lacks(torch.device(device).type):
        return False, f"{lack}, so each step takes longer"
    if wanted:
        return True, "compile=True"
    if torch.device(device).type == "cuda":
        return True, "a GPU"
    enough = work >= LEAST
    amount = f"{work:.1e} operations are left, {'more' if enough else 'less'}"
    return enough, f"{amount} than the {LEAST:.0e} from which it pays"


@functools.cache
def what_lacks(kind: str) -> str | None:
    """What torch.compile misses on a kind of device, if anything."""
    if kind == "cuda":
        if not find_spec("triton"):
            return "triton is not installed"
        if torch.cuda.get_device_capability() < (7, 0):
            return "triton knows no GPU this old"
        names = [os.environ.get("CC"), "gcc", "clang"]
        return None if any(map(shutil.which, filter(None, names))) else "no C compiler is found"
    if kind != "cpu":
        return f"torch.compile is for CPU and CUDA, not {kind}"
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    name = os.environ.get("CXX", default)
    if not shutil.which(name):
        return f"no C++ compiler is found ({name})"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python.h is not installed (Debian and Ubuntu: apt-get install python3-dev)"
    return None


def compile_blocks(model: torch.nn.Module) -> None:
    """Block by block: all layers share their code, so that it takes seconds. On a CPU code for rows
    of any number and length is as fast as for those of one."""
    # equal sizes may be chance (64 tokens, 64 to a head); the eps of a norm does not change
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.specialize_float = True
    on_cpu = model.wte.weight.device.type == "cpu"
    for block in model.blocks:
        block.compile(backend=backend, dynamic=True if on_cpu else None)


def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    """torch's own compiler; the graph as it is where that fails, with one line the first time."""
    from torch._dynamo.exc import ShortenTraceback, TorchDynamoException
    from torch._inductor.compile_fx import compile_fx

    try:
        return compile_fx(graph, inputs)
    except Exception as error:
        if isinstance(error, TorchDynamoException) and not isinstance(error, ShortenTraceback):
            raise  # it steers the compiler
        say_failure(error)
        return graph


def say_failure(error: Exception) -> None:
    first = str(error).strip().partition("\n")[0]
    _say_once(f"{type(error).__name__}: {first}")


@functools.cache
def _say_once(why: str) -> None:
    tqdm.write(f"note: compiling failed ({why}), so each step takes longer", file=sys.stderr)
