"""Sources -> a prepared dataset, in several processes and bounded memory.

    @dataclass
    class Settings(pipeline.Settings):
        out: str = "data/mine"  # directory to write

    def read(config: Settings, source: Source, tally: Tally) -> Iterator[tuple[str, Record]]:
        for record in records(source, tally):
            yield split_of(record, config.val), record

    def main(argv: list[str]) -> None:
        pipeline.prepare(configure(Settings, argv), read, "pretrain")

The sources are cut into units by their sizes alone: parts of a long file, or several short files.
Each unit is read and encoded on its own, in any process, to files in a temporary folder; then
writer.py puts them together in their order. So any number of processes gives the same bytes. `read`
yields records with their splits; other processes find it by its name, so it is a function of a
module, or a functools.partial of one. `prepare_texts` is for datasets that need no `read` of their
own, only a function from a line or a JSON value to a text.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tqdm import tqdm

from configurator import ROOT, UserError, at_least, below, repo_path, show_path
from miniglm.prep.forms import parse_fields, split_of, text_of
from miniglm.prep.readers import Source, Tally, converted, find_sources, parts, records
from miniglm.prep.writer import Form, Kind, Mask, Record, merge, working_folder, write_unit
from miniglm.tokenizer import Tokenizer, load_tokenizer, sample, train_tokenizer

UNIT = 2**25  # bytes of input that are read and encoded together
SAMPLED = 16  # units, evenly over the input, that a tokenizer is trained on
PIECE = 2**24  # bytes that Ray hands over at a time
Reads = Iterator[tuple[str, Record]]  # (split, record)
Unit = list[Source]
Do = Callable[[Unit, Path], Any]  # works on a unit; files that it writes begin with Path
Run = Callable[[Do, list[Unit], list[Path]], Iterator[Any]]  # calls it, in some processes


@dataclass
class Settings:
    input: list[str] = field(default_factory=list)  # files, folders, globs: a,b
    out: str = ""  # directory to write
    tokenizer: str = "train"  # train: on the training records; gpt2; or a path
    vocab_size: int = 4096  # entries of a trained tokenizer
    val: Annotated[float, at_least(0), below(1)] = 0.05  # share of the records for validation
    max_tokens: Annotated[int, at_least(1)] = 256  # of a conversation; at most block_size
    mask: Mask = "answer"  # trained: answer and its end token; no_end without; padding: end tokens
    dedup_val: bool = False  # a validation question that is also trained goes to training
    encoding: str = "auto"  # of all files: utf-8, gb18030, big5, utf-16
    fields: str = ""  # as question=ask,answer=reply, or text=body: what the fields are called
    strict: bool = False  # stop at the first bad record
    processes: Annotated[int | None, at_least(1)] = None  # that read and encode; None: all cores
    engine: Literal["local", "ray"] = "local"  # ray: on the machines of a Ray cluster
    address: str = ""  # of that cluster; empty: one on this machine alone

    def __post_init__(self):
        if self.address and self.engine != "ray":
            raise UserError(f"address={self.address!r} goes with --engine=ray")


Read = Callable[[Settings, Source, Tally], Reads]


def splits_of(val: float) -> tuple[str, ...]:
    """The splits of a dataset of which a share, or nothing, is for validation."""
    return ("train", "val") if val else ("train",)


def read_records(config: Settings, source: Source, tally: Tally, want: type | None = None) -> Reads:
    """A `read` for most datasets: the good records, a share of them for validation."""
    for record in records(source, tally, parse_fields(config.fields), want):
        yield split_of(record, config.val), record


def prepare(
    config: Settings,
    read: Read,
    kind: Kind,
    sources: list[Source] | None = None,
    splits: tuple[str, ...] | None = None,
    more_meta: dict | None = None,
) -> dict:
    """Reads and encodes the sources, writes config.out and prints what it holds.

    sources: None is the files of config.input. splits: None is training, and a share for
    validation. more_meta: what else goes into meta.json, which is returned."""
    sources = sources or find_sources(config.input, config.encoding)
    out, units = repo_path(config.out), plan(sources)
    is_share, splits = not splits, splits or splits_of(config.val)
    form = Form(kind, config.max_tokens, config.mask, splits, is_share, config.dedup_val)
    tally, skipped = Tally(config.strict), Counter()
    with working_folder(out) as folder, workers(config, len(units)) as run:
        paths = [folder / f"{number:06}" for number in range(len(units))]
        tokenizer = find_tokenizer(config, run, read, units, paths)
        encode = functools.partial(encode_unit, config, read, tokenizer.text, form)
        done = run(encode, units, paths)
        quiet = True if len(units) == 1 else None  # None: no bar unless it is a terminal
        for part, left_out in tqdm(done, "encoding", len(units), leave=False, disable=quiet):
            tally.add(part)
            skipped += left_out
        files = [file.name for source in sources for file in (source, source.target) if file]
        more_meta = {"sources": files} | tally.meta() | (more_meta or {})
        meta = merge(paths, skipped, tokenizer, form, more_meta)
    print(f"{tally.good:,} good records{tally.summary()}")
    print_meta(out, meta)
    return meta


def prepare_texts(config: Settings, text_of_value: Callable[[object], str]) -> dict:
    """`prepare` for texts, which the function makes of each line of a .txt file, or of each value
    of a jsonl, csv, ... file. It raises BadRecord if it cannot."""
    refuse_fields(config)
    return prepare(config, functools.partial(read_values, text_of_value), "pretrain")


def read_values(
    record_of: Callable[[object], Record], config: Settings, source: Source, tally: Tally
) -> Reads:
    """With a record_of of your own, a `read` for texts or conversations of any form."""
    for record in converted(source, tally, record_of):
        yield split_of(record, config.val), record


def refuse_fields(config: Settings) -> None:
    """For datasets whose fields have names of their own."""
    if config.fields:
        raise UserError(
            f"fields={config.fields!r}: the fields of this dataset have fixed names; "
            "data/custom/prepare.py takes others"
        )


def print_meta(out: Path, meta: dict) -> None:
    """Prints a line per split: what it holds, and what was left out."""
    for split, sizes in meta["splits"].items():
        counts = ", ".join(f"{n:,} {name}" for name, n in sizes.items() if isinstance(n, int))
        print(f"{show_path(out)}/{split}.bin: {counts}")
    if n := meta.get("val_questions_in_train"):
        print(f"{n:,} validation questions are also trained; --dedup_val moves them to training")
    if n := meta.get("val_questions_moved_to_train"):
        print(f"{n:,} validation questions were also trained, and have been moved to training")


# --- units ---------------------------------------------------------------------------------------


def plan(sources: list[Source]) -> list[Unit]:
    """The units of the sources, in order; they depend on the files alone."""
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
    """The tokenizer that config names, or one trained on a sample of the training records; of all
    records if none is for training yet, since the writer then moves one there."""
    if config.tokenizer != "train":
        return load_tokenizer(config.tokenizer)
    some = [n * len(units) // SAMPLED for n in range(SAMPLED)] if len(units) > SAMPLED else []
    every = range(len(units))
    for chosen, settings in ((some, config), (every, config), (every, replace(config, val=0))):
        do = functools.partial(sample_unit, settings, read)
        samples = run(do, [units[n] for n in chosen], [paths[n] for n in chosen])
        if passages := sample(itertools.chain.from_iterable(samples)):
            return train_tokenizer(passages, config.vocab_size)
    raise UserError("no record is for train; change --val= or the input")


def sample_unit(config: Settings, read: Read, unit: Unit, path: Path) -> list[str]:
    """Passages of a unit's training records."""
    tally = Tally(quiet=True)  # records are counted when they are encoded
    reads = read_unit(config, read, unit, tally)
    return sample(text_of(record) for split, record in reads if split == "train")


def encode_unit(
    config: Settings, read: Read, tokenizer: str, form: Form, unit: Unit, path: Path
) -> tuple[Tally, Counter]:
    """Writes a unit's files; returns its tally, and what was skipped: see write_unit."""
    tally = Tally(config.strict, quiet=True)
    reads = read_unit(config, read, unit, tally)
    return tally, write_unit(path, reads, _tokenizer(tokenizer), form)


def read_unit(config: Settings, read: Read, sources: Unit, tally: Tally) -> Reads:
    """The records of several sources, one after another."""
    for source in sources:
        yield from read(config, source, tally)


@functools.lru_cache(maxsize=1)
def _tokenizer(text: str) -> Tokenizer:
    return Tokenizer(text)


# --- processes -----------------------------------------------------------------------------------


@contextmanager
def workers(config: Settings, n_units: int) -> Iterator[Run]:
    """A function that works on the units in several processes and yields results in their order."""
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
                "a process that read the input was killed, perhaps for lack of memory; "
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
    """In a worker: ends it when the process that started it has gone, however that ended. Ctrl-C is
    left to that process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _ray(config: Settings) -> Iterator[Run]:
    """As `workers`, on the machines of a Ray cluster. They must find the project and the input at
    the same paths as this one; what they write comes back through Ray."""
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
            for name, value in map(ray.get, waiting.popleft()):
                if name == "result":
                    yield value
                elif name == "error":
                    raise UserError(value)
                else:  # a file's suffix
                    with path.with_suffix(name).open("ab") as file:
                        file.write(value)

    try:
        yield run
    except ray.exceptions.RayError as error:
        raise UserError(f"Ray gave up: {str(error).splitlines()[0]}") from None
    finally:
        ray.shutdown()


def _remote_unit(do: Do, unit: Unit) -> Iterator[tuple[str, Any]]:
    """In a worker of Ray: yields pieces of the files written, then the result, or the error."""
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
