"""Compares answers.jsonl of multiple choice with lm-evaluation-harness on the same csv files.

    pip install lm_eval==0.4.13 transformers accelerate       # into an environment of its own
    python export.py --format=hf --out_dir=OUT --to=HF
    python evaluations.py --out_dir=OUT --dataset=FOLDER/val --shots=2
    python tests/harness.py HF OUT/answers.jsonl FOLDER ceval 2 [chat]

FOLDER holds val/ and dev/ in C-Eval's form (ceval), or test/ and dev/ in CMMLU's (cmmlu), subjects
that the harness has. Prints the greatest difference of the log-likelihoods, and how many items
have equal choices.
"""

import json
import sys
from pathlib import Path

import lm_eval
import numpy as np
import yaml
from datasets import Dataset
from lm_eval.models.huggingface import HFLM

TASKS = Path(lm_eval.__file__).parent / "tasks"
PARTS = {  # folder of the questions, name of a task, defaults, end of a file's name, its column
    "ceval": ("val", "ceval-valid_{}", "_default_ceval_yaml", "_{}.csv", "question"),
    "cmmlu": ("test", "cmmlu_{}", "_default_template_yaml", ".csv", "Question"),
}


def task(folder: Path, kind: str, subject: str, way: str) -> dict:
    """The harness's own task on local files; of the way "option" its prompt without the options."""
    split, name, defaults, end, question = PARTS[kind]
    own = name.format(subject)
    files = [TASKS / kind / defaults, TASKS / kind / f"{own}.yaml"]
    config = {}
    for file in files:
        config |= yaml.full_load(file.read_text(encoding="utf-8"))
    paths = {part: str(folder / part / f"{subject}{end.format(part)}") for part in (split, "dev")}
    tables = {part: Dataset.from_csv(path) for part, path in paths.items()}
    config |= {"custom_dataset": lambda **_: tables}
    config |= {"dataset_name": None, "task": f"{own}_{way}"}
    if way == "option":
        config["doc_to_text"] = f"{{{{{question}.strip()}}}}\n答案："
        config["doc_to_choice"] = "{{[A, B, C, D]}}"
    return {key: value for key, value in config.items() if key != "include"}


def main(model: str, answers: str, folder: str, kind: str, shots: str, chat: str = "") -> None:
    lines = Path(answers).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    subjects = list(dict.fromkeys(record["subject"] for record in records))
    peer = HFLM(model, device="cpu", dtype="float32", batch_size=16, enable_thinking=False)
    for way, right in (("letter", "acc"), ("option", "acc"), ("option", "acc_norm")):
        tasks = [task(Path(folder), kind, subject, way) for subject in subjects]
        result = lm_eval.simple_evaluate(
            peer, tasks=tasks, num_fewshot=int(shots), apply_chat_template=bool(chat)
        )
        samples = [s for t in tasks for s in sorted(result["samples"][t["task"]], key=by_number)]
        ours = np.array([record[f"{way}_log_likelihoods"] for record in records])
        theirs = np.array([[r[0] for r in s["filtered_resps"]] for s in samples], float)
        name = "option_per_character" if right == "acc_norm" else way
        hits = [int(record[name] == record["answer"]) for record in records]
        equal = sum(a == int(s[right]) for a, s in zip(hits, samples, strict=True))
        lengths = np.array([[len(s["doc"][letter]) for letter in "ABCD"] for s in samples])
        chosen = (theirs / lengths if right == "acc_norm" else theirs).argmax(1)
        same = sum("ABCD"[i] == r[name] for i, r in zip(chosen, records, strict=True))
        print(
            f"{name}: {equal} of {len(hits)} scores and {same} choices equal, "
            f"log-likelihoods within {abs(ours - theirs).max():.1e}"
        )


def by_number(sample: dict) -> int:
    return sample["doc_id"]


if __name__ == "__main__":
    main(*sys.argv[1:])
