"""What a run does on GPUs that are not there: choices, waits, kernels, tensors without values."""

import os
import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import train
from configurator import UserError
from miniglm import attention, compiling, devices, distributed
from miniglm.attention import takes_shared_heads
from miniglm.decoding import Decoder, recorded
from miniglm.devices import cuda_lack, gpu_dtype, has_code, pick_device, what_to_install
from miniglm.distributed import World
from miniglm.optim import make_optimizers
from model import GPT, ModelConfig
from tests.helpers import NEEDS_COMPILER, tiny_model
from tests.runs import run, train_here
from tests.watch import Watch

V100, T4, RTX_3090, H100, GTX_1080, RTX_5090 = (7, 0), (7, 5), (8, 6), (9, 0), (6, 1), (12, 0)
WINDOWS = "pip install 'triton-windows>=3.7,<3.8'"
TORCH = f"pip install --force-reinstall torch=={torch.__version__.partition('+')[0]}"
TORCH += " --index-url https://download.pytorch.org/whl"


# --- choices -----------------------------------------------------------------------------------


def test_precision_and_shared_heads_follow_from_the_capability():
    half, low, full = torch.float16, torch.bfloat16, torch.float32
    gpus = [GTX_1080, V100, T4, RTX_3090, H100, None]  # None: a Mac's
    assert [gpu_dtype(gpu) for gpu in gpus] == [full, half, half, low, low, full]
    assert [takes_shared_heads(gpu, half, masked=False) for gpu in gpus[:5]] == 3 * [False] + 2 * [
        True
    ]
    assert not takes_shared_heads(H100, full, masked=False)
    assert not takes_shared_heads(H100, low, masked=True)


def test_what_compiling_misses_on_a_gpu():
    """Of capability, system, whether triton is there, and what a C compiler misses."""
    said = {
        (V100, "linux", True, None): None,
        (H100, "linux", True, "no compiler"): "no compiler",
        (RTX_3090, "linux", False, None): "triton is not installed",
        (RTX_3090, "win32", False, None): f"triton is missing ({WINDOWS})",
        (RTX_3090, "win32", True, "no compiler"): None,
        (GTX_1080, "linux", True, None): "triton knows no GPU this old",
    }
    assert {case: compiling.what_a_gpu_lacks(*case) for case in said} == said


def test_a_gpu_compiles_only_if_it_pays(monkeypatch):
    monkeypatch.setattr(compiling, "what_lacks", lambda device: None)
    assert not compiling.decide(None, "cuda:0", 1e15)[0]
    assert compiling.decide(None, "cuda:0", 1e16)[0]
    assert compiling.decide(True, "cuda:0", 0)[0]


def test_each_driver_and_card_has_its_wheel(monkeypatch):
    newer, older = "install NVIDIA's driver 580 or newer", "install NVIDIA's driver 535 to 580"
    advice = {
        ("580.65.06", "8.0"): f"{TORCH}/cu130",
        ("610.1", "12.0"): f"{TORCH}/cu130",
        ("550.54.14", "8.0"): f"{TORCH}/cu126",
        ("580.65.06", "7.0"): f"{TORCH}/cu126",
        ("550.54.14", "12.0"): newer,
        ("470.256", "unknown"): newer,
        ("470.256", "7.0"): older,
        ("540.3.0", "[N/A]"): f"{TORCH}/cu126",
        ("[Not Supported]", "[N/A]"): f"{TORCH}/cu130",
        ("470.256", "3.5"): "an older torch, no build of this one has code for it",
    }
    assert {case: what_to_install(*case) for case in advice} == advice
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert what_to_install("580.65.06", "8.0").startswith("see CUDA_VISIBLE_DEVICES")


def test_a_wheel_runs_on_its_generations_and_on_what_drivers_translate():
    cuda_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
    cuda_12 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
    gpus = [GTX_1080, V100, T4, (8, 9), H100, RTX_5090, (13, 0)]
    assert [has_code(gpu, cuda_13) for gpu in gpus] == 2 * [False] + 5 * [True]
    assert [has_code(gpu, cuda_12) for gpu in gpus] == 5 * [True] + 2 * [False]


# --- devices -----------------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Writes an nvidia-smi that knows only some fields of a card."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def write(fields: str, answer: str) -> None:
        script = f"#!/bin/sh\ncase $1 in *={fields}) echo '{answer}';; *) exit 2;; esac\n"
        (tmp_path / "nvidia-smi").write_text(script, encoding="utf-8")
        (tmp_path / "nvidia-smi").chmod(0o755)

    cuda_lack.cache_clear()
    yield write
    cuda_lack.cache_clear()


ON_CPU = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch might use the card")


@ON_CPU
def test_a_card_that_torch_cannot_use_is_said_with_what_to_install(driver, monkeypatch, capsys):
    driver("name,driver_version,compute_cap", "NVIDIA GeForce RTX 3060, 550.54.14, 8.6\nTesla T4")
    card = f"torch {torch.__version__} cannot use this machine's NVIDIA GeForce RTX 3060"
    card += f" (driver 550.54.14, compute capability 8.6); to use it: {TORCH}/cu126"
    assert pick_device("auto") != "cuda"
    assert capsys.readouterr().err == f"note: {card}\n"
    with pytest.raises(UserError, match=re.escape(f"device='cuda' cannot be used ({card})")):
        pick_device("cuda")
    cuda_lack.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pick_device("auto")
    assert not capsys.readouterr().err


@ON_CPU
def test_an_old_driver_that_does_not_know_the_capability_is_said(driver, capsys):
    driver("name,driver_version", "Tesla T4, 470.256.02")
    pick_device("auto")
    assert "capability unknown); to use it: install NVIDIA's driver 580 or newer" in (
        capsys.readouterr().err
    )


@pytest.fixture
def two_gpus(monkeypatch):
    """Which torch says are there: an A100, and a T4 as cuda:1. Notes what is asked of them."""
    asked = []

    def name(device=None):
        asked.append(device)
        return "Tesla T4" if device in (1, "cuda:1") else "NVIDIA A100-SXM4-80GB"

    def capability(device=None):
        return [(8, 0), T4][device or 0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    cuda_lack.cache_clear()
    yield asked
    cuda_lack.cache_clear()


def test_a_named_gpu_is_the_one_that_is_asked_and_the_current_one(two_gpus, monkeypatch):
    assert devices.pick_dtype("auto", "cuda") == torch.bfloat16
    assert devices.pick_dtype("auto", "cuda:1") == torch.float16
    assert devices.environment("cuda:1")["processor"] == "Tesla T4"
    assert devices.find_peak("cuda:1", torch.float16).rate == 65e12
    assert two_gpus == ["cuda:1", "cuda:1"]
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    assert pick_device("cuda:1") == "cuda:1"
    assert two_gpus[2:] == [torch.device("cuda:1")]
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])  # none for the T4
    cuda_lack.cache_clear()
    assert pick_device("cuda") == "cuda"
    with pytest.raises(UserError, match="this machine's Tesla T4"):
        pick_device("cuda:1")


def test_a_process_takes_no_memory_of_a_gpu_before_it_knows_its_own(two_gpus, monkeypatch):
    """A context takes half a gigabyte, and each process would open one on the first GPU."""

    def allocate(*args, **kwargs):
        raise AssertionError("memory of a GPU was taken")

    monkeypatch.setattr(torch, "empty", allocate)
    assert pick_device("cuda") == pick_device("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    assert distributed.join(World(1, 2, 1, 2), "cuda") == "cuda:1"
    assert two_gpus == ["cuda:1"]


def test_a_dry_runs_clock_starts_when_the_gpu_is_done(toys, tmp_path, monkeypatch):
    order = []
    for module, name in ((devices, "synchronize"), (train, "train_step"), (train, "Window")):
        real = getattr(module, name)
        noted = lambda *args, real=real, name=name: order.append(name) or real(*args)  # noqa: E731
        monkeypatch.setattr(module, name, noted)
    train_here(dataset=toys / "text", out_dir=tmp_path / "out", dry_run=True)
    first = order.index("train_step")
    assert order[first:] == ["train_step", "synchronize", "Window", *3 * ["train_step"]]


# --- kernels and waits -------------------------------------------------------------------------


def test_kernels_of_an_optimizers_step_do_not_grow_with_the_layers():
    counts = {}
    for n_layer in (2, 6):
        model = GPT(ModelConfig(n_layer=n_layer, n_embd=32, n_head=4, n_kv_head=1, n_vocab=64))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizers = make_optimizers(model, train.Settings(dtype="bfloat16"), "cpu")
        for _ in range(2):  # the first makes the moments
            with Watch() as watch:
                for optimizer in optimizers:
                    optimizer.step()
        counts[n_layer] = sum(watch.kernels.values())
    assert counts[2] == counts[6] <= 160, counts


@NEEDS_COMPILER
def test_a_static_step_makes_no_copy_of_the_cache():
    torch._dynamo.reset()
    model = tiny_model(n_layer=2, n_kv_head=1, block_size=64)
    decoder, cache = Decoder(model, static=True), model.new_cache(4, 64)
    shape = f"({', '.join(map(str, cache.all_k.shape[1:]))})"
    cache.lengths = [3, 0, 7, 1]
    decoder.run = recorded(decoder._run)
    with torch.inference_mode():
        _, codes = run_and_get_code(decoder, torch.tensor([1, 2, 3, 4]), cache)
    assert codes and "empty_strided_cpu(" in codes[0]
    assert not any(f"empty_strided_cpu({shape}" in code for code in codes)


def test_a_static_step_is_compiled_once_that_pays():
    model = tiny_model()
    decoder, cache, compiled = Decoder(model, static=True, eager=2), model.new_cache(1), []
    decoder.run = lambda *args: compiled.append(args) or decoder._run(*args)
    with torch.inference_mode():
        for _ in range(4):
            decoder(torch.tensor([1]), cache)
    assert len(compiled) == 2


def test_a_capability_is_a_constant_of_compiled_code(monkeypatch):
    """What asks for it, no compiler can trace."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: os.getpid() and T4)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x * attention.flash_capability(x.device.index)[1],
        backend="aot_eager",
        fullgraph=True,
    )
    assert compiled(torch.ones(2)).tolist() == [5, 5]
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert attention.flash_capability(None) == (0, 0)


# --- tensors without values --------------------------------------------------------------------


@NEEDS_COMPILER
@ON_CPU
def test_all_of_training_and_decoding_runs_on_tensors_of_a_gpu(toys):
    done = run("-m", "tests.fake_gpu", str(toys))
    assert done.returncode == 0, done.stderr
    cases = dict(line.split(": ") for line in done.stdout.splitlines())
    assert cases.pop("text in float16").startswith("_local_scalar_dense in train_step")
    assert cases.pop("attention of a T4") == "4 heads of keys, causal"  # repeated
    assert cases.pop("attention of an A100") == "1 heads of keys, causal"
    assert cases.pop("attention of a Mac") == "1 heads of keys, masked"
    assert len(cases) == 13 and set(cases.values()) == {"ok"}, cases
