"""COMET scores of translations (Rei et al., 2022), in an environment of their own.

    python -m venv .venv-comet
    .venv-comet/bin/pip install -r requirements-comet.txt
    .venv-comet/bin/python -m miniglm.comet --answers=out-x/answers-finance_sft-test.jsonl

COMET needs older packages than the rest, so this file imports nothing that only the other
environment has. The score is added to evaluation-NAME.json beside answers-NAME.jsonl, where
`python evaluations.py --compare=` finds it, until the next evaluation.
"""

from dataclasses import dataclass
from typing import Annotated

from configurator import UserError, at_least, command, configure, show_path, user_path
from miniglm import jsonl

MODEL = "Unbabel/wmt22-comet-da"
TEXTS = ("question", "reference", "answer")  # of a line that evaluations.py wrote


@dataclass
class Settings:
    answers: str = ""  # a file that evaluations.py wrote
    model: str = MODEL  # a name on the Hugging Face hub, a checkpoint file, or its folder
    batch_size: Annotated[int, at_least(1)] = 16  # sentences at once


def load_comet(name: str):
    """The COMET model of a name on the Hugging Face hub, a checkpoint file, or a folder that holds
    hparams.yaml and checkpoints/model.ckpt."""
    try:
        from comet import download_model, load_from_checkpoint
    except ImportError as error:
        raise UserError(
            f"COMET is not in this environment ({error}); it needs one of its own: python -m venv "
            ".venv-comet, then .venv-comet/bin/pip install -r requirements-comet.txt, and run this "
            "command with .venv-comet/bin/python"
        ) from None
    path = user_path(name)
    path = path / "checkpoints" / "model.ckpt" if path.is_dir() else path
    try:
        return load_from_checkpoint(str(path if path.is_file() else download_model(name)))
    except Exception as error:  # COMET itself raises nothing narrower
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"COMET's model {name} cannot be loaded ({type(error).__name__}: {reason}); it comes "
            "from the Hugging Face hub or the mirror HF_ENDPOINT; or pass --model=, a checkpoint"
        ) from None


def predict(
    model: object, texts: list[tuple[str, str, str]], batch_size: int, progress_bar: bool = True
) -> list[float]:
    """Scores of (source, translation, reference), mostly 0 to 1."""
    import torch  # COMET brings it

    rows = [{"src": source, "mt": text, "ref": ref} for source, text, ref in texts]
    options = {"gpus": int(torch.cuda.is_available()), "progress_bar": progress_bar}
    return [*model.predict(rows, batch_size=batch_size, **options).scores]


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    answers, remedy = user_path(config.answers), "pass --answers=, a file that evaluations.py wrote"
    records = jsonl.read_records(answers, TEXTS, remedy)
    path = answers.with_name(f"evaluation{answers.stem.removeprefix('answers')}.json")
    report = jsonl.read_report(path, (), remedy)
    model = load_comet(config.model)
    texts = [(record["question"], record["answer"], record["reference"]) for record in records]
    scores = predict(model, texts, config.batch_size)
    report |= {"comet": float(sum(scores) / len(scores)), "comet_model": config.model}
    jsonl.write_report(path, report)
    print(f"COMET {report['comet']:.4f} by {config.model}, written to {show_path(path)}")


if __name__ == "__main__":
    command(main)
