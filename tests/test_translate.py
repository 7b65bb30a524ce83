"""The translator's four phases: their configs, and all of them in a row at a tiny size."""

import random
from pathlib import Path

import pytest

import evaluations
import train
from configurator import ROOT, configure
from data.finance import prepare_dpo
from data.finance import prepare_sft as finance_sft
from data.translation import prepare as translation
from data.translation import prepare_sft as translation_sft
from miniglm.prep import parallel
from tests.runs import read_json, words

PHASES = ("pretrain", "sft", "lora", "grpo")


def configs_of(folder: str) -> list[Path]:
    return sorted((ROOT / "config" / folder).glob("?_*.py"))


@pytest.mark.parametrize(("folder", "last"), [("translate", "dpo"), ("translate_small", "grpo")])
def test_each_phase_goes_on_from_the_one_before(folder, last):
    paths, names = configs_of(folder), [*PHASES[:-1], last]
    assert [path.stem for path in paths] == [f"{n}_{name}" for n, name in enumerate(names, 1)]
    configs = [configure(train.Settings, [str(path)]) for path in paths]
    out_dirs = [config.out_dir for config in configs]
    assert [config.init_from for config in configs] == ["scratch", *out_dirs[:-1]]
    assert [bool(config.lora_rank) for config in configs] == [False, False, True, True]


def test_preferences_go_on_from_the_adapter_as_rewards_do():
    dpo, grpo = (
        configure(train.Settings, [f"config/translate_small/{name}.py"])
        for name in ("dpo", "4_grpo")
    )
    shape = (grpo.init_from, grpo.lora_rank, grpo.lora_alpha)
    assert shape == (dpo.init_from, dpo.lora_rank, dpo.lora_alpha)
    assert grpo.reward and grpo.dataset == "finance_sft"


def test_run_sh_runs_the_phases_in_their_order():
    text = (ROOT / "run.sh").read_text(encoding="utf-8")
    assert f"for phase in {' '.join(PHASES)}; do" in text
    assert "config/translate_small/?_$phase.py" in text


# --- all of them ---------------------------------------------------------------------------------

GENERAL = {"court": "庭", "order": "令", "person": "人", "notice": "書", "land": "地"}
FINANCE = {"fund": "金", "market": "市", "asset": "產", "price": "價", "profit": "利"}
BOTH = {"the": "該", "new": "新", "old": "舊", "large": "大", "small": "小", "first": "首"}


def write_pairs(path: Path, names: dict[str, str], count: int) -> str:
    """Sentences that are translated word by word, as lines English TAB Chinese."""
    draw, known = random.Random(0), [*(names | BOTH).items()]
    lines = []
    for _ in range(count):
        chosen = draw.choices(known, k=8)
        english = " ".join(word for word, _ in chosen)
        lines.append(f"{english.capitalize()}.\t{''.join(sign for _, sign in chosen)}。\n")
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def test_the_four_phases_in_a_row(tmp_path, monkeypatch):
    general = write_pairs(tmp_path / "general.tsv", GENERAL, 400)
    finance = write_pairs(tmp_path / "finance.tsv", FINANCE, 400)
    monkeypatch.setattr(parallel, "GENERAL", [general])
    monkeypatch.setattr(parallel, "FINANCE", [finance])
    data = {name: tmp_path / name for name in ("texts", "general_sft", "finance_sft", "pairs")}
    common = words(val=0.05, processes=1, tokenizer=data["texts"], max_tokens=64)
    translation.main(words(out=data["texts"], val=0.05, processes=1, vocab_size=330))
    translation_sft.main([*common, f"--out={data['general_sft']}"])
    finance_sft.main([*common, f"--out={data['finance_sft']}"])
    phases = (*PHASES, "dpo")
    out_dirs = [tmp_path / f"out-{phase}" for phase in phases]
    paths = [*configs_of("translate_small"), ROOT / "config" / "translate_small" / "dpo.py"]
    trained = [
        data[name] for name in ("texts", "general_sft", "finance_sft", "finance_sft", "pairs")
    ]
    before = ["scratch", *out_dirs[:3], out_dirs[2]]
    tiny = words(batch_size=16, warmup_iters=5, dtype="float32", device="cpu")
    shape = words(n_layer=1, n_head=2, n_kv_head=1, n_embd=64, block_size=64)
    tests = [f"{data[name]}" for name in ("general_sft", "finance_sft")]
    for number, phase in enumerate(phases):
        if phase == "dpo":
            sampled = words(n_sources=100, n_val=16, margin=0, max_tokens=64, temperature=0.7)
            prepare_dpo.main([f"--out_dir={out_dirs[2]}", f"--out={data['pairs']}", *sampled])
        steps = (60, 300, 250, 4, 10)[number]
        own = words(
            dataset=trained[number],
            out_dir=out_dirs[number],
            init_from=before[number],
            max_iters=steps,
            eval_interval=steps,
        )
        train.main([str(paths[number]), *(shape if number == 0 else []), *tiny, *own])
        for dataset in tests:
            asked = words(out_dir=out_dirs[number], dataset=dataset, split="test")
            evaluations.main([*asked, "--max_new_tokens=16"])
    runs, out = ",".join(map(str, out_dirs)), tmp_path / "comparison"
    evaluations.main(words(compare=runs, datasets=",".join(tests), out=out))

    report = read_json(tmp_path / "comparison" / "comparison.json")
    general, finance = (part["phases"] for part in report["datasets"])
    assert [row["run"] for row in finance] == [str(path) for path in out_dirs]
    pretrained, tuned, adapted, *last = (row["perplexity"] for row in finance)
    assert adapted < tuned  # finance is what the adapter has learnt
    assert max(last) < pretrained
    assert general[1]["perplexity"] < general[0]["perplexity"]
    assert "chrf_p" in finance[2]
