"""The speed of greedy generation, beside Hugging Face's and llama.cpp's on the same weights.

    python -m bench generate --rounds=3                            random weights
    python -m bench generate --out_dir=out-sanguo-sft --rounds=3   a trained model
    python -m bench generate --out_dir=out-sanguo-sft --llama_cpp=llama-venv/bin/python

Ids are compared first, up to the first near tie. One prompt: ours in float32, compiled as a server
does (TORCHINDUCTOR_CACHE_DIR= on an empty folder shows what compiling costs), and with 8-bit
weights, Hugging Face's, and the rate at which memory is read (a token reads all weights, and the
cache at its mean length); then many prompts at once. Of a trained model also the time from the
command to the first character. bench/llama.py says how to build llama.cpp's environment.
"""

import contextlib
import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch

from bench import timing
from bench.llama import LlamaCpp
from bench.timing import measure, report, speed_ratio
from configurator import ROOT, UserError, at_least, repo_path
from miniglm.checkpoint import Checkpoint, load_checkpoint
from miniglm.decoding import compile_one_row, decoder, pack, quantize
from miniglm.generation import Batch, Request, Sampling
from miniglm.interop.gguf import write_gguf
from miniglm.interop.hugging_face import shape_of, to_hugging_face
from miniglm.text import load_for_sampling, stream
from model import GPT, ModelConfig

MEMORY = 2**29  # bytes whose reading is timed
RATIOS = [("ours", "Hugging Face"), ("ours, compiled", "Hugging Face"), ("ours, int8", "ours")]
RATIOS += [("sample.py", "llama.cpp"), ("ours, compiled", "llama.cpp")]
EXACT = ("ours", "ours, compiled", "Hugging Face", "llama.cpp")  # their ids are compared
TIE = 1e-4  # two best logits nearer than this may change places between implementations
START = "却说"

Way = Callable[[], list[list[int]]]  # generates ids, a list a prompt


@dataclass
class Settings(timing.Settings):
    n_kv_head: Annotated[int | None, at_least(1)] = None  # key and value heads; None is n_head
    vocab_size: Annotated[int, at_least(2)] = 4096  # ids
    prompt_tokens: Annotated[int, at_least(1)] = 16  # length of a prompt
    new_tokens: Annotated[int, at_least(1)] = 512  # after one prompt; after each of many, a quarter
    prompts: Annotated[int, at_least(1)] = 32  # how many are many
    out_dir: str = ""  # a trained model, in place of random weights of the shape above
    llama_cpp: str = ""  # python of an environment with llama-cpp-python; needs out_dir

    def __post_init__(self):
        super().__post_init__()
        if self.llama_cpp and (not self.out_dir or self.clock == "cpu"):
            raise UserError("--llama_cpp= goes with --out_dir= and --clock=wall")


def bench(config: Settings) -> dict:
    """Speeds and ratios of one prompt and of many, and seconds to the first character."""
    results, checkpoint = {}, None
    if config.out_dir:
        checkpoint = load_checkpoint(repo_path(config.out_dir), device=config.device)
        results["first character"] = first_character(config, checkpoint.answers)
    model = checkpoint.model if checkpoint else random_model(config).to(config.device).eval()
    c = model.config
    n = min(config.new_tokens, c.block_size - config.prompt_tokens)
    if n < 1:
        raise UserError(f"prompt_tokens={config.prompt_tokens} must be below {c.block_size}")
    print(
        f"generate: {config.out_dir or 'random weights'}, {c.n_layer} layers x {c.n_embd}, "
        f"vocabulary {c.n_vocab:,}, prompts of {config.prompt_tokens} tokens, {config.rounds} turns"
    )
    models = {"ours": pack(copy.deepcopy(model))}
    if config.device == "cpu":
        models["ours, int8"] = quantize(copy.deepcopy(model))
    peer = with_our_weights(model)

    def contenders(prompts: list[list[int]], n: int) -> dict[str, Way]:
        ways = {name: partial(ours, packed, prompts, n) for name, packed in models.items()}
        return ways | {"Hugging Face": hugging_face(peer, prompts, n)}

    prompt, *many = torch.randint(c.n_vocab, (1 + config.prompts, config.prompt_tokens)).tolist()
    with beside_llama_cpp(config, checkpoint, prompt, n) as more:
        ways = contenders([prompt], n) | compiled(models["ours"], [prompt], n) | more
        results["one"] = race(config, model, [prompt], n, ways)
    n = max(1, n // 4)
    results["many"] = race(config, model, many, n, contenders(many, n))
    return results


def race(
    config: Settings, model: GPT, prompts: list[list[int]], n: int, ways: dict[str, Way]
) -> dict:
    """Tokens per second of each way to generate n tokens after each prompt, and ratios."""
    compare(model, prompts, {name: ways[name] for name in ways if name in EXACT})
    memory = torch.ones(MEMORY // 4, device=config.device)
    calls = ways | {"memory read": memory.sum}
    seconds = measure(calls, config)
    ratios = {f"{a} / {b}": speed_ratio(seconds, a, b) for a, b in RATIOS if {a, b} <= {*ways}}
    c = model.config
    weights = 4 * (sum(p.numel() for p in model.blocks.parameters()) + model.lm_head.weight.numel())
    cache = 4 * 2 * c.n_layer * c.n_kv_head * c.head_dim * (config.prompt_tokens + n / 2)
    work = n * (weights + len(prompts) * cache) / MEMORY
    label = "ours: of the rate at which memory is read"
    ratios[label] = speed_ratio(seconds, "ours", "memory read", work)
    rate = MEMORY / median(seconds["memory read"]) / 1e9
    print(
        f" {len(prompts)} prompt(s), {n} tokens each; a step reads {weights / 1e6:.1f} MB of "
        f"weights, and memory is read at {rate:.1f} GB/s"
    )
    return report(seconds, list(ways), n * len(prompts), ratios)


# --- contenders ----------------------------------------------------------------------------------


def random_model(config: Settings) -> GPT:
    """Our default architecture, with random weights that do not repeat one token forever."""
    torch.manual_seed(config.seed)
    names = ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size")
    shape = {name: getattr(config, name) for name in names}
    block_size = max(1024, config.prompt_tokens + config.new_tokens)  # nothing is cut
    model = GPT(ModelConfig(**shape, n_vocab=config.vocab_size, block_size=block_size, init="gpt2"))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.mul_(5)
    return model


def hugging_face_model(config: ModelConfig) -> torch.nn.Module:
    """A new GPT-2, Llama or Qwen3 of the settings' shape, without dropout."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "transformers is not installed; run pip install -r requirements-dev.txt"
        ) from None
    shape = shape_of(config) | {"bos_token_id": None, "eos_token_id": None}
    shape |= {name: 0.0 for name in ("resid_pdrop", "embd_pdrop") if name in shape}
    their_config = transformers.AutoConfig.for_model(**shape)
    model = transformers.AutoModelForCausalLM.from_config(their_config, attn_implementation="sdpa")
    model.loss_type = "ForCausalLM"  # GPT-2's default anyway, after a warning
    return model


def with_our_weights(model: GPT) -> torch.nn.Module:
    """Hugging Face's model with the weights of a model of ours, in eval mode."""
    peer = hugging_face_model(model.config)
    missing, unexpected = peer.load_state_dict(to_hugging_face(model)[1], strict=False)
    assert not unexpected and {*missing} <= {"lm_head.weight"}  # a tied one
    return peer.to(model.wte.weight.device).eval()


def ours(
    model: GPT, prompts: list[list[int]], n: int, decode: Callable | None = None
) -> list[list[int]]:
    batch = Batch(model, size=len(prompts))
    batch.decode = decode or batch.decode
    requests = [Request(prompt, Sampling(n, temperature=0.0)) for prompt in prompts]
    for request in requests:
        batch.add(request)
    while batch:
        batch.step()
    return [request.ids for request in requests]


def compiled(model: GPT, prompts: list[list[int]], n: int) -> dict[str, Way]:
    """The decoder of a server, when its code is ready; {} where nothing is compiled."""
    decode, began = decoder(model), time.perf_counter()
    compile_one_row(decode, len(prompts))
    if not getattr(decode, "run_one_row", None):
        return {}
    print(f"compiled in {time.perf_counter() - began:.1f} s")
    return {"ours, compiled": partial(ours, model, prompts, n, decode)}


def hugging_face(peer: torch.nn.Module, prompts: list[list[int]], n: int) -> Way:
    idx = torch.tensor(prompts, device=peer.device)
    options = {"do_sample": False, "min_new_tokens": n, "max_new_tokens": n}
    options["attention_mask"] = torch.ones_like(idx)
    return lambda: peer.generate(idx, **options)[:, idx.shape[1] :].tolist()


@contextlib.contextmanager
def beside_llama_cpp(
    config: Settings, checkpoint: Checkpoint | None, prompt: list[int], n: int
) -> Iterator[dict[str, Way]]:
    """sample.py's stream of text, and llama.cpp with as many threads; {} without --llama_cpp=."""
    if not config.llama_cpp:
        yield {}
        return
    packed = load_for_sampling(config.out_dir, config.device)
    packed.tokenizer.stop_ids = ()  # n tokens, whatever they are
    sampling, threads = Sampling(n, temperature=0.0), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(checkpoint.model, checkpoint.tokenizer, checkpoint.answers, file)
        with LlamaCpp(config.llama_cpp, file, len(prompt) + n, threads) as llama:
            yield {
                "sample.py": lambda: list(stream(packed, prompt, sampling)),
                "llama.cpp": lambda: [llama.ask("greedy", ids=prompt, n=n)],
            }


# --- ids -----------------------------------------------------------------------------------------


def compare(model: GPT, prompts: list[list[int]], ways: dict[str, Way]) -> None:
    """AssertionError if two ways give a row other ids before the first near tie."""
    first, *others = ways
    rows = ways[first]()
    for name in others:
        for prompt, wanted, ids in zip(prompts, rows, ways[name](), strict=True):
            compared = untied_length(model, prompt, wanted)
            assert ids[:compared] == wanted[:compared], f"{name} has other ids than {first}"


@torch.inference_mode()
def untied_length(model: GPT, prompt: list[int], ids: list[int]) -> int:
    """How many of the greedy ids come before the first whose two best logits are nearly equal."""
    idx = torch.tensor([prompt + ids], device=model.wte.weight.device)
    best = model.head(model(idx)[0, len(prompt) - 1 : -1]).topk(2).values
    ties = (best[:, 0] - best[:, 1] < TIE).nonzero()
    return int(ties[0]) if len(ties) else len(ids)


# --- first character -----------------------------------------------------------------------------


def first_character(config: Settings, answers: bool) -> float:
    """Median seconds from sample.py's command to its first character."""
    words = ["sample.py", f"--out_dir={config.out_dir}", f"--start={START}"]
    words += [f"--device={config.device}", "--max_new_tokens=8"]
    echoed, turns = 0 if answers else len(START), []  # a text is printed before it is continued
    for _ in range(config.rounds + 1):
        began = time.perf_counter()
        pipe = {"stdout": subprocess.PIPE, "encoding": "utf-8"}
        with subprocess.Popen([sys.executable, *words], cwd=ROOT, **pipe) as process:
            process.stdout.read(echoed + 1)
            turns.append(time.perf_counter() - began)
            process.communicate()
        if process.returncode:
            raise UserError("sample.py failed; its message is above")
    seconds = median(turns[1:])  # the first reads files from the disk
    print(f"first character after {seconds:.2f} s")
    return seconds
