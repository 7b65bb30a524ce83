"""Damaged files of every kind, read by every reader and script: nothing is lost in silence.

    python -m tests.fuzz --files=500 --seed=0    # so many of each form; a tenth for each command

Good files are made, one is damaged, and the files are read as a script reads them. Fine is

    as before        what the good files give
    counted          bad records that a tally counts; `assert_none_lost` says what may be missing
    other content    a bit of a number, a letter or a weight that gives another one; a line cut out
    one line         an error that names the file, and all files stay as they were

All else is a fault: other exceptions, control characters on a terminal, 10 seconds, a gigabyte, a
lost record. The commands are in fuzz.txt. Needs Linux or macOS.
"""

import contextlib
import faulthandler
import gzip
import importlib
import io
import pickle
import random
import re
import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import torch
from backports import zstd

import export
from configurator import UserError, command, configure, printable
from data import upload
from data.generate_qa import Pairs
from miniglm.interop.hub import CardSettings
from miniglm.jsonl import dumps, write_report, write_text
from miniglm.prep.forms import text_of
from miniglm.prep.readers import Tally, find_sources, is_text, records
from tests.prep import test_ways as ways
from tests.prep.test_readers import PACKERS
from tests.runs import contents, train_here, without_bars, words, write_toys
from tests.test_comparison import REFERENCES, write_run

KINDS = ("as before", "counted", "other content", "one line", "FAULT")
DRAW, LATIN, HAN = random.Random(0), "the king of wei rode on ", "天下大勢分久必合"
ROWS = [  # a question and its answer
    (f"{n}: {''.join(DRAW.choices(LATIN, k=40))}?", f"{n}{''.join(DRAW.choices(HAN, k=16))}。")
    for n in range(40)
]
CARD = CardSettings("a/b")
MAINS = {  # of scripts that would go on to ask a server
    "data/upload.py": lambda argv: [upload.gather(Path(path), CARD) for path in argv],
    "data/generate_qa.py": lambda argv: Pairs(Path(argv[0]), []),
}


@dataclass
class Settings:
    files: int = 500  # damaged ones of each form; a tenth as many for each command
    seed: int = 0  # of the damages
    only: str = ""  # rows of the table whose names hold this text


class Subject(NamedTuple):
    files: dict[str, bytes]  # good ones, by their names in a folder
    read: Callable[[Path], tuple[object, int]]  # what comes out of the folder, and bad records


# --- damages -----------------------------------------------------------------------------------

PUT_IN = b"\" ' [ ] { } < > , : \0 \x1b[31m \r \n \\ud800 \xe2\x80\xa8 PK\3\4 PAR1".split(b" ")
PUT_IN += [b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xff\xfe", b"\xef\xbb\xbf"]
PUT_IN += [b'[{"a":' * 10**5, b"x" * 2**21]
VALUES = rb'null true [] {} [[]] "" "\ud800" "\u001b\u0000" "../x" -1 0 3.5 NaN 1e999'.split()
VALUES += [b"1" + b"0" * 18, b"9" * 5000]
DAMAGES = (  # of a file in three pieces
    lambda a, b, c, draw: a + bytes(byte ^ 1 << draw.randrange(8) for byte in b[:1]) + b[1:] + c,
    lambda a, b, c, draw: a + draw.randbytes(len(b)) + c,
    lambda a, b, c, draw: a + draw.choice([b"\0", b"\xff", b" "]) * len(b) + c,
    lambda a, b, c, draw: a + draw.choice([b"", b + b]) + c,
    lambda a, b, c, draw: draw.choice([a, c, c + a]),
    lambda a, b, c, draw: a + (b + c).replace(b"\n", draw.choice([b"\r", b"\r\n", b"\n\n", b""])),
    lambda a, b, c, draw: b"\n".join(sorted((a + b + c).split(b"\n"), key=lambda _: draw.random())),
    lambda a, b, c, draw: a + draw.choice(PUT_IN) + b + c,
    lambda a, b, c, draw: a + VALUE.sub(lambda _: draw.choice(VALUES), b + c, count=1),
)
VALUE = re.compile(rb'"[^"]*"|-?\d[\d.]*')


def damaged(data: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        start = int(len(data) * draw.random() ** draw.choice([1, 1, 4]))  # heads are worth more
        end = start + draw.choice([1, 1, 3, 40, 1000])
        data = draw.choice(DAMAGES)(data[:start], data[start:end], data[end:], draw)
    return data


# --- files of records --------------------------------------------------------------------------

FORMS = ways.FORMS | {"a.en": ("", "\n", "\n", lambda row: row[0])}  # a.zh answers it
LINES = ("a.txt", "a.jsonl", "a.tsv")  # a good or a bad record for each line
ENCODINGS = ("utf-8", "utf-8-sig", "gb18030", "cp950", "utf-16", "utf-16-be")
UNPACK = {b"\x1f\x8b": gzip.decompress, b"\x28\xb5": zstd.decompress}


def form_subject(form: str, encoding: str, suffix: str) -> Subject:
    start, between, end, write = FORMS[form]
    text = start + between.join(map(write, ROWS)) + end
    units = {write(row) + between.strip(): row for row in ROWS}
    files = {form + suffix: PACKERS[suffix](text.encode(encoding))}
    if form == "a.en":
        files["a.zh"] = "\n".join(row[1] for row in ROWS).encode()

    def read(folder: Path) -> tuple[object, int]:
        inputs = [str(folder / name) for name in files]
        found, tally = read_records(inputs[:1], inputs[1:])
        data = (folder / form).with_suffix(Path(form).suffix + suffix).read_bytes()
        assert_none_lost(
            form, UNPACK.get(data[:2], bytes)(data).decode(encoding, "replace"), units, found, tally
        )
        return found, tally.bad.total()

    return Subject(files, read)


def read_records(inputs: list[str], targets: list[str]) -> tuple[list, Tally]:
    """As data/custom/prepare.py reads them."""
    sources, tally = find_sources(inputs, targets=targets), Tally()
    want = str if is_text(sources, {}) else list
    return [r for source in sources for r in records(source, tally, want=want)], tally


def assert_none_lost(form: str, text: str, units: dict, found: list, tally: Tally) -> None:
    """text: of the damaged file; units: the lines of each row. All lines that are whole come out;
    each other one is bad or a record of its own. Where records are no lines, one bad record may
    take whole ones with it."""
    text = "\n" + re.sub("\r\n|\r", "\n", text.removeprefix("\ufeff")) + "\n"
    out = "\n".join(map(text_of, found))
    whole = [row for unit, row in units.items() if f"\n{unit}\n" in text]
    lost = [row for row in whole if row[0] not in out or (form != "a.en" and row[1] not in out)]
    assert len(lost) <= (form not in LINES) * tally.bad.total(), f"lost: {lost}"
    n_lines = sum(bool(line.strip()) for line in text.split("\n")) if form in LINES else 0
    assert tally.good + tally.bad.total() >= n_lines, f"{tally} of {n_lines} lines"


def parquet_subject(checksum: bool) -> Subject:
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist([{"Question": q, "Answer": a} for q, a in ROWS])
    pyarrow.parquet.write_table(table, file, row_group_size=10, write_page_checksum=checksum)

    def read(folder: Path) -> tuple[object, int]:
        found, tally = read_records([str(folder / "a.parquet")], [])
        assert tally.good + tally.bad.total() == len(ROWS), tally
        return found, tally.bad.total()

    return Subject({"a.parquet": file.getvalue()}, read)


# --- commands ----------------------------------------------------------------------------------


def write_world(folder: Path) -> None:
    """What the commands read: datasets, runs, and files of records with the fields of all."""
    from tests.interop.test_foreign import nanogpt_content  # it imports transformers

    write_toys(folder)
    short = {"max_iters": 4, "eval_interval": 2, "prompts": "[]", "block_size": 128}
    train_here(dataset=folder / "text", out_dir=folder / "base", **short)
    for name, data, first, rank in (
        ("answers", "questions", "base", 0),
        ("lora/base", "questions", "base", 0),
        ("lora", "questions", "lora/base", 2),
        ("dpo", "pairs", "answers", 0),
    ):
        given = {"dataset": folder / data, "init_from": folder / first, "lora_rank": rank}
        train_here(out_dir=folder / name, **short | given)
    export.main(words(out_dir=folder / "answers", to=folder / "hf"))
    write_run(folder / "compared", REFERENCES[:9], 3.0, REFERENCES[:9])
    (folder / "nano").mkdir()
    torch.save(nanogpt_content()[0], folder / "nano" / "ckpt.pt")
    chapters = [f"第{n}回`1`2 甲 {a}\n曹操曰`1`2：“{a}{a}”\n" for n, (_, a) in enumerate(ROWS)]
    people = {"mention": {"曹操": ["孟德"]}, "type": {"曹操": "人名"}}
    write_text(folder / "all" / "a.txt", "".join(chapters * 9))
    write_text(folder / "all" / "a.jsonl", dumps(map(with_all_fields, *zip(*ROWS, strict=True))))
    for name, value in (("docs", chapters), ("people", people)):
        write_report(folder / "all" / f"{name}.json", value)


def with_all_fields(question: str, answer: str) -> dict:
    """A record for every prepare script."""
    asked = dict.fromkeys(("Question", "prompt", "rejected", "summary", "call"), question)
    told = dict.fromkeys(("Answer", "chosen", "title", "explanation", "derivation"), answer)
    split = "val" if question < "2" else "train"
    ranked = {"samples": [answer, question], "scores": [2, 1], "split": split}
    sections = [{"title": answer, "content": question}]
    return asked | told | ranked | {"word": answer[:4], "sections": sections}


def command_subject(world: Path, line: str) -> Subject:
    """A command of fuzz.txt: @ is the folder of its files, + what most prepare scripts are told."""
    script, *argv = line.replace("+", "--out=@out --tokenizer=@text/tokenizer.json").split()
    names = tuple(re.findall(r"@([\w./]+)", " ".join(argv)))
    files = {file: data for file, data in contents(world).items() if file.startswith(names)}
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    main = MAINS.get(line.partition(" @")[0], module.main)

    def read(folder: Path) -> tuple[object, int]:
        main([word.replace("@", f"{folder}/") for word in argv])
        out = contents(folder / "out") if (folder / "out").is_dir() else {}
        return {name: out[name] for name in out if not name.endswith(("log.jsonl", "run.json"))}, 0

    return Subject(files, read)


# --- outcomes ----------------------------------------------------------------------------------


def judge(subject: Subject, folder: Path, victim: str) -> tuple[str, object]:
    """The outcome of the subject's files in the folder, and its value, its error, or what is wrong.
    victim: the damaged one."""
    out, err, results, line = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO()), [], ""
    before, began, memory = contents(folder), time.perf_counter(), peak()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command(lambda _: results.append(subject.read(folder)))
    except SystemExit as end:
        line = str(end.code)
    except BaseException:
        return "FAULT", traceback.format_exc()
    said, bars = (stream.buffer.getvalue().decode() for stream in (out, err) if not stream.flush())
    after = contents(folder)
    names = (*victim.split("/"), str(folder))
    wrong = {
        "slow": time.perf_counter() - began > 10,
        "memory": peak() - memory > 2**20,
        "control characters": re.search(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", said + bars),
        "no line": line and not (line.startswith("error: ") and printable(line) == line),
        "more lines": line and without_bars(bars),
        "a long line": len(line) > 600,
        "names no file": line and not any(name in line + said for name in names),
        # logs grow
        "other files": line and any(not after[n].startswith(before[n]) for n in before),
    }
    if faults := [what for what, is_so in wrong.items() if is_so]:
        return "FAULT", f"{faults} {line[:600]} {said[-300:]}{bars[-300:]}"
    value, bad = results[0] if results else (None, 0)
    return "one line" if line else "counted" if bad else "other content", pickle.dumps(value)


def peak() -> int:
    """Kilobytes of memory that this process has had at most (bytes on macOS)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fuzz(subjects: list[Subject], name: str, files: int, seed: int) -> Counter:
    """Kinds of so many outcomes; prints each fault once."""
    kinds, good, shown = Counter(), {}, set()
    for number in range(files):
        draw = random.Random(f"{seed} {name} {number}")
        subject = draw.choice(subjects)
        victim = draw.choice(sorted(subject.files))
        harm = {victim: damaged(subject.files[victim], draw)}
        if id(subject) not in good:
            good[id(subject)] = outcome(subject, {}, victim)
            assert good[id(subject)][0] == "other content", good[id(subject)]
        kind, value = outcome(subject, harm, victim)
        kind = "as before" if (kind, value) == good[id(subject)] else kind
        kinds[kind] += 1
        if kind == "FAULT" and (what := value.split("]")[0][-60:]) not in shown:
            shown.add(what)
            print(f"{name}, file {number}, {victim}:\n{value[-1500:]}", flush=True)
    return kinds


def outcome(subject: Subject, harm: dict[str, bytes], victim: str) -> tuple[str, object]:
    with TemporaryDirectory() as name:
        for file, content in (subject.files | harm).items():
            path = Path(name, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        faulthandler.dump_traceback_later(100, exit=True)  # of what hangs
        try:
            return judge(subject, Path(name), victim)
        finally:
            faulthandler.cancel_dump_traceback_later()


def all_subjects(world: Path, only: str) -> dict[str, list[Subject]]:
    """The rows of the table."""
    packs = ("", "", "", *PACKERS)
    rows = {f: [form_subject(f, e, p) for e in ENCODINGS for p in packs] for f in FORMS}
    rows["a.parquet"] = [parquet_subject(True), parquet_subject(False)]
    if not any(only in name for name in rows if only):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            write_world(world)
        lines = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        rows |= {line: [command_subject(world, line)] for line in lines}
    return {name: subjects for name, subjects in rows.items() if only in name}


def main(argv: list[str]) -> None:
    config, total = configure(Settings, argv), Counter()
    torch.set_num_threads(1)
    table = [f"{'damaged':<50}{'files':>8}" + "".join(f"{kind:>15}" for kind in KINDS)]
    with TemporaryDirectory() as world:
        for name, subjects in all_subjects(Path(world), config.only).items():
            files = config.files if name in FORMS else max(1, config.files // 10)
            kinds = fuzz(subjects, name, files, config.seed)
            total += kinds
            table.append(row_of(name, kinds))
    print("\n".join([*table, row_of("all", total)]))
    if total["FAULT"]:
        raise UserError(f"{total['FAULT']} of {total.total()} damaged files gave a fault")


def row_of(name: str, kinds: Counter) -> str:
    return f"{name[:48]:<50}{kinds.total():>8,}" + "".join(f"{kinds[kind]:>15,}" for kind in KINDS)


if __name__ == "__main__":
    command(main)
