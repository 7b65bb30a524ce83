import dataclasses
import json
import logging
import math
import re

import matplotlib
import numpy as np
import pytest
from matplotlib.font_manager import fontManager
from matplotlib.patches import StepPatch

import visualize
from configurator import UserError
from miniglm.checkpoint import append_log, read_log
from visualize import PANELS, curves_figure, draw_histogram, follow, load_log, main

pytestmark = pytest.mark.filterwarnings("error")
RATIO = 0.5  # bits per byte of a nat per token


def write_log(out_dir, records):
    out_dir.mkdir()
    for step, record in enumerate(records, 1):
        common = {"iter": step, "tokens": 1000 * step, "seconds": 0.5 * step, "lr": 1e-3 / step}
        append_log(out_dir, common | {"tokens_per_second": 2000 + step} | record)
    return out_dir


def write_run(out_dir, tokenizer=None, steps=30, interval=5, best=25, init_from="scratch"):
    """An out_dir with a log of a loss that falls from 8, and rises after the step `best`."""
    records = []
    for step in range(1, steps + 1):
        loss = 4 + 4 * math.exp(-step / 2) + 0.01 * abs(step - best)
        records.append({"train_loss": loss})
        if step % interval == 0:
            records[-1] |= {"val_loss": loss + 0.1, "val_bits_per_byte": RATIO * (loss + 0.1)}
    write_log(out_dir, records)
    if tokenizer:
        (out_dir / "step-000030").mkdir()
        run = {"tokenizer_sha256": tokenizer, "settings": {"init_from": str(init_from)}}
        (out_dir / "step-000030/run.json").write_text(json.dumps(run), encoding="utf-8")
        (out_dir / "latest").write_text("step-000030\n", encoding="utf-8")
    return out_dir


def write_paired_run(out_dir, steps=10, kind="margin"):
    """An out_dir with a log of a run on preferences, marks or rewards."""
    records, own = [], [name for names in PANELS[kind].values() for name in names]
    for step in range(1, steps + 1):
        record = {name: k + 0.1 * step for k, name in enumerate(own) if name != "loss"}
        if step % 5 == 0:
            record |= {f"val_{name}": 10 * record[name] for name in record}
            record["val_loss"] = 0.8 / step
        records.append(record | {"train_loss": 0.7 / step})
    return write_log(out_dir, records)


def read_column(out_dir, key):
    return np.array([record[key] for record in read_log(out_dir) if key in record])


def legend_texts(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def assert_lines_are_logs(axes, runs, names, x):
    """In axes of a figure: for each run, for each of (training's, validation's column), lines."""
    lines = iter(axes.lines)
    for index, run in enumerate(runs):
        for columns in names:
            for column in columns:
                line, xs = next(lines), read_column(run, x)
                has_value = slice(4, None, 5) if column.startswith("val_") else slice(None)
                np.testing.assert_array_equal(line.get_xdata(), xs[has_value])
                np.testing.assert_array_equal(line.get_ydata(), read_column(run, column))
                assert line.get_color() == f"C{index}"


@pytest.mark.parametrize("x", ["tokens", "seconds", "iter"])
def test_curves_are_the_log(tmp_path, x):
    runs = [write_run(tmp_path / "out-a"), write_run(tmp_path / "out-b", steps=20, best=15)]
    figure = curves_figure([load_log(run) for run in runs], x, "loss")
    shown = [[("train_loss", "val_loss")], [("lr",)], [("tokens_per_second",)]]
    for axes, names in zip(figure.axes, shown, strict=True):
        assert_lines_are_logs(axes, runs, names, x)
    curves, _, speed = figure.axes
    assert curves.get_ylabel() == "loss (nats per token)"
    assert x in speed.get_xlabel() or speed.get_xlabel() == "steps of the optimizer"


@pytest.mark.parametrize("kind", PANELS)
def test_the_curves_of_other_runs_are_the_log(tmp_path, kind):
    runs = [write_paired_run(tmp_path / f"out-{n}", 10 + m, kind) for m, n in ((0, "a"), (5, "b"))]
    figure = visualize.answers_figure([load_log(run) for run in runs], "iter")
    for axes, names in zip(figure.axes, PANELS[kind].values(), strict=True):
        columns = [("train_loss" if name == "loss" else name, f"val_{name}") for name in names]
        assert_lines_are_logs(axes, runs, columns, "iter")
    assert legend_texts(figure)[-2:] == ["out-a", "out-b"]
    main([f"--runs={runs[0]}"])
    assert (runs[0] / "curves.png").stat().st_size > 10_000


def test_runs_on_preferences_are_drawn_by_themselves(tmp_path):
    paired, other = write_paired_run(tmp_path / "out-a"), write_run(tmp_path / "out-b")
    for flags in ([f"--runs={other},{paired}"], [f"--runs={paired}", "--y=bits_per_byte"]):
        with pytest.raises(UserError, match="out-a is a run on preferences"):
            main(flags)


@pytest.mark.parametrize("x", ["tokens", "seconds", "iter"])
def test_a_run_begins_where_that_before_it_ended(tmp_path, x):
    first = write_run(tmp_path / "out-a", tokenizer="t", steps=20, best=15)
    second = write_run(tmp_path / "out-b", tokenizer="t", init_from=first)
    third = write_run(tmp_path / "out-c", tokenizer="t", init_from=second)
    other = write_run(tmp_path / "out-d", tokenizer="t", init_from=tmp_path / "elsewhere")
    runs = [load_log(run) for run in (first, second, third, other)]
    follow(runs)
    a, b, _, d = (read_column(run, x) for run in (first, second, third, other))
    wanted = [a, a[-1] + b, a[-1] + b[-1] + b, d]
    for run, xs in zip(runs, wanted, strict=True):
        np.testing.assert_array_equal(run.train[x], xs)
        np.testing.assert_array_equal(run.val[x], xs[4::5])


def test_bits_per_byte_scale_training_by_the_runs_ratio(tmp_path):
    run = write_run(tmp_path / "out-a")
    figure = curves_figure([load_log(run)], "tokens", "bits_per_byte")
    train, val = figure.axes[0].lines[:2]
    np.testing.assert_array_equal(val.get_ydata(), read_column(run, "val_bits_per_byte"))
    np.testing.assert_allclose(train.get_ydata(), RATIO * read_column(run, "train_loss"))
    assert figure.axes[0].get_ylabel() == "bits per byte"
    assert "val_bits_per_byte / val_loss" in legend_texts(figure)[1]


def test_the_best_evaluation_has_a_star_and_its_value(tmp_path):
    run = write_run(tmp_path / "out-a", best=25)
    figure = curves_figure([load_log(run)], "tokens", "loss")
    star, best = figure.axes[0].lines[2], read_column(run, "val_loss").min()
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (25_000, best)
    assert figure.axes[0].texts[0].get_text() == f"{best:.3f}" == "4.100"
    assert legend_texts(figure)[2] == "out-a: best 4.100 at 25 k tokens"


def test_the_first_steps_do_not_flatten_the_rest(tmp_path):
    run = write_run(tmp_path / "out-a")
    low, high = curves_figure([load_log(run)], "iter", "loss").axes[0].get_ylim()
    train, val = read_column(run, "train_loss"), read_column(run, "val_loss")
    assert high < train[0]
    assert low < min(train.min(), val.min()) and high > max(train[3:].max(), val.max())


@pytest.mark.parametrize(
    ("tokenizers", "unit"), [("aa", "loss"), ("ab", "bits per byte"), (["a", None], "loss")]
)
def test_the_unit_is_one_in_which_the_runs_compare(tmp_path, capsys, tokenizers, unit):
    runs = [write_run(tmp_path / f"out-{i}", tokenizer) for i, tokenizer in enumerate(tokenizers)]
    main([f"--runs={runs[0]},{runs[1]}"])
    assert f"shows {unit}" in capsys.readouterr().out
    assert (runs[0] / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_evaluation_is_drawn_in_nats_only(tmp_path):
    bare, full = write_run(tmp_path / "bare", interval=99), write_run(tmp_path / "full")
    figure = curves_figure([load_log(bare)], "tokens", "loss")
    assert len(figure.axes[0].lines[0].get_ydata()) == 30
    assert legend_texts(figure)[2] == "bare: no evaluation"
    figure = curves_figure([load_log(bare), load_log(full)], "tokens", "bits_per_byte")
    assert np.isnan(figure.axes[0].lines[0].get_ydata()).all()
    assert legend_texts(figure)[2] == "bare: no evaluation, so no bits per byte"
    with pytest.raises(UserError, match="no run has one; pass --y=loss"):
        main([f"--runs={bare}", "--y=bits_per_byte"])


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    (tmp_path / "x").mkdir()
    runs = [load_log(write_run(tmp_path / name)) for name in ("out", "x/out")]
    texts = legend_texts(curves_figure(runs, "tokens", "loss"))
    assert texts[2].startswith(f"{tmp_path.as_posix()}/out:")
    assert texts[3].startswith(f"{tmp_path.as_posix()}/x/out:")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runs="], "no run to draw; pass --runs=out-a,out-b"),
        (["--runs=DIR/none"], "none/log.jsonl is missing"),
        (["--runs=DIR/empty"], "empty/log.jsonl is empty"),
        (["--runs=DIR/other"], "other/log.jsonl is not a log of train.py .KeyError: 'tokens'"),
        (["--runs=DIR/damaged"], "damaged/log.jsonl is damaged .Expecting"),
        (["--runs=DIR/out-a", "--out=DIR/a.pdf"], "must end in .png"),
    ],
)
def test_errors_say_what_to_do_in_one_line(tmp_path, flags, message):
    write_run(tmp_path / "out-a")
    logs = {"empty": "", "other": '{"loss": 1}\n', "damaged": '{"iter": 1\n{}\n{}\n'}
    for name, text in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"^.*{message}.*\Z"):
        main([flag.replace("DIR", str(tmp_path)) for flag in flags])
    assert not list(tmp_path.rglob("*.png*"))


def test_pictures_are_whole_and_leave_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    run = write_run(tmp_path / "out-a")
    main([f"--runs={run}", f"--out={tmp_path}/new/a.png"])
    draw_histogram({"seen": [1.0, 2.0]}, tmp_path / "new/b.png", "title", "x")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.png", "b.png"]
    assert dict(matplotlib.rcParams) == before


# --- Chinese -----------------------------------------------------------------------------------


def test_fonts_with_chinese_are_known_by_their_names(monkeypatch):
    names = ["Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Serif", "SimHei", "DejaVu Serif"]
    fonts = [dataclasses.replace(fontManager.ttflist[0], name=name) for name in names]
    monkeypatch.setattr(fontManager, "ttflist", fonts)
    wanted = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "SimHei"]
    assert visualize.font_families() == wanted


@pytest.mark.parametrize("font", ["none at all", "STIXGeneral"])
def test_no_character_becomes_a_box(tmp_path, capsys, caplog, monkeypatch, font):
    """ⓐ and ⓑ are in STIXGeneral, which matplotlib brings, and not in DejaVu Sans."""
    monkeypatch.setattr(visualize, "CJK_FONT", re.compile(font))
    caplog.set_level(logging.WARNING)
    run = write_run(tmp_path / "out-ⓐⓑ")
    main([f"--runs={run}"])  # a warning, as of a missing glyph, is an error here
    has_font = font == "STIXGeneral"
    assert ("no font for ⓐⓑ" in capsys.readouterr().out) != has_font
    figure = curves_figure([load_log(run)], "tokens", "loss")
    name = "out-ⓐⓑ" if has_font else r"out-\u24d0\u24d1"
    assert legend_texts(figure)[2].startswith(f"{name}: best")

    draw_histogram({"ⓐ": [1.0]}, tmp_path / "h.png", "ⓐⓑ 🙂", "ⓑ")
    assert not caplog.records


def test_a_dollar_or_an_underscore_in_a_name_means_nothing(tmp_path):
    run = write_run(tmp_path / "_$x^$")
    main([f"--runs={run}"])  # $x^$ is an error as mathematics
    texts = legend_texts(curves_figure([load_log(run)], "tokens", "loss"))
    assert texts[2].startswith(r"_\$x^\$: best")


# --- histograms --------------------------------------------------------------------------------


def filled_steps(figure):
    return [patch.get_data() for patch in figure.axes[0].findobj(StepPatch) if patch.get_fill()]


@pytest.mark.parametrize("log_x", [False, True])
def test_histogram_shows_shares_of_each_group(tmp_path, log_x):
    groups = {"seen": [1.0, 1.0, 1.0, 100.0], "unseen": [100.0, math.inf]}
    figure = draw_histogram(groups, tmp_path / "h.png", "title", "perplexity", log_x)
    seen, unseen = filled_steps(figure)
    assert (seen.values[0], seen.values[-1]) == (0.75, 0.25)
    assert (unseen.values[0], unseen.values[-1]) == (0, 1)
    np.testing.assert_allclose(seen.edges[[0, -1]], [1, 100])
    assert legend_texts(figure) == [
        "seen: n = 4, mean 25.75 (dashed)",
        "unseen: n = 2, mean 100 (dashed), 1 not finite (drawn at 100)",
    ]
    assert figure.axes[0].get_xscale() == ("log" if log_x else "linear")
    assert (figure.axes[0].get_title(), figure.axes[0].get_xlabel()) == ("title", "perplexity")


EDGES = [{}, {"seen": [5.0], "unseen": []}, {"seen": [math.inf]}, {"seen": [0.0, math.nan]}]
EDGES += [{"seen": [1.0, 8.0]}]  # in float64, 10 ** log10(8) is below 8


@pytest.mark.parametrize("log_x", [False, True])
@pytest.mark.parametrize("groups", EDGES)
def test_histogram_loses_no_value(tmp_path, groups, log_x):
    drawn = filled_steps(draw_histogram(groups, tmp_path / "h.png", "title", "x", log_x))
    for steps, values in zip(drawn, groups.values(), strict=True):
        assert steps.values.sum() == (1 if values else 0)
