"""What log.jsonl gets, sent to trackers too: each through its own package, none of them required.

    python train.py config/pretrain_sanguo.py --track=tensorboard,wandb
    tensorboard --logdir=out-sanguo

What concerns a tracker alone is set by its own environment variables: WANDB_MODE=offline,
SWANLAB_MODE=offline, TRACKIO_DIR=... A run keeps its id, so a resumed one goes on as the same run.
"""

import importlib
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from configurator import UserError, in_a_line, nearest, written_aside

PROJECT = "miniglm"


def tracking_id(out_dir: Path, new: bool) -> str:
    """The id of the run, kept in out_dir/tracking_id; another one for a new run."""
    path = out_dir / "tracking_id"
    if new or not path.is_file():
        with written_aside(path) as aside:
            aside.write_text(f"{uuid.uuid4().hex[:16]}\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


class TensorBoard:
    """Event files in the out_dir's folder tensorboard, in float32."""

    def __init__(self, id: str, out_dir: Path, step: int, settings: dict):
        from torch.utils.tensorboard import SummaryWriter

        # a killed run has sent steps beyond its checkpoint; they are not shown
        self.writer = SummaryWriter(out_dir / "tensorboard", purge_step=step + 1)

    def log(self, record: dict, samples: str) -> None:
        for name, value in record.items():
            self.writer.add_scalar(name, value, record["iter"])
        if samples:
            self.writer.add_text("samples", samples, record["iter"])

    def close(self) -> None:
        self.writer.close()


class Package:
    """wandb, trackio or swanlab, which share one interface; wandb leaves out steps of a resumed run
    that it already has, trackio keeps runs apart by name, swanlab's files lie in swanlog."""

    def __init__(self, name: str, id: str, out_dir: Path, step: int, settings: dict):
        self.package = importlib.import_module(name)
        options = {
            "wandb": {"id": id, "name": out_dir.name, "dir": out_dir},
            "trackio": {"name": f"{out_dir.name}-{id}", "embed": False},
            "swanlab": {"id": id, "name": out_dir.name, "log_dir": str(out_dir / "swanlog")},
        }
        self.as_text = getattr(self.package, "Text", str)  # swanlab's
        self.run = self.package.init(
            project=PROJECT, config=settings, resume="allow", **options[name]
        )

    def log(self, record: dict, samples: str) -> None:
        text = {"samples": self.as_text(samples)} if samples else {}
        self.run.log(record | text, step=record["iter"])

    def close(self) -> None:
        self.package.finish()


TRACKERS = {"tensorboard": TensorBoard}
TRACKERS |= {name: partial(Package, name) for name in ("wandb", "trackio", "swanlab")}


def check_trackers(names: list[str]) -> None:
    """Raises UserError if a tracker is unknown, or its package, of the same name, not installed."""
    for name in names:
        if name not in TRACKERS:
            near = nearest(name, TRACKERS) or f"; there are {', '.join(TRACKERS)}"
            raise UserError(f"unknown tracker {name!r} in track{near}")
        if not find_spec(name):
            raise UserError(f"track={name!r} needs its package; pip install {name}")


@contextmanager
def open_trackers(names: list[str], out_dir: Path, step: int, settings: dict) -> Iterator[list]:
    """The trackers of these names, closed at the end; steps beyond `step` that were logged before
    are discarded. Raises UserError if one cannot start."""
    id = tracking_id(out_dir, new=step == 0) if names else ""
    with ExitStack() as stack:
        trackers = []
        for name in names:
            try:
                tracker = TRACKERS[name](id, out_dir, step, settings)
            except Exception as error:
                raise UserError(f"track={name!r} cannot start: {in_a_line(error)}") from None
            stack.callback(tracker.close)
            trackers.append(tracker)
        yield trackers
