"""Peak rates: GPUs under the names that torch gives them, measured ones; freed memory."""

import itertools
import platform
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from configurator import ROOT
from miniglm.devices import BUDGET, find_peak, listed_peak, measure_peak, show_rate

# names as torch.cuda.get_device_name gives them, and dense TFLOP/s of the data sheets
PEAKS = {
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A800 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA L40S": 362.05,
    "NVIDIA GeForce RTX 4090": 165.2,
    "Tesla T4": 65,
    "Tesla V100-SXM2-16GB": 125,
    "Tesla V100-PCIE-32GB": 112,
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb": None,  # a slice of a GPU
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA A10G": None,
}


def test_gpus_are_known_by_torchs_names_and_other_devices_are_not():
    rates = {name: listed_peak(name, torch.float16) for name in PEAKS}
    assert rates == {name: rate and rate * 1e12 for name, rate in PEAKS.items()}


def test_rates_that_are_emulated_or_without_tensor_cores_are_not_listed():
    assert listed_peak("NVIDIA A100-SXM4-80GB", torch.bfloat16) == 312e12
    assert listed_peak("Tesla T4", torch.bfloat16) is None
    assert listed_peak("NVIDIA A100-SXM4-80GB", torch.float32) is None


@pytest.mark.parametrize(("seconds", "side"), [(0.02, 2048), (0.1, 256)])
def test_a_measured_peak_is_that_of_the_largest_matmul_within_the_budget(
    monkeypatch, seconds, side
):
    ticks = itertools.count(step=seconds)  # a clock by which each matmul takes that long
    monkeypatch.setattr("miniglm.devices.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    peak = measure_peak.__wrapped__("cpu", torch.float32)  # past the cache
    assert peak.rate == pytest.approx(2 * side**3 / seconds)


def test_a_cpus_peak_is_measured_once():
    peak = find_peak("cpu", torch.float32)
    assert peak.source == "measured"
    assert 1e6 < peak.rate < 20e12
    assert find_peak("cpu", torch.float32) is peak


def test_measuring_is_short_and_leaves_the_random_state():
    before = torch.get_rng_state()
    for dtype in (torch.float32, torch.float16):  # which may be a hundred times slower
        began = time.process_time()
        measure_peak.__wrapped__("cpu", dtype)
        assert time.process_time() - began < BUDGET + 0.5
    assert torch.equal(torch.get_rng_state(), before)


def test_rates_are_shown_in_a_unit_that_fits():
    assert show_rate(92.44e9) == "92.4 GFLOP/s"
    assert show_rate(989.4e12) == "989 TFLOP/s"
    assert show_rate(2250e12) == "2,250 TFLOP/s"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone")
def test_freed_memory_stays_with_the_process():
    script = """
import resource, torch, train
def pages_taken():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(20_000_000)  # 80 MB, 19,500 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
train.devices.keep_freed_memory()
torch.ones(30_000_000)  # an aligned block fits into an old place only with some room beside it
print(min(pages_taken() for _ in range(3)))
"""
    done = subprocess.run(  # in a process whose heap no earlier test has fragmented
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2000


@pytest.mark.skipif(sys.platform == "win32", reason="it cannot be asked there")
def test_a_peak_of_memory_is_the_processs_own_and_not_its_parents():
    lines = "from miniglm.devices import peak_memory", "x = b'1' * 300_000_000"
    code = "\n".join([*lines, "print(peak_memory('cpu'))"])
    held = b"1" * 10**9
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert 3e8 < int(done.stdout) < len(held)
