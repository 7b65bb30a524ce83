"""What goes up to a hub is there as it was: the real client, and a hub on this machine."""

import json
import re
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml

import evaluations
import export
import train
from configurator import ROOT, UserError, configure
from data import upload
from data_utils import Dataset
from miniglm.checkpoint import load_checkpoint, read_log, read_run
from miniglm.interop.hub import CardSettings
from miniglm.prep.writer import write_pretrain
from tests.helpers import TEXT, save_run, tiny_model, tiny_tokenizer
from tests.hub import TOKEN, USER, Hub, Repository, logged_in
from tests.runs import contents, error_line, free_port, pointer, read_json, train_here, words

REPO = f"{USER}/a-model"
CARD = CardSettings(repo=REPO)


@pytest.fixture
def hub(tmp_path, run_ready):
    with logged_in(tmp_path / "hf_home", run_ready) as hub:
        yield hub


@pytest.fixture(scope="module")
def answers(toys):
    """A run on questions, from a model of a text, with its evaluation."""
    data = {"dataset": toys / "questions", "init_from": toys / "base"}
    out_dir = train_here(out_dir=toys / "answers", **data)
    evaluations.main(words(out_dir=out_dir, device="cpu", max_new_tokens=8))
    return out_dir


@pytest.fixture(scope="module")
def uploaded(answers, run_ready, tmp_path_factory):
    """What the hub has of this run, and the run as it comes down again."""
    (answers / "marks.jsonl").write_text('{"prompt": "private"}\n', encoding="utf-8")
    folder = tmp_path_factory.mktemp("uploaded")
    with logged_in(folder / "hf_home", run_ready) as hub:
        assert went_up(hub, answers) == f"{hub.url}/{REPO}"
        link = (answers / "hub_url.txt").read_text(encoding="utf-8")
        assert link == f"{hub.url}/{REPO}\n"
        repository = hub.repositories[f"models/{REPO}"]
    return repository, come_down(repository, folder / "there")


def go_up(hub: Hub, path: Path, repo: str = REPO, **settings: object) -> CompletedProcess:
    """The command line in a process of its own, whose output never has the token."""
    done = hub.run("data/upload.py", *words(path=path, repo=repo, **settings))
    assert TOKEN not in done.stdout + done.stderr
    return done


def went_up(hub: Hub, path: Path, **settings: object) -> str:
    """The address that it printed."""
    done = go_up(hub, path, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def come_down(repository: Repository, to: Path) -> Path:
    """All its files, as `hf download` writes them."""
    for name, content in repository.files.items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(content)
    return to


def novel(path: Path, source: str = "test") -> Path:
    lines = TEXT.splitlines()
    write_pretrain(path, tiny_tokenizer(), {"train": lines[:3], "val": lines[3:]}, [source])
    return path


def metadata(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def figures(card: str) -> dict[str, list[str]]:
    """The lines of its tables by their first column."""
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("|")]
    return {name.strip("`"): values for name, *values in rows}


def card_of(path: Path, about: CardSettings = CARD) -> str:
    return upload.gather(path, about).files["README.md"].decode()


# --- there and back ----------------------------------------------------------------------------


def test_a_run_that_went_up_is_an_out_dir_when_it_comes_down(answers, uploaded):
    repository, there = uploaded
    step = pointer(answers, "best")
    assert {*repository.files} == {
        *(".gitattributes", "README.md", "latest", "best", "log.jsonl"),
        *("evaluation.json", "evaluation-questions-val.json", "rouge_l.png", "perplexity.png"),
        *(f"{step}/{name}" for name in ("model.safetensors", "tokenizer.json", "run.json")),
    }
    assert repository.messages == ["initial commit", "Upload answers"]
    for name in ("log.jsonl", "rouge_l.png"):
        assert (there / name).read_bytes() == (answers / name).read_bytes()
    assert read_json(there / "evaluation.json") == read_json(answers / "evaluation.json")
    ours, theirs = load_checkpoint(answers), load_checkpoint(there)
    weights = theirs.model.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in ours.model.state_dict().items())
    assert theirs.tokenizer.sha256 == ours.tokenizer.sha256
    place = answers.parent.parent.as_posix()
    assert place in json.dumps(read_run(answers, "best"))  # else this shows nothing
    for name, content in repository.files.items():
        assert TOKEN.encode() not in content and place.encode() not in content, name


def test_a_dataset_that_went_up_is_one_when_it_comes_down(toys, hub, tmp_path):
    path = toys / "questions"
    url = went_up(hub, path, repo=f"{USER}/ids")
    assert url == f"{hub.url}/datasets/{USER}/ids"
    there = come_down(hub.repositories[f"datasets/{USER}/ids"], tmp_path / "there")
    before, after = contents(path), contents(there)
    for name in before.keys() - {"hub_url.txt"}:
        assert after[name] == before[name], name
    Dataset(str(there))


def test_an_exported_model_goes_up_as_it_is(hub, tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(block_size=128, n_vocab=tokenizer.n_vocab)
    out_dir = save_run(tmp_path / "out", model, tokenizer, tmp_path, "sft")
    export.main(words(out_dir=out_dir, to=tmp_path / "exported"))
    before = contents(tmp_path / "exported")
    went_up(hub, tmp_path / "exported")
    files = hub.repositories[f"models/{REPO}"].files
    assert {name: files[name] for name in before} == before
    card = files["README.md"].decode()
    assert metadata(card)["library_name"] == "transformers"
    padding = (model.config.vocab_size - model.config.n_vocab) * model.config.n_embd
    assert figures(card)["parameters"] == [f"{model.n_params() - padding:,}"]


def test_a_second_upload_leaves_nothing_of_the_first(hub, tmp_path):
    lines = TEXT.splitlines()
    parts = {"train": lines[:3], "val": lines[3:4], "test": lines[4:]}
    for names in (["train", "val", "test"], ["train", "val"]):
        splits = {name: parts[name] for name in names}
        write_pretrain(tmp_path / "data", tiny_tokenizer(), splits, ["test"])
        went_up(hub, tmp_path / "data")
        files = hub.repositories[f"datasets/{REPO}"].files
        assert ("test.bin" in files) == ("test" in names) and ".gitattributes" in files


# --- cards -------------------------------------------------------------------------------------


def test_the_figures_of_a_card_are_the_runs(answers):
    card = card_of(answers, CardSettings(REPO, "mit", ["en", "zh"]))
    assert metadata(card) == {
        "language": ["en", "zh"],
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["miniglm", "gpt"],
    }
    run_json, report = read_run(answers, "best"), read_json(answers / "evaluation.json")
    progress = run_json["progress"]
    [record] = [r for r in read_log(answers) if r["iter"] == progress["iter"]]
    measured = {name: record[name] for name in ("train_loss", "val_loss", "val_bits_per_byte")}
    measured |= {name: report[name] for name in ("perplexity", "rouge_l", "rouge_l_seen")}
    expected = {name: f"{value:.4g}" for name, value in measured.items()} | {
        "parameters": f"{sum(p.numel() for p in load_checkpoint(answers).model.parameters()):,}",
        "steps": str(progress["iter"]),
        "tokens read": f"{progress['tokens']:,}",
        "dataset": "questions (questions and answers)",
        "n": str(report["n"]),
    }
    rows = figures(card)
    assert {name: rows[name] for name in expected} == {k: [v] for k, v in expected.items()}
    for name in ("n_layer", "n_embd", "n_hidden", "block_size"):
        assert f"`{name}={run_json['architecture'][name]}`" in card
    assert "Not stated yet" not in card
    assert "answers questions" in card and "on from the model in `base`" in card


@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_the_command_of_a_card_is_that_of_the_run(toys, tmp_path, model):
    given = {"model": model, "max_iters": 2, "prompts": ["刘备", "a, b"], "learning_rate": 2e-3}
    # 8 heads of keys and values is what no setting at all gives, but not beside 16 heads
    given |= {"n_head": 16, "n_kv_head": 8, "n_embd": 64} if model == "gpt" else {"n_head": 8}
    out_dir = train_here(dataset=toys / "text", out_dir=tmp_path / "run", **given)
    card = card_of(out_dir)
    [line] = [line for line in card.splitlines() if line.startswith("    python train")]
    config = configure(train.Settings, shlex.split(line)[2:])
    again = upload.public(read_run(out_dir, "best")["settings"])
    assert asdict(config) | {"prompts": again["prompts"]} == again
    assert again["dataset"] == "text" and again["max_iters"] == 2


def test_the_languages_of_a_card_are_those_asked_for_or_the_datasets(toys, tmp_path):
    data = shutil.copytree(toys / "text", tmp_path / "data")
    meta = read_json(data / "meta.json") | {"languages": ["en", "zh-Hant"]}
    (data / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    out_dir = train_here(dataset=data, out_dir=tmp_path / "run", max_iters=1)
    for path in (data, out_dir):
        assert metadata(card_of(path))["language"] == ["en", "zh"]
        assert metadata(card_of(path, CardSettings(REPO, "", ["fr"])))["language"] == ["fr"]
    shutil.rmtree(data)
    for path in (out_dir, toys / "text"):
        assert metadata(card_of(path))["language"] == ["zh"]


def test_an_evaluation_of_another_checkpoint_stays_here(answers, tmp_path, capsys):
    out_dir = shutil.copytree(answers, tmp_path / "copy")
    report = read_json(out_dir / "evaluation.json") | {"checkpoint": "step-000003", "n": 4321}
    (out_dir / "evaluation-old-val.json").write_text(json.dumps(report), encoding="utf-8")
    files = upload.gather(out_dir, CARD).files
    assert "evaluation-old-val.json" not in files and "evaluation.json" in files
    assert "4,321" not in files["README.md"].decode()
    assert "evaluation-old-val.json is of step-000003, not of" in capsys.readouterr().out


def test_the_counts_of_a_card_are_the_datasets(toys):
    meta = read_json(toys / "questions" / "meta.json")
    card = card_of(toys / "questions")
    assert metadata(card)["viewer"] is False
    assert "license" not in metadata(card) and "Not stated yet" in card
    rows = figures(card)
    for name in ("conversations", "tokens", "characters", "bytes"):
        assert rows[name] == [f"{meta['splits'][split][name]:,}" for split in ("train", "val")]
    assert rows["vocabulary"] == [str(Dataset(str(toys / "questions")).tokenizer.n_vocab)]
    assert rows["max_tokens"] == ["32"]
    assert "- `a test`" in card and meta["tokenizer_sha256"] in card


def test_a_readme_of_ones_own_goes_up_in_the_cards_place(tmp_path):
    path = novel(tmp_path / "data")
    (path / "README.md").write_text("一部小说", encoding="utf-8")
    assert upload.gather(path, CARD).files["README.md"] == path / "README.md"


def test_a_merged_adapter_goes_up_and_an_adapter_does_not(toys, answers, tmp_path):
    data = {"dataset": toys / "questions", "init_from": answers, "max_iters": 2}
    adapter = train_here(out_dir=tmp_path / "adapter", lora_rank=3, **data)
    advice = r"holds an adapter.*python export\.py --format=merged --out_dir="
    with pytest.raises(UserError, match=advice):
        upload.gather(adapter, CARD)
    export.main(words(format="merged", out_dir=adapter, to=tmp_path / "merged"))
    card = card_of(tmp_path / "merged")
    assert figures(card)["adapter, merged into the weights"] == ["rank 3"]
    assert "--lora_rank=3" in card and "Not evaluated." in card


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("/home/me/texts/novel", "novel"),
        ("../../elsewhere/novel", "novel"),
        ("C:\\Users\\me\\novel", "novel"),
        ("/home/me/news:3,/home/me/novels:1", "news:3,novels:1"),
        (f"{ROOT}/data/mine", "data/mine"),
        ("data/raw/sanguo/a.json", "data/raw/sanguo/a.json"),
    ],
)
def test_places_on_this_machine_are_shortened(value, left):
    assert upload.public({"settings": [value, 3, None]}) == {"settings": [left, 3, None]}


# --- refusals ----------------------------------------------------------------------------------


def refused(hub: Hub, path: Path, **settings: object) -> str:
    """The one line; nothing is written then."""
    line = error_line(go_up(hub, path, **settings))
    assert not (path / "hub_url.txt").exists()
    return line


def test_a_token_is_needed_and_never_shown(hub, tmp_path, monkeypatch):
    path = novel(tmp_path / "data")
    monkeypatch.setenv("HF_TOKEN", "hf_mistaken")
    assert refused(hub, path) == (
        f"{hub.url} refused to upload to {REPO}: 401, Invalid username or password; "
        "see its name, run hf auth login, or set another HF_TOKEN"
    )
    monkeypatch.delenv("HF_TOKEN")
    hub.asked.clear()
    assert refused(hub, path) == "no token for the hub; run hf auth login, or set HF_TOKEN"
    assert hub.asked == []
    # what `hf auth login` keeps will do
    (tmp_path / "hf_home").mkdir()
    (tmp_path / "hf_home" / "token").write_text(TOKEN, encoding="utf-8")
    assert went_up(hub, path) == f"{hub.url}/datasets/{REPO}"


def test_a_hub_that_refuses_midway_is_one_line(hub, tmp_path):
    hub.refuses[r"PUT /put/\w+"] = 413, f"No room\nfor {TOKEN}"  # `go_up` looks for it
    line = refused(hub, novel(tmp_path / "data"))
    assert line == f"{hub.url} refused to upload to {REPO}: 413, No room for ..."
    assert len(hub.repositories[f"datasets/{REPO}"].messages) == 1


def test_a_hub_that_is_not_there_or_is_none_is_one_line(hub, tmp_path, monkeypatch):
    path = novel(tmp_path / "data")
    hub.refuses["POST /api/repos/create"] = 404, "no such page"
    assert refused(hub, path).endswith("data set), and HF_ENDPOINT if it is set")
    place = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("HF_ENDPOINT", place)
    assert refused(hub, path).startswith(f"cannot upload to {REPO} at {place}: ")


def test_a_name_or_a_licence_that_the_hub_does_not_take_is_one_line(hub, tmp_path):
    path = novel(tmp_path / "data")
    line = refused(hub, path, repo="another/model")
    assert line.startswith(
        f"{hub.url} refused to upload to another/model: 403, You don't have the rights"
    )
    assert line.endswith("a token the right to write")
    line = refused(hub, path, license="mine")
    assert 'Invalid metadata in README.md. - "license" must be one of' in line


def test_what_is_to_be_private_is_never_public(hub, tmp_path):
    path = novel(tmp_path / "data", "data/raw/hongkong/courts.tsv")
    assert "the terms of hongkong" in refused(hub, path)
    assert not hub.repositories
    hub.repositories[f"datasets/{USER}/free"] = Repository(False, {}, [])
    line = refused(hub, path, repo=f"{USER}/free", private=True)
    assert line == f"{USER}/free is there and is public; take another --repo="
    assert not hub.repositories[f"datasets/{USER}/free"].messages
    went_up(hub, path, private=True)
    assert hub.repositories[f"datasets/{REPO}"].is_private


def test_a_name_or_a_directory_that_is_none_is_said(tmp_path):
    for repo in ("", "model", "a/b/c", "名/字"):
        with pytest.raises(UserError, match=re.escape(f"repo={repo!r} names no repository")):
            upload.connect(repo)
    for name in ("", str(tmp_path / "nothing")):
        with pytest.raises(UserError, match="is no directory; pass --path="):
            upload.find(name)
    with pytest.raises(UserError, match=r"holds no dataset \(meta\.json\)"):
        upload.gather(tmp_path, CARD)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("answers/evaluation.json", r"evaluation\.json is damaged"),
        ("answers/step-000020/model.safetensors", r"model\.safetensors is damaged"),
        ("exported/tokenizer.json", r"tokenizer\.json is missing; run export\.py again"),
        ("exported/model.safetensors", r"model\.safetensors.*; run export\.py again"),
    ],
)
def test_a_file_that_is_damaged_or_missing_is_named(answers, tmp_path, name, message):
    export.main(words(out_dir=answers, to=tmp_path / "exported"))
    shutil.copytree(answers, tmp_path / "answers")
    if "missing" in message:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        upload.gather(tmp_path / Path(name).parts[0], CARD)
