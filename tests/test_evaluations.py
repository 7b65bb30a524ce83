"""The reports of a tiny model against its own losses, token by token, and what its files say."""

import math
from pathlib import Path

import pytest
import torch

import evaluations
import sample
from configurator import UserError
from data.translation import prepare_sft as translation_sft
from data_utils import Dataset
from miniglm import jsonl
from miniglm.checkpoint import Checkpoint, load_checkpoint
from miniglm.generation import Sampling
from miniglm.losses import split_sums
from miniglm.metrics import METRICS, look_up, mean, rouge_l, score
from miniglm.prep import parallel
from miniglm.scoring import answer_nats, in_chat, in_text, score_translations, simplified
from miniglm.text import stream
from miniglm.tokenizer import train_tokenizer
from tests.helpers import (
    QUESTIONS,
    TEXT,
    dialogue,
    logits,
    save_run,
    tiny_model,
    tiny_tokenizer,
    write_novel,
)
from tests.prep.test_parallel import many, write_pairs
from tests.runs import read_json
from tests.test_sample import make_run


def slow_nats(checkpoint: Checkpoint, messages: list[dict], ask=in_chat) -> tuple[float, int]:
    """The sum of -log p of the last message's tokens and its end, and how many they are."""
    prompt, answer = ask(checkpoint.tokenizer, messages)
    every = logits(checkpoint.model, torch.tensor([prompt + answer]))[0].double()
    log_probs = every.log_softmax(dim=-1)[len(prompt) - 1 : -1]
    return -sum(log_probs[i, id].item() for i, id in enumerate(answer)), len(answer)


def perplexity(losses: list[tuple[float, int]]) -> float:
    nats, counts = zip(*losses, strict=True)
    return math.exp(sum(nats) / sum(counts))


def evaluate(out: Path, *flags: str) -> dict:
    evaluations.main([f"--out_dir={out}", "--device=cpu", "--max_new_tokens=20", *flags])
    return read_json(out / "evaluation.json")


def read_lines(path: Path) -> list[dict]:
    return jsonl.read_records(path, ("question", "answer"), "")


def has_pictures(out: Path) -> bool:
    files = [out / "rouge_l.png", out / "perplexity.png"]
    return all(file.read_bytes().startswith(b"\x89PNG\r\n") for file in files)


def test_what_is_asked_in_chat_ends_with_the_answer_and_its_end():
    tokenizer, messages = tiny_tokenizer(), QUESTIONS["train"][2]
    prompt, answer = in_chat(tokenizer, messages)
    assert prompt == tokenizer.render_prompt(messages[:-1])
    assert answer == [*tokenizer.encode(messages[-1]["content"]), tokenizer.end]


def test_reference_perplexities_are_those_of_each_answer_alone(tmp_path):
    checkpoint = load_checkpoint(make_run(tmp_path, "sft"))
    conversations = QUESTIONS["train"] + QUESTIONS["val"]  # one of them of two turns
    slow = [perplexity([slow_nats(checkpoint, messages)]) for messages in conversations]
    assert max(slow) > 1.5 * min(slow)
    for batch_size in (1, 2, 9):
        pairs = [in_chat(checkpoint.tokenizer, messages) for messages in conversations]
        nats = answer_nats(checkpoint, pairs, batch_size)
        got = [math.exp(n / len(ids)) for n, (_, ids) in zip(nats, pairs, strict=True)]
        assert got == pytest.approx(slow, rel=1e-4)


@pytest.mark.parametrize("split", ["val", "train"])
def test_the_report_of_questions_holds_what_its_answers_say(tmp_path, split):
    out = make_run(tmp_path, "sft")
    report = evaluate(out, f"--split={split}", "--batch_size=2")
    assert read_json(out / f"evaluation-toy_sft-{split}.json") == report
    assert (report["dataset"], report["split"]) == ("toy_sft", split)
    asked, seen = read_lines(out / "answers.jsonl"), read_lines(out / "answers-seen.jsonl")
    assert read_lines(out / f"answers-toy_sft-{split}.jsonl") == asked
    wanted = QUESTIONS[split]
    known = [(m[-2]["content"], m[-1]["content"]) for m in QUESTIONS["train"]]
    pairs = [(m[-2]["content"], m[-1]["content"]) for m in wanted]
    assert [(r["question"], r["reference"]) for r in asked] == pairs
    assert report["n"] == report["n_seen"] == len({r["question"] for r in seen}) == len(wanted)
    assert {(r["question"], r["reference"]) for r in seen} <= {*known}
    assert report["ended"] == mean([r["ended"] for r in asked])
    assert report["answer_characters"] == mean([len(r["answer"]) for r in asked])
    assert report["reference_characters"] == mean([len(r["reference"]) for r in asked])
    for records, key in ((asked, "rouge_l"), (seen, "rouge_l_seen")):
        scores = [rouge_l(r["answer"], r["reference"]) for r in records]
        assert [r["rouge_l"] for r in records] == scores and report[key] == mean(scores)
    nearest = look_up([r["question"] for r in asked], known)
    scores = [rouge_l(text, r["reference"]) for text, r in zip(nearest, asked, strict=True)]
    assert report["rouge_l_lookup"] == mean(scores) > (0.99 if split == "train" else 0.1)
    assert has_pictures(out)


@pytest.mark.parametrize(("kind", "name"), [("sft", "toy_sft"), ("pretrain", "toy")])
def test_perplexity_and_bits_per_byte_are_those_of_the_splits_sums(tmp_path, kind, name):
    """Sums that tests/test_losses.py has from slow loops."""
    out = make_run(tmp_path, kind)
    report = evaluate(out, "--batch_size=3")
    assert read_json(out / f"evaluation-{name}-val.json") == report
    assert (out / "answers.jsonl").exists() == (kind == "sft")
    data = Dataset(str(tmp_path / name))
    nats, count, n_bytes = split_sums(load_checkpoint(out).model, data, "val", 2)
    assert (report["tokens"], report["bytes"]) == (count, n_bytes)
    assert report["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert report["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_a_text_is_read_in_windows_even_by_a_model_of_a_long_context(tmp_path, monkeypatch):
    """Published models read more tokens at once than a short text has."""
    out = make_run(tmp_path, "pretrain")
    data, model = Dataset(str(tmp_path / "toy")), load_checkpoint(out).model
    wanted = split_sums(model, data, "val", 2, block_size=8)
    assert wanted[1:] == split_sums(model, data, "val", 2)[1:]
    monkeypatch.setattr(evaluations, "WINDOW", 8)
    report = evaluate(out)
    assert report["perplexity"] == pytest.approx(math.exp(wanted[0] / wanted[1]), rel=1e-5)


def test_an_evaluation_that_cannot_be_is_refused(tmp_path):
    out = make_run(tmp_path, "sft")
    with pytest.raises(UserError, match="no split 'test'"):
        evaluate(out, "--split=test")
    other = write_novel(tmp_path / "other", train_tokenizer([TEXT], 300))
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate(out, f"--dataset={other}")


# --- translations ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A prepared dataset of translations."""
    folder = tmp_path_factory.mktemp("pairs")
    tokenizer = train_tokenizer(
        [TEXT, *(f"{a} {parallel.traditional(b)}" for a, b in many(50))], 400
    )
    tokenizer.save(folder / "tokenizer.json")
    file = write_pairs(folder / "a.tsv", many(120))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "FINANCE", [])
        words = [f"--input={file}", f"--out={folder / 'toy_sft'}", f"--tokenizer={folder}"]
        translation_sft.main([*words, "--val=0.1"])
    return Dataset(str(folder / "toy_sft"))


def make_translator(tmp_path: Path, pairs: Dataset, kind: str) -> Path:
    model = tiny_model(n_vocab=pairs.tokenizer.n_vocab, block_size=256)
    return save_run(tmp_path / "out-toy", model, pairs.tokenizer, pairs.path, kind)


@pytest.mark.parametrize(("kind", "ask"), [("sft", in_chat), ("pretrain", in_text)])
def test_the_report_of_translations_holds_what_its_texts_say(tmp_path, pairs, kind, ask):
    out = make_translator(tmp_path, pairs, kind)
    report = evaluate(out, "--split=test", "--batch_size=5")
    assert read_json(out / "evaluation-toy_sft-test.json") == report
    asked = read_lines(out / "answers-toy_sft-test.jsonl")
    assert read_lines(out / "answers.jsonl") == asked
    wanted = pairs.conversations("test")
    texts = [[message["content"] for message in messages] for messages in wanted]
    assert [[r["question"], r["reference"]] for r in asked] == texts
    assert report | score_translations(asked) == report
    assert not [key for key in report if "rouge" in key or "seen" in key]
    assert not [*out.glob("*seen*"), *out.glob("*.png")]
    checkpoint, tokenizer = load_checkpoint(out), pairs.tokenizer
    losses = [slow_nats(checkpoint, messages, ask) for messages in wanted]
    assert report["tokens"] == sum(count for _, count in losses)
    assert report["bytes"] == sum(len(r["reference"].encode()) for r in asked)
    assert report["perplexity"] == pytest.approx(perplexity(losses), rel=1e-4)
    assert asked[0]["perplexity"] == pytest.approx(perplexity(losses[:1]), rel=1e-4)
    pieces = stream(checkpoint, ask(tokenizer, wanted[0])[0], Sampling(20, temperature=0.0))
    assert asked[0]["answer"] == "".join(pieces)


def test_the_scores_of_translations_by_hand():
    references = [parallel.traditional(chinese) for _, chinese in many(8)]
    answers = [*(text[2:] for text in references[:5]), "基金会出售股份。", " \n", ""]
    records = [
        {"answer": answer, "reference": reference, "ended": number % 4 > 0}
        for number, (answer, reference) in enumerate(zip(answers, references, strict=True))
    ]
    report = score_translations(records)
    assert report["n"] == 8
    assert (report["unfinished"], report["empty"], report["simplified"]) == (2 / 8, 2 / 8, 1 / 8)
    for name, metric in METRICS.items():
        figures = (report[name], report[f"{name}_low"], report[f"{name}_high"])
        assert figures == score(metric, answers, references)
    assert "tok:zh" in report["bleu_signature"] and "nw:2" in report["chrf_signature"]


def test_simplified_characters_by_hand():
    for text, wanted in {"证监会须发出书面通知。": "证监会须发书", "汇丰与恒生": "汇与"}.items():
        assert sorted(simplified(text)) == sorted(wanted)
    for text in (
        "證監會須發出書面通知。",
        # characters that are Simplified for one word, and Traditional for another
        "皇后大道中的里程碑，公布於周年大會後。余先生、范女士及姓于的人家，占地甚廣，不知所云。",
        "只有一隻船；制度與製造；面積與麵粉；征途與徵收；干預與幹事。",
        # variants of Taiwan, and of taste
        "臺灣和台灣，裡面和裏面，群眾和羣眾，為了和爲了",
        "説明、說明，税、稅，線、綫，床、牀，峰、峯，啟、啓，衞、衛，証券、證券",
        "沿着、沿著，甚麼、什麼，唸書、念書，回覆、回復，儘管、盡管，了解、瞭解",
        "年息五厘，永恒不變，恒生指數，煙熏三文魚，蚝油，涂先生",
        "東涌、鰂魚涌、深水埗、愛民邨、𨋢、嘅、佢哋",
    ):
        assert simplified(text) == ""


def test_chinese_is_simplified_before_conversion_and_never_after_it():
    chinese = [text for _, text in many(50)]
    share = sum(bool(simplified(text)) for text in chinese) / len(chinese)
    assert share > 0.95
    assert not any(simplified(parallel.traditional(text)) for text in chinese)


def test_a_model_of_texts_is_asked_as_its_texts_are_written(pairs):
    tokenizer = pairs.tokenizer
    for messages in pairs.conversations("train"):
        prompt, answer = in_text(tokenizer, messages)
        english, chinese = (message["content"] for message in messages)
        text = parallel.record_of(parallel.Settings(), "pretrain", english, chinese)
        end = tokenizer.end_of_text
        assert prompt + answer == [end, *tokenizer.encode(text), end]
        assert tokenizer.decode(answer) == messages[1]["content"]


def test_a_file_of_translations_is_scored_as_such(tmp_path, pairs):
    out = make_translator(tmp_path, pairs, "sft")
    english, chinese = (message["content"] for message in pairs.conversations("val")[0])
    lines = [{"Question": english}, {"Question": "The fund.", "Answer": "該基金。"}]
    report = ask_file(out, tmp_path / "x.jsonl", lines)
    asked = read_lines(out / "answers-x-file.jsonl")
    assert [record["reference"] for record in asked] == [chinese, "該基金。"]
    assert report | score_translations(asked) == report
    assert "rouge_l" not in report and not (out / "answers-seen.jsonl").exists()


# --- the answers to a file's questions ---------------------------------------------------------


def ask_file(out: Path, path: Path, records: list[dict]) -> dict:
    jsonl.write(path, records)
    flags = [f"--out_dir={out}", f"--start=FILE:{path}", "--eval_mode=True", "--device=cpu"]
    sample.main([*flags, "--max_new_tokens=20"])
    return read_json(out / "evaluation.json")


def test_a_files_answers_are_scored_against_its_own_or_the_datasets_references(tmp_path, capsys):
    out = make_run(tmp_path, "sft")
    known, unseen = QUESTIONS["train"][1], QUESTIONS["val"][0]
    records = [
        {"Question": "何人起义？", "Answer": "高祖。"},
        {"Question": known[0]["content"]},
        {"Question": "何人何时何地？"},
        {"Question": unseen[0]["content"], "Answer": None},
        {"Question": QUESTIONS["val"][1][0]["content"], "Answer": "文件先于数据。"},
    ]
    report = ask_file(out, tmp_path / "x.jsonl", records)
    assert read_json(out / "evaluation-x-file.json") == report
    assert (report["dataset"], report["split"]) == ("x", "file")
    assert (report["n"], report["n_seen"]) == (4, 1)
    asked, seen = read_lines(out / "answers.jsonl"), read_lines(out / "answers-seen.jsonl")
    wanted = ["高祖。", known[1]["content"], unseen[1]["content"], "文件先于数据。"]
    assert [r["reference"] for r in asked] == wanted
    assert [r["question"] for r in seen] == [known[0]["content"]]
    assert report["rouge_l_seen"] == seen[0]["rouge_l"]
    checkpoint = load_checkpoint(out)
    loss = slow_nats(checkpoint, dialogue("何人起义？", "高祖。"))
    assert asked[0]["perplexity"] == pytest.approx(perplexity([loss]), rel=1e-4)
    assert "4 questions; 1 without a reference were left out" in capsys.readouterr().out


def test_a_file_of_unseen_questions_alone_is_scored(tmp_path):
    out = make_run(tmp_path, "sft")
    report = ask_file(out, tmp_path / "x.jsonl", [{"Question": "何人？", "Answer": "高祖。"}])
    assert (report["n"], report["n_seen"], report["rouge_l_seen"]) == (1, 0, None)
    assert has_pictures(out)


def test_a_reference_too_long_for_the_model_is_cut_or_left_out_and_said(tmp_path, capsys):
    out = make_run(tmp_path, "sft")
    answers = {"其一？": "蛇不见了。" * 40, "其二？": "蛇" * 200, "其三？": "蛇。"}
    records = [{"Question": question, "Answer": answer} for question, answer in answers.items()]
    report = ask_file(out, tmp_path / "x.jsonl", records)
    asked = read_lines(out / "answers.jsonl")
    assert [r["question"] for r in asked] == ["其一？", "其三？"]
    assert len(asked[0]["reference"]) % 5 == 0 and len(asked[0]["reference"]) < 200
    assert report["n"] == 2
    assert "2 longer than block_size" in capsys.readouterr().out


def test_a_file_without_any_reference_or_no_file_is_refused(tmp_path):
    out = make_run(tmp_path, "sft")
    with pytest.raises(UserError, match="has a reference"):
        ask_file(out, tmp_path / "x.jsonl", [{"Question": "何人？"}])
    with pytest.raises(UserError, match="FILE:"):
        sample.main([f"--out_dir={out}", "--eval_mode=True", "--start=何人？", "--device=cpu"])
    novel = make_run(tmp_path / "novel", "pretrain")
    with pytest.raises(UserError, match="no answers"):
        ask_file(novel, tmp_path / "x.jsonl", [{"Question": "何人？", "Answer": "高祖。"}])
