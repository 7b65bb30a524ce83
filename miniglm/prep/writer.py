"""Records -> the prepared format of data_utils.py, in two steps, in bounded memory. No torch here.

    write_unit   records -> ids, masks and a row of facts per record, in files of a temporary folder
    merge        these files, in order -> *.bin, *_mask.bin, *_idx.bin, meta.json: duplicates are
                 left out

Units can be written by many processes (pipeline.py does that); the result depends on their order
alone. `write_splits` does both steps for records in memory. Everything
is first written to `prepare.tmp` in the dataset's folder; the next run removes what a killed one
left there. meta.json, without which no dataset is accepted, is renamed last.
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from configurator import UserError, locked, show_path
from data_utils import RECORDS
from miniglm.chat import plain
from miniglm.prep.forms import first_question, shortened
from miniglm.tokenizer import Tokenizer

Kind = Literal["pretrain", "sft", "dpo", "kto"]
Mask = Literal["answer", "no_end", "padding"]  # what of a conversation is trained, see `remask`
Pair = tuple[list[dict], str, str]  # a prompt's messages, the chosen answer, the rejected one
Mark = tuple[list[dict], str | None, str | None]  # the same with one of the answers
Record = str | list[dict] | Pair | Mark  # a text, the messages of a conversation, a preference
Records = Iterable[tuple[str, Record]]  # each with its split
SENTENCE_END = re.compile(r"(?:[。！？…；!?;]|\.(?!\d))+[”’」』）)]*")

BLOCK = 2**20  # tokens copied at a time
CUTS = ("", "cut: oldest turns", "cut: answer")
LEFT_OUT = 255  # in place of a row's split
ROW = np.dtype(
    [  # what is kept of a record beside its ids
        ("key", "u8"),  # the hash of its text
        ("question", "u8"),  # the hash of a conversation's first question
        ("tokens", "u4"),  # of a pair those of both conversations
        ("chosen", "u4"),  # of a pair those of its first conversation
        ("characters", "u4"),
        ("bytes", "u4"),
        ("mark", "u4"),  # the code of the last character of its last question
        ("cut", "u1"),  # an index into CUTS
        ("split", "u1"),  # an index into Form.splits
    ]
)


@dataclass(frozen=True)
class Form:
    """What records become."""

    kind: Kind
    max_tokens: int = 256  # longest conversation
    mask: Mask = "answer"
    splits: tuple[str, ...] = ("train", "val")
    is_share: bool = False  # val is a share by hashes: neither split stays empty, see `_fill`
    dedup_val: bool = False  # a validation row whose question is also trained goes to training

    def meta(self) -> dict:
        limits = {} if self.kind == "pretrain" else {"max_tokens": self.max_tokens}
        return limits | ({"mask": self.mask} if self.kind == "sft" else {})

    @property
    def records(self) -> str:
        """What meta.json calls the records."""
        return RECORDS[self.kind]


def write_splits(
    kind: Kind,
    out: Path,
    tokenizer: Tokenizer,
    splits: dict[str, Iterable[Record]],
    sources: list[str],
    max_tokens: int = 256,
    mask: Mask = "answer",
) -> dict:
    """Writes each split's records, and returns the meta.json.

    Texts get an end token each. Conversations and pairs longer than max_tokens are fitted (see
    `fit`, `fit_pair`); pairs with equal answers are left out, and so are repeated records, within
    a split and across splits. All of it is counted in meta.json.
    """
    records = ((split, record) for split in splits for record in splits[split])
    form = Form(kind, max_tokens, mask, (*splits,))
    return write(out, tokenizer, records, form, lambda: {"sources": sources})


write_pretrain = partial(write_splits, "pretrain")
write_sft = partial(write_splits, "sft")


def write(
    out: Path, tokenizer: Tokenizer, records: Records, form: Form, more_meta: Callable[[], dict]
) -> dict:
    """Writes the records, and returns the meta.json. more_meta: called when all are read, for
    what else goes into it."""
    with working_folder(out) as folder:
        unit = folder / "unit"
        skipped = write_unit(unit, records, tokenizer, form)
        return merge([unit], skipped, tokenizer, form, more_meta())


@contextmanager
def working_folder(out: Path) -> Iterator[Path]:
    """The folder where everything is written until it is complete: empty at first, removed at the
    end. Raises UserError if another run is preparing the same dataset."""
    folder, is_new = out / "prepare.tmp", not out.exists()
    with locked(out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if is_new and not any(out.iterdir()):
                out.rmdir()


# --- one unit ------------------------------------------------------------------------------------


def write_unit(path: Path, records: Records, tokenizer: Tokenizer, form: Form) -> Counter:
    """Writes path.ids, path.mask and path.rows of records, as they come.

    Returns how many were skipped: (split, reason) -> n."""
    skipped = Counter()
    dtype = ids_dtype(tokenizer)
    with ExitStack() as stack:
        ids_file, mask_file, rows_file = (
            stack.enter_context(path.with_suffix(suffix).open("wb", buffering=2**20))
            for suffix in (".ids", ".mask", ".rows")
        )
        for split, record in records:
            try:
                ids, mask, row = ENCODERS[form.kind](record, tokenizer, form)
            except Skipped as reason:
                skipped[split, str(reason)] += 1
                continue
            ids_file.write(np.asarray(ids, dtype))
            mask_file.write(bytes(mask))
            rows_file.write(np.array((*row, form.splits.index(split)), ROW).tobytes())
    return skipped


class Skipped(Exception):
    """Why a record is skipped."""


def encode_text(text: str, tokenizer: Tokenizer, form: Form) -> tuple:
    """Ids, no mask, and the ROW of a text. Raises Skipped if it is empty."""
    if not text.strip():
        raise Skipped("skipped: empty")
    body = tokenizer.encode_array(text)
    ids = np.empty(len(body) + 1, ids_dtype(tokenizer))
    ids[:-1], ids[-1] = body, tokenizer.end_of_text
    data = text.encode()
    return ids, [], (_key(data), 0, len(ids), 0, len(text), len(data), 0, 0)


def encode_conversation(messages: list[dict], tokenizer: Tokenizer, form: Form) -> tuple:
    """Ids, mask, and the ROW of a conversation. Raises Skipped if it cannot be fitted."""
    fitted, how, (ids, mask) = _fit(tokenizer, messages, form.max_tokens)
    ids, mask = remask(ids, mask, form.mask, tokenizer.end, form.max_tokens)
    return ids, mask, _row(messages, fitted, len(ids), 0, how)


def encode_pair(pair: Pair, tokenizer: Tokenizer, form: Form) -> tuple:
    """Ids and mask of both conversations of a pair, chosen first, and its ROW. Raises Skipped if
    they cannot be fitted. Earlier answers belong to the prompt and are not trained."""
    both, how, rendered = fit_pair(tokenizer, pair, form.max_tokens)
    ids = [id for row, _ in rendered for id in row]
    mask = [bit for _, trained in rendered for bit in _last_answer(trained)]
    return ids, mask, _row(pair[0], both[0] + both[1], len(ids), len(rendered[0][0]), how)


def encode_mark(mark: Mark, tokenizer: Tokenizer, form: Form) -> tuple:
    """Ids, mask, and the ROW of a marked answer; the mask of a bad one has 2 for 1. Raises Skipped
    if it cannot be fitted."""
    prompt, good, bad = mark
    answer = {"role": "assistant", "content": good or bad}
    fitted, how, (ids, mask) = _fit(tokenizer, [*prompt, answer], form.max_tokens)
    mask = [bit if good else 2 * bit for bit in _last_answer(mask)]
    key, *row = _row(prompt, fitted, len(ids), 0, how)
    return ids, mask, (key ^ bool(bad), *row)  # both marks of one answer are kept


def _last_answer(mask: list[int]) -> list[int]:
    """The mask without those of earlier answers."""
    start = bytes(mask).rindex(b"\0\1") + 1
    return [0] * start + mask[start:]


ENCODERS = {"pretrain": encode_text, "sft": encode_conversation}
ENCODERS |= {"dpo": encode_pair, "kto": encode_mark}


def _row(messages: list[dict], kept: list[dict], tokens: int, chosen: int, how: str) -> tuple:
    """The ROW, without its split, of messages of which `kept` are kept."""
    turns = plain(kept)  # calls, tools and reasoning count as the text between tags that ours has
    text = "".join(turn["content"] for turn in turns)
    [*_, question] = (message["content"] for message in kept if message["role"] == "user")
    mark = ord(question[-1:] or "\0")
    whole = "\0".join(part for turn in turns for part in (turn["role"], turn["content"]))
    keys = _key(whole.encode()), _key(first_question(messages).encode())
    return *keys, tokens, chosen, len(text), len(text.encode()), mark, CUTS.index(how)


def _key(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def ids_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32)


def remask(
    ids: list[int], trained: list[int], mask: Mask, end: int, max_tokens: int
) -> tuple[list[int], list[int]]:
    """A conversation's ids and mask, as `render` gives them, with another mask.

    answer leaves them alone: the answer and its end token are trained. no_end trains the answer
    without its end token; padding fills the row up to max_tokens with end tokens, all trained. For
    the question q and the answer a b, with end tokens (.), without roles, and max_tokens 8:

        q . a b .      answer 0 0 1 1 1      no_end 0 0 1 1 0      padding 0 0 1 1 1 1 1 1
    """
    if mask == "no_end":
        return ids, [int(bit and id != end) for id, bit in zip(ids, trained, strict=True)]
    if mask == "padding":
        more = max_tokens - len(ids)
        return ids + [end] * more, trained + [1] * more
    return ids, trained


def fit(tokenizer: Tokenizer, messages: list[dict], max_tokens: int) -> tuple[list | None, str]:
    """Messages of at most max_tokens ids, and what was done to them, "" for nothing; or None, and
    why they are skipped.

    The oldest turns go first, up to a later question; then the answer is cut at the last sentence
    end that fits, unless it calls tools. Messages are skipped if there is none, if they do not end
    with an answer to a question or to a tool's result, or if the chat template refuses them.
    """
    try:
        return _fit(tokenizer, messages, max_tokens)[:2]
    except Skipped as reason:
        return None, str(reason)


def _fit(
    tokenizer: Tokenizer, messages: list[dict], max_tokens: int
) -> tuple[list[dict], str, tuple]:
    """The same, and the result of `render`, so that most are encoded only once. Raises Skipped."""
    if [m["role"] for m in messages[-2:]] not in (["user", "assistant"], ["tool", "assistant"]):
        raise Skipped("skipped: no question and answer")
    answer = messages[-1]
    if not answer["content"].strip() and "tool_calls" not in answer:
        raise Skipped("skipped: empty answer")
    if len((rendered := _render(tokenizer, messages))[0]) <= max_tokens:
        return messages, "", rendered
    kept = shortened(messages, lambda turns: len(_render(tokenizer, turns)[0]) <= max_tokens)
    if kept is not messages and len((rendered := _render(tokenizer, kept))[0]) <= max_tokens:
        return kept, "cut: oldest turns", rendered
    cuts = [] if "tool_calls" in answer else SENTENCE_END.finditer(answer["content"])
    for end in reversed([match.end() for match in cuts]):
        shorter = [*kept[:-1], answer | {"content": answer["content"][:end]}]
        if len((rendered := _render(tokenizer, shorter))[0]) <= max_tokens:
            return shorter, "cut: answer", rendered
    raise Skipped("skipped: too long")


def _render(tokenizer: Tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """As `tokenizer.render`. Raises Skipped if the chat template of a base refuses the messages."""
    try:
        return tokenizer.render(messages)
    except UserError:
        if tokenizer.chat is None:
            raise
        raise Skipped("skipped: the chat template refuses it") from None


def fit_pair(
    tokenizer: Tokenizer, pair: Pair, max_tokens: int
) -> tuple[list[list[dict]], str, list[tuple]]:
    """Both conversations of a pair as `fit` makes them, on the same prompt, what was done, and what
    `render` makes of them. Raises Skipped if one cannot be fitted or the answers are equal."""
    prompt, *answers = pair
    fits = [
        _fit(tokenizer, [*prompt, {"role": "assistant", "content": answer}], max_tokens)
        for answer in answers
    ]
    # the shorter answer has kept no fewer turns
    shortest = min((fitted[:-1] for fitted, _, _ in fits), key=len)
    how = max((how for _, how, _ in fits), key=CUTS.index)
    both = [[*shortest, fitted[-1]] for fitted, _, _ in fits]
    if both[0] == both[1]:
        raise Skipped("skipped: equal answers")
    return both, how, [_render(tokenizer, messages) for messages in both]


# --- all units -----------------------------------------------------------------------------------


def merge(
    units: list[Path], skipped: Counter, tokenizer: Tokenizer, form: Form, more_meta: dict
) -> dict:
    """Units of a working folder, as write_unit made them -> the dataset that the folder is in;
    returns its meta.json.

    skipped: (split, reason) -> n. more_meta: what else goes into meta.json."""
    folder = units[0].parent
    out = folder.parent
    dtype = ids_dtype(tokenizer)
    rows, counts = _all_rows(units, folder / "all.rows")
    repeated = _leave_out_repeated(rows)
    if form.is_share:
        _fill(rows, form)
    meta = {"kind": form.kind, "tokenizer_sha256": tokenizer.sha256, "dtype": dtype.name}
    meta |= more_meta | form.meta()
    if common := _common_questions(rows, form):
        meta["val_questions_moved_to_train" if form.dedup_val else "val_questions_in_train"] = (
            common
        )
    writers = [_SplitWriter(folder, split, form, dtype, rows) for split in form.splits]
    for writer in writers:
        if writer.total == 0:
            name = f"{show_path(out)}/{writer.split}.bin"
            raise UserError(f"nothing to write for {name}: {_why_empty(writer.split, skipped)}")
    for block, ids, mask in _blocks(rows, counts, units, dtype):
        for writer in writers:
            writer.write(block, ids, mask)
    meta["splits"] = {}
    for number, writer in enumerate(writers):
        left_out = {why: n for (split, why), n in sorted(skipped.items()) if split == writer.split}
        left_out |= {"skipped: duplicate": repeated[number]} if repeated[number] else {}
        meta["splits"][writer.split] = writer.close() | left_out
    if form.kind != "pretrain":
        meta["question_end"] = _question_end(writers[0].marks)
    text = json.dumps(meta, ensure_ascii=False, indent=1)
    (folder / "meta.json").write_text(text, encoding="utf-8")
    tokenizer.save(folder / "tokenizer.json")
    _install(folder, out, meta)
    return meta


def _why_empty(split: str, skipped: Counter) -> str:
    """Why a split has no row, and what to do."""
    reasons = [f"{n:,} {why}" for (name, why), n in sorted(skipped.items()) if name == split]
    if reasons:
        return f"all its records are left out ({', '.join(reasons)}); see --max_tokens="
    return (
        f"no record is for {split}; change --val= or the input (equal documents or questions all "
        "go to one split)"
    )


def _all_rows(units: list[Path], path: Path) -> tuple[np.ndarray, list[int]]:
    """The rows of all units in one file, mapped, and how many each has."""
    counts = []
    with path.open("wb") as file:
        for unit in units:
            with unit.with_suffix(".rows").open("rb") as part:
                shutil.copyfileobj(part, file)
            counts.append(unit.with_suffix(".rows").stat().st_size // ROW.itemsize)
    return np.memmap(path, ROW, "r+") if sum(counts) else np.empty(0, ROW), counts


def _leave_out_repeated(rows: np.ndarray) -> Counter:
    """Marks all but the first of equal rows as left out; how many of each split."""
    again = np.ones(len(rows), bool)
    again[np.unique(rows["key"], return_index=True)[1]] = False
    repeated = Counter(rows["split"][again].tolist())
    rows["split"][again] = LEFT_OUT
    return repeated


def _fill(rows: np.ndarray, form: Form) -> None:
    """Where the hashes leave a split empty, as they may of few records: the document with the
    smallest hash goes there, or all conversations of the first question with the smallest."""
    hashes = rows["key" if form.kind == "pretrain" else "question"]
    kept = rows["split"] != LEFT_OUT
    for number in range(len(form.splits)):
        if kept.any() and not (rows["split"] == number).any():
            moved = kept & (hashes == hashes[kept].min())
            if (moved == kept).all():
                raise UserError(
                    "only one document or question, none for validation; add more, or pass --val=0"
                )
            rows["split"][moved] = number


def _common_questions(rows: np.ndarray, form: Form) -> int:
    """How many validation rows have a first question that is trained too; they go to training
    if the form says so."""
    if form.kind == "pretrain" or not {"train", "val"} <= {*form.splits}:
        return 0
    train, val = form.splits.index("train"), form.splits.index("val")
    trained = rows["question"][rows["split"] == train]
    common = (rows["split"] == val) & np.isin(rows["question"], trained)
    if form.dedup_val:
        rows["split"][common] = train
    return int(common.sum())


def _blocks(
    rows: np.ndarray, counts: list[int], units: list[Path], dtype: np.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Some rows, their ids and their mask (empty for texts), one block after another."""
    first = 0
    for unit, count in zip(units, counts, strict=True):
        ids_file, mask_file = unit.with_suffix(".ids"), unit.with_suffix(".mask")
        with ids_file.open("rb") as ids, mask_file.open("rb") as masks:
            own = rows[first : first + count]
            ends = np.cumsum(own["tokens"], dtype=np.int64)
            for part in np.split(own, np.flatnonzero(np.diff(ends // BLOCK)) + 1):
                size = int(part["tokens"].sum(dtype=np.int64))
                yield part, np.fromfile(ids, dtype, size), np.fromfile(masks, np.uint8, size)
        first += count


class _SplitWriter:
    """Writes the rows of one split, and counts them."""

    def __init__(self, folder: Path, split: str, form: Form, dtype: np.dtype, rows: np.ndarray):
        self.folder, self.split, self.form = folder, split, form
        self.number = form.splits.index(split)
        self.total = int(rows["tokens"][rows["split"] == self.number].sum(dtype=np.int64))
        self.digest = hashlib.sha256()
        self.sizes, self.marks = Counter(), Counter()
        self.position = 0  # tokens written
        names = ("",) if form.kind == "pretrain" else ("", "_mask", "_idx")
        self.files = {name: (folder / f"{split}{name}.bin").open("wb") for name in names}
        if "_idx" in self.files:
            self.files["_idx"].write(np.uint64(0).tobytes())

    def write(self, block: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> None:
        """Writes what is this split's of some rows, their ids and their mask."""
        chosen = block["split"] == self.number
        taken = np.repeat(chosen, block["tokens"])
        block, ids = block[chosen], ids[taken]
        self.sizes[self.form.records] += len(block)
        for name in ("characters", "bytes"):
            self.sizes[name] += int(block[name].sum(dtype=np.int64))
        if self.form.kind == "pretrain":
            self.digest.update(ids)
        else:
            self._write_rows(block, ids, mask[taken])
        self.files[""].write(ids.tobytes())
        self.position += len(ids)

    def _write_rows(self, block: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> None:
        """The mask and the bounds of conversations. The digest is that of each row's ids, mask and
        bound in turn."""
        lengths = block["tokens"]
        if self.form.kind == "dpo":  # a pair has two rows
            lengths = np.stack([block["chosen"], lengths - block["chosen"]], axis=1).ravel()
        ends = np.cumsum(lengths, dtype=np.uint64)
        bounds = ends + np.uint64(self.position)
        start = 0
        for end, bound in zip(ends.tolist(), bounds, strict=True):
            self.digest.update(ids[start:end])
            self.digest.update(mask[start:end])
            self.digest.update(bound)
            start = end
        self.files["_idx"].write(bounds.tobytes())
        self.files["_mask"].write(mask.tobytes())
        self.marks.update(chr(code) if code else "" for code in block["mark"].tolist())
        self.sizes.update(CUTS[code] for code in block["cut"].tolist())

    def close(self) -> dict:
        """The split's entry in meta.json."""
        for file in self.files.values():
            file.close()
        names = (self.form.records, "characters", "bytes")
        sizes = {name: self.sizes[name] for name in names} | {"tokens": self.total}
        cuts = {how: self.sizes[how] for how in CUTS[1:] if self.sizes[how]}
        return sizes | {"fingerprint": self.digest.hexdigest()} | cuts


def _question_end(marks: Counter) -> str:
    """The mark that ends nearly all trained questions, if there is one."""
    [(mark, count)] = marks.most_common(1)
    usual = count >= 0.9 * marks.total()
    return mark if usual and not mark.isalnum() else ""


# --- files ---------------------------------------------------------------------------------------


def files_of(meta: dict) -> list[str]:
    """The files that a meta.json describes, beside tokenizer.json."""
    kinds = [""] if meta["kind"] == "pretrain" else ["", "_mask", "_idx"]
    return [f"{split}{kind}.bin" for split in meta["splits"] for kind in kinds]


def _install(folder: Path, out: Path, meta: dict) -> None:
    """Replaces the old files by the new ones. While they are mixed there is no meta.json."""
    final = out / "meta.json"
    try:
        before = files_of(json.loads(final.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        before = []
    final.unlink(missing_ok=True)
    names = files_of(meta)
    for name in [*names, "tokenizer.json", "meta.json"]:
        (folder / name).replace(out / name)
    for name in {*before} - {*names}:
        (out / name).unlink(missing_ok=True)
