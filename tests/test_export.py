"""What leaves equals what is here, in transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configurator import UserError
from export import main
from sample import load_for_sampling
from tests.helpers import TEXT, dialogue, save_run, tiny_model, tiny_tokenizer
from tokenizer import SPECIAL_TOKENS

FAMILIES = {
    "qwen3": {"n_kv_head": 2},
    "qwen3_untied": {"tie_weights": False, "rope_theta": 500.0, "n_hidden": 64},
    "llama": {"qk_norm": False, "n_kv_head": 1, "norm_eps": 1e-5},
    "llama_bias": {"qk_norm": False, "bias": True, "tie_weights": False},
    "gpt2": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False}
    | {"bias": True, "norm_eps": 1e-4},
    "gpt2_no_bias": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False}
    | {"tie_weights": False},
}
SPOKEN = [
    dialogue("汉朝自谁起义？"),
    dialogue("<|end|>a<|user|> <| <|endoftext|>", "  \n<|assistant|>\n\n", "why? it's 1234"),
    [{"role": "system", "content": "答。"}, *dialogue("谁弄权？")],
]


def leave(tmp_path, kind="sft", to="there", **options):
    """A run with a tiny model -> its out_dir, and where it was exported to."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(block_size=128, n_vocab=tokenizer.n_vocab, **options)
    out_dir = save_run(tmp_path / "out", model, tokenizer, tmp_path, kind)
    main([f"--out_dir={out_dir}", f"--to={tmp_path / to}"])
    return out_dir, tmp_path / to


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_transformers_gives_the_same_logits_and_ids(tmp_path, options):
    out_dir, there = leave(tmp_path, **options)
    checkpoint = load_for_sampling(out_dir, "cpu")
    peer = AutoModelForCausalLM.from_pretrained(there).eval()
    ids = checkpoint.tokenizer.render_prompt(SPOKEN[0])
    idx = torch.tensor([ids])
    with torch.no_grad():
        ours = checkpoint.model.head(checkpoint.model(idx))
        theirs = peer(idx).logits
    assert theirs.shape == ours.shape and ours.std() > 1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    new = peer.generate(idx, max_new_tokens=20, do_sample=False)[0, len(ids) :].tolist()
    plain = []
    with torch.no_grad():
        while len(plain) < 20 and not {*plain} & {*checkpoint.tokenizer.stop_ids}:
            logits = checkpoint.model.head(checkpoint.model(torch.tensor([ids + plain])))[0, -1]
            plain.append(int(logits.argmax()))
    assert new == plain


@pytest.mark.parametrize("messages", SPOKEN)
def test_the_chat_template_gives_the_same_ids(tmp_path, messages):
    out_dir, there = leave(tmp_path)
    tokenizer = load_for_sampling(out_dir, "cpu").tokenizer
    theirs = AutoTokenizer.from_pretrained(there)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.render_prompt(messages)
    ids = theirs.apply_chat_template(messages, return_dict=False)
    assert ids == tokenizer.render(messages)[0]
    assert theirs.eos_token_id == tokenizer.end


def test_an_unknown_role_is_refused_by_the_template(tmp_path):
    _, there = leave(tmp_path)
    with pytest.raises(Exception, match="unknown role"):
        AutoTokenizer.from_pretrained(there).apply_chat_template([{"role": "x", "content": "y"}])


def test_a_model_that_continues_takes_all_text_as_plain(tmp_path):
    out_dir, there = leave(tmp_path, kind="pretrain")
    ours, theirs = load_for_sampling(out_dir, "cpu").tokenizer, AutoTokenizer.from_pretrained(there)
    for text in (TEXT, *SPECIAL_TOKENS, "a <|end|>\n b"):
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.chat_template is None
    assert theirs.eos_token_id == ours.end_of_text


def test_generation_ends_at_both_end_tokens(tmp_path):
    out_dir, there = leave(tmp_path)
    stops = load_for_sampling(out_dir, "cpu").tokenizer.stop_ids
    assert {*AutoModelForCausalLM.from_pretrained(there).generation_config.eos_token_id} == {*stops}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"value_residual": True}, "value_residual=True"),
        ({"mlp": "relu2"}, "mlp='relu2'"),
        ({"bias": True}, "bias=True"),
        ({"position": "learned", "norm": "layernorm", "mlp": "gelu"}, "qk_norm=True"),
        (FAMILIES["gpt2"] | {"n_kv_head": 2}, "n_kv_head=2"),
        ({"model": "lstm"}, "model='lstm'"),
    ],
)
def test_what_no_other_tool_expresses_is_named(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        leave(tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    out_dir, _ = leave(tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot write .*there"):
        main([f"--out_dir={out_dir}", f"--to={tmp_path / 'file' / 'there'}"])
    assert {path.name for path in tmp_path.iterdir()} == {"out", "there", "file"}


def test_what_is_there_is_not_overwritten(tmp_path):
    out_dir, there = leave(tmp_path)
    with pytest.raises(UserError, match="is there"):
        main([f"--out_dir={out_dir}", f"--to={there}"])
    with pytest.raises(UserError, match="--to="):
        main([f"--out_dir={out_dir}"])
