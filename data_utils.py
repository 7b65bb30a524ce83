"""The prepared format: flat arrays of token ids, their writers and their batches. No torch here.

    train.bin, val.bin     uint16 or uint32 ids, one flat array a split
    train_mask.bin, ...    questions and answers only: uint8, 1 where a token is trained
    train_idx.bin, ...     questions and answers only: uint64 bounds of rows, the last the length;
                           of preferences, row 2i is a question with its chosen answer, 2i + 1 the
                           same with the rejected one
    meta.json              kind, tokenizer's sha256, sizes, fingerprint, sources, what was skipped
    tokenizer.json         the vocabulary

Raw files are the prepare scripts' business.
"""

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np

from configurator import ROOT, UserError, repo_path, show_path, written_aside
from tokenizer import Tokenizer, load_tokenizer

IGNORE = -100  # a target that is not trained; torch's own default
POOL = 16  # steps whose rows are sorted by length together
Mask = Literal["answer", "no_end", "padding"]  # what of a conversation is trained, see `remask`
SENTENCE_END = re.compile(r"(?:[。！？…；!?;]|\.(?!\d))+[”’」』）)]*")


# --- writers -----------------------------------------------------------------------------------


def write_pretrain(
    out: Path,
    tokenizer: Tokenizer,
    documents: dict[str, Iterable[str]],
    sources: list[str],
    found: Callable[[], dict] = dict,
) -> dict:
    """Writes each split's documents, each with its end token, and returns the meta.json.

    found: what else goes into it, once all documents have been read: what their reader skipped.
    """

    def rows(split: str, sizes: Counter) -> Iterator[tuple[list[int], None]]:
        for text in documents[split]:
            if not text.strip():
                sizes["skipped: empty"] += 1
                continue
            sizes["documents"] += 1
            sizes["characters"] += len(text)
            sizes["bytes"] += len(text.encode())
            yield [*tokenizer.encode(text), tokenizer.end_of_text], None

    rows_of = {split: rows for split in documents}
    return _write(out, "pretrain", tokenizer, rows_of, {"sources": sources}, found)


def write_sft(
    out: Path,
    tokenizer: Tokenizer,
    conversations: dict[str, Iterable[list[dict]]],
    sources: list[str],
    max_tokens: int,
    mask: Mask = "answer",
    found: Callable[[], dict] = dict,
) -> dict:
    """Writes each split's conversations with the mask of their answers, and returns the meta.json.

    What is longer than max_tokens is fitted (see `fit`); repeated conversations are left out, in
    later splits those of earlier ones too. All of it is counted in meta.json. found: as in
    write_pretrain.
    """
    seen, last_characters = set(), Counter()

    def rows(split: str, sizes: Counter) -> Iterator[tuple[list[int], list[int]]]:
        for messages in conversations[split]:
            fitted, how = fit(tokenizer, messages, max_tokens)
            key = hashlib.blake2b(json.dumps(fitted or messages).encode(), digest_size=16).digest()
            if key in seen:
                sizes["skipped: duplicate"] += 1
                continue
            seen.add(key)
            if how:
                sizes[how] += 1
            if fitted is None:
                continue
            sizes["conversations"] += 1
            if split == "train":
                last_characters[fitted[-2]["content"][-1:]] += 1
            text = "".join(message["content"] for message in fitted)
            sizes["characters"] += len(text)
            sizes["bytes"] += len(text.encode())
            yield remask(*tokenizer.render(fitted), mask, tokenizer.end, max_tokens)

    def question_end() -> str:
        """The mark that ends nearly all trained questions, if there is one."""
        [(mark, count)] = last_characters.most_common(1) or [("", 0)]
        usual = count >= 0.9 * last_characters.total()
        return mark if usual and not mark.isalnum() else ""

    meta = {"sources": sources, "max_tokens": max_tokens, "mask": mask}
    rows_of = {split: rows for split in conversations}
    return _write(
        out, "sft", tokenizer, rows_of, meta, lambda: {"question_end": question_end()} | found()
    )


Pair = tuple[list[dict], str, str]  # a prompt's messages, the chosen answer, the rejected one


def write_dpo(
    out: Path,
    tokenizer: Tokenizer,
    pairs: dict[str, Iterable[Pair]],
    sources: list[str],
    max_tokens: int,
    found: Callable[[], dict] = dict,
) -> dict:
    """Writes each split's preferences, two rows a pair, and returns the meta.json.

    Pairs are fitted (see `fit_pair`); repeated ones and equal answers are left out, in later splits
    those of earlier ones too. All of it is counted in meta.json. found: as in write_pretrain.
    """
    seen, last_characters = set(), Counter()

    def rows(split: str, sizes: Counter) -> Iterator[tuple[list[int], list[int]]]:
        for pair in pairs[split]:
            both, how = fit_pair(tokenizer, pair, max_tokens)
            key = hashlib.blake2b(json.dumps(both or pair).encode(), digest_size=16).digest()
            if key in seen:
                how, both = "skipped: duplicate", None
            seen.add(key)
            if how:
                sizes[how] += 1
            if both is None:
                continue
            sizes["pairs"] += 1
            if split == "train":
                last_characters[both[0][-2]["content"][-1:]] += 1
            for messages in both:
                text = "".join(message["content"] for message in messages)
                sizes["characters"] += len(text)
                sizes["bytes"] += len(text.encode())
                ids, mask = tokenizer.render(messages)
                prompt = len(tokenizer.render_prompt(messages[:-1]))
                yield ids, [0] * prompt + mask[prompt:]  # earlier answers are of the prompt

    meta = {"sources": sources, "max_tokens": max_tokens}
    rows_of = {split: rows for split in pairs}

    def about() -> dict:
        return {"question_end": usual_mark(last_characters)} | found()

    return _write(out, "dpo", tokenizer, rows_of, meta, about)


def usual_mark(last_characters: Counter) -> str:
    """The mark that nearly all questions end with, if there is one."""
    [(mark, count)] = last_characters.most_common(1) or [("", 0)]
    usual = count >= 0.9 * last_characters.total()
    return mark if usual and not mark.isalnum() else ""


def fit_pair(
    tokenizer: Tokenizer, pair: Pair, max_tokens: int
) -> tuple[tuple[list, list] | None, str]:
    """Both conversations of a pair as `fit` makes them, on one and the same prompt, and what was
    done: "" where nothing was; None where one cannot be fitted or the answers are equal."""
    prompt, *answers = pair
    both = [[*prompt, {"role": "assistant", "content": answer}] for answer in answers]
    sizes = [len(tokenizer.render(messages)[0]) for messages in both]
    longer = sizes.index(max(sizes))
    fitted, how = fit(tokenizer, both[longer], max_tokens)
    if fitted is None:
        return None, how
    # the shorter one needs no fewer turns
    other, cut = fit(tokenizer, [*fitted[:-1], both[1 - longer][-1]], max_tokens)
    if other is None:
        return None, cut
    if fitted == other:
        return None, "skipped: equal answers"
    return ((other, fitted) if longer else (fitted, other)), how or cut


def remask(
    ids: list[int], trained: list[int], mask: Mask, end: int, max_tokens: int
) -> tuple[list[int], list[int]]:
    """A conversation's ids and mask, as `render` gives them, with another mask.

    answer leaves them alone: the answer and its end token are trained. no_end trains the answer
    without its end token; padding fills the row to max_tokens with end tokens, all trained. The
    question q and the answer a b, each with its end token (.), roles left out, max_tokens 8:

        q . a b .      answer 0 0 1 1 1      no_end 0 0 1 1 0      padding 0 0 1 1 1 1 1 1
    """
    if mask == "no_end":
        return ids, [int(one and id != end) for id, one in zip(ids, trained, strict=True)]
    if mask == "padding":
        more = max_tokens - len(ids)
        return ids + [end] * more, trained + [1] * more
    return ids, trained


def fit(tokenizer: Tokenizer, messages: list[dict], max_tokens: int) -> tuple[list | None, str]:
    """Messages of at most max_tokens ids, and what was done: "" where nothing was.

    The oldest turns go first, then the answer ends at the last sentence end that fits; None where
    there is none, or where the last two messages are no question and answer.
    """
    if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
        return None, "skipped: no question and answer"
    if not messages[-1]["content"].strip():
        return None, "skipped: empty answer"
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = messages[len(system) :]
    how = ""
    while len(tokenizer.render(system + turns)[0]) > max_tokens:
        later = [i for i, m in enumerate(turns) if i and m["role"] == "user"]
        if not later:
            break
        turns, how = turns[later[0] :], "cut: oldest turns"
    if len(tokenizer.render(system + turns)[0]) <= max_tokens:
        return system + turns, how
    *question, answer = turns
    ends = [match.end() for match in SENTENCE_END.finditer(answer["content"])]
    for end in reversed(ends):
        shorter = {"role": "assistant", "content": answer["content"][:end]}
        if len(tokenizer.render([*system, *question, shorter])[0]) <= max_tokens:
            return [*system, *question, shorter], "cut: answer"
    return None, "skipped: too long"


def _write(
    out: Path,
    kind: str,
    tokenizer: Tokenizer,
    splits: dict,
    meta: dict,
    found: Callable[[], dict] = dict,
) -> dict:
    """found: what else goes into meta.json, once all rows have been seen."""
    dtype = np.dtype(np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32)
    meta = {"kind": kind, "tokenizer_sha256": tokenizer.sha256, "dtype": dtype.name} | meta
    meta["splits"] = {}
    with ExitStack() as files:  # renamed together at the end, meta.json last
        meta_file = files.enter_context(written_aside(out / "meta.json"))
        tokenizer.save(files.enter_context(written_aside(out / "tokenizer.json")))
        for split, rows in splits.items():
            path = files.enter_context(written_aside(out / f"{split}.bin"))
            names = ["", "_mask", "_idx"] if kind != "pretrain" else [""]
            paths = [path] + [
                files.enter_context(written_aside(out / f"{split}{name}.bin")) for name in names[1:]
            ]
            sizes = Counter()
            sizes["tokens"], fingerprint = _write_split(paths, rows(split, sizes), dtype)
            if sizes["tokens"] == 0:
                raise UserError(f"nothing to write for {show_path(out)}/{split}.bin: no text in it")
            meta["splits"][split] = dict(sizes) | {"fingerprint": fingerprint}
        meta |= found()
        meta_file.write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
    return meta


def _write_split(paths: list[Path], rows: Iterable, dtype: np.dtype) -> tuple[int, str]:
    """Appends the rows to the files as they come; returns the tokens and the files' sha256."""
    digest = hashlib.sha256()
    position = 0
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        if len(files) == 3:
            files[2].write(np.uint64(0).tobytes())
        for ids, mask in rows:
            position += len(ids)
            parts = [np.array(ids, dtype).tobytes()]
            if len(files) == 3:
                parts += [np.array(mask, np.uint8).tobytes(), np.uint64(position).tobytes()]
            for file, part in zip(files, parts, strict=True):
                file.write(part)
                digest.update(part)
    return position, digest.hexdigest()


# --- datasets and their batches ----------------------------------------------------------------


class Dataset:
    """A prepared directory: `name` is one under data/, or a path. Arrays are memory-mapped."""

    def __init__(self, name: str):
        under_data = ROOT / "data" / name
        self.path = under_data if under_data.is_dir() else repo_path(name)
        self.name = self.path.name
        self.meta = self._read_meta()
        try:
            self.kind = self.meta["kind"]
            self.fingerprint = self.meta["splits"]["train"]["fingerprint"]
        except (KeyError, TypeError):
            raise UserError(
                f"{show_path(self.path)}/meta.json is damaged; prepare it again"
            ) from None
        self.tokens, self.mask, self.bounds = {}, {}, {}
        for split, sizes in self.meta["splits"].items():
            self.tokens[split] = self._map(f"{split}.bin", self.meta["dtype"], sizes["tokens"])
            if self.kind != "pretrain":
                rows = sizes["conversations"] if self.kind == "sft" else 2 * sizes["pairs"]
                self.mask[split] = self._map(f"{split}_mask.bin", "uint8", sizes["tokens"])
                self.bounds[split] = self._map(f"{split}_idx.bin", "uint64", rows + 1)

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
        """Raises UserError where the checkpoint's tokenizer is not the dataset's."""
        if tokenizer.sha256 != self.tokenizer.sha256:
            raise UserError(
                f"{show_path(self.path)} has another tokenizer than {show_path(checkpoint)}; "
                f"prepare it with --tokenizer={show_path(checkpoint)}"
            )

    def input_tokens(self, rows: np.ndarray, block_size: int) -> int:
        """Tokens that the model reads of these training rows, padding left out."""
        if self.kind == "pretrain":
            return len(rows) * block_size
        bounds, rows = self.bounds["train"], self._rows_of(rows)
        return int((bounds[rows + 1] - bounds[rows] - 1).sum())

    def check(self, block_size: int, split: str) -> None:
        """Raises UserError where the split cannot serve a model of this block_size."""
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

    def conversations(self, split: str) -> list[list[dict]]:
        """The messages of each row of a question and answer set."""
        tokenizer = self.tokenizer
        bounds, tokens = self.bounds[split], self.tokens[split]
        rows = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        return [tokenizer.parse(tokens[start:end]) for start, end in rows]

    def n_rows(self, split: str, block_size: int) -> int:
        """Rows of an epoch: windows of block_size tokens, conversations, or pairs of them."""
        if self.kind != "pretrain":
            return (len(self.bounds[split]) - 1) // (2 if self.kind == "dpo" else 1)
        return len(self.tokens[split]) // block_size

    def step_rows(self, seed: int, start: int, count: int, block_size: int) -> np.ndarray:
        """The training rows of the step that begins after `start` rows, (count,) int64.

        A pure function of its arguments and the dataset's fingerprint: each epoch holds each row
        once, in another order. In question and answer sets the rows of a step are of like length.
        """
        n = self.n_rows("train", block_size)
        stream = np.arange(start, start + count)
        rows = np.empty(count, np.int64)
        for epoch in range(start // n, (start + count - 1) // n + 1):
            here = stream // n == epoch
            key = f"{seed} {self.fingerprint} {epoch}"
            if self.kind != "pretrain":
                order = _order_by_length(self, key, n, epoch * n % count, count)
                rows[here] = order[stream[here] - epoch * n]
            else:  # the text is a ring, cut at another place in each epoch
                windows = permute(stream[here] - epoch * n, n, key)
                shift = _keys(key)[0] % np.uint64(len(self.tokens["train"]))
                rows[here] = (windows * block_size + int(shift)) % len(self.tokens["train"])
        return rows

    def batch(
        self, rows: np.ndarray, block_size: int, multiple: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Training rows as `step_rows` names them -> idx and targets, (B, T) int64 each.

        Conversations are padded to the longest of them, up to a multiple of `multiple`. B pairs
        give 2 B rows: chosen, rejected, chosen, ...
        """
        if self.kind != "pretrain":
            return self._padded("train", self._rows_of(rows), multiple, block_size)
        tokens = self.tokens["train"]
        window = tokens[(rows[:, None] + np.arange(block_size + 1)) % len(tokens)].astype(np.int64)
        return window[:, :-1], window[:, 1:]

    def eval_batches(
        self, split: str, block_size: int, batch_size: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The whole split once, always the same: idx and targets, (B, T) int64 each."""
        if self.kind != "pretrain":
            rows = np.argsort(np.diff(self.bounds[split].astype(np.int64)), kind="stable")
            for first in range(0, len(rows), batch_size):
                yield self._padded(split, rows[first : first + batch_size])
            return
        tokens = self.tokens[split]
        starts = np.arange(0, len(tokens) - 1, block_size)
        for first in range(0, len(starts), batch_size):
            bounds = starts[first : first + batch_size]
            ends = np.minimum(bounds + block_size + 1, len(tokens))
            yield _gather(tokens, None, bounds, ends)

    def pair_batches(
        self, split: str, batch_size: int
    ) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
        """A whole split of preferences once, always the same: numbers of pairs, (B,), and their
        idx and targets, (2 B, T) int64 each."""
        pairs = np.argsort(self.row_lengths(split), kind="stable")
        for first in range(0, len(pairs), batch_size):
            part = pairs[first : first + batch_size]
            yield part, self._padded(split, self._rows_of(part))

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
    ) -> tuple[np.ndarray, np.ndarray]:
        starts = self.bounds[split][rows].astype(np.int64)
        ends = self.bounds[split][rows + 1].astype(np.int64)
        return _gather(self.tokens[split], self.mask[split], starts, ends, multiple, longest)

    def _read_meta(self) -> dict:
        path = self.path / "meta.json"
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{show_path(path)} is damaged: {error}") from None
        scripts = sorted(self.path.glob("prepare*.py")) or sorted(
            (ROOT / "data").glob(f"*/prepare_{self.path.name.rpartition('_')[2]}.py")
        )
        run = f"run python {show_path(scripts[0])}" if scripts else "prepare it first"
        raise UserError(f"{show_path(path)} is missing; {run}")

    def _map(self, file: str, dtype: str, length: int) -> np.ndarray:
        path = self.path / file
        found = path.stat().st_size / np.dtype(dtype).itemsize if path.is_file() else None
        if found != length:
            state = "is missing" if found is None else f"has {found} entries, not {length}"
            raise UserError(f"{show_path(path)} {state}; run its prepare script again")
        return np.memmap(path, dtype, "r")


def collate(
    rendered: list[tuple[list[int], list[int]]],
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids and masks as `render` gives them -> idx and targets, (B, T) int64 each."""
    ids = np.concatenate([np.array(ids) for ids, _ in rendered])
    mask = np.concatenate([np.array(mask) for _, mask in rendered])
    ends = np.cumsum([len(ids) for ids, _ in rendered])
    return _gather(ids, mask, np.append(0, ends[:-1]), ends)


def _gather(
    tokens: np.ndarray,
    mask: np.ndarray | None,
    starts: np.ndarray,
    ends: np.ndarray,
    multiple: int = 1,
    longest: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows tokens[start:end], padded on the right: idx (B, T), and targets shifted by one.

    Right padding needs no attention mask: causal positions before it cannot see it.
    """
    T = -(-((ends - starts).max() - 1) // multiple) * multiple
    positions = starts[:, None] + np.arange((min(T, longest) if longest else T) + 1)
    inside = positions < ends[:, None]
    positions = np.where(inside, positions, starts[:, None])
    ids = tokens[positions].astype(np.int64)
    trained = inside if mask is None else inside & (mask[positions] == 1)
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
