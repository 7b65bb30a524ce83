"""The check of a GPU, rehearsed on a CPU as a user runs it: a row that is not ok says why."""

import inspect
import re
import textwrap

import pytest

import model
from configurator import UserError
from miniglm import compiling
from tests import gpu
from tests.runs import ROOT, run


def test_all_is_well_on_a_cpu_wherever_it_is_run(tmp_path):
    (tmp_path / "pytest.py").write_text("raise ImportError")  # users have none
    where = {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = run("-m", "tests.gpu", "--device=cpu", cwd=tmp_path, environment=where)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    lines = [re.split(r" *\| ?", line)[1:-1] for line in done.stdout.splitlines() if "|" in line]
    rows = {name: dict(zip(gpu.COLUMNS, cells, strict=True)) for name, *cells in lines[2:]}
    assert list(rows) == [*gpu.RUNS, *gpu.CHECKS]
    skipped = [name for name, row in rows.items() if row["verdict"] != "ok"]
    assert skipped == ["text, cuda:1", "two processes, sharded", "host syncs"]
    for name in ("stopped and resumed", "two processes"):
        assert rows[name]["loss"] == rows["text, float32"]["loss"]
    compiled = [row for name, row in rows.items() if name.endswith((", compiled", "model"))]
    assert len(compiled) == 6
    assert all(row["graphs"] in "12345" and row["breaks"] == "0" for row in compiled)
    assert not any(tmp_path.glob("t*"))


def test_a_fault_that_only_a_compiler_sees_is_named(monkeypatch, capsys):
    """That Span's is_causal is a bool, taken back."""
    source = textwrap.dedent(inspect.getsource(model.Span.__init__))
    faulty = re.sub(r"True if (.+) else False", r"\1", source)
    assert faulty != source
    exec(faulty, names := vars(model).copy())
    monkeypatch.setattr(model.Span, "__init__", names["__init__"])
    for name in ("backend", "say_failure"):  # which the check replaces
        monkeypatch.setattr(compiling, name, getattr(compiling, name))
    monkeypatch.setattr(gpu, "RUNS", {gpu.TEXT: gpu.RUNS[gpu.TEXT]})
    monkeypatch.setattr(gpu, "CHECKS", {"whole model": gpu.whole_model})
    with pytest.raises(UserError, match="1 of 2 rows are not ok: whole model"):
        gpu.main(["--device=cpu"])
    assert "Unsupported: TypeError when making fake tensor call" in capsys.readouterr().out
