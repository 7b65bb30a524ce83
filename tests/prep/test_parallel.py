"""Pairs of English and Chinese: on small files, and on Hong Kong's where they were fetched."""

import itertools
import random
from pathlib import Path

import pytest

from configurator import ROOT, UserError
from data.finance import prepare as finance
from data.finance import prepare_sft as finance_sft
from data.translation import prepare as translation
from data.translation import prepare_sft as translation_sft
from data_utils import Dataset
from miniglm.prep import parallel
from miniglm.prep.forms import BadRecord
from miniglm.prep.parallel import pair_of, role_of, tidy, traditional
from miniglm.prep.similar import letters_of
from miniglm.tokenizer import train_tokenizer
from tests.data.test_datasets import documents
from tests.helpers import TEXT, write_lines

SUBJECTS = {"fund": "基金", "bank": "银行", "court": "法院", "tenant": "租客", "judge": "法官"}
SUBJECTS |= {"Secretary": "司长", "company": "公司", "investor": "投资者", "owner": "业主"}
DEEDS = {"may sell": "可以出售", "shall report": "须要报告", "has refused": "已经拒绝"}
DEEDS |= {"must keep": "必须保存", "will review": "将会检讨", "cannot transfer": "不得转让"}
THINGS = {"shares": "股份", "the land": "该幅土地", "a written order": "一项书面命令"}
THINGS |= {"all bonds": "所有债券", "the appeal": "该宗上诉", "its accounts": "其账目"}
TIMES = {"at noon": "于中午时分", "within 3 days": "在三日之内", "every year": "每年一次"}
TIMES |= {"before the hearing": "于聆讯之前", "without delay": "不得延误"}


def many(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different pairs whose English differs in two words or more."""
    draw, pairs = random.Random(seed), {}
    while len(pairs) < count:
        kinds = (SUBJECTS, DEEDS, THINGS, TIMES, SUBJECTS, THINGS)
        words = [draw.choice([*kind]) for kind in kinds]
        a, b, c, d, e, f = (kind[word] for kind, word in zip(kinds, words, strict=True))
        pairs["The {} {} {} {} to the {} {}.".format(*words)] = f"{a}{d}{b}{c}予{e}及{f}。"
    return [*pairs.items()]


def write_pairs(path: Path, pairs: list) -> Path:
    return write_lines(path, map("\t".join, pairs))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a tokenizer, where no file of Hong Kong lies."""
    for name in ("GENERAL", "FINANCE"):
        monkeypatch.setattr(parallel, name, [])
    train_tokenizer([TEXT, *(f"{a} {b}" for a, b in many(50))], 400).save(
        tmp_path / "tokenizer.json"
    )
    return tmp_path


def prepared(script, folder: Path, *words: str, name: str = "out") -> Dataset:
    script.main([*words, f"--out={folder / name}", f"--tokenizer={folder}", "--val=0.1"])
    return Dataset(str(folder / name))


# --- a pair --------------------------------------------------------------------------------------


def test_chinese_becomes_traditional_by_the_words():
    for simplified, expected in (
        ("证监会须发出书面通知。", "證監會須發出書面通知。"),
        ("皇后大道后面的里程", "皇后大道後面的里程"),  # 后 and 里 stay in words that have them
        ("獲准干预", "獲准干預"),  # what was Traditional already keeps its words
        ("Section 5(1)", "Section 5(1)"),
    ):
        assert traditional(simplified) == traditional(expected) == expected


def test_either_language_may_come_first():
    for english, chinese in [*many(3), ("Rule 4B(4)", "第 4B(4) 条"), ("Ends", "完")]:
        for first, second in ((english, chinese), (chinese, english)):
            assert pair_of({"1": first, "2": second}, {}) == (english, chinese)
        assert pair_of({"translation": {"en": english, "zh": chinese}}, {}) == (english, chinese)


def test_a_sentence_is_tidied():
    assert tidy("(  a ) 《选举 ( 舞弊 ) 条例》") == "(a) 《选举 (舞弊) 条例》"
    assert tidy(r"\n[107] At 292. \n[130] Article:") == "[107] At 292. [130] Article:"
    assert tidy("”  另一方面，") == "另一方面，"


@pytest.mark.parametrize(
    ("english", "chinese", "reason"),
    [
        ("Operating income", "Operating expenses", "too little Chinese"),
        ("1,200", "一千二百", "no English"),
        ("The fund may sell all of its shares at noon.", "基金。", "lengths do not match"),
        ("The fund may sell all its shares.", "基金可以" * 10, "lengths do not match"),
        ("word " * 400, "字" * 500, "too long"),
        ("The fund.", " ", "empty answer"),
    ],
)
def test_what_cannot_be_a_translation_is_left_out(english, chinese, reason):
    with pytest.raises(BadRecord) as found:
        pair_of({"1": english, "2": chinese}, {})
    assert found.value.reason == reason


def test_without_validation_there_is_no_test_either(folder):
    words = [f"--input={write_pairs(folder / 'a.tsv', many(9))}", f"--tokenizer={folder}"]
    translation.main([*words, f"--out={folder / 'out'}", "--val=0"])
    assert {*Dataset(str(folder / "out")).tokens} == {"train"}


def test_roles_have_their_shares_and_hang_on_the_letters_alone():
    letters = [letters_of(english) for english, _ in many(3000)]
    roles = [role_of(text, 0.1) for text in letters]
    shares = {role: round(roles.count(role) / 3000, 1) for role in ("test", "val", "train")}
    assert shares == {"test": 0.1, "val": 0.1, "train": 0.8}
    assert role_of(letters_of("The Fund, may sell!"), 0.1) == role_of("thefundmaysell", 0.1)
    smaller = [role_of(text, 0.05) for text in letters]  # a test of a smaller share is part of it
    assert {a for a, b in zip(roles, smaller, strict=True) if b == "test"} == {"test"}


# --- datasets ------------------------------------------------------------------------------------


def test_pairs_become_texts_and_conversations(folder):
    pairs = many(120)
    for name, column in zip(("a.en", "a.zh"), zip(*pairs, strict=True), strict=True):
        (folder / name).write_text("\n".join(column), encoding="gb18030")
    words = [f"--input={folder / 'a.en'}", f"--target={folder / 'a.zh'}"]
    data = prepared(translation, folder, *words)
    texts = {split: documents(data, split) for split in data.tokens}
    expected = sorted(f"{a}\n{traditional(b)}" for a, b in pairs)
    assert sorted(itertools.chain(*texts.values())) == expected
    conversations = prepared(translation_sft, folder, *words)
    assert data.languages == conversations.languages == ["en", "zh-Hant"]
    for split, found in texts.items():
        assert found
        assert all(role_of(letters_of(text.split("\n")[0]), 0.1) == split for text in found)
        rows = [[turn["content"] for turn in row] for row in conversations.conversations(split)]
        assert rows == [text.split("\n") for text in found]


def english_of(data: Dataset) -> list[str]:
    """The sentences of all splits, in order."""
    return sorted(text.split("\n")[0] for split in data.tokens for text in documents(data, split))


def of_role(pairs: list, role: str) -> list:
    return [pair for pair in pairs if role_of(letters_of(pair[0]), 0.1) == role]


def test_what_is_left_out_is_counted_by_reason(folder):
    pairs = many(120)
    english, chinese = of_role(pairs, "train")[0]
    extra = [
        (english, chinese),  # the very same
        (english.upper().replace(".", " !"), "另一" + chinese),  # but for case and punctuation
        (english.replace("The ", "A "), chinese + "另一译"),  # nearly the same
        ("Operating income", "Operating expenses"),
        ("The fund may sell all its shares before noon.", "基金。"),
    ]
    data = prepared(translation, folder, f"--input={write_pairs(folder / 'a.tsv', pairs + extra)}")
    assert english_of(data) == sorted(english for english, _ in pairs)
    assert data.meta["skipped"] == {"lengths do not match": 1, "too little Chinese": 1}
    assert data.meta["not_taken"] == {"English nearly the same": 1, "English the same": 1}
    assert data.meta["splits"]["train"]["skipped: duplicate"] == 1


def test_neither_a_sentence_like_one_of_the_test_nor_its_chinese_is_trained(folder):
    pairs = many(160)
    tested = of_role(pairs, "test")
    like = [(english.replace("The ", "Any "), "任何" + chinese) for english, chinese in tested]
    like = of_role(like, "train")
    others = [pair for pair in many(400, seed=3) if pair not in pairs]
    others = [pair for pair in others if pair not in of_role(others, "test")]
    same = [(others.pop()[0], chinese) for _, chinese in tested]
    file = write_pairs(folder / "a.tsv", like + same + pairs)  # they come first, and go anyway
    data = prepared(translation, folder, f"--input={file}")
    assert english_of(data) == sorted(english for english, _ in pairs)
    assert data.meta["not_taken"]["Chinese of a test"] == len(same) > 4
    assert data.meta["not_taken"]["English nearly the same"] == len(like) > 4


def test_the_tests_of_either_domain_are_unseen_by_the_other(folder, monkeypatch):
    """Files where each domain has what the other tests, word for word and nearly so."""
    law, money = many(150, seed=1), many(150, seed=2)
    for own, other in ((law, money), (money, law)):
        tested = of_role(other, "test")[:4]
        own += [(f"“{a.replace('The ', 'the ')}”", f"“{b}”") for a, b in tested]
        own += [(f"Any{a[3:]}", f"任何{b}") for a, b in tested]
    files = [str(write_pairs(folder / f"{n}.tsv", rows)) for n, rows in enumerate((law, money))]
    monkeypatch.setattr(parallel, "GENERAL", files[:1])
    monkeypatch.setattr(parallel, "FINANCE", files[1:])
    letters = []
    for script in (translation_sft, finance_sft):
        data = prepared(script, folder, name=script.__name__)
        rows = {split: data.conversations(split) for split in data.tokens}
        letters.append({s: {letters_of(row[0]["content"]) for row in rows[s]} for s in rows})
    for tested, trained in itertools.product(letters, letters):
        assert not tested["test"] & trained["train"]
        assert not any(f"any{text[3:]}" in trained["train"] for text in tested["test"])


def test_a_pair_that_is_too_long_is_left_out_whole(folder):
    long = ("The fund may sell shares. " * 20, "基金可以出售股份。" * 20)
    file = write_pairs(folder / "a.tsv", [*many(120), long])
    data = prepared(translation_sft, folder, f"--input={file}", "--max_tokens=128")
    assert data.meta["not_taken"] == {"longer than --max_tokens": 1}
    assert sum(len(data.conversations(split)) for split in data.tokens) == 120
    assert not any("cut: answer" in sizes for sizes in data.meta["splits"].values())


def test_files_that_were_not_fetched_are_one_line(folder, monkeypatch):
    monkeypatch.setattr(parallel, "GENERAL", ["data/raw/hongkong/gone.tsv"])
    for absent in ([], ["--input=data/raw/hongkong/gone*.tsv"], ["--input=data/raw/hongkong/**x"]):
        with pytest.raises(UserError, match="data/raw/hongkong is not complete; run python data/f"):
            prepared(translation, folder, *absent)


# --- Hong Kong's files ---------------------------------------------------------------------------

needs_files = pytest.mark.skipif(
    not all((ROOT / name).is_file() for name in parallel.GENERAL + parallel.FINANCE),
    reason="Hong Kong's texts are not here; run python data/fetch_data.py hongkong",
)


@pytest.mark.slow
@needs_files
def test_no_test_sentence_of_hong_kong_is_trained_and_no_simplified_one_is_left(tmp_path):
    train_tokenizer([TEXT], 300).save(tmp_path / "tokenizer.json")
    pairs = {"train": set(), "val": set(), "test": set()}
    for script in (translation, finance):
        script.main([f"--out={tmp_path / script.__name__}", f"--tokenizer={tmp_path}"])
        data = Dataset(str(tmp_path / script.__name__))
        for split, found in pairs.items():
            found.update(tuple(text.split("\n")) for text in documents(data, split))
    trained = {letters_of(a) for a, _ in pairs["train"]}
    held_out = {letters_of(a) for a, _ in pairs["val"] | pairs["test"]}
    assert len(trained) > 55000 and len(held_out) > 2000
    assert not trained & held_out
    answers = {letters_of(b) for _, b in pairs["train"] | pairs["val"]}
    assert not answers & {letters_of(b) for _, b in pairs["test"]}
    chinese = {b for found in pairs.values() for _, b in found}
    assert not [text for text in chinese if traditional(text) != text]
