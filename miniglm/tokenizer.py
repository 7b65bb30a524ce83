"""Text and conversations <-> token ids. Files of ids are in data_utils.py.

A vocabulary is a tokenizer.json as Hugging Face has it: a byte-level BPE, trained on a corpus,
GPT-2's or another project's. tiktoken does the encoding. Special tokens follow the ordinary ones
and exist from pretraining on; their names inside a text are plain text. A conversation becomes

    <|user|>孔明是谁？<|end|><|assistant|>孔明是诸葛亮的字。<|end|>
                                        ----------------------- trained (mask 1)

or what the chat template of a base model makes of it, which the key "chat" of its tokenizer.json
then holds: miniglm/chat.py.

Training reads at most SAMPLE characters, passages picked by their hashes. The command is
data/train_tokenizer.py.
"""

import functools
import hashlib
import heapq
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from configurator import ROOT, UserError, repo_path, show_path
from miniglm import chat
from miniglm.chat import END, END_OF_TEXT, HIDDEN, NO_REASONING, ROLES, SPECIAL_TOKENS

# Qwen2's split pattern, which llama.cpp and Hugging Face know
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|", 1)
# SmolLM's: each digit alone, and GPT-2's between them
DIGITS_PATTERN = (
    r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {  # llama.cpp's names for them
    QWEN2_PATTERN: "qwen2",
    GPT2_PATTERN: "gpt-2",
    LLAMA3_PATTERN: "llama-bpe",
    DIGITS_PATTERN: "smollm",
}
NFC = {"type": "NFC"}  # Qwen's normalizer, the only one supported
# normalizer of an exported tokenizer: the chat template puts HIDDEN into names inside a message
UNHIDE = {"type": "Replace", "pattern": {"String": HIDDEN}, "content": ""}
# ends of documents in other vocabularies; here they are renamed END_OF_TEXT
OTHER_ENDS = ("<|end_of_text|>", "</s>")
SAMPLE = 2_000_000  # characters that a vocabulary is trained on; bounds the memory
PASSAGE = 4096  # characters
RUN_LENGTH = 4  # characters; Chinese has no blanks, and the trainer is slow on long words
# (characters, how many of them in a row are too many): tiktoken's patterns panic at a million
# blanks, and NFC takes a time that is quadratic in the marks on a letter
BLANKS = r"\s", 2**19
MARKS = r"[^\0-\x7f\u4e00-\u9fff]", 2**10  # and others; a cut between those costs nothing
GPT2_FILES = ROOT / "data" / "raw" / "gpt2"


class Tokenizer:
    """A vocabulary. n_vocab: ids are 0 .. n_vocab - 1; bytes_of: the UTF-8 bytes of each, none of a
    special one; bytes_per_id: how many; end_of_text: the id that ends documents; end: the one that
    ends a message; stop_ids: both, which end a generated text; chat: a base's own format, or None.
    """

    def __init__(self, text: str):
        """text: the content of a tokenizer.json. Raises ValueError if it is no byte-level BPE."""
        self.text = text
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        content = json.loads(text)
        try:
            added = content["added_tokens"]
            special = {token["content"]: token["id"] for token in added}
            vocab = content["model"]["vocab"]
            pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            byte_of = {char: byte for byte, char in _byte_to_unicode().items()}
            ranks = {
                bytes(byte_of[c] for c in token): id
                for token, id in vocab.items()
                if token not in special
            }
            ids = sorted([*ranks.values(), *special.values()])
            self.chat = _chat_template(content)
            missing = [] if self.chat else [t for t in SPECIAL_TOKENS if t not in special]
            if missing:
                raise ValueError(f"special tokens are missing: {' '.join(missing)}")
            if ids != list(range(len(ids))) or not all(bytes([b]) in ranks for b in range(256)):
                raise ValueError("an id or a byte is missing or there twice")
            if content["normalizer"] not in (None, NFC):
                raise ValueError("it has a normalizer")
            self._nfc = content["normalizer"] == NFC
            self._encoding = tiktoken.Encoding(
                "miniglm", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
            )
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"not a byte-level BPE with a split pattern ({error!r})") from None
        self.n_vocab = len(ids)
        self.special = {id: name for name, id in special.items()}
        self.bytes_of = [b""] * self.n_vocab
        for token, id in ranks.items():
            self.bytes_of[id] = token
        for token in added:
            if not token["special"]:  # <think> and others that one reads
                self.bytes_of[token["id"]] = token["content"].encode()
        self.bytes_per_id = np.array([len(token) for token in self.bytes_of], np.int64)
        self.end = special[self.chat.end if self.chat else END]
        ends = [special[name] for name in (END_OF_TEXT, *OTHER_ENDS) if name in special]
        self.end_of_text = [*ends, self.end][0]
        self.stop_ids = (self.end_of_text, self.end)
        if self.chat:
            longest_first = sorted(special, key=len, reverse=True)
            self._names = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
            self._id_of = special
            self._header = self._encode_named(f"{self.chat.start}assistant{self.chat.tail}")
        else:
            self._role_id = {role: special[token] for role, token in ROLES.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of a text; names of special tokens inside it are plain text."""
        first, *others = self._split(self._encoding.encode_ordinary, text)
        return [*first, *itertools.chain(*others)] if others else first

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids, uint32; a sixth faster, since none becomes a Python object."""
        encode = functools.partial(self._encoding.encode_to_numpy, disallowed_special=())
        return np.concatenate(self._split(encode, text))

    def _split(self, encode: Callable[[str], Iterable], text: str) -> list:
        """What `encode` makes of a text, in pieces if its blanks are too many for it."""
        try:
            return [encode(piece) for piece in _cut(self._normalized(text), *BLANKS)]
        except BaseException as error:  # a panic in Rust is no Exception
            if type(error).__name__ not in ("PanicException", "ValueError"):
                raise
            raise UserError(f"the tokenizer cannot split {text[:20]!r}... ({error})") from None

    def _normalized(self, text: str) -> str:
        if not self._nfc:
            return text
        return "".join(unicodedata.normalize("NFC", piece) for piece in _cut(text, *MARKS))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens have none, invalid bytes become U+FFFD."""
        return b"".join(self.bytes_of[id] for id in ids).decode("utf-8", errors="replace")

    def entry(self, id: int) -> str:
        """An entry for display: quoted text, bytes in hexadecimal, or a special name."""
        if id in self.special:
            return self.special[id]
        try:
            return repr(self.bytes_of[id].decode())
        except UnicodeDecodeError:
            return self.bytes_of[id].hex(" ")

    def render(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        """Messages, as miniglm/chat.py has them -> ids and mask: 1 for each answer and its end
        token, 0 for one with "train": False. Raises UserError if a template refuses them."""
        if self.chat:
            ids = self._encode_named(self.chat.text(messages))
            return ids, self._answers(ids, messages)
        ids, mask = [], []
        for message in chat.plain(messages):
            body = self.encode(message["content"])
            ids += [self._role_id[message["role"]], *body, self.end]
            is_trained = message["role"] == "assistant" and message.get("train", True)
            mask += [0] + [int(is_trained)] * (len(body) + 1)
        return ids, mask

    def render_prompt(self, messages: list[dict]) -> list[int]:
        """Ids that ask for the next answer, a prefix of `render` of the answered messages, unless
        the answer has reasoning: a template may have written an empty one here."""
        if self.chat:
            return self._encode_named(self.chat.text(messages, asks=True))
        return [*self.render(messages)[0], self._role_id["assistant"]]

    def parse(self, ids: Iterable[int]) -> list[dict]:
        """Messages of ids that `render` made, which makes the same ids of them."""
        if self.chat:
            return self._parse_turns([*map(int, ids)])
        role_of = {id: role for role, id in self._role_id.items()}
        messages = []
        for id in map(int, ids):
            if id in role_of:
                messages.append((role_of[id], []))
            elif id != self.end:
                messages[-1][1].append(id)
        return [{"role": role, "content": self.decode(body)} for role, body in messages]

    def _encode_named(self, text: str) -> list[int]:
        """Ids of a text in which names of special tokens are these tokens."""
        ids = []
        for number, part in enumerate(self._names.split(text)):
            ids += [self._id_of[part]] if number % 2 else self.encode(part.replace(HIDDEN, ""))
        return ids

    def _answers(self, ids: list[int], messages: list[dict]) -> list[int]:
        """The mask of ids that a template gave."""
        mask, header = [0] * len(ids), self._header
        starts = [i + len(header) for i in range(len(ids)) if ids[i : i + len(header)] == header]
        answers = [message for message in messages if message["role"] == "assistant"]
        if len(starts) != len(answers):
            raise UserError(
                f"the chat template makes {len(starts)} turns of {len(answers)} answers"
            )
        for start, answer in zip(starts, answers, strict=True):
            stop = ids.index(self.end, start) + 1
            mask[start:stop] = [int(answer.get("train", True))] * (stop - start)
        return mask

    def _parse_turns(self, ids: list[int]) -> list[dict]:
        """Without what a template writes by itself: a system message, empty reasoning."""
        starts = [i for i, id in enumerate(ids) if id == self._header[0]]
        messages = []
        for start in starts:
            body = ids[start + 1 : ids.index(self.end, start)]
            parts = (self.special.get(id, "").encode() or self.bytes_of[id] for id in body)
            text = b"".join(parts).decode("utf-8", "replace")
            role, _, content = text.partition(self.chat.tail)
            messages.append({"role": role, "content": content.removeprefix(NO_REASONING)})
        if len(messages) > 2 and messages[0]["role"] == "system":
            asked = self._encode_named(self.chat.text(messages[1:]))
            return messages[1:] if asked == ids else messages
        return messages

    def save(self, path: Path) -> None:
        path.write_text(self.text, encoding="utf-8", newline="")


def _cut(text: str, chars: str, longest: int) -> list[str]:
    """A text, cut behind every `longest` characters of a run of these."""
    if len(text) < longest:
        return [text]
    runs = re.finditer(f"{chars}{{1,{longest}}}", text)
    ends = [run.end() for run in runs if run.end() - run.start() == longest]
    return [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)])]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of vocab_size entries, special ones included, trained on the texts."""
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(f"vocab_size={vocab_size} is too small; it must be {smallest} or more")
    bpe = _new_bpe(models.BPE(), QWEN2_PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    runs = (text[i : i + RUN_LENGTH] for text in texts for i in range(0, len(text), RUN_LENGTH))
    bpe.train_from_iterator(runs, trainer)
    bpe.add_special_tokens(SPECIAL_TOKENS)
    return Tokenizer(bpe.to_str())


def sample(texts: Iterable[str], size: int = SAMPLE) -> list[str]:
    """Distinct passages of at most size characters in all: those with the smallest hashes, so that
    they come from everywhere in the texts and do not depend on the order of the texts."""
    heap, passages, total = [], {}, 0  # heap: negated hashes, so that the largest pops first
    for passage in (text[i : i + PASSAGE] for text in texts for i in range(0, len(text), PASSAGE)):
        key = -int.from_bytes(hashlib.blake2b(passage.encode(), digest_size=8).digest())
        if key in passages:
            continue
        passages[key] = passage
        heapq.heappush(heap, key)
        total += len(passage)
        while total > size:
            total -= len(passages.pop(heapq.heappop(heap)))
    return [passages[key] for key in sorted(heap, reverse=True)]


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer `gpt2`, or that of a directory or a tokenizer.json, another project's too;
    nanoGPT's ckpt.pt, which holds none, has gpt2's. Raises UserError if there is none."""
    path = repo_path(name)
    if str(name) == "gpt2" or (path.suffix == ".pt" and path.is_file()):
        return _gpt2_tokenizer()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        script = path.parent / "prepare.py"
        if script.is_file():
            raise UserError(f"{show_path(path)} is missing; run python {show_path(script)}")
        raise UserError(f"no tokenizer {show_path(path)}; name gpt2, or a directory that holds one")
    try:
        return Tokenizer(adopt(path.read_text(encoding="utf-8"), chat.read_template(path.parent)))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())  # several lines for a bad pattern
        raise UserError(f"{show_path(path)} cannot be used as a tokenizer: {reason}") from None


def _gpt2_tokenizer() -> Tokenizer:
    """GPT-2's 50,257 entries, and the chat format's four behind them."""
    files = GPT2_FILES / "encoder.json", GPT2_FILES / "vocab.bpe"
    if not all(file.is_file() for file in files):
        raise UserError("the gpt2 vocabulary is not here; run python data/fetch_data.py gpt2")
    bpe = _new_bpe(models.BPE(*models.BPE.read_file(*map(str, files))), GPT2_PATTERN)
    bpe.add_special_tokens(SPECIAL_TOKENS)
    return Tokenizer(bpe.to_str())


def adopt(text: str, own: dict[str, str] | None = None) -> str:
    """Another project's tokenizer.json as one of ours with the same ids. own: read_template's; if
    it holds a format of its own, that is kept, else the SPECIAL_TOKENS that the vocabulary lacks
    follow its entries. Returns one of ours unchanged. Raises ValueError if ours would give other
    ids."""
    content = json.loads(text)
    own = None if not own or chat.is_ours(own["template"]) else own
    try:
        added = sorted(content["added_tokens"], key=lambda token: token["id"])
        names = [token["content"] for token in added]
        if "chat" in content or ({*SPECIAL_TOKENS} <= {*names} and _is_ours(content)):
            return text
        pattern, is_nfc = _pattern_of(content["pre_tokenizer"]), _is_nfc(content["normalizer"])
        model = content["model"]
        vocab = dict(model["vocab"])
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        merges = [(left, right) for left, right in pairs]
        made = list(dict.fromkeys(vocab[left + right] for left, right in merges))
        if made != sorted(made):
            raise ValueError("its merges are not in the order of its ids")
        whole_first = {"ignore_merges": bool(model.get("ignore_merges"))}
        if not whole_first["ignore_merges"]:
            _refuse_unmade(vocab.keys() - {*names}, merges)
        end = next((name for name in OTHER_ENDS if name in names), None)
        if end and END_OF_TEXT not in names and not own:
            names[names.index(end)] = END_OF_TEXT
            if end in vocab:
                vocab[END_OF_TEXT] = vocab.pop(end)
        bpe = _new_bpe(models.BPE(vocab, merges, **whole_first), pattern)
        if is_nfc:
            bpe.normalizer = normalizers.NFC()
        bpe.add_special_tokens(names)
        if not own:
            bpe.add_special_tokens(SPECIAL_TOKENS)
        if [bpe.token_to_id(name) for name in names] != [token["id"] for token in added]:
            raise ValueError("its added tokens do not follow its entries")
        if not own:
            return bpe.to_str()
        kept = {"added_tokens": added, "post_processor": content.get("post_processor")}
        return json.dumps(json.loads(bpe.to_str()) | kept | {"chat": own}, ensure_ascii=False)
    except ValueError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"not a byte-level BPE ({error!r})") from None


def _chat_template(content: dict) -> chat.ChatTemplate | None:
    """The chat format of a tokenizer.json, None if it is ours."""
    if "chat" not in content:
        return None
    names = dict(content["chat"])
    control = [token["content"] for token in content["added_tokens"] if token["special"]]
    return chat.ChatTemplate(names.pop("template"), names, control)


def _refuse_unmade(entries: Iterable[str], merges: list[tuple[str, str]]) -> None:
    """Raises ValueError if no merge makes an entry: tiktoken would use it for a whole word."""
    made = {left + right for left, right in merges}
    unmade = sorted(entry for entry in entries if len(entry) > 1 and entry not in made)
    if unmade:
        raise ValueError(f"no merge makes its entry {unmade[0]!r} ({len(unmade)} such)")


def _is_ours(content: dict) -> bool:
    parts = content["pre_tokenizer"].get("pretokenizers", [{}])
    return content["normalizer"] in (None, NFC) and parts[0].get("type") == "Split"


def _pattern_of(splitter: dict) -> str:
    """The pattern that splits a text as the pre_tokenizer of a tokenizer.json does."""
    parts = splitter.get("pretokenizers", [splitter])
    cut = parts[0] if len(parts) == 2 else None
    by_bytes = {"use_regex": True} | parts[-1]
    is_bytes = by_bytes["type"] == "ByteLevel" and not by_bytes["add_prefix_space"]
    if is_bytes and len(parts) == 1 and by_bytes["use_regex"]:
        return GPT2_PATTERN
    is_digits = cut and cut["type"] == "Digits" and cut["individual_digits"]
    if is_bytes and is_digits and by_bytes["use_regex"]:
        return DIGITS_PATTERN
    is_split = cut and cut["type"] == "Split" and cut["behavior"] == "Isolated"
    if is_bytes and is_split and not cut["invert"] and not by_bytes["use_regex"]:
        return cut["pattern"]["Regex"]
    kinds = " and ".join(part["type"] for part in parts)
    raise ValueError(f"its way of splitting text, {kinds}, is not supported")


def _is_nfc(normalizer: dict | None) -> bool:
    """Whether texts are normalized to NFC; export.py's UNHIDE is ignored."""
    parts = (normalizer or {}).get("normalizers", [normalizer])
    parts = [part for part in parts if part not in (None, UNHIDE)]
    others = [part["type"] for part in parts if part != NFC]
    if others:
        raise ValueError(f"its normalizer {others[0]} is not supported")
    return bool(parts)


def _new_bpe(model: models.BPE, pattern: str) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(model)
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _byte_to_unicode() -> dict[int, str]:
    """GPT-2's printable character for each byte, as vocabulary files write them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
