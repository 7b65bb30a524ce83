"""Sources -> a prepared dataset, in several processes and bounded memory.

    @dataclass
    class Settings(pipeline.Settings):
        out: str = "data/mine"  # directory to write

    def read(source: Source, tally: Tally) -> Iterator[tuple[str, Record]]:
        for record in records(source, tally):
            yield "train", record

    def main(argv: list[str]) -> None:
        config = configure(Settings, argv)
        prepare(config, find_sources(config.input, config.encoding), read, "pretrain")

The sources are cut into units by their sizes alone: parts of a long file, or some short files. Each
unit is read and encoded by itself, in whatever process, to files in a temporary folder; then
writer.py puts them together in their order. So the bytes that come out are the same from any
number of processes. `read` yields records with their splits, and goes to other processes by its
name: it is a function of a module, or a functools.partial of one.
"""

import functools
import itertools
import multiprocessing
import os
import signal
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from configurator import ROOT, UserError, repo_path, show_path
from miniglm.prep.forms import is_validation, text_of
from miniglm.prep.readers import Source, Tally, converted, find_sources, parts, records
from miniglm.prep.writer import Form, Kind, Mask, Record, merge, working_folder, write_unit
from miniglm.tokenizer import Tokenizer, load_tokenizer, sample, train_tokenizer

UNIT = 2**25  # bytes of input that are read and encoded together
SAMPLED = 16  # units, evenly over the input, that a tokenizer is trained on
PIECE = 2**24  # bytes that Ray hands over at a time
Read = Callable[[Source, Tally], Iterator[tuple[str, Record]]]
Unit = list[Source]
Do = Callable[[Unit, Path], Any]  # what is done with a unit; files that it writes begin with Path
Run = Callable[[Do, list[Unit], list[Path]], Iterator[Any]]  # does it, in whatever processes


@dataclass
class Settings:
    input: list[str] = field(default_factory=list)  # files, folders, globs: a,b
    out: str = ""  # directory to write
    tokenizer: str = "train"  # train: on the training records; gpt2; or where one lies
    vocab_size: int = 4096  # entries of a trained tokenizer
    val: float = 0.05  # share of the records for validation
    max_tokens: int = 256  # longest conversation; a model's block_size must not be smaller
    mask: Mask = "answer"  # trained: answer and its end token; no_end without; padding: end tokens
    dedup_val: bool = False  # a validation question that is also trained goes to training
    encoding: str = "auto"  # of all files: utf-8, gb18030, big5, utf-16
    fields: str = ""  # as question=ask,answer=reply, or text=body: what the fields are called
    strict: bool = False  # stop at the first bad record
    processes: int | None = None  # that read and encode; None: as many as cores
    engine: Literal["local", "ray"] = "local"  # ray: on the machines of a Ray cluster
    address: str = ""  # of that cluster; empty: one on this machine alone

    def __post_init__(self):
        if not 0 < self.val < 1:
            raise UserError(f"val={self.val} must lie between 0 and 1")
        if self.processes is not None and self.processes < 1:
            raise UserError(f"processes={self.processes} must be 1 or more")
        if self.address and self.engine != "ray":
            raise UserError(f"address={self.address!r} goes with --engine=ray")


def read_records(
    source: Source,
    tally: Tally,
    fields: dict[str, str] | None = None,
    want: type | None = None,
    val: float = 0.05,
    record_of: Callable[[object], Record] | None = None,
) -> Iterator[tuple[str, Record]]:
    """A `read` for most datasets: the good records, a share of them for validation.

    record_of: what makes a record of a value, or of a line; see readers.converted."""
    if record_of:
        found = converted(source, tally, record_of)
    else:
        found = records(source, tally, fields, want)
    for record in found:
        yield ("val" if is_validation(record, val) else "train"), record


def prepare(
    config: Settings,
    sources: list[Source],
    read: Read,
    kind: Kind,
    splits: tuple[str, ...] = ("train", "val"),
    about: dict | None = None,
) -> dict:
    """Reads and encodes the sources, writes config.out and prints what it holds.

    about: what else goes into meta.json, which is returned."""
    out, units = repo_path(config.out), plan(sources)
    form = Form(kind, config.max_tokens, config.mask, splits)
    tally, skipped = Tally(config.strict), Counter()
    with working_folder(out) as folder, workers(config, len(units)) as run:
        paths = [folder / f"{number:06}" for number in range(len(units))]
        tokenizer = find_tokenizer(config, run, read, units, paths)
        encode = functools.partial(encode_unit, read, config.strict, tokenizer.text, form)
        done = run(encode, units, paths)
        for part, left_out in tqdm(
            done, "encoding", len(units), unit=" parts", leave=False, disable=len(units) < 2 or None
        ):
            tally.add(part)
            skipped += left_out
        names = [file.name for one in sources for file in (one, one.target) if file]
        meta = {"sources": names} | tally.meta() | (about or {})
        meta = merge(out, paths, skipped, tokenizer, form, meta, config.dedup_val)
    print(f"{tally.good:,} good records{tally.summary()}")
    print_meta(out, meta)
    return meta


def prepare_texts(config: Settings, record_of: Callable[[object], Record]) -> dict:
    """prepare for texts that record_of makes of a value, or of a line; see readers.converted."""
    read = functools.partial(read_records, record_of=record_of, val=config.val)
    return prepare(config, find_sources(config.input, config.encoding), read, "pretrain")


def refuse_fields(config: Settings) -> None:
    """For datasets whose fields have names of their own."""
    if config.fields:
        raise UserError(
            f"fields={config.fields!r}: the fields of this dataset have fixed names; "
            "data/custom/prepare.py takes others"
        )


def print_meta(out: Path, meta: dict) -> None:
    """A line a split: what it holds, and what was left out."""
    for split, sizes in meta["splits"].items():
        counts = ", ".join(f"{n:,} {what}" for what, n in sizes.items() if isinstance(n, int))
        print(f"{show_path(out)}/{split}.bin: {counts}")
    if n := meta.get("val_questions_in_train"):
        print(f"{n:,} validation questions are also trained; --dedup_val moves them to training")
    if n := meta.get("val_questions_moved_to_train"):
        print(f"{n:,} validation questions were also trained, and have been moved to training")


# --- units ---------------------------------------------------------------------------------------


def plan(sources: list[Source]) -> list[Unit]:
    """The units of the sources, in order: they depend on the files alone."""
    units, size = [], 0
    for part in itertools.chain.from_iterable(parts(source, UNIT) for source in sources):
        length = part.path.stat().st_size if part.is_whole else UNIT
        if not units or size + length > UNIT:
            units.append([])
            size = 0
        units[-1].append(part)
        size += length
    return units


def find_tokenizer(
    config: Settings, run: Run, read: Read, units: list[Unit], paths: list[Path]
) -> Tokenizer:
    """The tokenizer that config names, or one of a sample of the training records."""
    if config.tokenizer != "train":
        return load_tokenizer(config.tokenizer)
    some = [n * len(units) // SAMPLED for n in range(SAMPLED)] if len(units) > SAMPLED else []
    for chosen in filter(None, (some, range(len(units)))):
        do = functools.partial(sample_unit, read)
        found = run(do, [units[n] for n in chosen], [paths[n] for n in chosen])
        if passages := sample(itertools.chain.from_iterable(found)):
            return train_tokenizer(passages, config.vocab_size)
    raise UserError("no record is for train; change --val= or the input")


def sample_unit(read: Read, unit: Unit, path: Path) -> list[str]:
    """Passages of a unit's training records."""
    tally = Tally(show=0)  # records are counted when they are encoded
    found = (one for source in unit for one in read(source, tally))
    return sample(text_of(record) for split, record in found if split == "train")


def encode_unit(
    read: Read, strict: bool, tokenizer: str, form: Form, unit: Unit, path: Path
) -> tuple[Tally, Counter]:
    """Writes a unit's files; returns its tally, and what was skipped: see write_unit."""
    tally = Tally(strict, say=False)
    found = (one for source in unit for one in read(source, tally))
    return tally, write_unit(path, found, _tokenizer(tokenizer), form)


@functools.lru_cache(maxsize=1)
def _tokenizer(text: str) -> Tokenizer:
    return Tokenizer(text)


# --- processes -----------------------------------------------------------------------------------


@contextmanager
def workers(config: Settings, n_units: int) -> Iterator[Run]:
    """What does something with each unit, and yields the results in the order of the units."""
    if config.engine == "ray":
        with _ray(config) as run:
            yield run
        return
    processes = min(config.processes or os.cpu_count(), n_units)
    if processes == 1:
        yield map
        return
    before = {*multiprocessing.active_children()}
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, initializer=_end_with_parent)

    def run(do: Do, units: list[Unit], paths: list[Path]) -> Iterator[Any]:
        try:
            yield from pool.map(do, units, paths)
        except BrokenProcessPool:
            raise UserError(
                "a process that read the input was killed, for want of memory perhaps; "
                f"try --processes={processes - 1}"
            ) from None

    try:
        yield run
    except BaseException:
        for process in {*multiprocessing.active_children()} - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: ends it when the process that started it is gone, however that ended. Ctrl-C is
    for that process alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _ray(config: Settings) -> Iterator[Run]:
    """As `workers`, on the machines of a Ray cluster. They find the project and the input at the
    same paths as this one; what they write comes here through Ray."""
    try:
        import ray
    except ImportError:
        raise UserError("--engine=ray needs Ray; pip install ray") from None
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ray.init(
        address=config.address or "local",
        runtime_env={"env_vars": {"PYTHONPATH": python_path}},
        num_cpus=None if config.address else config.processes,
        include_dashboard=None if config.address else False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    at_once = config.processes or int(ray.cluster_resources()["CPU"])
    remote = ray.remote(num_returns="streaming")(_remote_unit)

    def run(do: Do, units: list[Unit], paths: list[Path]) -> Iterator[Any]:
        waiting = deque()
        todo = iter(units)
        for path in paths:
            while len(waiting) < 2 * at_once and (unit := next(todo, None)):
                waiting.append(remote.remote(do, unit))
            for what, value in map(ray.get, waiting.popleft()):
                if what == "result":
                    yield value
                elif what == "error":
                    raise UserError(value)
                else:
                    with path.with_suffix(what).open("ab") as file:
                        file.write(value)

    try:
        yield run
    except ray.exceptions.RayError as error:
        raise UserError(f"Ray gave up: {str(error).splitlines()[0]}") from None
    finally:
        ray.shutdown()


def _remote_unit(do: Do, unit: Unit) -> Iterator[tuple[str, Any]]:
    """In a worker of Ray: pieces of the files that are written, then the result, or the error."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = do(unit, Path(folder) / "unit")
        except UserError as error:
            yield "error", str(error)
            return
        for path in sorted(Path(folder).iterdir()):
            with path.open("rb") as file:
                while piece := file.read(PIECE):
                    yield path.suffix, piece
            yield path.suffix, b""  # an empty file is a file
        yield "result", result
