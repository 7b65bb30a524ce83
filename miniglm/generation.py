"""Model -> ids: many requests at once, each with its own sampling and random stream.

    batch = Batch(model, stop_ids, size=16)
    batch.add(Request(prompt, Sampling(temperature=0.8)))
    while batch:
        for request, token in batch.step():
            ...

A step gives each running row one token. A finished row makes way for the next waiting request, so a
long queue keeps the batch full. Text is in miniglm/text.py.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor

from configurator import Bound, UserError, at_least, at_most, below, check_bounds
from lstm_model import LSTM
from miniglm.decoding import decoder, may_compile
from model import GPT, KVCache

LONGEST = 4096  # tokens of a cache that a recorded step holds whole; published models: 131,072
LEAST, MOST = 1e-6, 1e4  # factors that leave logits within float32
FACTOR = Bound(f"{LEAST:g} to {MOST:g}", lambda x: LEAST <= x <= MOST)
PENALTY = Bound("-2 to 2", lambda x: -2 <= x <= 2)
HEAT = Bound(f"0 (greedy), or {FACTOR.words}", lambda x: x == 0 or FACTOR.holds(x))


@dataclass
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: Annotated[int, at_least(1)] = 256  # longest output, tokens
    temperature: Annotated[float | None, HEAT] = None  # None is 0.8 to continue, 0 to answer
    top_k: Annotated[int | None, at_least(1)] = None  # only the k likeliest tokens; None is all
    top_p: Annotated[float, at_least(LEAST), at_most(1)] = 1.0  # only the likeliest, up to this sum
    min_p: Annotated[float, at_least(0), at_most(1)] = 0.0  # only from this share of the top one's
    repetition_penalty: Annotated[float, FACTOR] = 1.0  # above 1 lowers ids of the text so far
    frequency_penalty: Annotated[float, PENALTY] = 0.0  # lowers new ids each time they come
    presence_penalty: Annotated[float, PENALTY] = 0.0  # lowers new ids once
    no_repeat_ngram: Annotated[int, at_least(0)] = 0  # n: no n tokens come twice; 0 is off
    end_p: Annotated[float, at_least(0), at_most(1)] = 0.0  # ends only where that is so probable
    stop: list[str] = field(default_factory=list)  # the output ends before these texts
    seed: Annotated[int, at_least(0), below(2**63)] = 1337  # same seed, same text

    def __post_init__(self):
        check_bounds(type(self), vars(self))
        if not all(self.stop):
            raise UserError("stop has an empty text; leave it out")

    @property
    def is_cut(self) -> bool:
        """Whether top_k, top_p or min_p leave tokens out."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)


@dataclass(eq=False)
class Request:
    """A sample to generate. Its random stream depends on (seed, prompt_index, sample_index) alone.

    alternatives: how many of the likeliest tokens to report with each token and its probability;
    None reports neither. finish: None while it waits or runs, then "stop" (a stop id), "length"
    (max_new_tokens) or "cancelled".
    """

    prompt: list[int]
    sampling: Sampling
    prompt_index: int = 0
    sample_index: int = 0
    alternatives: int | None = None
    finish: str | None = None

    def __post_init__(self):
        self.text = list(self.prompt)  # and the new ids, a stop id included
        seed = [self.sampling.seed, self.prompt_index, self.sample_index]
        self.random = np.random.default_rng(seed)

    @property
    def n_new(self) -> int:
        return len(self.text) - len(self.prompt)

    @property
    def ids(self) -> list[int]:
        """The new ids so far, without the stop id."""
        end = -1 if self.finish == "stop" else None
        return self.text[len(self.prompt) : end]


class Token(NamedTuple):
    """log_prob: in the model's own distribution, before temperature, penalties and filters;
    alternatives: (id, prob), likeliest first."""

    id: int
    log_prob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()

    @property
    def prob(self) -> float | None:
        return None if self.log_prob is None else math.exp(self.log_prob)


class Batch:
    """Requests that are generated together, at most `size` at once, first come, first served.

    A row that fills block_size continues from its last block_size / 2 tokens, which are read again.
    eager: after how many steps that of a GPU is compiled; None is never. Not thread-safe.
    """

    @torch.inference_mode()  # compiled code is for tensors of one kind
    def __init__(
        self,
        model: GPT | LSTM,
        stop_ids: tuple[int, ...] = (),
        size: int = 16,
        eager: int | None = None,
    ):
        self.model, self.stop_ids, self.size = model, stop_ids, size
        self.block_size, self.device = model.config.block_size, model.wte.weight.device
        static = eager is not None and self.device.type == "cuda" and self.block_size <= LONGEST
        static = static and may_compile(str(self.device), eager == 0)
        first = self.block_size if static else min(64, self.block_size)  # tokens; it grows
        self.cache: KVCache = model.new_cache(size, first)
        self.cache.keep_rows(0)
        self.decode = decoder(model, static, eager or 0)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # of each row of the cache

    def __bool__(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        length = len(request.prompt)
        if not 0 < length <= self.block_size:
            raise UserError(
                f"the prompt has {length} tokens; this model takes 1 to {self.block_size}"
            )
        self.waiting.append(request)

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """Gives up a request, unless it has ended."""
        if request in self.running:
            self._drop(self.running.index(request))
        elif request in self.waiting:
            self.waiting.remove(request)
        request.finish = request.finish or "cancelled"

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, Token]]:
        """Admits waiting requests while there is room, then makes one token of each row."""
        logits = []
        if self.running:
            self._make_room()
            self.cache.reserve(max(self.cache.lengths) + 1)
            newest = torch.tensor([r.text[-1] for r in self.running], device=self.device)
            logits.append(self.model.head(self.decode(newest, self.cache)))
        free = min(len(self.waiting), self.size - len(self.running))
        if entering := [self.waiting.popleft() for _ in range(free)]:
            logits.append(self._enter(entering))
        if not self.running:
            return []
        logits = torch.cat(logits) if len(logits) > 1 else logits[0]
        chosen = list(zip(self.running, self._choose(logits.float()), strict=True))
        for place in reversed(range(len(chosen))):
            request, token = chosen[place]
            request.text.append(token.id)
            if token.id in self.stop_ids:
                request.finish = "stop"
            elif request.n_new >= request.sampling.max_new_tokens:
                request.finish = "length"
            if request.finish:
                self._drop(place)
        return chosen

    def _enter(self, entering: list[Request]) -> Tensor:
        """Reads prompts, equal ones once, into new rows -> logits (rows, n_vocab)."""
        place = {}
        rows = [place.setdefault(tuple(r.prompt), len(place)) for r in entering]
        logits, cache = self._prefill([list(prompt) for prompt in place])
        self.cache.append(cache, rows)
        self.running += entering
        return logits[rows]

    def _prefill(self, prompts: list[list[int]]) -> tuple[Tensor, KVCache]:
        """Reads prompts of any lengths in one batch -> logits of the next token, cache."""
        lengths = [len(prompt) for prompt in prompts]
        idx = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in enumerate(prompts):  # right padding: no token before it sees it
            idx[row, : len(prompt)] = torch.tensor(prompt)
        cache = self.model.new_cache(len(prompts), idx.shape[1])
        hidden = self.model(idx.to(self.device), cache, lengths)
        last = hidden[torch.arange(len(prompts)), torch.tensor(lengths) - 1]
        return self.model.head(last), cache

    def _make_room(self) -> None:
        """Rows that fill block_size keep their last half, without the newest token, which the next
        step reads."""
        full = [row for row, length in enumerate(self.cache.lengths) if length == self.block_size]
        if full:
            kept = [self.running[row].text[-max(2, self.block_size // 2) : -1] for row in full]
            self.cache.copy_rows(self._prefill(kept)[1], list(range(len(full))), full)

    def _drop(self, row: int) -> None:
        self.cache.drop_row(row)
        self.running[row] = self.running[-1]
        self.running.pop()

    def _choose(self, logits: Tensor) -> list[Token]:
        kept = hold_ends(logits, self.running, self.stop_ids)
        ids = choose(penalize(kept, self.running, self.stop_ids), self.running)
        counts = [request.alternatives for request in self.running]
        if all(count is None for count in counts):
            return [Token(id) for id in ids]
        log_probs = torch.log_softmax(logits, dim=-1)
        own = log_probs.gather(1, torch.tensor(ids, device=logits.device)[:, None]).squeeze(1)
        best = log_probs.topk(min(max(count or 0 for count in counts), logits.shape[-1]))
        others, probs = best.indices.tolist(), best.values.exp().tolist()
        tokens = []
        for row, (id, count, log_prob) in enumerate(zip(ids, counts, own.tolist(), strict=True)):
            pairs = tuple(zip(others[row], probs[row], strict=True))[:count]
            tokens.append(Token(id) if count is None else Token(id, log_prob, pairs))
        return tokens


def hold_ends(logits: Tensor, requests: list[Request], stop_ids: tuple[int, ...]) -> Tensor:
    """(B, n_vocab) logits, without the stop ids in rows where these have less than end_p together.
    The end can be the likeliest id though going on is likelier, in other words each time: at 0.5
    greedy decoding goes on there."""
    least = [request.sampling.end_p for request in requests]
    if not any(least):
        return logits
    stops = torch.tensor(stop_ids, dtype=torch.int64, device=logits.device)
    ends = torch.softmax(logits, dim=-1)[:, stops].sum(dim=-1)
    held = ends < torch.tensor(least, device=logits.device)
    return logits.index_fill(1, stops, -torch.inf).where(held[:, None], logits)


def penalize(logits: Tensor, requests: list[Request], stop_ids: tuple[int, ...] = ()) -> Tensor:
    """(B, n_vocab) logits after each row's penalties and no_repeat_ngram. frequency_penalty and
    presence_penalty are OpenAI's: subtracted from an id's logit for each time that the new ids have
    it, and once ("Frequency and presence penalties" in the guide to its API). Stop ids are exempt:
    a conversation holds them already, and must be able to end."""
    changed = logits
    for row, request in enumerate(requests):
        penalty, n = request.sampling.repetition_penalty, request.sampling.no_repeat_ngram
        each, once = request.sampling.frequency_penalty, request.sampling.presence_penalty
        if (penalty != 1 or n or each or once) and changed is logits:
            changed = logits.clone()
        if penalty != 1:
            seen = sorted({*request.text}.difference(stop_ids))
            seen = torch.tensor(seen, dtype=torch.int64, device=logits.device)
            old = logits[row, seen]
            changed[row, seen] = torch.where(old > 0, old / penalty, old * penalty)
        if (each or once) and request.n_new:
            new = torch.tensor(request.text[len(request.prompt) :])
            ids, counts = new.unique(return_counts=True)
            changed[row, ids] -= (counts * each + once).to(logits.device)
        banned = {*completions(request.text, n)}.difference(stop_ids) if n else ()
        if 0 < len(banned) < logits.shape[-1]:  # one id must be left
            changed[row, torch.tensor(sorted(banned), device=logits.device)] = -torch.inf
    return changed


def completions(text: list[int], n: int) -> list[int]:
    """The ids that would complete an n-gram which the text already has."""
    start = text[len(text) - n + 1 :]
    return [text[i + n - 1] for i in range(len(text) - n + 1) if text[i : i + n - 1] == start]


def choose(logits: Tensor, requests: list[Request]) -> list[int]:
    """(B, n_vocab) logits -> an id a row: the likeliest, or a sample by one uniform number of the
    row's own stream, from the probabilities that top_k, top_p and min_p leave."""
    ways = [(bool(r.sampling.temperature), r.sampling.is_cut) for r in requests]
    ids = logits.argmax(dim=-1).tolist() if not all(way[0] for way in ways) else [0] * len(ways)
    for way in {(True, False), (True, True)}.intersection(ways):
        rows = [row for row, own in enumerate(ways) if own == way]
        some = logits if len(rows) == len(ways) else logits[rows]
        for row, id in zip(rows, draw(some, [requests[row] for row in rows]), strict=True):
            ids[row] = id
    return ids


def draw(logits: Tensor, requests: list[Request]) -> list[int]:
    """Samples, as `choose`, for rows that are all cut by top_k, top_p or min_p, or all not: to sort
    a vocabulary takes longer than all else."""

    def column(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    samplings, n_vocab, order = [r.sampling for r in requests], logits.shape[-1], None
    if samplings[0].is_cut:
        most = [min(s.top_k or n_vocab, n_vocab) for s in samplings]
        logits, order = logits.topk(max(most), dim=-1)  # likeliest first
        beyond = torch.arange(max(most), device=logits.device) >= column(*most)
        logits = logits.masked_fill(beyond, -torch.inf)
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    probs = torch.softmax(shifted / column(*(s.temperature for s in samplings)), dim=-1)
    if order is not None:
        before, least = probs.cumsum(dim=-1) - probs, column(*(s.min_p for s in samplings))
        out = (before >= column(*(s.top_p for s in samplings))) | (probs < least * probs[:, :1])
        probs = probs.masked_fill(out, 0.0)
    cumulative = probs.cumsum(dim=-1)
    u = column(*(request.random.random() for request in requests))
    place = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    # u can round up to the whole sum: then take the last token that is left
    place = torch.minimum(place, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))
    # a sum on a GPU may fall by a rounding error, and meet an id that has no probability
    place = torch.where(probs.gather(1, place) > 0, place, probs.max(dim=-1, keepdim=True).indices)
    return (place if order is None else order.gather(1, place)).squeeze(1).tolist()
