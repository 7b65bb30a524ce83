"""Scores against slow versions and numbers worked by hand, and the reports of a tiny model."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from rouge import Rouge

import evaluations
import sample
from configurator import UserError
from data.translation import prepare_sft as translation_sft
from data_utils import IGNORE, Dataset
from evaluations import (
    LONGEST_FOR_ROUGE,
    distinct,
    in_chat,
    in_text,
    lcs_length,
    look_up,
    reference_losses,
    repeated,
    rouge_l,
)
from miniglm.checkpoint import load_checkpoint
from miniglm.devices import to_device
from miniglm.losses import next_token
from miniglm.prep import parallel
from miniglm.tokenizer import train_tokenizer
from miniglm.translation_scores import corpus_scores
from tests.helpers import (
    QUESTIONS,
    TEXT,
    dialogue,
    save_run,
    tiny_model,
    tiny_tokenizer,
    write_novel,
    write_questions,
)
from tests.prep.test_parallel import many, write_pairs

REPORT_KEYS = {
    *("dataset", "split", "tokens", "bytes", "perplexity", "bits_per_byte"),
    *("n", "rouge_l", "n_seen", "rouge_l_seen", "rouge_l_lookup"),
}


def slow_lcs(a: str, b: str) -> int:
    """The table of the textbook."""
    above = [0] * (len(b) + 1)
    for char in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if char == other else max(above[j + 1], row[j]))
        above = row
    return above[-1]


def slow_rouge_l(a: str, b: str) -> float:
    a, b = "".join(a.split()), "".join(b.split())
    common = slow_lcs(a, b)
    if common == 0:
        return 0.0
    precision, recall = common / len(a), common / len(b)
    return 2 * precision * recall / (precision + recall)


def random_text(generator: random.Random, length: int, chars: str = "魏蜀吴哈. 。a\n") -> str:
    return "".join(generator.choices(chars, k=length))


# --- scores of texts ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["孔明", "a", ".", "a.b.c.", "哈" * 60, TEXT, TEXT * 3, "　x "])
def test_a_text_against_itself_scores_one(text):
    assert rouge_l(text, text) == pytest.approx(1, abs=1e-6)


def test_rouge_l_equals_the_f1_of_the_plain_lcs_on_random_pairs():
    generator = random.Random(0)
    scores = []
    for pair in range(1000):
        a = random_text(generator, generator.choice([0, 1, 3, 10, 20]))
        b = random_text(generator, generator.choice([0, 1, 3, 10, 20]))
        if pair % 3 == 0:  # a repeats itself, and b is a with a hole and a new end
            a = a * generator.randint(1, 3)
            cut = generator.randint(0, len(a))
            b = a[:cut] + a[cut + 3 :] + b[:3]
        scores.append(rouge_l(a, b))
        assert scores[-1] == pytest.approx(slow_rouge_l(a, b), abs=1e-6), (a, b)
        assert 0 <= scores[-1] <= 1
    assert min(scores) == 0 and 0.2 < sum(scores) / 1000 < 0.8


@pytest.mark.parametrize(
    "a, b, score",
    [
        ("哈哈哈哈哈哈", "哈", 2 / 7),  # LCS 1 of 6 and 1
        ("孔明是谁。" * 3, "孔明是谁。", 0.5),  # 5 of 15 and 5
        ("孔明是诸葛亮", "诸葛亮是孔明", 0.5),  # 诸葛亮, 3 of 6 and 6
        ("a.b.c", "abc", 6 / 8),  # full stops are characters
        ("...", "..", 4 / 5),
        ("魏 蜀\n吴　", "魏蜀吴", 1),  # white space is not
        ("魏", "吴", 0),
        ("", "吴", 0),
        ("吴", "", 0),
        ("", "", 0),
        (" \n　", " ", 0),
    ],
)
def test_rouge_l_worked_by_hand(a, b, score):
    assert rouge_l(a, b) == pytest.approx(score, abs=1e-6)
    assert rouge_l(b, a) == pytest.approx(score, abs=1e-6)


def test_the_packages_own_defaults_would_score_repetition_as_perfect():
    [default] = Rouge(metrics=["rouge-l"]).get_scores(" ".join("哈哈哈哈哈哈"), "哈")
    assert default["rouge-l"]["f"] > 0.99
    assert rouge_l("哈哈哈哈哈哈", "哈") < 0.3


def test_both_ways_to_the_score_agree_where_one_gives_way_to_the_other():
    generator = random.Random(1)
    for total in range(LONGEST_FOR_ROUGE - 1, LONGEST_FOR_ROUGE + 3):
        for length in (1, total // 2, total - 1):
            a = random_text(generator, length, "魏蜀吴.")
            b = random_text(generator, total - length, "魏蜀吴.")
            wanted = 2 * slow_lcs(a, b) / total
            assert rouge_l(a, b) == pytest.approx(wanted, abs=1e-6)
            assert 2 * lcs_length(a, b) / total == wanted


def test_texts_of_5000_characters_have_a_score():
    novel = (TEXT * 12)[:5000]
    assert rouge_l(novel, novel) == pytest.approx(1, abs=1e-6)
    assert rouge_l("魏蜀" * 2500, "蜀魏" * 2500) == pytest.approx(4999 / 5000, abs=1e-6)
    random_5000 = random_text(random.Random(2), 5000, "魏蜀吴.")
    assert rouge_l("." * 5000, random_5000) == random_5000.count(".") / 5000
    assert rouge_l(novel, "龙") == 0


def test_lcs_length_equals_the_textbooks_table():
    generator = random.Random(3)
    for _ in range(100):
        a, b = (random_text(generator, generator.randint(0, 80), "魏蜀吴.") for _ in range(2))
        assert lcs_length(a, b) == slow_lcs(a, b)
    a, b = (random_text(generator, 500, "abcdefgh") for _ in range(2))
    assert lcs_length(a, b) == lcs_length(b, a) == slow_lcs(a, b)


def test_distinct_and_repeated_worked_by_hand():
    # ab bc ca ab bc | ab: 3 different of 6
    assert distinct(["abcabc", "ab"]) == 3 / 6
    # abab baba abab baba | abab: 2 of 5 stood in the same text before
    assert repeated(["abababa", "abab"]) == 2 / 5
    assert repeated(["aaaaa"], n=1) == 4 / 5
    assert distinct(["魏蜀吴"], n=1) == 1
    assert distinct([]) == distinct(["", "a"]) == repeated([]) == repeated(["abc"]) == 0


def test_look_up_takes_the_question_that_shares_most_character_pairs():
    known = [("孔明是谁？", "A"), ("曹操是谁？", "B"), ("孔明何时出山？", "C"), ("谁", "D")]
    asked = ["孔明到底是谁？", "曹操是谁？", "孔明于何时出山？", "刘备是谁？"]
    assert look_up(asked[:3], known) == ["A", "B", "C"]
    assert look_up(asked[3:], known) in (["A"], ["B"])
    assert look_up([], known) == []


@pytest.mark.parametrize("question", ["孔明是谁？", "谁", "哈哈哈", "哈哈"])
def test_look_up_finds_the_very_question_that_is_known(question):
    known = [("谁啊", "A"), ("谁", "B"), ("哈哈哈", "C"), ("哈哈", "D")]
    known += [("曹操是谁？孔明是谁？", "E"), ("孔明是谁？", "F")]
    assert look_up([question], known) == [dict(known)[question]]


# --- scores of a model -------------------------------------------------------------------------


def slow_nats(checkpoint, messages: list[dict]) -> tuple[float, int]:
    """The sum of -log p of the last message's tokens and its end, and how many they are."""
    tokenizer, model = checkpoint.tokenizer, checkpoint.model
    prompt = tokenizer.render_prompt(messages[:-1])
    answer = [*tokenizer.encode(messages[-1]["content"]), tokenizer.end]
    with torch.no_grad():
        logits = model.head(model(torch.tensor([prompt + answer])))[0].double()
    log_probs = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]
    return -sum(log_probs[i, id].item() for i, id in enumerate(answer)), len(answer)


def make_run(tmp_path: Path, kind: str, **options) -> Path:
    """An out_dir of a random model, with the dataset beside it."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(**{"n_vocab": tokenizer.n_vocab, "block_size": 128} | options)
    if kind == "sft":
        data = write_questions(tmp_path / "toy_sft", tokenizer)
    else:
        data = write_novel(tmp_path / "toy", tokenizer)
    return save_run(tmp_path / "out-toy", model, tokenizer, data, kind)


def evaluate(out: Path, *flags: str) -> dict:
    evaluations.main([f"--out_dir={out}", "--device=cpu", "--max_new_tokens=20", *flags])
    return read_json(out / "evaluation.json")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n") and path.stat().st_size > 2000


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_reference_perplexities_are_those_of_each_answer_alone(tmp_path, batch_size):
    checkpoint = load_checkpoint(make_run(tmp_path, "sft"))
    conversations = [m for m in QUESTIONS["train"] + QUESTIONS["val"] if len(m) == 2]
    losses = reference_losses(checkpoint, conversations, batch_size)
    got = [math.exp(nats / tokens) for nats, tokens, _ in losses]
    slow = [slow_nats(checkpoint, messages) for messages in conversations]
    assert got == pytest.approx([math.exp(nats / count) for nats, count in slow], rel=1e-4)
    assert max(got) > 1.5 * min(got)


def test_the_perplexity_of_a_later_turn_is_that_of_its_own_answer(tmp_path):
    checkpoint = load_checkpoint(make_run(tmp_path, "sft"))
    messages = QUESTIONS["train"][2]
    assert len(messages) == 4
    nats, count = slow_nats(checkpoint, messages)
    [(nats, tokens, _)] = reference_losses(checkpoint, [messages], 1)
    got = math.exp(nats / tokens)
    assert got == pytest.approx(math.exp(nats / count), rel=1e-4)


@pytest.mark.parametrize("split", ["val", "train"])
def test_the_report_of_questions_holds_what_its_answers_say(tmp_path, split):
    out = make_run(tmp_path, "sft")
    report = evaluate(out, f"--split={split}", "--batch_size=2")
    assert set(report) >= REPORT_KEYS
    assert read_json(out / f"evaluation-toy_sft-{split}.json") == report
    assert (report["dataset"], report["split"]) == ("toy_sft", split)
    asked, seen = read_lines(out / "answers.jsonl"), read_lines(out / "answers-seen.jsonl")
    assert read_lines(out / f"answers-toy_sft-{split}.jsonl") == asked
    wanted = QUESTIONS[split]
    assert [r["question"] for r in asked] == [m[-2]["content"] for m in wanted]
    assert [r["reference"] for r in asked] == [m[-1]["content"] for m in wanted]
    assert report["n"] == len(asked) == len(wanted)
    assert report["n_seen"] == len(seen) == len(wanted)
    trained = [m[-2]["content"] for m in QUESTIONS["train"]]
    assert len({r["question"] for r in seen} & set(trained)) == len(seen)
    for records, key in ((asked, "rouge_l"), (seen, "rouge_l_seen")):
        for record in records:
            slow = slow_rouge_l(record["answer"], record["reference"])
            assert record["rouge_l"] == pytest.approx(slow, abs=1e-6)
        assert report[key] == pytest.approx(mean([r["rouge_l"] for r in records]))
    known = [(m[-2]["content"], m[-1]["content"]) for m in QUESTIONS["train"]]
    found = look_up([r["question"] for r in asked], known)
    scores = [slow_rouge_l(text, r["reference"]) for text, r in zip(found, asked, strict=True)]
    assert report["rouge_l_lookup"] == pytest.approx(mean(scores), abs=1e-6)
    assert report["rouge_l_lookup"] > (0.99 if split == "train" else 0.1)
    assert is_picture(out / "rouge_l.png") and is_picture(out / "perplexity.png")


def test_bits_per_byte_of_questions_by_hand(tmp_path):
    out = make_run(tmp_path, "sft")
    report = evaluate(out)
    checkpoint = load_checkpoint(out)
    slow = [slow_nats(checkpoint, messages) for messages in QUESTIONS["val"]]
    nats, count = sum(n for n, _ in slow), sum(c for _, c in slow)
    n_bytes = sum(len(m[-1]["content"].encode()) for m in QUESTIONS["val"])
    assert (report["tokens"], report["bytes"]) == (count, n_bytes)
    assert report["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert report["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_the_report_of_a_novel_by_hand(tmp_path):
    out = make_run(tmp_path, "pretrain", block_size=32)
    report = evaluate(out, "--batch_size=3")
    assert read_json(out / "evaluation-toy-val.json") == report
    assert not (out / "answers.jsonl").exists()
    checkpoint, data = load_checkpoint(out), Dataset(str(tmp_path / "toy"))
    ids = data.tokens["val"].astype(int).tolist()
    nats = 0.0
    for start in range(0, len(ids) - 1, 32):
        window = ids[start : start + 33]
        with torch.no_grad():
            logits = checkpoint.model.head(checkpoint.model(torch.tensor([window[:-1]])))[0]
        log_probs = logits.double().log_softmax(dim=-1)
        nats -= sum(log_probs[i, id].item() for i, id in enumerate(window[1:]))
    n_bytes = sum(len(checkpoint.tokenizer._bytes[id]) for id in ids[1:])
    assert (report["tokens"], report["bytes"]) == (len(ids) - 1, n_bytes)
    assert n_bytes > len(ids)
    assert report["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
    assert report["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_a_report_twice_is_the_same_but_for_its_time(tmp_path):
    out = make_run(tmp_path, "sft")
    first, answers = evaluate(out, "--temperature=1"), read_lines(out / "answers.jsonl")
    second = evaluate(out, "--temperature=1", "--batch_size=1")
    for record, again in zip(answers, read_lines(out / "answers.jsonl"), strict=True):
        assert again == record | {"perplexity": pytest.approx(record["perplexity"], rel=1e-5)}
    for report in (first, second):
        del report["seconds"]
    assert second == {
        key: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        for key, value in first.items()
    }


def test_a_memorised_answer_scores_one(tmp_path):
    tokenizer = tiny_tokenizer()
    data = Dataset(str(write_questions(tmp_path / "toy_sft", tokenizer)))
    model = tiny_model(n_vocab=tokenizer.n_vocab, block_size=128, n_embd=64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    [batch] = data.eval_batches("train", 128, 8)
    count = int((batch[1] != IGNORE).sum())
    for _ in range(120):
        optimizer.zero_grad()
        (next_token(model, *to_device(batch, "cpu")) / count).backward()
        optimizer.step()
    out = save_run(tmp_path / "out", model, tokenizer, data.path, "sft")
    report = evaluate(out, "--split=train", "--max_new_tokens=100")
    assert report["rouge_l"] == pytest.approx(1, abs=1e-6)
    assert report["perplexity"] < 1.1
    assert report["ended"] == 1
    assert report["answer_characters"] == report["reference_characters"]
    assert evaluate(out, "--max_new_tokens=100")["rouge_l"] < 0.9


def test_an_evaluation_that_cannot_be_is_refused(tmp_path):
    out = make_run(tmp_path, "sft")
    with pytest.raises(UserError, match="no split 'test'"):
        evaluate(out, "--split=test")
    other = write_novel(tmp_path / "other", train_tokenizer([TEXT], 300))
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate(out, f"--dataset={other}")
    with pytest.raises(UserError, match="no checkpoint in"):
        evaluate(tmp_path / "nothing")


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


def slow_translation(out: Path, prompt: list[int], count: int) -> list[int]:
    """The likeliest ids behind the prompt, one after another."""
    model, ids = load_checkpoint(out).model, list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + count:
            ids.append(int(model.head(model(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(("kind", "ask"), [("sft", in_chat), ("pretrain", in_text)])
def test_the_report_of_translations_holds_what_its_texts_say(tmp_path, pairs, kind, ask):
    out = make_translator(tmp_path, pairs, kind)
    report = evaluate(out, "--split=test", "--batch_size=5")
    assert read_json(out / "evaluation-toy_sft-test.json") == report
    asked = read_lines(out / "answers-toy_sft-test.jsonl")
    assert read_lines(out / "answers.jsonl") == asked
    wanted = pairs.conversations("test")
    assert [[r["question"], r["reference"]] for r in asked] == [
        [message["content"] for message in messages] for messages in wanted
    ]
    assert {key: report[key] for key in corpus_scores(asked)} == corpus_scores(asked)
    assert not [key for key in report if "rouge" in key or "seen" in key]
    assert {*asked[0]} == {"question", "reference", "answer", "perplexity", "ended"}
    assert not [*out.glob("*seen*"), *out.glob("*.png")]
    tokenizer = pairs.tokenizer
    nats, counts = zip(
        *(slow_ask(out, *ask(tokenizer, messages)) for messages in wanted), strict=True
    )
    assert report["tokens"] == sum(counts)
    assert report["bytes"] == sum(len(r["reference"].encode()) for r in asked)
    assert report["perplexity"] == pytest.approx(math.exp(sum(nats) / sum(counts)), rel=1e-4)
    for record, n, count in zip(asked, nats, counts, strict=True):
        assert record["perplexity"] == pytest.approx(math.exp(n / count), rel=1e-4)
    ids = slow_translation(out, ask(tokenizer, wanted[0])[0], 20)
    end = next((i for i, id in enumerate(ids) if id in tokenizer.stop_ids), 20)
    assert asked[0]["answer"] == tokenizer.decode(ids[:end])
    assert asked[0]["ended"] == (end < 20)


def slow_ask(out: Path, prompt: list[int], answer: list[int]) -> tuple[float, int]:
    """The sum of -log p of an answer's ids behind the prompt, and how many they are."""
    model = load_checkpoint(out).model
    with torch.no_grad():
        logits = model.head(model(torch.tensor([prompt + answer])))[0].double()
    log_probs = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]
    return -sum(log_probs[i, id].item() for i, id in enumerate(answer)), len(answer)


def test_a_model_of_texts_is_asked_as_its_texts_are_written(pairs):
    tokenizer = pairs.tokenizer
    for messages in pairs.conversations("train"):
        prompt, answer = in_text(tokenizer, messages)
        text = parallel.as_text(*(message["content"] for message in messages))
        end = tokenizer.end_of_text
        assert prompt + answer == [end, *tokenizer.encode(text), end]
        assert tokenizer.decode(answer) == messages[1]["content"]


def test_translations_are_greedy_whatever_the_seed(tmp_path, pairs):
    out = make_translator(tmp_path, pairs, "pretrain")
    texts = [
        [evaluate(out, "--split=test", *flags)] and (out / "answers.jsonl").read_bytes()
        for flags in (["--seed=1"], ["--seed=2"], ["--temperature=1"])
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_file_of_translations_is_scored_as_such(tmp_path, pairs):
    out = make_translator(tmp_path, pairs, "sft")
    english, chinese = (message["content"] for message in pairs.conversations("val")[0])
    asked = [{"Question": english}, {"Question": "The fund.", "Answer": "該基金。"}]
    report = ask_file(out, tmp_path / "x.jsonl", asked)
    found = read_lines(out / "answers-x-file.jsonl")
    assert [record["reference"] for record in found] == [chinese, "該基金。"]
    assert {key: report[key] for key in corpus_scores(found)} == corpus_scores(found)
    assert "rouge_l" not in report and not (out / "answers-seen.jsonl").exists()


# --- the answers to a file's questions ---------------------------------------------------------


def ask_file(out: Path, path: Path, records: list[dict]) -> dict:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
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
    assert (report["n"], report["unmatched"], report["n_seen"]) == (4, 1, 1)
    asked, seen = read_lines(out / "answers.jsonl"), read_lines(out / "answers-seen.jsonl")
    assert [r["reference"] for r in asked] == [
        "高祖。",
        known[1]["content"],
        unseen[1]["content"],
        "文件先于数据。",
    ]
    assert [r["question"] for r in seen] == [known[0]["content"]]
    assert report["rouge_l"] == pytest.approx(mean([r["rouge_l"] for r in asked]))
    assert report["rouge_l_seen"] == seen[0]["rouge_l"]
    checkpoint = load_checkpoint(out)
    for record in asked:
        nats, count = slow_nats(checkpoint, dialogue(record["question"], record["reference"]))
        assert record["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert "4 questions; 1 without a reference were left out" in capsys.readouterr().out
    assert is_picture(out / "rouge_l.png") and is_picture(out / "perplexity.png")


def test_a_file_of_unseen_questions_alone_is_scored(tmp_path):
    out = make_run(tmp_path, "sft")
    report = ask_file(out, tmp_path / "x.jsonl", [{"Question": "何人？", "Answer": "高祖。"}])
    assert (report["n"], report["n_seen"], report["rouge_l_seen"]) == (1, 0, None)
    assert is_picture(out / "rouge_l.png")


def test_a_reference_too_long_for_the_model_is_cut_or_left_out_and_said(tmp_path, capsys):
    out = make_run(tmp_path, "sft")
    records = [
        {"Question": "其一？", "Answer": "蛇不见了。" * 40},
        {"Question": "其二？", "Answer": "蛇" * 200},
        {"Question": "其三？", "Answer": "蛇。"},
    ]
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
