"""What log.jsonl gets, sent to trackers too: each through its own package, none of them required.

    python train.py config/pretrain_sanguo.py --track=tensorboard,wandb
    tensorboard --logdir=out-sanguo

What concerns a tracker alone is set by its own environment variables: WANDB_MODE=offline,
SWANLAB_MODE=offline, TRACKIO_DIR=... A run keeps its id, so a resumed one goes on as the same run.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from configurator import UserError, nearest

PROJECT = "miniglm"


@dataclass
class Tracked:
    """What trackers know a run by."""

    id: str
    name: str  # of its out_dir
    folder: Path  # its out_dir
    step: int  # steps done: what was sent of later ones is void
    settings: dict


class TensorBoard:
    """Event files in the out_dir's folder tensorboard, in float32."""

    def __init__(self, run: Tracked):
        from torch.utils.tensorboard import SummaryWriter

        # a killed run has sent steps beyond its checkpoint; they are not shown
        self.writer = SummaryWriter(run.folder / "tensorboard", purge_step=run.step + 1)

    def log(self, record: dict, samples: str) -> None:
        for name, value in record.items():
            self.writer.add_scalar(name, value, record["iter"])
        if samples:
            self.writer.add_text("samples", samples, record["iter"])

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; it leaves out steps of a resumed run that it already has."""

    def __init__(self, run: Tracked):
        import wandb

        self.run = wandb.init(
            project=PROJECT,
            id=run.id,
            name=run.name,
            dir=run.folder,
            config=run.settings,
            resume="allow",
        )

    def log(self, record: dict, samples: str) -> None:
        self.run.log(record | text_of(samples), step=record["iter"])

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """Trackio, which keeps runs apart by name."""

    def __init__(self, run: Tracked):
        import trackio

        self.package = trackio
        name = f"{run.name}-{run.id}"
        self.run = trackio.init(
            PROJECT, name=name, config=run.settings, resume="allow", embed=False
        )

    def log(self, record: dict, samples: str) -> None:
        self.run.log(record | text_of(samples), step=record["iter"])

    def close(self) -> None:
        self.package.finish()


class SwanLab:
    """SwanLab; its files lie in the out_dir's folder swanlog."""

    def __init__(self, run: Tracked):
        import swanlab

        self.package = swanlab
        self.run = swanlab.init(
            project=PROJECT,
            id=run.id,
            name=run.name,
            log_dir=str(run.folder / "swanlog"),
            config=run.settings,
            resume="allow",
        )

    def log(self, record: dict, samples: str) -> None:
        text = {"samples": self.package.Text(samples)} if samples else {}
        self.run.log(record | text, step=record["iter"])

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio, "swanlab": SwanLab}


def text_of(samples: str) -> dict:
    return {"samples": samples} if samples else {}


def check_trackers(names: list[str]) -> None:
    """UserError where a tracker is unknown, or its package, of the same name, is not installed."""
    for name in names:
        if name not in TRACKERS:
            near = nearest(name, TRACKERS) or f"; there are {', '.join(TRACKERS)}"
            raise UserError(f"unknown tracker {name!r} in track{near}")
        if not find_spec(name):
            raise UserError(f"track={name!r} needs its package; pip install {name}")


@contextmanager
def open_trackers(names: list[str], run: Tracked) -> Iterator[list]:
    """The trackers of these names, closed at the end. UserError where one cannot start."""
    with ExitStack() as stack:
        trackers = []
        for name in names:
            try:
                tracker = TRACKERS[name](run)
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise UserError(f"track={name!r} cannot start: {reason}") from None
            stack.callback(tracker.close)
            trackers.append(tracker)
        yield trackers
