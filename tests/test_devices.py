"""Peak rates: the GPUs' names as torch gives them, and a measured rate beside a timed product."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from miniglm.devices import BUDGET, find_peak, listed_peak, measure_peak, show_rate

# names as torch.cuda.get_device_name gives them, and TFLOP/s of the data sheets, dense
NAMES = {
    "NVIDIA A100-SXM4-80GB": 312,
    "A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H20": 148,
    "NVIDIA B200": 2250,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362.05,
    "NVIDIA A10": 125,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "Tesla T4": 65,
    "Tesla V100-SXM2-16GB": 125,
    "Tesla V100-PCIE-32GB": 112,
}
OTHERS = [
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb",  # a part of one
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA A10G",
    "NVIDIA GeForce GTX 1080 Ti",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_data_sheets_gpus_are_known_by_torch_s_names(name):
    assert listed_peak(name, torch.float16) == NAMES[name] * 1e12


@pytest.mark.parametrize("name", OTHERS)
def test_a_gpu_that_only_looks_like_one_is_not_listed(name):
    assert listed_peak(name, torch.float16) is None


def test_what_a_gpu_only_emulates_or_does_without_tensor_cores_is_not_listed():
    assert listed_peak("NVIDIA A100-SXM4-80GB", torch.bfloat16) == 312e12
    assert listed_peak("Tesla T4", torch.bfloat16) is None
    assert listed_peak("NVIDIA A100-SXM4-80GB", torch.float32) is None


def test_a_measured_peak_is_the_operations_of_the_largest_product_over_its_seconds(monkeypatch):
    ticks = itertools.count(step=0.02)  # a clock by which each product takes 0.02 s
    monkeypatch.setattr("miniglm.devices.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    peak = measure_peak.__wrapped__("cpu", torch.float32)  # past the cache
    assert peak.rate == pytest.approx(2 * 2048**3 / 0.02)
    assert str(peak) == "peak 859 GFLOP/s, measured"


def test_where_products_take_long_smaller_ones_are_measured(monkeypatch):
    ticks = itertools.count(step=0.1)
    monkeypatch.setattr("miniglm.devices.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    peak = measure_peak.__wrapped__("cpu", torch.float32)
    assert peak.rate == pytest.approx(2 * 256**3 / 0.1)


def test_a_cpu_s_peak_is_measured_once_and_no_gpu_s():
    peak = find_peak("cpu", torch.float32)
    assert peak.source == "measured"
    assert 1e6 < peak.rate < 20e12
    assert find_peak("cpu", torch.float32) is peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_measuring_is_short_and_leaves_the_random_state(dtype):
    before = torch.get_rng_state()
    began = time.process_time()
    measure_peak.__wrapped__("cpu", dtype)  # past the cache
    # float16 and bfloat16 may be a hundred times slower: then smaller matrices are timed
    assert time.process_time() - began < BUDGET + 0.5
    assert torch.equal(torch.get_rng_state(), before)


def test_rates_are_shown_in_a_unit_that_fits():
    assert show_rate(92.44e9) == "92.4 GFLOP/s"
    assert show_rate(989.4e12) == "989 TFLOP/s"
    assert show_rate(2250e12) == "2,250 TFLOP/s"
