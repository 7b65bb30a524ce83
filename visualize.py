"""Pictures: the loss curves of runs from their logs, and histograms for evaluations.py.

python visualize.py --runs=out-sanguo
python visualize.py --runs=out-a,out-b --x=seconds --y=bits_per_byte --out=pictures/a-b.png

A run that went on from another one of the list is drawn behind it.

Losses per token of different tokenizers do not compare: a longer piece of text in each token is
harder to predict. Bits per byte do. All numbers come from log.jsonl; nothing is computed anew.
Runs on preferences (DPO) have a picture of their own: loss, rewards, margin, log-probabilities.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogFormatter, PercentFormatter

from configurator import UserError, command, configure, repo_path, show_path, written_aside
from miniglm.checkpoint import has_checkpoint, read_log, read_run

X = Literal["tokens", "seconds", "iter"]
Y = Literal["loss", "bits_per_byte"]
X_LABELS = {
    "tokens": "tokens seen",
    "seconds": "seconds of training and evaluation",
    "iter": "steps of the optimizer",
}
Y_LABELS = {"loss": "loss (nats per token)", "bits_per_byte": "bits per byte"}
COLUMNS = ("iter", "tokens", "seconds", "train_loss", "lr", "tokens_per_second")
EVALUATION = (*COLUMNS, "val_loss", "val_bits_per_byte")
PAIRED = (*("rewards_chosen", "rewards_rejected", "margin", "accuracy"), "logp_chosen")
PAIRED += ("logp_rejected",)  # what runs on preferences log
CJK_FONTS = (
    *(f"Noto Sans {kind}" for kind in ("CJK SC", "CJK TC", "CJK JP", "SC", "TC")),
    *("Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("PingFang SC", "Hiragino Sans GB", "Heiti SC", "Heiti TC", "STHeiti", "Microsoft YaHei"),
    *("SimHei", "SimSun", "Microsoft JhengHei", "Arial Unicode MS", "Droid Sans Fallback"),
)


@dataclass
class Settings:
    runs: list[str] = field(default_factory=list)  # out_dirs with a log.jsonl: out-a,out-b
    x: X = "tokens"  # what the curves run along: tokens, seconds, iter
    y: Y | None = None  # loss or bits_per_byte; None: loss, unless the runs' tokenizers differ
    out: str | None = None  # the picture, *.png; None is curves.png in the first run's out_dir


@dataclass
class Run:
    """What log.jsonl holds, a column a key."""

    path: Path
    tokenizer: str | None  # its sha256; None where nothing was saved yet
    init_from: str  # scratch, or the out_dir that it went on from
    train: dict[str, np.ndarray]  # all lines
    val: dict[str, np.ndarray]  # the lines with an evaluation

    @property
    def evaluated(self) -> bool:
        return len(self.val["iter"]) > 0

    @property
    def is_paired(self) -> bool:
        """Whether it was trained on preferences."""
        return "margin" in self.train

    def curves(self, y: Y) -> tuple[np.ndarray, np.ndarray]:
        """Training and validation curve in the unit y; nan where that takes an evaluation."""
        if y == "loss":
            return self.train["train_loss"], self.val["val_loss"]
        # tokens / (bytes x ln 2) of the validation split: one number for the whole run
        ratios = self.val["val_bits_per_byte"] / self.val["val_loss"]
        ratio = ratios[-1] if self.evaluated else math.nan
        return self.train["train_loss"] * ratio, self.val["val_bits_per_byte"]


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if not config.runs:
        raise UserError("no run to draw; pass --runs=out-a,out-b")
    if len(config.runs) > 10:
        raise UserError(f"{len(config.runs)} runs are too many for one picture; pass 10 at most")
    runs = [load_log(repo_path(name)) for name in dict.fromkeys(config.runs)]
    follow(runs)
    out = repo_path(config.out) if config.out else runs[0].path / "curves.png"
    if out.suffix != ".png":
        raise UserError(f"out={config.out!r} must end in .png")
    paired = [run.is_paired for run in runs]
    if any(paired):
        if not all(paired) or config.y == "bits_per_byte":
            raise UserError(
                f"{run_names(runs)[paired.index(True)]} is a run on preferences, whose loss is no "
                "other's; draw such runs by themselves, without --y=bits_per_byte"
            )
        save_figure(preferences_figure(runs, config.x), out)
        print(f"{show_path(out)} shows rewards and log-probabilities of {names_of(runs)}")
        return
    y = config.y or pick_unit(runs)
    if y == "bits_per_byte" and not any(run.evaluated for run in runs):
        raise UserError("bits per byte come from evaluations, and no run has one; pass --y=loss")
    save_figure(curves_figure(runs, config.x, y), out)
    print(f"{show_path(out)} shows {Y_LABELS[y]} of {names_of(runs)}")


def load_log(out_dir: Path) -> Run:
    """UserError where there is no log, or not such a one."""
    log = out_dir / "log.jsonl"
    if not log.is_file():
        raise UserError(f"{show_path(log)} is missing; --runs= takes the out_dirs of train.py")
    try:
        records = read_log(out_dir)
        # an evaluation that gave nan has no place on an axis
        evaluated = [r for r in records if math.isfinite(r.get("val_loss", math.nan))]
        in_train, in_val = COLUMNS, EVALUATION
        if records and "margin" in records[0]:
            in_train, in_val = (*COLUMNS, *PAIRED), (*COLUMNS, "val_loss")
            in_val += tuple(f"val_{name}" for name in PAIRED)
        train = {name: np.array([r[name] for r in records], float) for name in in_train}
        val = {name: np.array([r[name] for r in evaluated], float) for name in in_val}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{show_path(log)} is not a log of train.py ({reason})") from None
    if not records:
        raise UserError(f"{show_path(log)} is empty; wait for the first line of train.py")
    saved = read_run(out_dir, "latest") if has_checkpoint(out_dir) else {}
    init_from = saved.get("settings", {}).get("init_from", "scratch")
    return Run(out_dir, saved.get("tokenizer_sha256"), init_from, train, val)


def follow(runs: list[Run]) -> None:
    """Moves each run behind the one that it went on from, where that stands before it."""
    before = {}
    for run in runs:
        earlier = before.get(repo_path(run.init_from))
        for x in X_LABELS if earlier else ():
            end = earlier.train[x][-1]
            run.train[x], run.val[x] = run.train[x] + end, run.val[x] + end
        before[run.path] = run


def pick_unit(runs: list[Run]) -> Y:
    """The unit in which these runs compare."""
    tokenizers = {run.tokenizer for run in runs} - {None}
    return "bits_per_byte" if len(tokenizers) > 1 else "loss"


def run_names(runs: list[Run]) -> list[str]:
    """The out_dirs' names, or their paths where two have the same name."""
    unique = len({run.path.name for run in runs}) == len(runs)
    return [run.path.name if unique else show_path(run.path) for run in runs]


def names_of(runs: list[Run]) -> str:
    return ", ".join(run_names(runs))


# --- curves ------------------------------------------------------------------------------------


def curves_figure(runs: list[Run], x: X, y: Y) -> Figure:
    """Axes: the curves, the learning rate, the speed; in each a line a run, in the runs' order.

    The first axes have two lines a run, training and validation, and then the stars.
    """
    with style():
        figure = Figure(figsize=(10, 6.6 + 0.2 * len(runs)), layout="constrained")
        axes = figure.subplots(3, sharex=True, height_ratios=[4.5, 1.2, 1.2])
        for index, run in enumerate(runs):
            (train, val), color = run.curves(y), f"C{index}"
            every = max(1, len(val) // 40)  # markers that do not touch
            dash = ("-", "--", ":", "-.")[index % 4]  # equal schedules lie on each other
            axes[0].plot(run.train[x], train, color=color, alpha=0.45, lw=0.9)
            axes[0].plot(run.val[x], val, "o-", color=color, lw=2.2, ms=4.5, markevery=every)
            axes[1].plot(run.train[x], run.train["lr"], dash, color=color, lw=1.4)
            axes[2].plot(run.train[x], run.train["tokens_per_second"], color=color, lw=0.9)
        mark_best(axes[0], runs, x, y)
        axes[0].set(ylabel=Y_LABELS[y], ylim=curve_limits(runs, x, y))
        axes[1].set(ylabel="learning rate", ylim=(0, None))
        axes[1].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes[2].set(ylabel="tokens / s", ylim=(0, None), xlabel=X_LABELS[x])
        axes[2].yaxis.set_major_formatter(lambda value, _: short(value))
        axes[2].xaxis.set_major_formatter(lambda value, _: x_text(value, x))
        figure.align_ylabels(axes)
        handles = legend_lines(runs, x, y)
        figure.legend(handles=handles, loc="outside upper center", frameon=False)
    return figure


def preferences_figure(runs: list[Run], x: X) -> Figure:
    """Axes: loss, rewards, margin, accuracy, log-probabilities; in each, for each run in order, the
    training and the validation curve, of the chosen answers and then of the rejected ones."""
    panels = {
        "loss (nats per pair)": ("loss",),
        "reward": ("rewards_chosen", "rewards_rejected"),
        "margin": ("margin",),
        "accuracy": ("accuracy",),
        "log p of an answer": ("logp_chosen", "logp_rejected"),
    }
    with style():
        figure = Figure(figsize=(10, 10 + 0.2 * len(runs)), layout="constrained")
        all_axes = figure.subplots(len(panels), sharex=True, height_ratios=[2, 2, 1.4, 1.2, 2])
        for axes, (label, names) in zip(all_axes, panels.items(), strict=True):
            for index, run in enumerate(runs):
                every = max(1, len(run.val[x]) // 40)
                for name, dash in zip(names, ("-", "--"), strict=False):
                    train = run.train["train_loss" if name == "loss" else name]
                    val, color = run.val[f"val_{name}"], f"C{index}"
                    axes.plot(run.train[x], train, dash, color=color, alpha=0.45, lw=0.9)
                    line = {"marker": "o", "ms": 4.5, "markevery": every, "lw": 2.2}
                    axes.plot(run.val[x], val, dash, color=color, **line)
            axes.set(ylabel=label)
        all_axes[-1].set(xlabel=X_LABELS[x])
        all_axes[-1].xaxis.set_major_formatter(lambda value, _: x_text(value, x))
        all_axes[3].yaxis.set_major_formatter(PercentFormatter(1))
        figure.align_ylabels(all_axes)
        kinds = {"validation": {"lw": 2.2, "marker": "o", "ms": 4.5}, "training": {"lw": 0.9}}
        kinds |= {"chosen": {"ls": "-"}, "rejected": {"ls": "--"}}
        handles = [Line2D([], [], color="0.35", label=label, **kw) for label, kw in kinds.items()]
        handles += [
            Line2D([], [], color=f"C{index}", lw=4, label=name)
            for index, name in enumerate(legible(run_names(runs)))
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    return figure


def mark_best(axes: Axes, runs: list[Run], x: X, y: Y) -> None:
    """A star at each run's best evaluation, and its value: above, or below where that is taken."""
    curves = [(run.val[x], run.curves(y)[1], f"C{i}") for i, run in enumerate(runs)]
    stars = [(xs[v.argmin()], v.min(), color) for xs, v, color in curves if len(v)]
    width = max(run.train[x][-1] for run in runs)
    for best_x, best, color in stars:
        higher = sum(v > best and abs(xs - best_x) < 0.08 * width for xs, v, _ in stars)
        axes.plot(best_x, best, "*", color=color, ms=15, mec="white", mew=0.8, zorder=4)
        axes.annotate(
            f"{best:.3f}",
            (best_x, best),
            xytext=(0, -4 - 12 * higher if higher else 16),
            textcoords="offset points",
            ha="center",
            va="center",
            color=color,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=5,
        )


def curve_limits(runs: list[Run], x: X, y: Y) -> tuple[float, float]:
    """Room for validation and the last 90 % of training: the first steps would flatten the rest."""
    shown = []
    for run in runs:
        (train, val), xs = run.curves(y), run.train[x]
        shown += [val, train[xs >= xs[0] + 0.1 * (xs[-1] - xs[0])]]
    values = np.concatenate(shown)
    low, high = np.nanmin(values), np.nanmax(values)
    margin = 0.08 * (high - low) or 0.1
    return low - margin, high + margin


def legend_lines(runs: list[Run], x: X, y: Y) -> list[Line2D]:
    """What the two kinds of curve are, then a line a run with its best value."""
    scaled = ", scaled by val_bits_per_byte / val_loss (exact for validation only)"
    training = "training" + scaled * (y == "bits_per_byte")
    lines = [
        Line2D([], [], color="0.35", lw=2.2, marker="o", ms=4.5, label="validation"),
        Line2D([], [], color="0.35", lw=0.9, alpha=0.6, label=training),
    ]
    names = legible(run_names(runs))
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        what = "no evaluation" + ", so no bits per byte" * (y == "bits_per_byte")
        if run.evaluated:
            val = run.curves(y)[1]
            where = x_text(round(run.val[x][val.argmin()]), x)
            what = f"best {val.min():.3f} at {where} {'steps' if x == 'iter' else x}"
        lines.append(Line2D([], [], color=f"C{index}", lw=4, label=f"{name}: {what}"))
    return lines


def x_text(value: float, x: X) -> str:
    return short(value) if x == "tokens" else f"{value:,.10g}"


def short(value: float) -> str:
    """1234567 -> 1.235 M"""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


# --- histograms --------------------------------------------------------------------------------


def draw_histogram(
    groups: dict[str, list[float]], path: Path, title: str, xlabel: str, log_x: bool = False
) -> None:
    """Writes a PNG of each group's distribution, in shares of the group, since sizes differ.

    What is not finite is drawn at the highest finite value and counted in the legend.
    """
    save_figure(histogram_figure(groups, title, xlabel, log_x), path)


def histogram_figure(
    groups: dict[str, list[float]], title: str, xlabel: str, log_x: bool = False, bins: int = 20
) -> Figure:
    """The picture of draw_histogram. A log axis takes positive values; others get a linear one."""
    arrays = [np.array(values, float) for values in groups.values()]
    pooled = np.concatenate([[], *(array[np.isfinite(array)] for array in arrays)])
    low, high = (pooled.min(), pooled.max()) if len(pooled) else (1.0, 1.0)
    log_x = log_x and low > 0
    edges = np.histogram_bin_edges(np.log10([low, high]) if log_x else [low, high], bins)
    edges = 10**edges if log_x else edges
    title, xlabel, *names = legible([title, xlabel, *groups])
    with style():
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        handles = []
        for index, (name, values) in enumerate(zip(names, arrays, strict=True)):
            drawn = np.nan_to_num(values, nan=high, posinf=high, neginf=low)
            drawn = drawn.clip(edges[0], edges[-1])  # the edges of a log axis are rounded
            shares = np.histogram(drawn, edges)[0] / max(1, len(drawn))
            color, finite = f"C{index}", values[np.isfinite(values)]
            label = f"{name}: n = {len(values):,}"
            if len(finite):
                axes.axvline(finite.mean(), color=color, lw=1.4, ls="--")
                label += f", mean {finite.mean():.4g} (dashed)"
            if others := len(values) - len(finite):
                label += f", {others:,} not finite (drawn at {high:.4g})"
            axes.stairs(shares, edges, fill=True, color=color, alpha=0.25)
            handles.append(axes.stairs(shares, edges, color=color, lw=1.8, label=label))
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(LogFormatter())
            axes.xaxis.set_minor_formatter(LogFormatter())
        else:
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(title=title, xlabel=xlabel, ylabel="share of the group", ylim=(0, None))
        figure.legend(handles=handles, loc="outside lower center", frameon=False)
    return figure


# --- style, fonts, files -----------------------------------------------------------------------


def style() -> AbstractContextManager:
    """Settings of matplotlib within which a figure is made and saved; none stays behind."""
    return matplotlib.rc_context(
        {
            "font.family": font_families(),
            "font.size": 10,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": "0.9",
            "figure.facecolor": "white",
            "axes.facecolor": "white",
        }
    )


def font_families() -> list[str]:
    """matplotlib's own font, then the installed ones that have Chinese, for what it lacks."""
    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]


def legible(texts: list[str]) -> list[str]:
    r"""The texts as they can be drawn: a character that no font has is written \u4e09, not a box.

    A line on stdout says so. $ is a dollar, not mathematics.
    """
    fonts = [findfont(FontProperties(family=[name])) for name in font_families()]
    known = set().union(*(get_font(font).get_charmap() for font in fonts))
    missing = sorted({char for char in "".join(texts) if ord(char) not in known})
    if missing:
        print(
            f"note: no font for {''.join(missing)}, drawn as \\u...; install one (Debian, Ubuntu: "
            f"fonts-noto-cjk), then delete fontlist*.json in {matplotlib.get_cachedir()}"
        )
    escapes = {ord(char): char.encode("unicode_escape").decode() for char in missing}
    return [text.translate(escapes | {ord("$"): r"\$"}) for text in texts]


def save_figure(figure: Figure, path: Path) -> None:
    with style(), written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=150)  # the suffix of aside names no format


if __name__ == "__main__":
    command(main)
