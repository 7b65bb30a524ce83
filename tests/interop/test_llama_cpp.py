"""What llama.cpp makes of exported GGUF files: the ids of texts and of conversations, greedy ids.

It runs in an environment of its own, which bench/llama.py says how to build; LLAMA_CPP_PYTHON
names its python.
"""

import os
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench.generate import untied_length
from export import main
from miniglm.chat import SPECIAL_TOKENS
from miniglm.checkpoint import Checkpoint, load_checkpoint
from miniglm.generation import Sampling
from miniglm.interop.gguf import TYPES
from miniglm.text import chat_prompt, stream
from tests.helpers import TEXT, dialogue, random_ids, save_run, tiny_model
from tests.interop.llama import LlamaCpp
from tests.runs import novel, questions, read_json, toy_tokenizer, train_here, write_toys
from tests.test_chat import CONVERSATIONS
from tests.test_export import FAMILIES, SPOKEN, base_tokenizer, read_gguf
from tests.test_generation import slow_generate
from tests.test_tokenizer import NASTY, random_texts

PYTHON = os.environ.get("LLAMA_CPP_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="LLAMA_CPP_PYTHON names no python with llama-cpp-python"),
]
TEXTS = ["", " ", "  却说  曹操\n\n", "Liu Bei's 1234 men, don't  wait...", novel(7, 5), *NASTY]
TEXTS += [TEXT, "".join(SPECIAL_TOKENS), *SPECIAL_TOKENS, "<|user|>谁？<|end|><|assistant|>"]
STAGES = ("pretrained", "finetuned", "merged")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A directory with the out_dir of each, trained so far that greedy ids are hardly ties."""
    folder = tmp_path_factory.mktemp("stages")
    write_toys(folder)
    common = {"max_iters": 150, "learning_rate": 3e-3, "eval_interval": 150, "block_size": 64}
    text = train_here(dataset=folder / "text", out_dir=folder / "pretrained", **common)
    answers = train_here(
        dataset=folder / "questions", init_from=text, out_dir=folder / "finetuned", **common
    )
    adapter = train_here(
        dataset=folder / "questions",
        init_from=answers,
        out_dir=folder / "adapter",
        **common | {"max_iters": 40, "lora_rank": 4},
    )
    main(["--format=merged", f"--out_dir={adapter}", f"--to={folder / 'merged'}"])
    return folder


def start(out_dir: Path, file: Path, dtype: str = "float32") -> tuple[Checkpoint, LlamaCpp]:
    main(["--format=gguf", f"--out_dir={out_dir}", f"--to={file}", f"--dtype={dtype}"])
    checkpoint = load_checkpoint(out_dir)
    return checkpoint, LlamaCpp(PYTHON, file, checkpoint.model.config.block_size, threads=1)


@pytest.mark.parametrize("stage", STAGES)
def test_ids_of_texts_and_greedy_ids_are_the_same(stages, tmp_path, stage):
    checkpoint, process = start(stages / stage, tmp_path / "x.gguf")
    tokenizer = checkpoint.tokenizer
    with process as llama:
        for text in [*TEXTS, *random_texts(300)]:
            assert llama.ask("tokenize", text=text) == tokenizer.encode(text), repr(text[:80])
        prompts = [tokenizer.encode(text) for text in ("刘备到", "却说曹操攻打", "Liu Bei 1")]
        if checkpoint.answers:
            prompts = [tokenizer.render_prompt(messages) for messages in (*ASKED, *SPOKEN)]
        prompts = [prompt for prompt in prompts if len(prompt) <= 32]
        n_compared = 0
        for prompt in prompts:
            ours = slow_generate(checkpoint.model, prompt, Sampling(32, temperature=0.0))
            n = untied_length(checkpoint.model, prompt, ours)  # up to the first near tie
            assert llama.ask("greedy", ids=prompt, n=32)[:n] == ours[:n]
            n_compared += n
    assert len(prompts) > 2 and n_compared > 16 * len(prompts)  # ties are the exception


ASKED = [conversation[:1] for conversation in questions(1, 6)]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_conversations_have_the_same_ids_and_answers(stages, tmp_path, stage):
    checkpoint, process = start(stages / stage, tmp_path / "x.gguf")
    with process as llama:
        assert {*llama.ask("ends")} == {*checkpoint.tokenizer.stop_ids}
        for messages in [*SPOKEN, *ASKED, dialogue("".join(SPECIAL_TOKENS))]:
            ids = checkpoint.tokenizer.render_prompt(messages)
            assert llama.ask("chat", messages=messages) == ids
        sampling = Sampling(max_new_tokens=16, temperature=0.0)
        answers = ["".join(stream(checkpoint, chat_prompt(checkpoint, m), sampling)) for m in ASKED]
        theirs = [llama.ask("answer", messages=messages, n=16) for messages in ASKED]
    assert theirs == answers and all("。" in answer for answer in answers)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_2"])
def test_conversations_in_a_bases_own_format_have_the_same_ids(tmp_path, name):
    tokenizer = base_tokenizer(tmp_path, name)
    model = tiny_model(block_size=128, n_vocab=tokenizer.n_vocab)
    out_dir = save_run(tmp_path / "out", model, tokenizer, tmp_path, "sft")
    options = {"enable_thinking": False, "date_string": "26 Jul 2024"}
    with start(out_dir, tmp_path / "x.gguf")[1] as llama:
        assert {*llama.ask("ends")} == {*tokenizer.stop_ids}
        for key in ("one", "system", "turns", "reasoning"):
            asked = CONVERSATIONS[key][:-1]
            ids = llama.ask("chat", messages=asked, **options)
            assert ids == tokenizer.render_prompt(asked)


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_logits_of_every_family_are_the_same(tmp_path, options):
    if options.get("mlp") == "gelu_erf":
        pytest.skip("llama.cpp's GPT-2 has no exact GELU, which export.py says")
    tokenizer = toy_tokenizer()
    model = tiny_model(block_size=128, n_vocab=tokenizer.n_vocab, **options)
    out_dir = save_run(tmp_path / "out", model, tokenizer, tmp_path, "pretrain")
    checkpoint, process = start(out_dir, tmp_path / "x.gguf")
    ids = tokenizer.encode(TEXT)[:60]
    with process as llama, torch.inference_mode():
        theirs = torch.tensor(llama.ask("logits", ids=ids))
        ours = model.head(model(torch.tensor([ids])))[0, -1]
    # ggml takes the tanh form of GELU from a table of float16
    tolerance = 3e-2 if options.get("mlp") == "gelu" else 1e-4
    torch.testing.assert_close(theirs, ours, rtol=0, atol=tolerance)
    assert checkpoint.model.config == model.config


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
@pytest.mark.parametrize("family", ["qwen3", "llama_bias", "gpt2"])
def test_smaller_types_are_those_of_llama_cpps_own_quantizer(tmp_path, family, dtype):
    tokenizer = toy_tokenizer()
    model = tiny_model(block_size=128, n_vocab=tokenizer.n_vocab, **FAMILIES[family])
    out_dir = save_run(tmp_path / "out", model, tokenizer, tmp_path, "pretrain")
    main(["--format=gguf", f"--out_dir={out_dir}", f"--to={tmp_path / 'x'}", f"--dtype={dtype}"])
    with start(out_dir, tmp_path / "whole")[1] as llama:
        kind = int(TYPES[dtype][1])
        theirs = tmp_path / "theirs"
        assert llama.ask("quantize", to=str(theirs), file_type=kind) == 0
    (values, weights), (their_values, their_weights) = map(read_gguf, (tmp_path / "x", theirs))
    assert values == their_values and weights.keys() == their_weights.keys()
    assert all(torch.equal(weights[name], their_weights[name]) for name in weights)


@pytest.mark.parametrize(("dtype", "tie"), [("float16", 0.02), ("q8_0", 0.25)])
def test_answers_of_smaller_types_part_at_near_ties_only(stages, tmp_path, dtype, tie):
    """tie: some twice the largest difference of logits; their standard deviation is 1.9."""
    checkpoint, process = start(stages / "finetuned", tmp_path / "x.gguf", dtype)
    model, n_equal = checkpoint.model, []
    with process as llama, torch.inference_mode():
        for messages in [conversation[:1] for conversation in questions(1, 30)]:
            prompt = checkpoint.tokenizer.render_prompt(messages)
            ours = slow_generate(model, prompt, Sampling(16, temperature=0.0))
            theirs = llama.ask("greedy", ids=prompt, n=16)
            is_equal = [a == b for a, b in zip(ours, theirs, strict=True)]
            n = [*is_equal, False].index(False)
            if n < 16:
                best = model.head(model(torch.tensor([prompt + ours[:n]]))[0, -1]).topk(2).values
                assert best[0] - best[1] < tie
            n_equal.append(n)
    assert sum(n_equal) > 0.9 * 16 * len(n_equal)


def test_a_prompt_goes_in_at_once_however_long_it_is(tmp_path):
    """llama.cpp's own batch is 512 tokens."""
    tokenizer = toy_tokenizer()
    model = tiny_model(block_size=600, n_vocab=tokenizer.n_vocab)
    out_dir = save_run(tmp_path / "out", model, tokenizer, tmp_path, "pretrain")
    _, process = start(out_dir, tmp_path / "x.gguf")
    with process as llama:
        ids = random_ids(520, n_vocab=tokenizer.n_vocab).tolist()
        assert len(llama.ask("greedy", ids=ids, n=3)) == 3


def test_the_bench_has_both_speeds(stages, tmp_path):
    given = [f"--out_dir={stages / 'pretrained'}", f"--llama_cpp={PYTHON}", f"--out={tmp_path}"]
    bench.main(["generate", *given, "--rounds=2", "--prompt_tokens=8", "--new_tokens=20"])
    results = read_json(tmp_path / "generate.json")["results"]["one"]
    assert {*results["tokens_per_second"]} > {"sample.py", "llama.cpp"}
    ratio = results["ratios"]["sample.py / llama.cpp"]
    assert 0 < ratio["min"] <= ratio["ratio"] <= ratio["max"]
