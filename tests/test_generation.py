"""Generated ids against a slow reference without a cache."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

from configurator import UserError
from miniglm import compiling, decoding
from miniglm.decoding import Decoder, PackedLinear, compile_one_row, may_compile, pack, quantize
from miniglm.generation import Batch, Request, Sampling, choose, hold_ends, penalize
from model import ACTIVATIONS, MLP, MLPS, NORMS, Attention, Block, RMSNorm, SwiGLU
from tests.helpers import ALL_MODELS, ARCHITECTURES, NEEDS_COMPILER, logits, random_ids, tiny_model
from tests.runs import run

BLOCK = 24  # tokens, the tiny model's block_size
GREEDY = Sampling(max_new_tokens=40, temperature=0.0)
WAYS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "cold_top_k": {"temperature": 0.7, "top_k": 5},
    "hot_top_p": {"temperature": 1.5, "top_p": 0.8},
    "penalty": {"temperature": 0.0, "repetition_penalty": 1.7},
    "min_p": {"temperature": 1.3, "min_p": 0.3},
    "no_repeat_ngram": {"temperature": 0.0, "no_repeat_ngram": 2},
    "all": {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "min_p": 0.05}
    | {"repetition_penalty": 1.3, "no_repeat_ngram": 3},
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def slow_probs(
    logits: np.ndarray, sampling: Sampling, text: list[int], stop_ids: tuple[int, ...] = ()
) -> dict[int, float]:
    """Each id that may come, likeliest first, with its probability; loops and float64 only."""
    logits = {id: float(logit) for id, logit in enumerate(logits)}
    for id in set(text) - set(stop_ids) if sampling.repetition_penalty != 1 else ():
        penalty = sampling.repetition_penalty
        logits[id] = logits[id] / penalty if logits[id] > 0 else logits[id] * penalty
    if n := sampling.no_repeat_ngram:
        grams = [text[i : i + n] for i in range(len(text) - n + 1)]
        for id in logits.keys() - set(stop_ids):
            if [*text[len(text) - n + 1 :], id] in grams:
                logits[id] = -math.inf
    order = sorted(logits, key=lambda id: -logits[id])
    if not sampling.temperature:
        return {order[0]: 1.0}
    order = order[: sampling.top_k]
    top = logits[order[0]]
    weights = [math.exp((logits[id] - top) / sampling.temperature) for id in order]
    probs, before = {}, 0.0
    for id, weight in zip(order, weights, strict=True):
        if before < sampling.top_p:
            probs[id] = weight / sum(weights)
        before += weight / sum(weights)
    most = max(probs.values())
    probs = {id: prob for id, prob in probs.items() if prob >= sampling.min_p * most}
    if sampling.top_k is None and sampling.top_p == 1 and not sampling.min_p:
        probs = dict(sorted(probs.items()))  # nothing is cut, so nothing is sorted by probability
    return {id: prob / sum(probs.values()) for id, prob in probs.items()}


def next_logits(model: torch.nn.Module, text: list[int]) -> np.ndarray:
    return logits(model, torch.tensor([text]))[0, -1].numpy()


def slow_generate(
    model: torch.nn.Module,
    prompt: list[int],
    sampling: Sampling,
    stop_ids: tuple[int, ...] = (),
    place: tuple[int, int] = (0, 0),
) -> list[int]:
    """One sample, the whole text read anew for each token; place is its prompt and sample."""
    stream = np.random.default_rng([sampling.seed, *place])
    block_size = model.config.block_size
    text, window = list(prompt), list(prompt)
    for _ in range(sampling.max_new_tokens):
        probs = slow_probs(next_logits(model, window), sampling, text, stop_ids)
        if sampling.temperature:
            u = stream.random()
            sums = itertools.accumulate(probs.values())
            id = next((i for i, total in zip(probs, sums, strict=True) if u < total), [*probs][-1])
        else:
            [id] = probs
        text.append(id)
        window.append(id)
        if id in stop_ids:
            break
        if len(window) > block_size:
            window = text[-max(2, block_size // 2) :]
    return text[len(prompt) :]


def run_batch(model, requests: list[Request], size: int = 100, stop_ids=()) -> list[list[int]]:
    """The new ids of each request, a stop id included."""
    batch = Batch(model, stop_ids, size)
    for request in requests:
        batch.add(request)
    most = 0
    while batch:
        most = max(most, len(batch.step()))
    assert most == min(size, len(requests))
    return [request.text[len(request.prompt) :] for request in requests]


def generate(model, prompts, sampling, stop_ids=(), num_samples=1) -> list[list[int]]:
    samples = range(num_samples)
    requests = [Request(p, sampling, i, n) for i, p in enumerate(prompts) for n in samples]
    return run_batch(model, requests, stop_ids=stop_ids)


def prompts_of(*lengths: int) -> list[list[int]]:
    return [random_ids(length, seed=length).tolist() for length in lengths]


PROMPTS = prompts_of(5, 1, BLOCK, 14, BLOCK - 1)


# --- the same ids ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["greedy", "all"])
@pytest.mark.parametrize("options", ALL_MODELS.values(), ids=ALL_MODELS)
def test_cached_ids_equal_uncached(options, way):
    model = tiny_model(**options).double()
    sampling = Sampling(max_new_tokens=40, **WAYS[way])
    slow = [slow_generate(model, p, sampling, (), (i, 0)) for i, p in enumerate(PROMPTS)]
    assert len(set(itertools.chain(*slow))) > 10
    assert generate(model, PROMPTS, sampling) == slow


@pytest.mark.parametrize("kind", ["gpt", "lstm"])
@pytest.mark.parametrize("block_size", [2, 3, 7])
def test_a_small_context_goes_on_as_the_slow_one_does(block_size, kind):
    model = tiny_model(block_size=block_size, model=kind).double()
    prompts = prompts_of(1, 2, block_size)
    slow = [slow_generate(model, prompt, GREEDY) for prompt in prompts]
    assert generate(model, prompts, GREEDY) == slow


@each_way
@pytest.mark.parametrize("options", [{"n_kv_head": 2}, {"model": "lstm"}], ids=["gpt", "lstm"])
def test_several_samples_equal_those_made_one_by_one(options, way):
    model = tiny_model(**options).double()
    sampling = Sampling(max_new_tokens=30, **way)
    prompts = prompts_of(6, 20, 2)
    slow = [
        slow_generate(model, prompt, sampling, (), (row, number))
        for row, prompt in enumerate(prompts)
        for number in range(3)
    ]
    assert generate(model, prompts, sampling, (), 3) == slow
    if sampling.temperature:
        assert len(set(map(tuple, slow))) == 9
    # the other samples are not there, the samples are the same
    assert generate(model, prompts, sampling, (), 1) == slow[::3]


@each_way
@pytest.mark.parametrize("kind", ["gpt", "lstm"])
def test_a_stop_id_ends_its_row_and_the_others_go_on(kind, way):
    model = tiny_model(model=kind).double()
    sampling = Sampling(max_new_tokens=40, **way)
    endless = generate(model, PROMPTS, sampling, (), 2)
    stop_ids = (endless[2][10], endless[7][3])
    slow = [
        slow_generate(model, PROMPTS[row // 2], sampling, stop_ids, (row // 2, row % 2))
        for row in range(10)
    ]
    assert min(map(len, slow)) < 12
    assert len(set(map(len, slow))) > 1
    assert generate(model, PROMPTS, sampling, stop_ids, 2) == slow
    for ids in slow:
        assert not set(ids[:-1]) & set(stop_ids)


@pytest.mark.parametrize("length", [0, BLOCK + 1])
def test_a_prompt_of_no_or_too_many_tokens_is_refused(length):
    with pytest.raises(UserError, match=f"{length} tokens.*1 to {BLOCK}"):
        generate(tiny_model(), [[1], [2] * length], GREEDY)


def test_an_impossible_setting_is_named():
    impossible = {"max_new_tokens": [0], "top_k": [0], "seed": [-1], "stop": [["x", ""]]}
    impossible |= {"temperature": [-0.1, 1e-50, math.inf, math.nan], "top_p": [0.0, 1e-50, 1.1]}
    impossible |= {"frequency_penalty": [-2.1, math.nan], "presence_penalty": [2.1, math.nan]}
    impossible |= {"min_p": [-0.1, 1.1], "repetition_penalty": [0.0, 1e-300, math.nan]}
    impossible |= {"end_p": [-0.1, 1.1, math.nan]}
    for name, values in (impossible | {"no_repeat_ngram": [-1]}).items():
        for value in values:
            with pytest.raises(UserError, match=f"^{name}"):
                Sampling(**{name: value})


# --- the choice of one id ----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_the_narrowest_choice_is_greedy(options):
    model = tiny_model().double()
    sampling = Sampling(**{"max_new_tokens": 40, "temperature": 3.0} | options)
    assert generate(model, PROMPTS, sampling) == generate(model, PROMPTS, GREEDY)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 7},
        {"top_k": 100, "top_p": 0.999},
        {"top_k": 6, "top_p": 0.6, "repetition_penalty": 1.5},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.2},
    ],
)
def test_choices_follow_the_probabilities(options):
    sampling = Sampling(**{"temperature": 1.0} | options)
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 1.5
    text = [int(logits.argmax()), int(logits.argmin()), 4]
    slow = slow_probs(logits.numpy(), sampling, text)
    request, n = Request(text, sampling), 20_000  # numbers of one stream
    rows = penalize(logits[None], [request]).expand(n, -1)
    counts = np.bincount(choose(rows, [request] * n), minlength=40)
    assert {*counts.nonzero()[0]} <= slow.keys()
    for id, prob in slow.items():  # within five standard deviations
        assert abs(counts[id] - n * prob) < 5 * math.sqrt(n * prob * (1 - prob)) + 5


def edge(u: float, **options) -> Request:
    """A request whose random stream is one number."""
    request = Request([0], Sampling(**options))
    request.random = SimpleNamespace(random=lambda: u)
    return request


def test_the_edges_of_the_unit_interval_are_the_first_and_the_last_choice():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]]).expand(2, -1)
    for options, wanted in (({}, [0, 3]), ({"top_k": 2}, [1, 2]), ({"top_p": 0.8}, [1, 2])):
        edges = [0.0, 1 - 2**-53]  # the second is 1 in float32
        assert choose(logits, [edge(u, temperature=1.0, **options) for u in edges]) == wanted
    held = torch.tensor([[-torch.inf, 1.0, 3.0, -torch.inf, -1.0, -torch.inf]]).expand(2, -1)
    assert choose(held, [edge(u, temperature=1.0) for u in edges]) == [1, 4]
    halves = [choose(torch.zeros(1, 2), [edge(u, temperature=1.0)]) for u in (0, 0.5)]
    assert halves[0] != halves[1]


def test_penalties_equal_hugging_faces():
    from transformers.generation.logits_process import (
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
    )

    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    texts = random_ids(6, 30, n_vocab=9)
    for n in (1, 2, 3, 40):
        requests = [Request(t, Sampling(no_repeat_ngram=n)) for t in texts.tolist()]
        wanted = NoRepeatNGramLogitsProcessor(n)(texts, logits.clone())
        wanted[wanted.isinf().all(dim=1)] = logits[wanted.isinf().all(dim=1)]
        assert torch.equal(penalize(logits, requests), wanted)
    requests = [Request(t, Sampling(repetition_penalty=1.3)) for t in texts[:, :4].tolist()]
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(texts[:, :4], logits.clone())
    assert torch.equal(penalize(logits, requests), wanted)


def test_counts_are_subtracted_as_openai_defines_it():
    samplings = [{"frequency_penalty": 0.5, "presence_penalty": -1.0}, {}, {"presence_penalty": 2}]
    requests = [Request([3, 4], Sampling(**options)) for options in samplings]
    for request in requests:
        request.text += [1, 1, 1, 4]  # after the prompt, whose ids do not count
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    minus = [[0, 3 * 0.5 - 1, 0, 0, 0.5 - 1, 0], [0] * 6, [0, 2, 0, 0, 2, 0]]
    changed = penalize(logits, requests)
    torch.testing.assert_close(changed, logits - torch.tensor(minus))
    assert torch.equal(changed[1], logits[1])
    assert penalize(logits, requests[1:2] * 3) is logits  # nothing is spent on what is off


# --- many requests -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt", "lstm"])
@pytest.mark.parametrize("size", [1, 3, 20])
def test_mixed_requests_have_the_ids_that_each_has_alone(kind, size):
    model = tiny_model(model=kind).double()
    prompts = prompts_of(5, 1, BLOCK, 14, BLOCK - 1, 5, 9)
    ways = [*WAYS.values()][: len(prompts)]
    samplings = [Sampling(7 + 5 * i, **way) for i, way in enumerate(ways)]
    pairs = zip(prompts, samplings, strict=True)
    requests = [Request(prompt, sampling, i, 2) for i, (prompt, sampling) in enumerate(pairs)]
    slow = [slow_generate(model, r.prompt, r.sampling, (), (i, 2)) for i, r in enumerate(requests)]
    assert run_batch(model, requests, size) == slow
    assert {request.finish for request in requests} == {"length"}


def test_a_row_that_ends_leaves_its_place_at_once():
    model = tiny_model().double()
    batch = Batch(model, size=2)
    lengths = [1, 6, 2, 3]
    requests = [Request([3 + n], Sampling(n, temperature=0.0)) for n in lengths]
    for request in requests:
        batch.add(request)
    running = []
    while batch:
        running.append([requests.index(request) for request, _ in batch.step()])
    # of two places the first is free after one token, then after two more, then after three
    assert [sorted(rows) for rows in running] == [[0, 1], *[[1, 2]] * 2, *[[1, 3]] * 3]


@pytest.mark.parametrize("kind", ["gpt", "lstm"])
@pytest.mark.parametrize("block_size", [100, 65])
def test_cancelled_requests_end_and_the_others_do_not_notice(kind, block_size):
    model = tiny_model(model=kind, block_size=block_size).double()
    sampling = Sampling(150, temperature=1.0)
    requests = [Request([3 + n], sampling, n) for n in range(5)]
    batch = Batch(model, size=4)
    for request in requests:
        batch.add(request)
    batch.cancel(requests[4])  # which waits
    for step in range(150):
        batch.step()
        if step in (1, 70, 120):  # before and after the cache has grown, and a text been cut
            batch.cancel(requests[(1, 70, 120).index(step)])
    batch.cancel(requests[3])  # which has ended
    assert [r.finish for r in requests] == [*["cancelled"] * 3, "length", "cancelled"]
    assert [r.n_new for r in requests] == [2, 71, 121, 150, 0]
    assert requests[3].ids == slow_generate(model, [6], sampling, (), (3, 0))


def test_penalties_spare_what_ends_a_text():
    logits = torch.ones(1, 6)
    text = [1, 2, 5, 1, 2]
    for options in ({"no_repeat_ngram": 2}, {"no_repeat_ngram": 1}, {"repetition_penalty": 2.0}):
        request = Request(text, Sampling(**options))
        assert penalize(logits, [request], stop_ids=(5,))[0, 5] == 1
        assert penalize(logits, [request])[0, 5] < 1


def test_a_text_ends_only_where_its_end_has_end_p():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.6, 0.1, 0.2, 0.1]]).log()
    held = [Request([3], Sampling(temperature=0.0, end_p=0.5)) for _ in range(2)]
    off = [Request([3], Sampling(temperature=0.0)) for _ in range(2)]

    def ids(requests, *stop_ids):
        return choose(hold_ends(logits, requests, stop_ids), requests)

    assert ids(held, 0) == [1, 0] and ids([off[0], held[1]], 0) == [0, 0]
    assert ids(held, 0, 1) == [0, 0] and ids(held, 0, 3) == [0, 0]  # several ends have it together
    assert ids(held) == [0, 0]
    assert hold_ends(logits, off, (0,)) is logits  # nothing is spent on what is off


def test_a_batch_holds_ends():
    model = tiny_model()
    end = int(next_logits(model, [5, 6]).argmax())
    for end_p, finish, n_new in ((0.0, "stop", 1), (1.0, "length", 7)):
        batch = Batch(model, (end,))
        batch.add(request := Request([5, 6], Sampling(7, temperature=0.0, end_p=end_p)))
        while batch:
            batch.step()
        assert (request.finish, request.n_new) == (finish, n_new)


@pytest.mark.parametrize("options", [{"temperature": 1e4}, {"top_p": 1e-6}, {"min_p": 1.0}])
@pytest.mark.parametrize("penalty", [1e-6, 1e4])
def test_extreme_settings_still_choose(options, penalty):
    sampling = Sampling(**{"temperature": 1e-6, "repetition_penalty": penalty} | options)
    logits = 30 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    requests = [Request([3, 5], sampling, n) for n in range(50)]
    ids = choose(penalize(logits, requests), requests)
    assert all(0 <= id < 40 for id in ids)


def test_probabilities_are_the_models_own_whatever_the_sampling():
    model = tiny_model().double()
    sampling = Sampling(20, temperature=2.0, top_k=3, repetition_penalty=2.0)
    with_probs, without = Request([5, 6], sampling, alternatives=4), Request([5, 6], sampling)
    batch = Batch(model)
    for request in (with_probs, without):
        batch.add(request)
    while batch:
        tokens = dict(batch.step())
        assert tokens[without].prob is None and tokens[without].alternatives == ()
        probs = torch.tensor(next_logits(model, with_probs.text[:-1])).softmax(dim=0)
        token, best = tokens[with_probs], probs.topk(4)
        assert token.prob == pytest.approx(probs[token.id].item(), rel=1e-5)
        ids, likelihoods = zip(*token.alternatives, strict=True)
        assert ids == tuple(best.indices.tolist())
        assert likelihoods == pytest.approx(best.values.tolist(), rel=1e-5)


# --- one token a row, laid out for speed -------------------------------------------------------


@pytest.mark.parametrize("static", [False, True], ids=["as_needed", "static"])
@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
@torch.no_grad()
def test_the_decoder_computes_what_the_model_does(options, static):
    model = tiny_model(**options).double()
    idx = random_ids(4, BLOCK)
    for lengths in ([6, 6, 6], [9, 1, 14]):
        caches = [model.new_cache(4), model.new_cache(4)]
        for cache in caches:
            cache.keep_rows(3)
            model(idx[:3, : max(lengths)], cache, lengths)
        decode = Decoder(model, static)
        for step in range(4):
            rows = torch.tensor([idx[row, n + step] for row, n in enumerate(lengths)])
            hidden = decode(rows, caches[0])
            wanted = model(rows[:, None], caches[1])[:, -1]
            assert (hidden - wanted).abs().max() < 1e-12
            assert caches[0].lengths == caches[1].lengths
    full = model.new_cache(1)
    full.lengths = [BLOCK]
    with pytest.raises(ValueError, match="exceed"):
        Decoder(model, static)(torch.tensor([1]), full)


class TanhNorm(nn.RMSNorm):
    """A student's norm: a subclass of a known one that computes something else."""

    def forward(self, x):
        assert x.dim() > 2  # (B, T, C), as in training
        return super().forward(x).tanh()


class SineGLU(SwiGLU):
    def forward(self, x):
        assert x.dim() > 2
        return super().forward(x).sin()


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledAttention(Attention):
    def forward(self, *args):
        return 2 * super().forward(*args)


class ParallelBlock(Block):
    def forward(self, x, *args):
        h = self.norm_1(x)
        return x + self.attn(h, *args) + self.mlp(h)


@pytest.mark.parametrize(
    ("options", "swapped"),
    [
        ({"norm": "tanh"}, {}),
        ({"mlp": "sine"}, {}),
        ({"mlp": "sine_glu"}, {}),
        ({}, {RMSNorm: TanhNorm}),  # of queries and keys, too
        ({}, {Attention: DoubledAttention}),
        ({}, {Block: ParallelBlock}),
        ({}, {nn.Linear: DoubledLinear}),  # and is not packed
    ],
)
def test_parts_of_a_students_own_decode_as_they_are_trained(monkeypatch, options, swapped):
    monkeypatch.setitem(NORMS, "tanh", lambda c: TanhNorm(c.n_embd, c.norm_eps))
    monkeypatch.setitem(ACTIVATIONS, "sine", torch.sin)
    monkeypatch.setitem(MLPS, "sine", MLP)
    monkeypatch.setitem(MLPS, "sine_glu", SineGLU)
    model = tiny_model(**options)
    for module in model.modules():
        module.__class__ = swapped.get(type(module), type(module))
    slow = [slow_generate(model, prompt, GREEDY) for prompt in PROMPTS]
    assert slow != [slow_generate(tiny_model(), prompt, GREEDY) for prompt in PROMPTS]
    assert generate(pack(model), PROMPTS, GREEDY) == slow


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@torch.inference_mode()
def test_a_static_step_is_one_graph(name):
    model = tiny_model(**ARCHITECTURES[name]).double()
    decode = Decoder(model, static=True)
    decode.run = torch.compile(decode._run, backend="eager", fullgraph=True)
    caches, idx = [model.new_cache(2), model.new_cache(2)], random_ids(2, 6)
    for step in range(6):
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            hidden = decode(idx[:, step], caches[0])
        assert (hidden - model(idx[:, step, None], caches[1])[:, -1]).abs().max() < 1e-12


@pytest.mark.parametrize("options", ALL_MODELS.values(), ids=ALL_MODELS)
@torch.no_grad()
def test_a_packed_model_computes_the_same(options):
    idx = random_ids(3, BLOCK)
    wanted = tiny_model(**options)
    packed = pack(tiny_model(**options))
    if torch.backends.mkldnn.is_available():
        assert isinstance(packed.lm_head, PackedLinear)
    logits = packed.head(packed(idx))
    assert logits.shape == (3, BLOCK, 50)
    assert (logits - wanted.head(wanted(idx))).abs().max() < 2e-4
    rows = generate(packed, PROMPTS, Sampling(9, temperature=0.0))
    assert rows[1][:2] == generate(wanted, PROMPTS, Sampling(9, temperature=0.0))[1][:2]


@torch.no_grad()
def test_eight_bits_keep_products_to_a_few_percent():
    wanted, rounded = tiny_model(n_embd=64, bias=True), quantize(tiny_model(n_embd=64, bias=True))
    x = torch.randn(5, 1, 64, generator=torch.Generator().manual_seed(0))
    exact, ours = (model.blocks[0].mlp.c_fc(x) for model in (wanted, rounded))
    assert 1e-4 < (ours - exact).norm() / exact.norm() < 0.04
    assert len(generate(rounded, PROMPTS, GREEDY)[0]) == 40


# --- a compiled step of a single row ------------------------------------------------------------


def lone_and_together(model: torch.nn.Module, decode) -> list[list[int]]:
    """Ids while rows come and go: one alone past block_size, several, and again one."""
    batch, requests = Batch(model, size=3), []
    batch.decode = decode or batch.decode
    for prompt, n in ((PROMPTS[0], 60), (PROMPTS[1], 3), (PROMPTS[2], 50)):
        requests.append(Request(prompt, Sampling(n, temperature=0.0)))
    batch.add(requests[0])
    while batch:
        if requests[0].n_new == 9:
            batch.add(requests[1])
            batch.add(requests[2])
        batch.step()
    return [request.ids for request in requests]


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "qwen2", "one_kv_head"])
def test_a_compiled_row_has_the_ids_of_an_eager_one_in_one_graph(monkeypatch, name):
    graphs = []
    monkeypatch.setattr(decoding, "may_compile", lambda device: True)
    monkeypatch.setattr(compiling, "backend", lambda graph, _: graphs.append(graph) or graph)
    torch.compiler.reset()
    model = pack(tiny_model(**ARCHITECTURES[name] | {"block_size": 200}))
    decode = Decoder(model)
    compile_one_row(decode, size=3)
    assert len(graphs) == 1
    with torch.compiler.set_stance("fail_on_recompile"):  # the cache grows from 64 to 128
        assert lone_and_together(model, decode) == lone_and_together(model, None)


@NEEDS_COMPILER
def test_a_row_of_real_compiled_code_has_the_ids_of_an_eager_one(capfd):
    torch.compiler.reset()
    model = pack(tiny_model(**ARCHITECTURES["qwen3"]))
    decode = Decoder(model)
    compile_one_row(decode, size=3)
    assert decode.run_one_row and not capfd.readouterr().err
    assert lone_and_together(model, decode) == lone_and_together(model, None)


def test_without_a_compiler_a_row_stays_eager_and_it_is_said_once(monkeypatch, capfd):
    for cached in (compiling.what_lacks, may_compile):
        cached.cache_clear()
    monkeypatch.setenv("PATH", "")
    model, decodes = tiny_model(), []
    for _ in range(2):
        decodes.append(Decoder(model))
        compile_one_row(decodes[-1], size=3)
    for cached in (compiling.what_lacks, may_compile):
        cached.cache_clear()
    err = capfd.readouterr().err
    assert err.startswith("note: no C++ compiler is found") and err.count("\n") == 1
    assert not decodes[1].run_one_row
    assert lone_and_together(model, decodes[1]) == lone_and_together(model, None)


@NEEDS_COMPILER
def test_without_a_place_for_compiled_code_a_row_stays_eager_and_it_is_said(tmp_path):
    (tmp_path / "file").touch()
    code = "from tests.test_generation import *; d = Decoder(tiny_model()); compile_one_row(d, 1)"
    place = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")}
    done = run("-c", code + "; print(d.run_one_row)", environment=place)
    assert done.stdout == "None\n", done.stderr
    assert done.stderr.startswith("note: compiling failed (") and done.stderr.count("\n") == 1


def test_weights_of_eight_bits_stay_eager(capfd):
    quantized = Decoder(quantize(tiny_model()))
    compile_one_row(quantized, size=1)
    assert not quantized.run_one_row and not capfd.readouterr().err
