"""Configs for GPUs are accepted and give one enough to do; a step's operations are all counted."""

import pytest

from configurator import configure
from tests.expect import CONFIGS, count_step, settings
from train import Settings


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_accepted_and_one_for_a_gpu_keeps_it_busy(path):
    config, least = settings([str(path)]), 8192 * (8 if "_8gpu" in path.stem else 1)
    # rows of answers are short, and the reference's head keeps a GPU busy with fewer
    few = any(part in config.dataset + path.stem for part in ("_sft", "_dpo", "reference"))
    if "GPU" in path.read_text(encoding="utf-8"):
        assert config.lora_rank or config.embedding_lr
        assert few or config.rows_per_step * config.block_size >= least


@pytest.mark.parametrize(
    "words", [["--n_kv_head=2"], ["--mlp=gelu", "--position=learned"], ["--lora_rank=4"]]
)
def test_the_operations_of_a_step_are_those_of_the_models_own_formula(words):
    config = configure(Settings, ["--n_layer=2", "--n_head=4", "--optimizer=adamw", *words])
    model, passes, others = count_step(config, 4096, 4, 256)
    counted = sum(op.flops for op in [*passes, *others])
    # with adapters the first block gives no gradient on
    assert counted == pytest.approx(4 * 256 * model.flops_per_token(256), rel=0.04)
