"""The prepared format: flat arrays of token ids, and their batches. No torch here.

    train.bin, val.bin     uint16 or uint32 ids, one flat array a split
    train_mask.bin, ...    questions and answers only: uint8, 1 where a token is trained
    train_idx.bin, ...     questions and answers only: uint64 bounds of rows, the last the length;
                           of preferences, row 2i is a question with its chosen answer, 2i + 1 the
                           same with the rejected one;
                           of marks, train_mask.bin has 2 for 1 where the answer is marked as bad
    meta.json              kind, tokenizer's sha256, sizes, fingerprint, sources, what was skipped;
                           of translations their languages
    tokenizer.json         the vocabulary

What writes all this is miniglm/prep/writer.py.
"""

import functools
import hashlib
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from configurator import ROOT, UserError, repo_path, show_path
from miniglm.jsonl import read_report
from miniglm.tokenizer import Tokenizer, load_tokenizer

IGNORE = -100  # a target that is not trained; torch's own default
# what a dataset holds, by its kind
RECORDS = {"pretrain": "documents", "sft": "conversations", "dpo": "pairs", "kto": "marks"}
POOL = 16  # steps whose rows are sorted by length together
PERIOD = 1000  # rows in which a mixture keeps its shares exactly
Arrays = tuple[np.ndarray, np.ndarray]  # idx and targets of rows, (B, T) int64 each
OWNER = 48  # a row of a mixture: the number of its dataset is in the bits from here on


class Dataset:
    """A prepared directory; `name` is one under data/, or a path. Arrays are memory-mapped.

    splits: those that training reads: train, and val if there is one; languages: the source's and
    the target's of a translation set, else empty; beside: the texts beside the questions of a
    Mixture.
    """

    def __init__(self, name: str):
        under_data = ROOT / "data" / name
        self.path = under_data if under_data.is_dir() else repo_path(name)
        self.name = self.path.name
        self.meta = self._read_meta()
        self.languages = self.meta.get("languages", [])
        self.beside = []
        self.tokens, self.mask, self.bounds = {}, {}, {}
        try:
            self.kind = self.meta["kind"]
            self.fingerprint = self.meta["splits"]["train"]["fingerprint"]
            for split, sizes in self.meta["splits"].items():
                self.tokens[split] = self._map(split, self.meta["dtype"], sizes["tokens"])
                if self.kind != "pretrain":
                    rows = sizes[RECORDS[self.kind]] * (2 if self.kind == "dpo" else 1)
                    self.mask[split] = self._map(f"{split}_mask", "uint8", sizes["tokens"])
                    bounds = self.bounds[split] = self._map(f"{split}_idx", "uint64", rows + 1)
                    rises = (bounds[1:] > bounds[:-1]).all()
                    if not rises or [bounds[0], bounds[-1]] != [0, sizes["tokens"]]:
                        raise self._damaged(f"{split}_idx")
        except (KeyError, TypeError, AttributeError):
            file = f"{show_path(self.path)}/meta.json"
            raise UserError(f"{file} is damaged; prepare it again") from None
        self.splits = [split for split in ("train", "val") if split in self.tokens]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.path)
        if tokenizer.sha256 != self.meta["tokenizer_sha256"]:
            raise UserError(
                f"{show_path(self.path)}/tokenizer.json is not what the dataset was prepared with; "
                "run its prepare script again"
            )
        return tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer, checkpoint: Path) -> None:
        """Raises UserError if the checkpoint's tokenizer is not the dataset's."""
        if tokenizer.sha256 != self.tokenizer.sha256:
            raise UserError(
                f"{show_path(self.path)} has another tokenizer than {show_path(checkpoint)}; "
                f"prepare it with --tokenizer={show_path(checkpoint)}"
            )

    def input_tokens(self, rows: np.ndarray, block_size: int) -> int:
        """Tokens that the model reads from these training rows, without padding."""
        if self.kind == "pretrain":
            return len(rows) * block_size
        bounds, rows = self.bounds["train"], self._rows_of(rows)
        return int((bounds[rows + 1] - bounds[rows] - 1).sum())

    def check(self, block_size: int, split: str) -> None:
        """Raises UserError if the split does not fit a model of this block_size."""
        if split not in self.tokens:
            have = ", ".join(self.tokens)
            raise UserError(f"{show_path(self.path)} has no split {split!r}; it has {have}")
        where = f"{show_path(self.path)}/{split}.bin"
        tokens = len(self.tokens[split])
        if self.kind == "pretrain" and tokens <= block_size:
            raise UserError(
                f"{where} has {tokens} tokens, block_size={block_size} needs {block_size + 1}; "
                "prepare more text or lower --block_size="
            )
        if self.kind != "pretrain" and self.meta["max_tokens"] > block_size:
            raise UserError(
                f"{where} has rows of up to {self.meta['max_tokens']} tokens, block_size is "
                f"{block_size}; prepare it with --max_tokens={block_size}"
            )

    def conversations(self, split: str, rows: slice = slice(None)) -> list[list[dict]]:
        """The messages of rows of a question and answer set."""
        tokens, bounds = self.tokens[split], self.bounds[split]
        pairs = zip(bounds[:-1][rows].tolist(), bounds[1:][rows].tolist(), strict=True)
        try:
            conversations = [self.tokenizer.parse(tokens[start:end]) for start, end in pairs]
            if any(len(messages) < 2 for messages in conversations):
                raise IndexError
        except (IndexError, ValueError):
            raise self._damaged(split) from None
        return conversations

    def n_rows(self, split: str, block_size: int) -> int:
        """Rows of an epoch: windows of block_size tokens, conversations, or pairs of them."""
        if self.kind != "pretrain":
            return (len(self.bounds[split]) - 1) // (2 if self.kind == "dpo" else 1)
        return len(self.tokens[split]) // block_size

    def epoch(self, block_size: int) -> float:
        """Training rows after which each was read once; in a Mixture, each of its first part."""
        return self.n_rows("train", block_size)

    def by_kind(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Training rows as `step_rows` names them, apart by kind; `batch` takes one kind."""
        return {self.kind: rows}

    def step_rows(
        self, seed: int, start: int, count: int, block_size: int, group: int | None = None
    ) -> np.ndarray:
        """The training rows of the step that begins after `start` rows, (count,) int64.

        A pure function of its arguments and the dataset's fingerprint: each epoch holds each row
        once, in another order. In question and answer sets each `group` of rows, by default a
        step's, are of like length.
        """
        n, group = self.n_rows("train", block_size), group or count
        stream = np.arange(start, start + count)
        rows = np.empty(count, np.int64)
        for epoch in range(start // n, (start + count - 1) // n + 1):
            here = stream // n == epoch
            key = f"{seed} {self.fingerprint} {epoch}"
            if self.kind != "pretrain":
                order = _order_by_length(self, key, n, epoch * n % group, group)
                rows[here] = order[stream[here] - epoch * n]
            else:  # the text is a ring, cut at another place in each epoch
                windows = permute(stream[here] - epoch * n, n, key)
                shift = _keys(key)[0] % np.uint64(len(self.tokens["train"]))
                rows[here] = (windows * block_size + int(shift)) % len(self.tokens["train"])
        return rows

    def batch(self, rows: np.ndarray, block_size: int, multiple: int = 1) -> Arrays:
        """Training rows as `step_rows` names them -> idx and targets, (B, T) int64 each.

        Conversations are padded to the longest of them, up to a multiple of `multiple`. B pairs
        give 2 B rows: chosen, rejected, chosen, ...
        """
        if self.kind != "pretrain":
            return self._padded("train", self._rows_of(rows), multiple, block_size)
        tokens = self.tokens["train"]
        window = tokens[(rows[:, None] + np.arange(block_size + 1)) % len(tokens)].astype(np.int64)
        return self._checked("train", (window[:, :-1], window[:, 1:]))

    def show_rows(self, rows: np.ndarray) -> str:
        """The place of training rows, for messages; numbers count from 0."""
        what = "the rows from tokens" if self.kind == "pretrain" else RECORDS[self.kind]
        shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
        return f"{what} {shown} of {show_path(self.path)}/train"

    def eval_batches(self, split: str, block_size: int, batch_size: int) -> Iterator[Arrays]:
        """The whole split once, always the same: idx and targets, (B, T) int64 each."""
        if self.kind != "pretrain":
            yield from (arrays for _, arrays in self.row_batches(split, batch_size))
            return
        tokens = self.tokens[split]
        starts = np.arange(0, len(tokens) - 1, block_size)
        for first in range(0, len(starts), batch_size):
            bounds = starts[first : first + batch_size]
            ends = np.minimum(bounds + block_size + 1, len(tokens))
            yield self._checked(split, _gather(tokens, None, bounds, ends))

    def row_batches(self, split: str, batch_size: int) -> Iterator[tuple[np.ndarray, Arrays]]:
        """A whole split of conversations, pairs or marks once, always the same: their numbers,
        (B,), and their idx and targets, int64 each: (2 B, T) of pairs, else (B, T)."""
        order = np.argsort(self.row_lengths(split), kind="stable")
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            yield part, self._padded(split, self._rows_of(part))

    def is_good(self, split: str, rows: np.ndarray) -> np.ndarray:
        """Whether each of these marks is of a good answer, (B,) bool."""
        bounds, mask = self.bounds[split][rows[:, None] + np.arange(2)], self.mask[split]
        return np.array([mask[start:end].max() == 1 for start, end in bounds.tolist()])

    def crossed(self, split: str, pairs: np.ndarray, block_size: int, multiple: int) -> Arrays:
        """Of each pair of marks, (B, 2), the first one's prompt with the second one's answer -> idx
        and targets, padded to a multiple of `multiple` and cut to block_size."""
        rows = []
        for both in self.bounds[split][pairs[..., None] + np.arange(2)].astype(np.int64):
            prompt, answer = (
                np.stack([self.tokens[split][start:end], self.mask[split][start:end]])
                for start, end in both
            )
            prompt, answer = prompt[:, : prompt[1].argmax()], answer[:, answer[1].argmax() :]
            rows.append(np.hstack([prompt, answer]))
        return collate(rows, multiple, block_size)

    def row_lengths(self, split: str) -> np.ndarray:
        """Tokens of each conversation, or of the longer one of each pair."""
        lengths = np.diff(self.bounds[split].astype(np.int64))
        return lengths.reshape(-1, 2).max(axis=1) if self.kind == "dpo" else lengths

    def _rows_of(self, pairs: np.ndarray) -> np.ndarray:
        """The rows of pairs, chosen before rejected; a conversation's number is its row's."""
        if self.kind != "dpo":
            return pairs
        return (2 * np.asarray(pairs)[:, None] + np.arange(2)).ravel()

    def _padded(
        self, split: str, rows: np.ndarray, multiple: int = 1, longest: int | None = None
    ) -> Arrays:
        starts = self.bounds[split][rows].astype(np.int64)
        ends = self.bounds[split][rows + 1].astype(np.int64)
        tokens, mask = self.tokens[split], self.mask[split]
        return self._checked(split, _gather(tokens, mask, starts, ends, multiple, longest))

    def _checked(self, split: str, batch: Arrays) -> Arrays:
        """The batch. Raises UserError if the tokenizer has not all of its ids."""
        if max(ids.max() for ids in batch) >= self.tokenizer.n_vocab:
            raise self._damaged(split)
        return batch

    def _damaged(self, stem: str) -> UserError:
        return UserError(f"{show_path(self.path)}/{stem}.bin is damaged; prepare it again")

    def _read_meta(self) -> dict:
        path = self.path / "meta.json"
        if path.is_file():
            return read_report(path, ("kind", "splits", "tokenizer_sha256"), "prepare it again")
        scripts = sorted(self.path.glob("prepare*.py"))
        folder, _, kind = self.path.name.rpartition("_")
        scripts += [file for file in [ROOT / f"data/{folder}/prepare_{kind}.py"] if file.is_file()]
        run = f"run python {show_path(scripts[0])}" if scripts else "prepare it first"
        raise UserError(f"{show_path(path)} is missing; {run}")

    def _map(self, stem: str, dtype: str, length: int) -> np.ndarray:
        """The entries of a file."""
        path = self.path / f"{stem}.bin"
        entries = path.stat().st_size / np.dtype(dtype).itemsize if path.is_file() else None
        if entries != length:
            state = "is missing" if entries is None else f"has {entries} entries, not {length}"
            raise UserError(f"{show_path(path)} {state}; run its prepare script again")
        array = np.memmap(path, dtype, "r")
        if stem.startswith("train") and hasattr(mmap, "MADV_RANDOM"):
            array.base.madvise(mmap.MADV_RANDOM)  # random access, so disable readahead
        return array


class Mixture:
    """Several datasets in one run, in given proportions of rows: `news:3,novels:1`.

    Each PERIOD rows of training hold exactly their shares, in an order that is another each time;
    a dataset smaller than its share is read more often. It has the methods of a Dataset; the
    highest bits of a row are the number of its dataset. With questions and texts, its kind,
    validation and conversations are those of the questions; parts without validation have none.
    """

    def __init__(self, name: str, parts: list[Dataset], weights: np.ndarray):
        self.name, self.parts = name, parts
        for part in parts:
            part.check_tokenizer(parts[0].tokenizer, parts[0].path)
            if part.kind in ("dpo", "kto"):
                what = f"{show_path(part.path)} holds {RECORDS[part.kind]}"
                raise UserError(f"{what}, which cannot be mixed")
        ends = np.rint(np.cumsum(weights / weights.sum()) * PERIOD).astype(int)
        self.shares = np.diff(ends, prepend=0)  # rows of each in a period
        if not self.shares.all():
            raise UserError(f"dataset={name}: a share is under 1 of {PERIOD:,}")
        self.kind = "sft" if any(part.kind == "sft" for part in parts) else "pretrain"
        self.judged = [part for part in parts if part.kind == self.kind]
        self.beside = [part for part in parts if part.kind != self.kind]
        # samples continue its validation split
        first = next((part for part in self.judged if "val" in part.tokens), self.judged[0])
        self.path, self.tokenizer, self.meta = first.path, first.tokenizer, first.meta
        self.splits = first.splits
        self.tokens, self.bounds, self.languages = first.tokens, first.bounds, first.languages
        facts = [(p.fingerprint, int(n)) for p, n in zip(parts, self.shares, strict=True)]
        self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()

    def check_tokenizer(self, tokenizer: Tokenizer, checkpoint: Path) -> None:
        self.parts[0].check_tokenizer(tokenizer, checkpoint)

    def check(self, block_size: int, split: str) -> None:
        for part in self.parts:
            if split in part.tokens or split not in self.tokens:
                part.check(block_size, split)

    def conversations(self, split: str, rows: slice = slice(None)) -> list[list[dict]]:
        """As Dataset.conversations; rows: of each part."""
        parts = [part for part in self.judged if split in part.tokens]
        return [messages for part in parts for messages in part.conversations(split, rows)]

    def n_rows(self, split: str, block_size: int) -> int:
        return sum(part.n_rows(split, block_size) for part in self.parts)

    def epoch(self, block_size: int) -> float:
        """As Dataset.epoch."""
        return self.parts[0].n_rows("train", block_size) * PERIOD / self.shares[0]

    def step_rows(
        self, seed: int, start: int, count: int, block_size: int, group: int | None = None
    ) -> np.ndarray:
        """As Dataset.step_rows: a pure function of its arguments and the fingerprint."""
        first, last = start // PERIOD, (start + count - 1) // PERIOD
        owners = [
            np.random.default_rng(_keys(f"{seed} {self.fingerprint} {period}")).permutation(
                np.repeat(np.arange(len(self.parts)), self.shares)
            )
            for period in range(first, last + 1)
        ]
        before, owner = np.split(np.concatenate(owners), [start - first * PERIOD])
        owner = owner[:count]
        rows = np.empty(count, np.int64)
        for number, part in enumerate(self.parts):
            mine, share = owner == number, int(self.shares[number])
            if mine.any():
                done = first * share + int((before == number).sum())
                alike = max(1, round(count * share / PERIOD))
                own = part.step_rows(seed, done, int(mine.sum()), block_size, alike)
                rows[mine] = own + (number << OWNER)
        return rows

    def by_kind(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """As Dataset.by_kind; questions come first."""
        kinds = np.array([part.kind for part in self.parts])[rows >> OWNER]
        return {kind: rows[kinds == kind] for kind in ("sft", "pretrain") if kind in kinds}

    def _by_part(self, rows: np.ndarray) -> Iterator[tuple[Dataset, np.ndarray, np.ndarray]]:
        """Each part with any of the rows, their numbers in it, and a mask of the rows."""
        for number, part in enumerate(self.parts):
            mine = rows >> OWNER == number
            if mine.any():
                yield part, rows[mine] - (number << OWNER), mine

    def input_tokens(self, rows: np.ndarray, block_size: int) -> int:
        return sum(part.input_tokens(own, block_size) for part, own, _ in self._by_part(rows))

    def batch(self, rows: np.ndarray, block_size: int, multiple: int = 1) -> Arrays:
        """As Dataset.batch, of rows of one kind."""
        batches = [
            (mine, part.batch(own, block_size, multiple)) for part, own, mine in self._by_part(rows)
        ]
        T = max(idx.shape[1] for _, (idx, _) in batches)
        out_idx = np.zeros((len(rows), T), np.int64)
        out_targets = np.full((len(rows), T), IGNORE)
        for mine, (idx, targets) in batches:
            out_idx[mine, : idx.shape[1]], out_targets[mine, : idx.shape[1]] = idx, targets
        return out_idx, out_targets

    def show_rows(self, rows: np.ndarray) -> str:
        """As Dataset.show_rows."""
        return " and ".join(part.show_rows(own) for part, own, _ in self._by_part(rows))

    def eval_batches(self, split: str, block_size: int, batch_size: int) -> Iterator[Arrays]:
        """The whole split of each that has it."""
        for part in self.judged:
            if split in part.tokens:
                yield from part.eval_batches(split, block_size, batch_size)


def open_dataset(name: str) -> "Dataset | Mixture":
    """The dataset of a name or path, or the mixture of several: NAME:SHARE,NAME:SHARE."""
    words = [word.strip() for word in name.split(",")]
    shares = [re.fullmatch(r"(.+):(\d*\.?\d+)", word) for word in words]
    if not any(shares):
        return Dataset(name)
    if not all(shares):
        word = words[shares.index(None)]
        raise UserError(f"dataset={name}: {word!r} is no NAME:SHARE, as in news:3,novels:1")
    weights = np.array([float(match[2]) for match in shares])
    if not weights.all():
        raise UserError(f"dataset={name}: each share must be above 0")
    return Mixture(",".join(words), [Dataset(match[1]) for match in shares], weights)


def collate(rendered: list[tuple[list, list]], multiple: int = 1, longest: int = 0) -> Arrays:
    """Rows of ids and masks as `render` gives them -> idx and targets, (B, T) int64 each; T is the
    longest row's, up to a multiple of `multiple` and, if it is not 0, at most `longest`."""
    ids, mask = (np.concatenate([np.array(row[i]) for row in rendered]) for i in (0, 1))
    ends = np.cumsum([len(ids) for ids, _ in rendered])
    return _gather(ids, mask, np.append(0, ends[:-1]), ends, multiple, longest)


def _gather(
    tokens: np.ndarray,
    mask: np.ndarray | None,
    starts: np.ndarray,
    ends: np.ndarray,
    multiple: int = 1,
    longest: int | None = None,
) -> Arrays:
    """Rows tokens[start:end], padded on the right: idx (B, T), and targets shifted by one.

    Right padding needs no attention mask: causal positions before it cannot see it.
    """
    T = -(-((ends - starts).max() - 1) // multiple) * multiple
    positions = starts[:, None] + np.arange((min(T, longest) if longest else T) + 1)
    inside = positions < ends[:, None]
    positions = np.where(inside, positions, starts[:, None])
    ids = tokens[positions].astype(np.int64)
    trained = inside if mask is None else inside & (mask[positions] != 0)
    return ids[:, :-1], np.where(trained, ids, IGNORE)[:, 1:]


@functools.lru_cache(maxsize=4)  # two epochs of two datasets
def _order_by_length(data: Dataset, key: str, n: int, phase: int, count: int) -> np.ndarray:
    """An epoch's order of n rows, in which each step of count rows has rows of like length.

    phase: how far into a step the epoch begins. The steps on both edges are shared with the
    neighbouring epochs and are left as they come.
    """
    order = permute(np.arange(n), n, key)
    lengths = data.row_lengths("train")
    first = -phase % count  # rows that complete the step before
    last = first + max(0, n - first) // count * count
    generator = np.random.default_rng(_keys(key))
    for start in range(first, last, POOL * count):
        pool = order[start : min(start + POOL * count, last)]
        steps = pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, count)
        order[start : start + len(pool)] = generator.permutation(steps).ravel()
    return order


def permute(index: np.ndarray, n: int, key: str) -> np.ndarray:
    """Where a keyed permutation of 0 .. n - 1 sends each index; nothing of length n is stored.

    A Feistel network over the next even number of bits, walked until it falls below n
    (Black and Rogaway, Ciphers with arbitrary finite domains, 2002).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = _keys(key)
    out = np.asarray(index, np.uint64).copy()
    todo = np.ones(len(out), bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & low
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & low)
        out[todo] = (left << half) | right
        todo[todo] = out[todo] >= n
    return out.astype(np.int64)


def _keys(key: str) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(key.encode(), digest_size=48).digest(), np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: each input bit moves half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
