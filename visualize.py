"""Pictures: the curves of runs from their logs, and histograms for evaluations.py.

python visualize.py --runs=out-sanguo
python visualize.py --runs=out-a,out-b --x=seconds --y=bits_per_byte --out=pictures/a-b.png

A run that started from another one in the list is drawn behind it.

Losses per token of different tokenizers do not compare: a longer piece of text in each token is
harder to predict. Bits per byte do. All numbers come from log.jsonl; nothing is computed anew.
Runs on preferences, marks and rewards have pictures of their own: PANELS.
"""

import math
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from configurator import UserError, command, configure, repo_path, show_path, written_aside

# isort: split
import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from miniglm.checkpoint import has_checkpoint, read_log, read_run

X = Literal["tokens", "seconds", "iter"]
Y = Literal["loss", "bits_per_byte"]
X_LABELS = {
    "tokens": "tokens seen",
    "seconds": "seconds of training and evaluation",
    "iter": "steps of the optimizer",
}
Y_LABELS = {"loss": "loss (nats per token)", "bits_per_byte": "bits per byte"}
MARKED = {
    "accuracy": ("accuracy",),
    "reward": ("rewards_chosen", "rewards_rejected"),
    "log p of an answer": ("logp_chosen", "logp_rejected"),
}
# the axes of other runs, by a column that only their logs have: columns, the second one dashed
PANELS = {
    "reward": {  # rewards; tokens of an answer, share of the answers that ended
        "reward": ("reward",),
        "spread": ("spread",),
        "KL (nats)": ("kl",),
        "tokens": ("length",),
        "ended": ("ended",),
    },
    "margin": {"loss (nats per pair)": ("loss",), "margin": ("margin",)} | MARKED,  # preferences
    "kl": {"loss of a mark": ("loss",), "KL (nats)": ("kl",)} | MARKED,  # marks
}
VALIDATION = {"lw": 2.2, "marker": "o", "ms": 4.5}
TRAINING = {"lw": 0.9, "alpha": 0.45}
CJK_FONT = re.compile(
    r"(Noto Sans|Source Han Sans) (CJK )?(SC|CN|TC|JP)|WenQuanYi|PingFang SC|Hei\b|Heiti|SimSun"
    "|Hiragino Sans GB|Arial Unicode MS|Droid Sans Fallback"
)


@dataclass
class Settings:
    runs: list[str] = field(default_factory=list)  # out_dirs with a log.jsonl: out-a,out-b
    x: X = "tokens"  # what the curves run along: tokens, seconds, iter
    y: Y | None = None  # loss or bits_per_byte; None: loss, unless the runs' tokenizers differ
    out: str | None = None  # the picture, *.png; None is curves.png in the first run's out_dir


@dataclass
class Run:
    """The columns of a log.jsonl: X_LABELS' in both, train_loss and val_loss as loss."""

    path: Path
    tokenizer: str | None  # its sha256; None if nothing is saved yet
    init_from: str  # scratch, or the out_dir that it started from
    train: dict[str, np.ndarray]  # all lines
    val: dict[str, np.ndarray]  # the lines with an evaluation
    panels: dict[str, tuple[str, ...]]  # one of PANELS; empty: loss, or bits per byte

    @property
    def evaluated(self) -> bool:
        return len(self.val["iter"]) > 0


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if not config.runs:
        raise UserError("no run to draw; pass --runs=out-a,out-b")
    runs = [load_log(repo_path(name)) for name in dict.fromkeys(config.runs)]
    follow(runs)
    out = repo_path(config.out) if config.out else runs[0].path / "curves.png"
    if out.suffix != ".png":
        raise UserError(f"out={config.out!r} must end in .png")
    panels = [run.panels for run in runs]
    if any(panels):
        if panels.count(panels[0]) < len(runs) or config.y == "bits_per_byte":
            name = run_names(runs)[[*map(bool, panels)].index(True)]
            raise UserError(
                f"{name} is a run on preferences, marks or rewards, whose loss is no other's; draw "
                "such runs by themselves, without --y=bits_per_byte"
            )
        figure, content = answers_figure(runs, config.x), ", ".join(panels[0])
    else:
        y = config.y or pick_unit(runs)
        if y == "bits_per_byte" and not any(run.evaluated for run in runs):
            raise UserError("bits per byte need an evaluation, and no run has one; pass --y=loss")
        figure, content = curves_figure(runs, config.x, y), Y_LABELS[y]
    save_figure(figure, out)
    print(f"{show_path(out)} shows {content} of {', '.join(run_names(runs))}")


def load_log(out_dir: Path) -> Run:
    """Raises UserError if there is no log, or it is not of train.py."""
    log = out_dir / "log.jsonl"
    if not log.is_file():
        raise UserError(f"{show_path(log)} is missing; --runs= takes the out_dirs of train.py")
    try:
        records = read_log(out_dir)
        # an evaluation that gave nan has no place on an axis
        evaluated = [r for r in records if math.isfinite(r.get("val_loss", math.nan))]
        first = records[0] if records else {}
        panels = next((PANELS[name] for name in PANELS if name in first), {})
        own = [name for names in panels.values() for name in names if name != "loss"]
        train = {name: column(records, name) for name in (*X_LABELS, "lr", "tokens_per_second")}
        # a window may have had no answers at all, or none of one kind
        train |= {name: np.array([r.get(name) for r in records], float) for name in own}
        train["loss"] = np.array([record.get("train_loss") for record in records], float)
        judged = [name for name in own if evaluated and f"val_{name}" in evaluated[0]]
        val = {name: column(evaluated, name) for name in X_LABELS}
        for name in ("loss", *(judged if panels else ["bits_per_byte"])):
            val[name] = column(evaluated, f"val_{name}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{show_path(log)} is not a log of train.py ({reason})") from None
    if not records:
        raise UserError(f"{show_path(log)} is empty; wait for the first line of train.py")
    if not panels:
        # tokens / (bytes x ln 2) of the validation split: one number for the whole run
        ratio = (val["bits_per_byte"] / val["loss"])[-1] if evaluated else math.nan
        train["bits_per_byte"] = train["loss"] * ratio
    saved = read_run(out_dir, "latest") if has_checkpoint(out_dir) else {}
    init_from = saved.get("settings", {}).get("init_from", "scratch")
    return Run(out_dir, saved.get("tokenizer_sha256"), init_from, train, val, panels)


def column(records: list[dict], name: str) -> np.ndarray:
    return np.array([record[name] for record in records], float)


def follow(runs: list[Run]) -> None:
    """Moves each run behind the one that it started from, if that comes earlier in the list."""
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
    """The out_dirs' names, or their paths if two have the same name."""
    unique = len({run.path.name for run in runs}) == len(runs)
    return [show_path(run.path.name if unique else run.path) for run in runs]


# --- curves ------------------------------------------------------------------------------------


def curves_figure(runs: list[Run], x: X, y: Y) -> Figure:
    """Axes: the curves, the learning rate, the speed; in each a line a run, in the runs' order.

    The first axes have two lines a run, training and validation, and then the stars.
    """
    panels = {Y_LABELS[y]: (y,), "learning rate": ("lr",), "tokens / s": ("tokens_per_second",)}
    with style():
        figure = panels_figure(runs, x, panels, [4.5, 1.2, 1.2], height=6.6)
        curves, rate, speed = figure.axes
        mark_best(curves, runs, x, y)
        curves.set(ylim=curve_limits(runs, x, y))
        for index, line in enumerate(rate.lines):  # equal schedules lie on each other
            line.set(linestyle=("-", "--", ":", "-.")[index % 4], linewidth=1.4)
        rate.set(ylim=(0, None))
        rate.yaxis.set_major_formatter("{x:g}")
        speed.set(ylim=(0, None))
        speed.yaxis.set_major_formatter(ticker.EngFormatter())
        scaled = ", scaled by val_bits_per_byte / val_loss (exact for validation only)"
        training = "training" + scaled * (y == "bits_per_byte")
        pairs = zip(run_names(runs), runs, strict=True)
        names = [f"{name}: {best_text(run, x, y)}" for name, run in pairs]
        handles = legend_lines({"validation": VALIDATION, training: TRAINING}, names)
        figure.legend(handles=handles, loc="outside upper center", frameon=False)
    return figure


def answers_figure(runs: list[Run], x: X) -> Figure:
    """Axes: the runs' PANELS; in each, for each run in order, the training and the validation
    curve, of the chosen answers and then of the rejected ones."""
    panels = runs[0].panels
    with style():
        figure = panels_figure(runs, x, panels, [2, 1.4, 1.4, 2, 2], height=10)
        for axes, names in zip(figure.axes, panels.values(), strict=True):
            if names[0] in ("accuracy", "ended"):
                axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
        kinds = {"validation": VALIDATION, "training": TRAINING}
        if "log p of an answer" in panels:
            kinds |= {"chosen": {"ls": "-"}, "rejected": {"ls": "--"}}
        handles = legend_lines(kinds, run_names(runs))
        figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    return figure


def panels_figure(
    runs: list[Run], x: X, panels: dict[str, tuple[str, ...]], ratios: list[float], height: float
) -> Figure:
    """Axes below each other, by their labels, with columns of the runs' logs."""
    figure = Figure(figsize=(10, height + 0.2 * len(runs)), layout="constrained")
    all_axes = figure.subplots(len(panels), sharex=True, height_ratios=ratios)
    for axes, (label, names) in zip(all_axes, panels.items(), strict=True):
        axes.set(ylabel=label)
        for index, run in enumerate(runs):
            for name, dash in zip(names, ("-", "--"), strict=False):
                look = {"color": f"C{index}", "ls": dash}
                alpha = TRAINING["alpha"] if name in run.val else 1
                axes.plot(run.train[x], run.train[name], **look, **TRAINING | {"alpha": alpha})
                if name in run.val:
                    every = max(1, len(run.val[x]) // 40)  # markers that do not touch
                    axes.plot(run.val[x], run.val[name], **look, **VALIDATION, markevery=every)
    all_axes[-1].set(xlabel=X_LABELS[x])
    all_axes[-1].xaxis.set_major_formatter(x_format(x))
    figure.align_ylabels(all_axes)
    return figure


def legend_lines(kinds: dict[str, dict], names: list[str]) -> list[Line2D]:
    """The kinds of curve, by their looks, then a line a run."""
    lines = [Line2D([], [], color="0.35", label=label, **look) for label, look in kinds.items()]
    for index, name in enumerate(legible(names)):
        lines.append(Line2D([], [], color=f"C{index}", lw=4, label=name))
    return lines


def best_text(run: Run, x: X, y: Y) -> str:
    if not run.evaluated:
        return "no evaluation" + ", so no bits per byte" * (y == "bits_per_byte")
    best = run.val[y].argmin()
    position = x_format(x)(round(run.val[x][best]))
    return f"best {run.val[y][best]:.3f} at {position} {'steps' if x == 'iter' else x}"


def mark_best(axes: Axes, runs: list[Run], x: X, y: Y) -> None:
    """A star at each run's best evaluation, and its value: above, or below if that is taken."""
    evaluated = [(run, f"C{index}") for index, run in enumerate(runs) if run.evaluated]
    stars = [(run.val[x][run.val[y].argmin()], run.val[y].min(), c) for run, c in evaluated]
    width = max(run.train[x][-1] for run in runs)
    for best_x, best, color in stars:
        higher = sum(v > best and abs(xs - best_x) < 0.08 * width for xs, v, _ in stars)
        axes.plot(best_x, best, "*", color=color, ms=15, mec="white", mew=0.8, zorder=4)
        look = {"color": color, "ha": "center", "va": "center", "zorder": 5}
        look["path_effects"] = [withStroke(linewidth=3, foreground="white")]
        offset = (0, -4 - 12 * higher if higher else 16)  # points
        position = {"xytext": offset, "textcoords": "offset points"}
        axes.annotate(f"{best:.3f}", (best_x, best), **position, **look)


def curve_limits(runs: list[Run], x: X, y: Y) -> tuple[float, float]:
    """Room for validation and the last 90 % of training: the first steps would flatten the rest."""
    late = [run.train[x] >= 0.9 * run.train[x][0] + 0.1 * run.train[x][-1] for run in runs]
    shown = [run.train[y][mask] for run, mask in zip(runs, late, strict=True)]
    values = np.concatenate([*shown, *(run.val[y] for run in runs)])
    low, high = np.nanmin(values), np.nanmax(values)
    margin = 0.08 * (high - low) or 0.1
    return low - margin, high + margin


def x_format(x: X) -> ticker.Formatter:
    """1234567 as 1.23457 M if they are tokens, else as 1,234,567."""
    return ticker.EngFormatter() if x == "tokens" else ticker.StrMethodFormatter("{x:,.10g}")


# --- histograms --------------------------------------------------------------------------------


def draw_histogram(
    groups: dict[str, list[float]], path: Path, title: str, xlabel: str, log_x: bool = False
) -> Figure:
    """Writes a PNG of each group's distribution, in shares of the group, since sizes differ.

    What is not finite is drawn at the highest finite value and counted in the legend. A log axis
    takes positive values; others get a linear one.
    """
    arrays = [np.array(values, float) for values in groups.values()]
    pooled = np.concatenate([[], *(array[np.isfinite(array)] for array in arrays)])
    low, high = (pooled.min(), pooled.max()) if len(pooled) else (1.0, 1.0)
    log_x = log_x and low > 0
    edges = np.histogram_bin_edges(np.log10([low, high]) if log_x else [low, high], bins=20)
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
            axes.xaxis.set_major_formatter(ticker.LogFormatter())
            axes.xaxis.set_minor_formatter(ticker.LogFormatter())
        else:
            axes.xaxis.set_major_formatter("{x:,.10g}")
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
        axes.set(title=title, xlabel=xlabel, ylabel="share of the group", ylim=(0, None))
        figure.legend(handles=handles, loc="outside lower center", frameon=False)
    save_figure(figure, path)
    return figure


# --- style, fonts, files -----------------------------------------------------------------------


def style() -> AbstractContextManager:
    """Settings of matplotlib within which a figure is made and saved; none stays behind."""
    return matplotlib.rc_context(
        {
            "font.family": font_families(),
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": "0.9",
        }
    )


def font_families() -> list[str]:
    """matplotlib's own font, then the installed ones that have Chinese, for what it lacks."""
    names = {font.name for font in fontManager.ttflist}
    installed = sorted(names, key=lambda name: ("SC" not in name, name))  # simplified first
    return ["DejaVu Sans", *filter(CJK_FONT.search, installed)]


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
