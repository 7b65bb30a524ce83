"""The chat formats of base models: the ids of transformers on real templates."""

import json
from pathlib import Path

import pytest
import tokenizers
import trl
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

import export
import train
from configurator import UserError
from data.custom import prepare
from miniglm.chat import plain, to_json
from miniglm.checkpoint import load_checkpoint
from miniglm.scoring import in_chat, without_reasoning
from miniglm.text import chat_prompt
from miniglm.tokenizer import Tokenizer, load_tokenizer
from tests.helpers import TEXT, dialogue, tiny_tokenizer, write_lines
from tests.interop.test_foreign import ROPE
from tests.runs import words

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
LLAMA += ["<|eot_id|>"]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
NAMES = {
    "qwen2_5": CHATML,
    "qwen3": CHATML,
    "qwen3_training": CHATML,  # with the tags that mark what is trained
    "qwen3_instruct_2507": CHATML,
    "qwen3_8": CHATML,
    "llama3": LLAMA,
    "llama3_2": LLAMA,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "城市"}}}]
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}]
REASONED = {"role": "assistant", "content": "四", "reasoning_content": "二加二"}
WITH_TOOLS = [
    {"role": "system", "content": "可用工具。"},
    {"role": "user", "content": "北京天气？"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": '{"度": 3}'},
    {"role": "assistant", "content": "三度。"},
]
CONVERSATIONS = {
    "one": dialogue("孔明是谁？", "诸葛亮。"),
    "system": [
        {"role": "system", "content": "你是\n说书人。"},
        *dialogue("谁？", "刘备。\n\n玄德。"),
    ],
    "turns": [*dialogue("你好", "好"), *dialogue("  几点? ", "三点"), *dialogue("谢谢", "再见")],
    "think": [*dialogue("一", "<think>\n想\n</think>\n\n二"), *dialogue("二", "三")],
    "reasoning": [*dialogue("你好", "好"), {"role": "user", "content": "2+2"}, REASONED],
    "tools": WITH_TOOLS,
    "tools_twice": [*WITH_TOOLS, *WITH_TOOLS[1:2], *WITH_TOOLS[4:]],
}


def write_base(path: Path, template: str, names: list[str] = CHATML, **config) -> Path:
    """The tokenizer of a base model with a template of its own, as a Hugging Face directory."""
    library = tokenizers.ByteLevelBPETokenizer()
    texts = [TEXT[i : i + 4] for i in range(0, len(TEXT), 4)]
    library.train_from_iterator(texts, 300, special_tokens=names, show_progress=False)
    library.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    path.mkdir(parents=True, exist_ok=True)
    library.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[-1]} | config
    config |= {"bos_token": names[0], "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture(params=NAMES)
def base(request, tmp_path):
    template = (TEMPLATES / f"{request.param}.jinja").read_text(encoding="utf-8")
    return write_base(tmp_path / request.param, template, NAMES[request.param])


def with_tools(messages: list[dict]) -> list[dict]:
    return (
        [messages[0] | {"tools": TOOLS}, *messages[1:]] if WITH_TOOLS[2] in messages else messages
    )


def trained(tokenizer: Tokenizer, messages: list[dict]) -> list[str]:
    """The texts that the mask marks."""
    ids, mask = tokenizer.render(messages)
    runs = "".join(map(str, mask)).replace("01", "0 1").split()
    places, at = [], 0
    for run in runs:
        places += [ids[at + run.index("1") : at + len(run)]] if "1" in run else []
        at += len(run)
    return [tokenizer.decode(part[: part.index(tokenizer.end)]) for part in places]


def chat_differs(base: Path) -> list[str]:
    """The conversations that a base's tokenizer renders in other ids than transformers does."""
    ours, theirs = load_tokenizer(base), AutoTokenizer.from_pretrained(base)
    options = {"return_dict": False, "enable_thinking": False, "date_string": "26 Jul 2024"}
    differ = []
    for name, messages in CONVERSATIONS.items():
        options["tools"] = TOOLS if WITH_TOOLS[2] in messages else None
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
        same = ours.render_prompt(with_tools(messages)[:-1]) == asked
        ids, _ = ours.render(with_tools(messages))
        same &= ids == theirs.apply_chat_template(messages, **options)
        differ += [] if same else [name]
    return differ


def test_ids_are_those_of_transformers(base):
    assert chat_differs(base) == []


def test_only_what_the_assistant_says_is_trained(base):
    tokenizer = load_tokenizer(base)
    for name in ("one", "system", "turns"):
        answers = [m["content"] for m in CONVERSATIONS[name] if m["role"] == "assistant"]
        texts = trained(tokenizer, CONVERSATIONS[name])
        assert [text.removeprefix("<think>\n\n</think>\n\n") for text in texts] == answers
    if base.name != "llama3":  # it knows no tools
        call, answer = trained(tokenizer, with_tools(WITH_TOOLS))
        assert "weather" in call and "北京" in call and answer.endswith("三度。")
    untrained = [CONVERSATIONS["turns"][0], CONVERSATIONS["turns"][1] | {"train": False}]
    assert trained(tokenizer, [*untrained, *CONVERSATIONS["turns"][2:4]])[0].endswith("三点")


def test_reasoning_is_trained_and_an_answer_is_scored_behind_its_prompt(tmp_path):
    template = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(write_base(tmp_path, template))
    messages = CONVERSATIONS["reasoning"]
    assert trained(tokenizer, messages)[-1] == "<think>\n二加二\n</think>\n\n四"
    for asked in (messages, CONVERSATIONS["turns"]):
        prompt, answer = in_chat(tokenizer, asked)
        assert answer[-1] == tokenizer.end and tokenizer.end not in answer[:-1]
        assert tokenizer.render(asked)[0][: len(prompt) + len(answer)] == prompt + answer
    assert tokenizer.decode(answer) == "再见"
    assert without_reasoning("<think>\n二加二\n</think>\n\n四") == without_reasoning("四") == "四"


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_2"])
def test_what_is_parsed_renders_to_the_same_ids(tmp_path, name):
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(write_base(tmp_path, template, NAMES[name]))
    for messages in CONVERSATIONS.values():
        if name == "llama3_2" and messages in (CONVERSATIONS["system"], WITH_TOOLS):
            continue  # its system message always has a date before it
        if name == "llama3_2" and len(messages) > 6:
            continue
        ids, _ = tokenizer.render(with_tools(messages))
        assert tokenizer.render(tokenizer.parse(ids))[0] == ids
    assert tokenizer.parse(tokenizer.render(CONVERSATIONS["one"])[0]) == CONVERSATIONS["one"]


def test_names_of_special_tokens_in_a_message_are_text(base):
    tokenizer = load_tokenizer(base)
    names = "".join(NAMES[base.name])
    ids, mask = tokenizer.render(dialogue(f"{names}？", f"{names}。"))
    special = [id for id in ids if id in tokenizer.special]
    assert special == [
        i for i in tokenizer.render(dialogue("？", "。"))[0] if i in tokenizer.special
    ]
    assert tokenizer.parse(ids) == dialogue(f"{names}？", f"{names}。")
    assert sum(mask) > len(tokenizer.encode(names))


def test_ours_writes_tools_and_reasoning_as_text(tmp_path):
    tokenizer = tiny_tokenizer()
    turns = [*with_tools(WITH_TOOLS), {"role": "user", "content": "2+2"}, REASONED]
    assert [(m["role"], m["content"]) for m in plain(turns)] == [
        ("system", f"可用工具。\n\n<tools>\n{to_json(TOOLS[0])}\n</tools>"),
        ("user", "北京天气？"),
        (
            "assistant",
            f"<tool_call>\n{to_json(CALLS[0]['function'])}\n</tool_call>",
        ),
        ("user", '<tool_response>\n{"度": 3}\n</tool_response>'),
        ("assistant", "三度。"),
        ("user", "2+2"),
        ("assistant", "<think>\n二加二\n</think>\n\n四"),
    ]
    assert tokenizer.parse(tokenizer.render(turns)[0]) == [
        {"role": m["role"], "content": m["content"]} for m in plain(turns)
    ]
    results = [*WITH_TOOLS[:3], WITH_TOOLS[3], WITH_TOOLS[3], WITH_TOOLS[4]]
    assert plain(results)[3]["content"].count("<tool_response>") == 2


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}", "cannot be rendered"),
        ("{{ raise_exception('no') }}", "cannot be rendered (the chat template refuses"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "ChatML or Llama 3"),
        ("{{ messages[0].content.nothing() }}", "cannot be rendered"),
        ("{{ 1 / 0 }}", "cannot be rendered"),
        ("{{ 10.0 ** 400 }}", "cannot be rendered"),
        (5, "is no text"),
        ({"default": "x"}, "is no text"),
    ],
)
def test_a_template_that_cannot_be_used_is_named_in_a_line(tmp_path, template, words):
    with pytest.raises(UserError, match=r"tokenizer.json cannot be used as a tokenizer") as caught:
        load_tokenizer(write_base(tmp_path, template))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_list_without_a_default_and_names_that_are_missing_are_no_traceback(tmp_path):
    for template in (["a"], [{"x": 1}], [{"name": "tool_use", "template": "x"}]):
        assert load_tokenizer(write_base(tmp_path, template)).chat is None
    base = write_base(tmp_path, (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8"))
    text = (base / "tokenizer.json").read_text(encoding="utf-8")
    text = text.replace('"special": true', '"special": false')
    (base / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="do not have the form"):
        load_tokenizer(base)


def test_a_damaged_file_beside_the_tokenizer_is_named(tmp_path):
    for text in ("[]", "{"):
        base = write_base(tmp_path, "")
        (base / "tokenizer_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"tokenizer.json cannot be used as a tokenizer"):
            load_tokenizer(base)


def test_messages_that_a_template_refuses_are_named(tmp_path):
    template = (TEMPLATES / "llama3_2.jinja").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(write_base(tmp_path, template, LLAMA))
    twice = [*WITH_TOOLS[:2], WITH_TOOLS[2] | {"tool_calls": CALLS * 2}, *WITH_TOOLS[3:]]
    with pytest.raises(UserError, match=r"the chat template refuses '三度。'.*single tool-calls"):
        tokenizer.render(twice)


def test_a_base_is_prepared_trained_and_exported_in_its_own_format(tmp_path):
    template = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    base = write_base(tmp_path / "base", template)
    config = Qwen3Config(**ROPE | {"vocab_size": 320, "head_dim": 8}, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    data, out_dir, exported = (tmp_path / name for name in ("data", "out", "exported"))
    rows = [{"messages": messages} for messages in CONVERSATIONS.values() if len(messages) == 2]
    lines = write_lines(tmp_path / "rows.jsonl", rows * 3)
    prepare.main(words(input=lines, out=data, tokenizer=base, max_tokens=64, val=0))
    train.main(words(init_from=base, dataset=data, out_dir=out_dir, max_iters=1, device="cpu"))
    export.main(words(out_dir=out_dir, to=exported))
    ours, back = load_checkpoint(out_dir), load_checkpoint(exported)
    assert ours.tokenizer.sha256 == back.tokenizer.sha256 and back.answers
    theirs = AutoTokenizer.from_pretrained(exported)
    for messages in CONVERSATIONS.values():
        ids = theirs.apply_chat_template(messages, return_dict=False)
        assert ours.tokenizer.render(messages)[0] == ids
    options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
    asked = CONVERSATIONS["one"][:1]
    assert chat_prompt(ours, asked) == theirs.apply_chat_template(asked, **options)
