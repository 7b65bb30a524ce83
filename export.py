"""A checkpoint as a Hugging Face directory, for other tools.

    python export.py --out_dir=out-sanguo-sft --to=sanguo-hf

transformers loads it as it loads any (AutoModelForCausalLM, AutoTokenizer, no code of ours).
Weights are float32. The chat template writes what tokenizer.py's
`render` writes: names of special tokens inside a message stay plain text. For that it sets HIDDEN
between `<` and `|`, which the exported tokenizer takes away again once special tokens are found.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from checkpoint import Checkpoint, load_checkpoint
from configurator import UserError, command, configure, repo_path, show_path
from hugging_face import family_of, to_hugging_face
from tokenizer import END, END_OF_TEXT, ROLES

HIDDEN = "\ue000"  # a private character, so that no text has it
ROLE_NAMES = ", ".join(f"'{role}': '{token}'" for role, token in ROLES.items())
CHAT_TEMPLATE = (
    "{% set names = {" + ROLE_NAMES + "} %}"
    "{% for message in messages %}"
    "{% if message['role'] not in names %}{{ raise_exception('unknown role') }}{% endif %}"
    "{{ names[message['role']] + message['content'] | replace('<|', '<" + HIDDEN + "|') + "
    f"'{END}'" + " }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ROLES["assistant"] + "' }}{% endif %}"
)


@dataclass
class Settings:
    out_dir: str = "out-sanguo-sft"  # the run whose best checkpoint leaves
    to: str = ""  # directory to write


def tokenizer_text(checkpoint: Checkpoint) -> str:
    """tokenizer.json, which lets HIDDEN vanish behind the search for special tokens."""
    content = json.loads(checkpoint.tokenizer.text)
    content["normalizer"] = {"type": "Replace", "pattern": {"String": HIDDEN}, "content": ""}
    return json.dumps(content, ensure_ascii=False, indent=1)


def tokenizer_config(checkpoint: Checkpoint) -> dict:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": checkpoint.model.config.block_size,
        "eos_token": END if checkpoint.answers else END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        # a model that only continues has no template: all of its text is plain
        "split_special_tokens": not checkpoint.answers,
    }
    return config | ({"chat_template": CHAT_TEMPLATE} if checkpoint.answers else {})


def write_hugging_face(checkpoint: Checkpoint, to: Path) -> None:
    """A directory, written aside and renamed. UserError where the disk is full."""
    config, weights = to_hugging_face(checkpoint.model)
    ends = {
        "eos_token_id": sorted(checkpoint.tokenizer.stop_ids),
        "pad_token_id": checkpoint.tokenizer.end_of_text,
        "bos_token_id": None,
    }
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    files = {
        "config.json": config | ends,
        "generation_config.json": ends,
        "tokenizer_config.json": tokenizer_config(checkpoint),
    }
    aside = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_file(contiguous, aside / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            text = json.dumps(content, ensure_ascii=False, indent=1)
            (aside / name).write_text(text, encoding="utf-8")
        text = tokenizer_text(checkpoint)
        (aside / "tokenizer.json").write_text(text, encoding="utf-8", newline="")
        aside.rename(to)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write {show_path(to)}: {reason}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if not config.to:
        raise UserError("to='' names nothing; pass --to=, a directory")
    to = repo_path(config.to)
    if to.exists():
        raise UserError(f"{show_path(to)} is there; delete it, or name another --to=")
    checkpoint = load_checkpoint(repo_path(config.out_dir))
    write_hugging_face(checkpoint, to)
    size = sum(file.stat().st_size for file in to.iterdir())
    print(f"{show_path(to)}: {family_of(checkpoint.model.config)}, {size / 1e6:.1f} MB, float32")


if __name__ == "__main__":
    command(main)
