"""The only reader and writer of checkpoints and logs in an out_dir.

    out-x/latest, out-x/best       one line each: the name of a checkpoint
    out-x/step-000500/             model.safetensors (a tied weight once), run.json, tokenizer.json,
                                   optimizer.safetensors; a LoRA run has adapter.safetensors instead
                                   of the model, and run.json names the base checkpoint; run.json
                                   has the sha256 of the others, which reading them checks
    out-x/log.jsonl                an object a line
    out-x/bases                    checkpoints that adapters need, and whose: never deleted
    out-x/reference.safetensors    a DPO run's log-probabilities before its first step
    out-x/lock                     held by the run that trains; a killed one leaves it, unlocked

A checkpoint is written aside and renamed, then the pointers are replaced, then checkpoints without
a pointer are deleted: killed at any moment, an out_dir still loads. Nothing is unpickled.

Models of other projects load in the same way, by miniglm/interop/foreign.py.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from configurator import UserError, configure, locked, show_path, written_aside
from lstm_model import LSTM
from miniglm import jsonl
from miniglm.distributed import ALONE, World, gather, is_sharded, part_of
from miniglm.interop.foreign import (
    find_foreign,
    foreign_run,
    is_foreign,
    load_foreign,
    weight_files,
)
from miniglm.lora import adapter_weights, add_adapters, merge
from miniglm.tokenizer import Tokenizer, load_tokenizer
from model import GPT, ModelConfig

PARTS = ("architecture", "settings", "dataset", "environment", "scaler", "progress", "sha256")
MODELS = {"gpt": GPT, "lstm": LSTM}  # by an architecture's `model`


@dataclass
class Checkpoint:
    path: Path
    model: GPT | LSTM
    tokenizer: Tokenizer
    run: dict  # run.json: architecture, settings, dataset, progress, losses, environment
    n_params: int = 0  # of the model, before its weights are packed for generation

    @property
    def out_dir(self) -> Path:
        """The directory of reports: the checkpoint's parent, or another project's own directory."""
        is_alone = is_foreign(self.path) and self.path.is_dir()
        return self.path if is_alone else self.path.parent

    @property
    def answers(self) -> bool:
        """Whether the model was fine-tuned on questions and answers."""
        return self.run["dataset"]["kind"] != "pretrain"

    @property
    def question_end(self) -> str:
        """The mark at the end of nearly all trained questions, or ""."""
        return self.run["dataset"].get("question_end", "")


def check_writable(folder: Path, flag: str) -> None:
    """Raises UserError, which names the flag, if no file can be made in a folder that is there or
    will be made: before long work, not after it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    probe = there / f".{os.getpid()}.tmp"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write in {show_path(folder)}: {error.strerror}; make it writable, or pass "
            f"another {flag}"
        ) from None


@contextmanager
def claimed(out_dir: Path) -> Iterator[Callable[[], None]]:
    """Makes out_dir and locks it against other runs; reading stays free. Raises UserError if it is
    locked or cannot be written. Yields a function that raises UserError if the directory has been
    removed or replaced since."""
    is_new = not out_dir.exists()
    check_writable(out_dir, "--out_dir=")
    try:
        with locked(out_dir, out_dir / "lock") as is_held:

            def check() -> None:
                if not is_held():
                    raise _gone(out_dir)

            yield check
    finally:
        if is_new:
            with suppress(OSError):  # it is not empty
                out_dir.rmdir()


def what_stays(out_dir: Path) -> str:
    """The end of a failed run's message: which checkpoint it leaves."""
    kept = _pointer(out_dir, "latest")
    return f"{kept} is whole, --resume goes on from it" if kept else "nothing was saved"


def save_checkpoint(
    out_dir: Path,
    model: GPT | LSTM,
    optimizers: list[torch.optim.Optimizer],
    tokenizer: Tokenizer,
    run: dict,
    is_best: bool,
    world: World = ALONE,
) -> None:
    """Saves step run["progress"]["iter"] as `latest`, and as `best` if is_best; deletes older ones,
    except the bases of adapters. With run["adapter"], see adapter_of, only A and B are saved. All
    processes of the world call it, the first one writes.

    Raises UserError if the disk is full; the previous checkpoint stays whole.
    """
    weights = gather(model, partial(_weights, model, "adapter" in run), world)
    moments = gather(model, partial(_optimizer_tensors, model, optimizers), world)
    if not world.is_first:
        return
    name = f"step-{run['progress']['iter']:06d}"
    best = name if is_best else _pointer(out_dir, "best") or name
    run = run | {"architecture": dataclasses.asdict(model.config), "best": best}
    try:
        with written_aside(out_dir / name) as aside:
            aside.mkdir()
            kind = "adapter" if "adapter" in run else "model"
            save_file(_contiguous(weights), aside / f"{kind}.safetensors")
            if optimizers:  # a merged adapter has none
                save_file(_contiguous(moments), aside / "optimizer.safetensors")
            tokenizer.save(aside / "tokenizer.json")
            run["sha256"] = {file.name: _sha256(file) for file in sorted(aside.iterdir())}
            text = json.dumps(run, ensure_ascii=False, indent=1)
            (aside / "run.json").write_text(text, encoding="utf-8")
            for file in aside.iterdir():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
            # a directory of that name is left from a killed save, or behind `latest`
            shutil.rmtree(out_dir / name, ignore_errors=True)
        _point(out_dir, "latest", name)
        _point(out_dir, "best", best)
    except (OSError, SafetensorError) as error:
        raise _write_fault(out_dir, f"save in {show_path(out_dir)}", error) from None
    finally:
        _delete_old(out_dir, run["settings"]["keep_last"])


def load_checkpoint(
    out_dir: Path,
    which: str = "best",
    device: str = "cpu",
    merged: bool = True,
    frozen: bool = False,
    **changes: float,
) -> Checkpoint:
    """The checkpoint that `which` points to, in eval mode. Raises UserError if it is damaged.

    An adapter is merged into its base; with merged=False it stays apart, and the base is frozen.
    frozen: the blocks' matrices of another project's model stay in the dtype of their file, for
    adapters. changes: of the architecture: dropout, or a lower block_size.
    """
    path = _checkpoint_path(out_dir, which)
    tokenizer = load_tokenizer(path) if is_foreign(path) else None  # its run depends on it
    run = _read_run(path, tokenizer)
    _read(path / "run.json", lambda: run["dataset"]["kind"])
    model = _load_model(path, run, device, changes, frozen)
    if merged:
        merge(model)
    tokenizer = tokenizer or load_tokenizer(path)
    return Checkpoint(path, model.eval(), tokenizer, run, model.n_params())


def _load_model(path: Path, run: dict, device: str, changes: dict, frozen: bool) -> GPT | LSTM:
    """The model of a checkpoint whose run.json is `run`; an adapter's is its base with the adapter
    added."""
    if is_foreign(path):
        return load_foreign(path, run["architecture"], device, changes, frozen)
    _check_files(path, run, ("model.safetensors", "adapter.safetensors", "tokenizer.json"))
    if "adapter" in run:
        return _load_adapter(path, run, device, changes, frozen)
    known = ModelConfig.__dataclass_fields__

    def options() -> dict:  # one of an older version does no harm where it was off
        return {k: v for k, v in run["architecture"].items() if v or k in known} | changes

    config = typed(path, ModelConfig, options)
    model = MODELS[config.model](config).to(device)
    _load_weights(path / "model.safetensors", model, device)
    return model


def _load_adapter(path: Path, run: dict, device: str, changes: dict, frozen: bool) -> GPT | LSTM:
    parts = ("base", "sha256", "rank", "alpha", "targets")
    place, sha256, rank, alpha, targets, block_size = _read(
        path / "run.json",
        lambda: [*(run["adapter"][part] for part in parts), run["architecture"]["block_size"]],
    )
    base = _read(path / "run.json", lambda: Path(os.path.normpath(path.parent.resolve() / place)))
    if not base.exists():
        raise UserError(
            f"{show_path(path)} is an adapter of {show_path(base)}, which is not there; put it "
            'back, or write where it is as "base" into run.json'
        )
    if weights_sha256(base) != sha256:
        raise UserError(
            f"{show_path(path)} is an adapter of {show_path(base)}, which has changed since; "
            "restore it, or train the adapter again in another --out_dir="
        )
    # an adapter may have been trained on shorter rows than its base
    changes = {"block_size": block_size} | changes
    model = _load_model(base, _read_run(base), device, changes, frozen)
    merge(model)  # the base may itself be an adapter
    _read(path / "run.json", lambda: add_adapters(model, rank, alpha, targets))
    _load_weights(path / "adapter.safetensors", model, device)
    return model


def _load_weights(file: Path, model: GPT | LSTM, device: str) -> None:
    """Loads what `_weights` gave into a model."""

    def load() -> None:
        weights = load_file(file, device=device)
        if "wpe.weight" in weights:
            weights["wpe.weight"] = weights["wpe.weight"][: model.config.block_size]
        if odd := weights.keys() ^ _weights(model, file.stem == "adapter").keys():
            raise RuntimeError(f"its weights are not those of run.json: {', '.join(sorted(odd))}")
        model.load_state_dict(weights, strict=False)

    _read(file, load)


def whole_model(model: GPT | LSTM, adapter: dict | None, world: World) -> GPT | LSTM:
    """The model; the first process gets a sharded one whole, on the CPU, and all must call this.
    adapter: its entry of run.json, if it has one."""
    if not is_sharded(model):
        return model
    weights = gather(model, model.state_dict, world)
    if not world.is_first:
        return model
    whole = MODELS[model.config.model](model.config)
    if adapter:
        add_adapters(whole, *(adapter[part] for part in ("rank", "alpha", "targets")))
    whole.load_state_dict(weights)
    return whole


def adapter_of(out_dir: Path, base: Path, rank: int, alpha: float, targets: list[str]) -> dict:
    """The entry "adapter" of run.json; its base, a checkpoint, is a path relative to out_dir."""
    try:
        path = os.path.relpath(base.resolve(), out_dir.resolve())
    except ValueError:  # another drive of Windows
        path = base.resolve()
    shape = {"rank": rank, "alpha": alpha, "targets": targets}
    return {"base": Path(path).as_posix(), "sha256": weights_sha256(base)} | shape


def weights_sha256(path: Path) -> str:
    """The digest of a checkpoint's weights; of an adapter's, only A and B. Our own checkpoints have
    it in run.json, and reading the weights checks it."""
    if is_foreign(path):
        return _sha256(*weight_files(path))
    adapter = path / "adapter.safetensors"
    file = adapter if adapter.is_file() else path / "model.safetensors"
    return _read_run(path).get("sha256", {}).get(file.name) or _sha256(file)


def _sha256(*files: Path) -> str:
    """The digest of the files' bytes, one file after another."""
    digest = hashlib.sha256()

    def add(file: Path) -> None:
        with file.open("rb") as handle:
            hashlib.file_digest(handle, lambda: digest)

    for file in files:
        _read(file, partial(add, file))
    return digest.hexdigest()


def _check_files(path: Path, run: dict, names: Sequence[str]) -> None:
    """Raises UserError if one of a checkpoint's files is not what its run.json says."""
    for name, sha256 in run.get("sha256", {}).items():  # older ones have none
        if name in names and _sha256(path / name) != sha256:
            raise _damaged(path / name, "its sha256 is not that in run.json")


def keep_base(base: Path, user: Path) -> None:
    """Protects the base of the adapter in the out_dir `user` from being deleted by its own run."""
    if is_foreign(base):
        return  # no run deletes it
    file = base.parent / "bases"
    line = f"{base.name} {show_path(user)}\n"
    try:
        if not (file.is_file() and line in file.read_text(encoding="utf-8")):
            with file.open("a", encoding="utf-8") as handle:  # others may add theirs meanwhile
                handle.write(line)
    except OSError as error:
        print(
            f"note: {show_path(file)} cannot be written ({error.strerror}); see that nothing "
            f"deletes {show_path(base)}, the adapter needs it"
        )


def load_optimizers(path: Path, model: GPT | LSTM, optimizers: list[torch.optim.Optimizer]) -> None:
    """Restores the optimizers' state from the checkpoint at path, parameter by parameter."""
    file = path / "optimizer.safetensors"
    _check_files(path, _read_run(path), (file.name,))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    owners = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}

    def load() -> dict[str, torch.Tensor]:
        tensors = load_file(file)
        if {key.rpartition(":")[0] for key in tensors} != parameters.keys():
            raise ValueError("its parameters are not the model's")
        return tensors

    for name, tensor in _read(file, load).items():
        parameter_name, _, key = name.rpartition(":")
        parameter = parameters[parameter_name]
        optimizer = owners[id(parameter)]
        fused = optimizer.defaults.get("fused")
        # AdamW counts steps on the CPU, unless it is fused
        device = "cpu" if key == "step" and not fused else parameter.device
        # a copy, since the file is mapped into memory and will be deleted
        optimizer.state[parameter][key] = part_of(tensor.to(device, copy=True), parameter)


def read_run(
    out_dir: Path, which: str, keys: Sequence[str] = (), Settings: type | None = None
) -> dict:
    """run.json of the checkpoint that the pointer `which` names. Raises UserError if it lacks a
    key, or if one of its settings is not of the type that Settings gives."""
    path = _checkpoint_path(out_dir, which)
    run = _read_run(path)
    _read(path / "run.json", lambda: [run[key] for key in keys])
    if Settings:  # those of an older version are left out
        known = Settings.__dataclass_fields__
        typed(path, Settings, lambda: {k: v for k, v in run["settings"].items() if k in known})
    return run


def typed(path: Path, Class: type, values: Callable[[], dict]) -> object:
    """An instance of a dataclass from a part of the checkpoint's run.json. Raises UserError if a
    value is missing or of another type."""

    def read() -> object:
        return configure(Class, [f"--{name}={value}" for name, value in values().items()])

    return _read(path / "run.json", read)


def files_alone(checkpoint: Checkpoint, run: dict) -> dict[str, Path | bytes]:
    """An out_dir with this checkpoint alone, without the optimizer: the source or the content of
    each file, by name. run: its run.json."""
    name = checkpoint.path.name
    files = {which: f"{name}\n".encode() for which in ("latest", "best")}
    for file in ("model.safetensors", "tokenizer.json"):
        files[f"{name}/{file}"] = checkpoint.path / file
    return files | {f"{name}/run.json": json.dumps(run, ensure_ascii=False, indent=1).encode()}


def has_checkpoint(out_dir: Path) -> bool:
    return _pointer(out_dir, "latest") is not None


def rewind(out_dir: Path) -> None:
    """Resets an out_dir to its state at `latest`: the pointer `best`, and log.jsonl."""
    step, keep_last = 0, 1
    if has_checkpoint(out_dir):
        run = read_run(out_dir, "latest")
        if (out_dir / run["best"]).is_dir():  # not if `latest` was set back by hand
            _point(out_dir, "best", run["best"])
        _point(out_dir, "latest", _pointer(out_dir, "latest"))  # it may have been lost
        step, keep_last = run["progress"]["iter"], run["settings"]["keep_last"]
    _delete_old(out_dir, keep_last)
    log = read_log(out_dir)
    kept = _read(out_dir / "log.jsonl", lambda: [r for r in log if r["iter"] <= step])
    jsonl.write(out_dir / "log.jsonl", kept)


def append_log(out_dir: Path, record: dict) -> None:
    path = out_dir / "log.jsonl"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise _write_fault(out_dir, f"write {show_path(path)}", error) from None


def _gone(out_dir: Path) -> UserError:
    return UserError(
        f"{show_path(out_dir)} was removed or renamed while this run wrote to it; put it back "
        "and pass --resume, or train again"
    )


def _write_fault(out_dir: Path, what: str, error: Exception) -> UserError:
    if not out_dir.is_dir():
        return _gone(out_dir)
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"cannot {what}: {reason}; {what_stays(out_dir)}")


def read_log(out_dir: Path) -> list[dict]:
    """The records of log.jsonl, without a last line that a kill has cut short."""
    path = out_dir / "log.jsonl"
    text = _read(path, partial(path.read_text, encoding="utf-8")) if path.is_file() else ""
    *lines, last = text.splitlines() or [""]
    records = _read(path, lambda: [json.loads(line) for line in lines])
    with suppress(ValueError, RecursionError):
        records.append(json.loads(last))
    return records


def save_reference(out_dir: Path, tensors: dict[str, torch.Tensor], key: dict[str, str]) -> None:
    """Writes a DPO run's reference log-probabilities; key: the model and data they depend on."""
    path = out_dir / "reference.safetensors"
    try:
        with written_aside(path) as aside:
            save_file(tensors, aside, metadata=key)
    except (OSError, SafetensorError) as error:
        raise _write_fault(out_dir, f"write {show_path(path)}", error) from None


def load_reference(out_dir: Path, key: dict[str, str]) -> dict[str, torch.Tensor] | None:
    """The tensors that save_reference wrote with this key, or None."""
    path = out_dir / "reference.safetensors"
    if not path.is_file():
        return None

    def load() -> dict[str, torch.Tensor] | None:
        with safe_open(path, "pt") as file:
            if file.metadata() != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    return _read(path, load)


def _checkpoint_path(out_dir: Path, which: str) -> Path:
    name = _pointer(out_dir, which)
    if name is None and (name := _pointer(out_dir, "latest")):  # `best` is lost, or not written yet
        best = _read_run(out_dir / name).get("best")
        name = best if isinstance(best, str) and (out_dir / best / "run.json").is_file() else name
    if name is not None:
        return out_dir / name
    if foreign := find_foreign(out_dir):
        return foreign
    raise UserError(f"no checkpoint in {show_path(out_dir)}; train first, or pass --out_dir=")


def _read_run(path: Path, tokenizer: Tokenizer | None = None) -> dict:
    """tokenizer: the checkpoint's, if it is loaded already."""
    if is_foreign(path):
        return foreign_run(path, tokenizer or load_tokenizer(path))
    file = path / "run.json"

    run = _read(file, lambda: {**json.loads(file.read_text(encoding="utf-8"))})
    return run | _read(file, lambda: {part: {**run[part]} for part in PARTS if part in run})


def _read(file: Path, read: Callable) -> object:
    """read(). Raises UserError, which names the file, if it fails."""
    try:
        return read()
    except FileNotFoundError:
        raise UserError(f"{show_path(file)} is missing; {_remedy(file)}") from None
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError, UserError) as error:
        raise _damaged(file, str(error).splitlines()[0]) from None


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{show_path(file)} is damaged ({reason}); {_remedy(file)}")


def _remedy(file: Path) -> str:
    """What to do about a file that is damaged or missing."""
    out_dir = file.parent.parent
    others = [p.parent.name for p in out_dir.glob("step-*/run.json") if p.parent != file.parent]
    back = f"write {max(others)} into {show_path(out_dir)}/latest and best, " if others else ""
    return f"copy it again, {back}or train again in another --out_dir="


def _optimizer_tensors(
    model: GPT | LSTM, optimizers: list[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": value
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _weights(model: GPT | LSTM, is_adapter: bool) -> dict[str, torch.Tensor]:
    if is_adapter:
        return adapter_weights(model)
    weights = model.state_dict()
    if model.config.tie_weights:
        del weights["lm_head.weight"]
    return weights


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _pointer(out_dir: Path, which: str) -> str | None:
    """The checkpoint that `latest` or `best` names; the newest if `latest` is lost, or was not
    written yet when the first save was killed."""
    file = out_dir / which
    if file.is_file():  # a damaged one may be longer than any file's name
        return file.read_text(encoding="utf-8", errors="replace").strip()[:99]
    names = [path.parent.name for path in out_dir.glob("step-*/run.json")]
    return max(names, key=lambda name: (len(name), name)) if names and which == "latest" else None


def _point(out_dir: Path, which: str, name: str) -> None:
    jsonl.write_text(out_dir / which, name + "\n")


def _delete_old(out_dir: Path, keep_last: int) -> None:
    """Deletes checkpoints that no pointer names and no adapter needs, except the keep_last newest
    ones up to `latest`; and the remains of killed saves."""
    latest = _pointer(out_dir, "latest")
    named = {latest, _pointer(out_dir, "best")}
    names = [path.name for path in out_dir.glob("step-*")]
    names.sort(key=lambda name: (len(name), name))
    if latest in names:
        named |= {*names[: names.index(latest) + 1][-keep_last:]}
    bases = out_dir / "bases"
    if bases.is_file():
        named |= {line.split(" ")[0] for line in bases.read_text(encoding="utf-8").splitlines()}
    for path in [*out_dir.glob("step-*"), *out_dir.glob(".step-*.tmp")]:
        if path.name not in named:
            shutil.rmtree(path, ignore_errors=True)
