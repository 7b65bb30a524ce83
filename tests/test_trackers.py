"""Trackers, with their real packages if installed: they hold what log.jsonl holds."""

import json
import shutil
import struct
import sys

import numpy as np
import pytest

from configurator import UserError
from miniglm.trackers import TRACKERS, check_trackers, tracking_id
from tests.runs import log, train_here


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_before_anything_starts(toys, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(UserError, match=f"track='{name}' needs its package; pip install {name}"):
        train_here(dataset=toys / "text", out_dir=tmp_path / "out", track=name)
    assert not (tmp_path / "out").exists()


def test_an_unknown_tracker_names_the_nearest_or_all():
    with pytest.raises(UserError, match="unknown tracker 'wand' in track; did you mean 'wandb'"):
        check_trackers(["wand"])
    with pytest.raises(UserError, match="there are tensorboard, wandb, trackio, swanlab"):
        check_trackers(["x"])


def test_the_id_stays_with_a_run_and_is_another_for_a_new_one(tmp_path):
    first = tracking_id(tmp_path, new=True)
    assert tracking_id(tmp_path, new=False) == first
    assert tracking_id(tmp_path, new=True) != first


def tensorboard_shows(out_dir):
    """What TensorBoard's own reader holds: name -> {step: value}, and {step: samples}."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(out_dir / "tensorboard"))
    events.Reload()
    shown = {
        tag: {event.step: make_ndarray(event.tensor_proto).item() for event in events.Tensors(tag)}
        for tag in events.Tags()["tensors"]
    }
    texts = {step: text.decode() for step, text in shown.pop("samples/text_summary").items()}
    return shown, texts


def logged(out_dir):
    """name -> {step: value} of log.jsonl, in float32."""
    names = {name for record in log(out_dir) for name in record}
    return {
        name: {r["iter"]: np.float32(r[name]) for r in log(out_dir) if name in r} for name in names
    }


def test_tensorboard_holds_what_the_log_holds_after_a_kill_too(toys, tmp_path):
    pytest.importorskip("tensorboard")
    common = {"dataset": toys / "text", "track": "tensorboard", "prompts": None}
    out = train_here(out_dir=tmp_path / "out", max_iters=10, **common)
    ten = shutil.copytree(out, tmp_path / "ten")
    train_here(out_dir=out, resume=True, max_iters=20)
    scalars, texts = tensorboard_shows(out)
    assert scalars == logged(out)
    assert {"train_loss", "val_loss", "mfu"} <= scalars.keys()
    assert texts.keys() == {10, 20} and len(texts[10]) > 20
    # as if killed after step 20, before its checkpoint: step 10 is the last there is
    for name in ("latest", "best"):
        shutil.copy(ten / name, out)
    shutil.copytree(ten / "step-000010", out / "step-000010", dirs_exist_ok=True)
    train_here(out_dir=out, resume=True, max_iters=15)
    scalars, texts = tensorboard_shows(out)
    assert scalars == logged(out)
    assert max(scalars["iter"]) == 15
    assert texts.keys() == {10, 15}


@pytest.mark.slow
def test_wandb_offline_holds_what_the_log_holds(toys, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    common = {"dataset": toys / "text", "track": "wandb", "prompts": None}
    out = train_here(out_dir=tmp_path / "out", max_iters=10, **common)
    train_here(out_dir=out, resume=True, max_iters=20)
    wandb.teardown()  # waits for its process, which writes the files
    records, ids = wandb_history(out)
    assert ids == {tracking_id(out, new=False)}
    names = {name for record in log(out) for name in record}
    assert [{n: r[n] for n in r if n in names} for r in records] == log(out)
    assert [r["iter"] for r in records if "samples" in r] == [10, 20]


def wandb_history(out_dir):
    """The records of all offline runs in an out_dir, and their ids."""
    from wandb.proto.wandb_internal_pb2 import Record

    records, ids = [], set()
    for path in sorted(out_dir.glob("wandb/offline-run-*/*.wandb")):
        content, place = path.read_bytes(), 7
        assert len(content) < 2**15  # one block of LevelDB's log format, so no record is split
        while place < len(content):
            [length] = struct.unpack_from("<H", content, place + 4)
            record = Record.FromString(content[place + 7 : place + 7 + length])
            place += 7 + length
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                pairs = ((i.key or i.nested_key[0], json.loads(i.value_json)) for i in items)
                records.append(dict(pairs))
    return records, ids
