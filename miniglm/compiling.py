"""Whether torch.compile can be used here and pays, and what is compiled instead if it fails.

Training, generation and serving all ask `decide`. It counts work and looks for a compiler, never at
a clock, so that the same run on the same machine has the same bits. What compiling saves is what is
around the matmuls, about as long on one CPU as on another, so one limit serves all of them.
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

from miniglm.devices import capability

# operations of training that take half a minute longer as they are, which compiling takes: measured
# on CPUs; on an A100 estimated, at 15 % of its peak instead of 30
LEAST = {"cpu": 1e13, "cuda": 3e15}


def decide(wanted: bool | None, device: str, work: float) -> tuple[bool, str]:
    """Whether to compile, and why. wanted: as set, None if not; work: operations that are left."""
    if wanted is False:
        return False, "compile=False"
    if lack := what_lacks(device):
        return False, f"{lack}, so each step takes longer"
    if wanted:
        return True, "compile=True"
    least = LEAST[torch.device(device).type]
    enough = work >= least
    amount = f"{work:.1e} operations are left, {'more' if enough else 'less'}"
    return enough, f"{amount} than the {least:.0e} from which it pays"


@functools.cache
def what_lacks(device: str) -> str | None:
    """What torch.compile misses on a device, if anything."""
    kind, index = torch.device(device).type, torch.device(device).index
    if kind == "cuda":
        lack = compiler_lack("CC", "gcc" if shutil.which("gcc") else "clang")
        triton = find_spec("triton") is not None
        return what_a_gpu_lacks(capability(index), sys.platform, triton, lack)
    if kind != "cpu":
        return f"torch.compile is for CPU and CUDA, not {kind}"
    return compiler_lack("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))


def what_a_gpu_lacks(
    capability: tuple[int, int], system: str, triton: bool, compiler_lack: str | None
) -> str | None:
    """What torch.compile misses on a GPU. compiler_lack: what a C compiler does; triton calls one,
    except on Windows, where it brings its own."""
    if capability < (7, 0):
        return "triton knows no GPU this old"
    if system == "win32":
        return None if triton else "triton is missing (pip install 'triton-windows>=3.7,<3.8')"
    return compiler_lack if triton else "triton is not installed"


def compiler_lack(variable: str, default: str) -> str | None:
    """variable: that names a compiler; default: its name."""
    name = os.environ.get(variable, default)
    if not shutil.which(name):
        return f"no {'C++' if variable == 'CXX' else 'C'} compiler is found ({name})"
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


def backend(graph: torch.fx.GraphModule, inputs: list, patches: dict | None = None) -> Callable:
    """torch's own compiler with patches of its settings; the graph as it is where that fails, with
    one line the first time."""
    from torch._dynamo.exc import ShortenTraceback, TorchDynamoException
    from torch._inductor.compile_fx import compile_fx

    try:
        return compile_fx(graph, inputs, config_patches=patches)
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
