"""What leaves equals what is here: in transformers, and in the GGUF file that llama.cpp reads,
which tests/test_llama_cpp.py runs."""

import json
import re

import gguf
import jinja2
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from configurator import UserError
from export import main
from miniglm.chat import HIDDEN, SPECIAL_TOKENS
from miniglm.checkpoint import load_checkpoint
from miniglm.interop.gguf import modelfile
from miniglm.text import load_for_sampling
from miniglm.tokenizer import QWEN2_PATTERN, Tokenizer, adopt, load_tokenizer
from tests.helpers import TEXT, dialogue, random_ids, save_run, tiny_model, tiny_tokenizer
from tests.interop.test_foreign import foreign_tokenizer
from tests.runs import small_disk
from tests.test_chat import CONVERSATIONS, LLAMA, NAMES, TAGS, TEMPLATES, write_base

FAMILIES = {
    "qwen3": {"n_kv_head": 2},
    "qwen3_untied": {"tie_weights": False, "rope_theta": 500.0, "n_hidden": 64},
    "qwen3_head_dim": {"n_kv_head": 2, "head_dim": 12},
    "qwen2": {"qk_norm": False, "qkv_bias": True, "n_kv_head": 2},
    "llama": {"qk_norm": False, "n_kv_head": 1, "norm_eps": 1e-5},
    "llama3": {"qk_norm": False, "rope_scaling": [8.0, 1.0, 4.0, 8.0], "rope_theta": 100.0},
    "llama_bias": {"qk_norm": False, "bias": True, "tie_weights": False},
    "gpt2": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False}
    | {"bias": True, "norm_eps": 1e-4},
    "gpt2_no_bias": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False}
    | {"tie_weights": False},
    "gpt2_erf": {"position": "learned", "norm": "layernorm", "mlp": "gelu_erf", "qk_norm": False},
}
SPOKEN = [
    dialogue("汉朝自谁起义？"),
    dialogue("<|end|>a<|user|> <| <|endoftext|>", "  \n<|assistant|>\n\n", "why? it's 1234"),
    [{"role": "system", "content": "答。"}, *dialogue("谁弄权？")],
]


def leave(tmp_path, kind="sft", to="there", form="hf", tokenizer=None, dtype="float32", **options):
    """A run with a tiny model -> its out_dir, and where it was exported to."""
    tokenizer = tokenizer or tiny_tokenizer()
    model = tiny_model(block_size=128, n_vocab=tokenizer.n_vocab, **options)
    out_dir = save_run(tmp_path / "out", model, tokenizer, tmp_path, kind)
    words = [f"--format={form}", f"--out_dir={out_dir}", f"--to={tmp_path / to}"]
    main([*words, f"--dtype={dtype}"])
    return out_dir, tmp_path / to


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_transformers_gives_the_same_logits_and_so_does_what_comes_back(tmp_path, options):
    out_dir, there = leave(tmp_path, **options)
    model, peer = load_checkpoint(out_dir).model, AutoModelForCausalLM.from_pretrained(there).eval()
    idx = random_ids(2, 40, n_vocab=model.config.n_vocab)
    with torch.no_grad():
        ours, theirs = model.head(model(idx)), peer(idx).logits
        again = load_checkpoint(there)
        back = again.model.head(again.model(idx))
    assert theirs.shape == ours.shape and ours.std() > 1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    torch.testing.assert_close(back, ours, rtol=0, atol=1e-6)
    assert again.answers and again.tokenizer.sha256 == tiny_tokenizer().sha256


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [FAMILIES["qwen3"], FAMILIES["gpt2"]])
def test_smaller_weights_are_ours_rounded_here_and_in_transformers(
    tmp_path, options, dtype, capsys
):
    name = str(dtype).removeprefix("torch.")
    out_dir, there = leave(tmp_path, dtype=name, **options)
    assert capsys.readouterr().out.endswith(f" MB, {name}\n")
    model, again = load_checkpoint(out_dir).model, load_checkpoint(there).model
    peer, idx = AutoModelForCausalLM.from_pretrained(there).eval(), random_ids(2, 40, n_vocab=300)
    assert {weight.dtype for weight in peer.parameters()} == {dtype}
    for weight, rounded in zip(model.parameters(), again.parameters(), strict=True):
        n = min(len(weight), model.config.n_vocab)  # padding stays here
        assert torch.equal(weight[:n].to(dtype).float(), rounded[:n])
    with torch.no_grad():
        ours, theirs = again.head(again(idx)), peer.float()(idx).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


ADDED = ["<think>", "[INST]", "  ", "\t\t", '"x"', "\\n", "😀!"]  # by the tokenizer that is adopted
HELD = ["<think>谁？</think>", "[INST] a  b   c", "\t\t\t", 'say "x"', "\\n", "😀!", "".join(ADDED)]


def adopted(added: list[str]) -> Tokenizer:
    library = foreign_tokenizer()
    library.add_tokens(added)
    return Tokenizer(adopt(library.to_str()))


@pytest.mark.parametrize("added", [[], ADDED])
def test_the_chat_template_gives_the_same_ids(tmp_path, added):
    """Names of special tokens inside a message are plain text."""
    tokenizer = adopted(added) if added else tiny_tokenizer()
    assert {*added} < {*tokenizer.special.values()}
    _, there = leave(tmp_path, tokenizer=tokenizer)
    theirs = AutoTokenizer.from_pretrained(there)
    assert theirs.eos_token_id == tokenizer.end and load_checkpoint(there).answers
    ends = GenerationConfig.from_pretrained(there).eos_token_id
    assert {*ends} == {*tokenizer.stop_ids}
    for messages in [*SPOKEN, *map(dialogue, HELD), dialogue("<|im_end|><", "[")]:
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == tokenizer.render_prompt(messages)
        ids = theirs.apply_chat_template(messages, return_dict=False)
        assert ids == tokenizer.render(messages)[0]
    with pytest.raises(Exception, match="unknown role"):
        theirs.apply_chat_template([{"role": "x", "content": "y"}])


def test_an_added_token_that_no_message_can_hide_is_named(tmp_path):
    with pytest.raises(UserError, match="the added token '哈' is a single character"):
        leave(tmp_path, tokenizer=adopted(["哈"]))
    _, file = leave(tmp_path, to="x.gguf", form="gguf", tokenizer=adopted(["哈"]))
    assert read_gguf(file)[0]["tokenizer.ggml.pre"] == "gpt-2"  # its split pattern


def test_a_model_that_continues_takes_all_text_as_plain_and_has_no_template(tmp_path):
    out_dir, there = leave(tmp_path, kind="pretrain")
    ours, theirs = load_for_sampling(out_dir, "cpu").tokenizer, AutoTokenizer.from_pretrained(there)
    for text in (TEXT, *SPECIAL_TOKENS, "a <|end|>\n b"):
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.chat_template is None and theirs.eos_token_id == ours.end_of_text
    assert not load_checkpoint(there).answers
    main(["--format=gguf", f"--out_dir={out_dir}", f"--to={tmp_path / 'x.gguf'}"])
    values = read_gguf(tmp_path / "x.gguf")[0]
    ends = values["tokenizer.ggml.eos_token_id"], values["tokenizer.ggml.eot_token_id"]
    assert ends == ours.stop_ids and values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.ggml.pre"] == "qwen2"
    assert "tokenizer.chat_template" not in values and not (tmp_path / "x.Modelfile").exists()


ODD_SPLIT = tiny_tokenizer().text.replace(json.dumps(QWEN2_PATTERN), '"."')


@pytest.mark.parametrize(
    ("form", "options", "words"),
    [
        ("hf", {"mlp": "relu2"}, "mlp='relu2'"),
        ("hf", {"bias": True}, "bias=True"),
        ("hf", {"position": "learned", "norm": "layernorm", "mlp": "gelu"}, "qk_norm=True"),
        ("hf", FAMILIES["gpt2"] | {"n_kv_head": 2}, "n_kv_head=2"),
        ("hf", {"model": "lstm"}, "model='lstm'"),
        ("gguf", {"model": "lstm"}, "model='lstm'"),
        ("gguf", FAMILIES["gpt2_erf"], "mlp='gelu_erf'"),
        ("gguf", {"tokenizer": Tokenizer(ODD_SPLIT)}, "no name for the tokenizer's split pattern"),
    ],
)
def test_what_the_other_tool_does_not_express_is_named(tmp_path, form, options, words):
    with pytest.raises(UserError, match=words):
        leave(tmp_path, form=form, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("form", "dtype", "words"),
    [
        ("hf", "q8_0", "format='hf' has no dtype='q8_0'; pass float32, float16, bfloat16"),
        ("gguf", "bfloat16", "format='gguf' has no dtype='bfloat16'; pass float32"),
        ("merged", "float16", "format='merged' has no dtype='float16'; pass float32"),
        ("gguf", "q8_0", r"token_embd.weight: .* shape \(\d+, 40\) to Q8_0; pass --dtype=float16"),
    ],
)
def test_a_type_that_does_not_fit_is_named(tmp_path, form, dtype, words):
    with pytest.raises(UserError, match=words):
        leave(tmp_path, form=form, dtype=dtype, n_embd=40)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_there_is_not_overwritten(tmp_path):
    out_dir, there = leave(tmp_path)
    with pytest.raises(UserError, match="is there"):
        main([f"--out_dir={out_dir}", f"--to={there}"])
    (tmp_path / "x.Modelfile").touch()
    with pytest.raises(UserError, match=r"x\.Modelfile is there"):
        main(["--format=gguf", f"--out_dir={out_dir}", f"--to={tmp_path / 'x.gguf'}"])
    with pytest.raises(UserError, match="--to="):
        main([f"--out_dir={out_dir}"])


# --- GGUF --------------------------------------------------------------------------------------


def read_gguf(file):
    """Its values and its weights, by their names."""
    reader = gguf.GGUFReader(file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    return values, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


@pytest.mark.parametrize("options", [o for o in FAMILIES.values() if o.get("mlp") != "gelu_erf"])
def test_a_gguf_file_holds_all_weights_in_float32_and_the_shape(tmp_path, options):
    out_dir, file = leave(tmp_path, to="x.gguf", form="gguf", **options)
    model = load_checkpoint(out_dir).model
    values, weights = read_gguf(file)
    weights.pop("rope_freqs.weight", None)
    c, family = model.config, values["general.architecture"]
    assert values[f"{family}.block_count"] == 2 and values[f"{family}.context_length"] == 128
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert torch.equal(weights["token_embd.weight"], model.wte.weight[: c.n_vocab])
    assert ("output.weight" in weights) == (not c.tie_weights)
    heads, their_heads = ("wte", "lm_head"), ("token_embd.weight", "output.weight")
    ours = [w.flatten() for name, w in model.named_parameters() if not name.startswith(heads)]
    theirs = [w.flatten() for name, w in weights.items() if name not in their_heads]
    ours, theirs = torch.cat(ours).detach(), torch.cat(theirs)
    zeros = torch.zeros(len(theirs) - len(ours))  # biases that GPT-2 has
    assert torch.equal(torch.cat([ours, zeros]).sort().values, theirs.sort().values)


@pytest.mark.parametrize(("dtype", "kind"), [("float16", "F16"), ("q8_0", "Q8_0")])
def test_a_smaller_gguf_file_holds_matrices_rounded_and_the_rest_exactly(tmp_path, dtype, kind):
    """q8_0: 32 values are multiples, up to 127, of a step, which is a float16."""
    options = FAMILIES["gpt2"] | {"form": "gguf"}
    whole = gguf.GGUFReader(leave(tmp_path, to="whole", **options)[1])
    small = gguf.GGUFReader(leave(tmp_path, to="small", dtype=dtype, **options)[1])
    for tensor, rounded in zip(whole.tensors, small.tensors, strict=True):
        is_matrix = len(tensor.shape) == 2 and tensor.name != "position_embd.weight"
        assert rounded.tensor_type.name == (kind if is_matrix else "F32")
        ours = torch.tensor(tensor.data).view(-1, 32)
        theirs = torch.tensor(gguf.quants.dequantize(rounded.data, rounded.tensor_type))
        error, largest = (theirs.view(-1, 32) - ours).abs(), ours.abs().amax(1, keepdim=True)
        bound = {"F32": 0, "F16": 2**-11, "Q8_0": 0.5 / 127 + 2**-11}[rounded.tensor_type.name]
        assert (error <= bound * largest).all()


def test_llamas_queries_and_keys_leave_in_pairs_that_turn_together(tmp_path):
    """Heads of 8 rows, of which i and i + 4 turn together here, 2 i and 2 i + 1 there."""
    out_dir, file = leave(tmp_path, to="x.gguf", form="gguf", qk_norm=False, n_kv_head=2)
    weight = load_checkpoint(out_dir).model.blocks[1].attn.c_attn.weight
    weights = read_gguf(file)[1]
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    assert torch.equal(weights["blk.1.attn_q.weight"][8:16], weight[8:16][order])
    assert torch.equal(weights["blk.1.attn_k.weight"][8:16], weight[32 + 8 : 32 + 16][order])
    assert torch.equal(weights["blk.1.attn_v.weight"], weight[48:])


def test_the_divisors_of_a_gguf_file_make_llama_3s_frequencies(tmp_path):
    _, file = leave(tmp_path, to="x.gguf", form="gguf", **FAMILIES["llama3"])
    llama = AutoConfig.from_pretrained(leave(tmp_path / "hf", **FAMILIES["llama3"])[1])
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](llama, "cpu")
    plain = 100.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / read_gguf(file)[1]["rope_freqs.weight"], wanted)
    assert not torch.equal(plain, wanted)


def ids_of(text, values, tokenizer):
    """Special tokens are found by their names, then the rest is plain text, as llama.cpp does."""
    kinds = zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"], strict=True)
    id_of = {name: id for id, (name, kind) in enumerate(kinds) if kind != gguf.TokenType.NORMAL}
    ids = []
    for part in re.split(f"({'|'.join(map(re.escape, id_of))})", text):
        ids += [id_of[part]] if part in id_of else tokenizer.encode(part)
    return ids


GO_WORDS = {
    "{{ if .System }}": "{% if System %}",
    "{{ else }}": "{% else %}",
    "{{ range .Messages }}": "{% for m in Messages %}",
    '{{ if eq .Role "user" }}': "{% if m.role == 'user' %}",
    '{{ else if eq .Role "assistant" }}': "{% elif m.role == 'assistant' %}",
    "{{ end }}{{ end }}": "{% endif %}{% endfor %}",
    "{{ end }}": "{% endif %}",
    ".Content": "m.content",
    ".System": "System",
}


def as_jinja(written):
    """The Go template of a Modelfile, word for word."""
    text = re.search('TEMPLATE """(.*)"""', written)[1]
    for go, jinja in GO_WORDS.items():
        text = text.replace(go, jinja)
    return jinja2.Template(text)


def base_tokenizer(tmp_path, name):
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return load_tokenizer(write_base(tmp_path / name, template, NAMES[name]))


ODD = [dialogue("{{ .Role }} \"a\" \\ <b> & 'c' 😀\u3000x{% if %}"), dialogue("x", "y", "z")]


@pytest.mark.parametrize("name", ["", "qwen2_5", "qwen3", "qwen3_training", "llama3_2"])
def test_the_template_of_a_modelfile_gives_the_same_ids(tmp_path, name):
    tokenizer = base_tokenizer(tmp_path, name) if name else tiny_tokenizer()
    _, file = leave(tmp_path, to="x.gguf", form="gguf", tokenizer=tokenizer)
    written = (tmp_path / "x.Modelfile").read_text(encoding="utf-8")
    assert written.startswith("FROM ./x.gguf\n") and HIDDEN not in written
    values, template = read_gguf(file)[0], as_jinja(written)
    for messages in [CONVERSATIONS["system"][:-1], *ODD, *([] if name else SPOKEN)]:
        system = "".join(m["content"] for m in messages if m["role"] == "system")
        text = template.render(Messages=messages, System=system)
        assert ids_of(text, values, tokenizer) == tokenizer.render_prompt(messages)


def test_a_template_that_skips_system_messages_is_left_to_ollama(tmp_path):
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    template = "{% for m in messages if m.role != 'system' %}" + turn + "{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = load_tokenizer(write_base(tmp_path, template))
    assert modelfile(tokenizer, "x.gguf").splitlines()[-1] == 'PARAMETER stop "<|im_end|>"'


@pytest.mark.parametrize("messages", SPOKEN)
def test_the_template_of_a_gguf_file_gives_the_same_ids(tmp_path, messages):
    out_dir, file = leave(tmp_path, to="x.gguf", form="gguf")
    tokenizer = load_for_sampling(out_dir, "cpu").tokenizer
    values = read_gguf(file)[0]
    kinds = zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"], strict=True)
    names = [name for name, kind in kinds if kind == gguf.TokenType.CONTROL]
    assert [name.replace(HIDDEN, "") for name in names] == SPECIAL_TOKENS
    template = jinja2.Template(values["tokenizer.chat_template"])
    text = template.render(messages=messages, add_generation_prompt=True)
    assert ids_of(text, values, tokenizer) == tokenizer.render_prompt(messages)


def test_a_bases_own_tokens_keep_their_names_and_kinds(tmp_path):
    tokenizer = base_tokenizer(tmp_path, "llama3_2")
    _, file = leave(tmp_path, to="x.gguf", form="gguf", tokenizer=tokenizer)
    values = {name.removeprefix("tokenizer."): v for name, v in read_gguf(file)[0].items()}
    names, kinds = values["ggml.tokens"], values["ggml.token_type"]
    kind_of = {name: kind for name, kind in zip(names, kinds, strict=True) if kind > 1}
    assert kind_of == dict.fromkeys(LLAMA, gguf.TokenType.CONTROL) | dict.fromkeys(
        TAGS, gguf.TokenType.USER_DEFINED
    )
    ends = [names[values[f"ggml.{key}_token_id"]] for key in ("bos", "eos", "eot", "eom")]
    assert ends == ["<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", "<|end_of_text|>"]
    assert values["chat_template"] == (TEMPLATES / "llama3_2.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, form):
    out_dir, _ = leave(tmp_path)
    with small_disk(tmp_path / "disk") as (disk, fill):
        fill(40_000)
        with pytest.raises(UserError, match=r"cannot write .*/x: the disk is full \(.*\)$"):
            main([f"--format={form}", f"--out_dir={out_dir}", f"--to={disk / 'x'}"])
        assert [path.name for path in disk.iterdir()] == ["filler"]
