"""A checkpoint for other tools: a Hugging Face directory, a GGUF file, or one whole checkpoint.

    python export.py --out_dir=out-sanguo-sft --to=sanguo-hf
    python export.py --format=gguf --out_dir=out-sanguo-sft --to=sanguo.gguf --dtype=q8_0
    python export.py --format=merged --out_dir=out-lora --to=out-merged    # adapter and base as one

transformers loads the directory as it loads any (AutoModelForCausalLM, AutoTokenizer, no code of
ours), llama.cpp the file, our own scripts the merged checkpoint. With sanguo.gguf a chat model gets
sanguo.Modelfile, for Ollama.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, command, configure, repo_path, show_path, written_aside

# isort: split
from safetensors import SafetensorError

from miniglm.checkpoint import Checkpoint, check_writable, claimed, load_checkpoint, save_checkpoint
from miniglm.interop.gguf import modelfile, write_gguf
from miniglm.interop.hugging_face import write_directory

DTYPES = {
    "hf": ("float32", "float16", "bfloat16"),
    "gguf": ("float32", "float16", "q8_0"),
    "merged": ("float32",),
}


@dataclass
class Settings:
    format: Literal["hf", "gguf", "merged"] = "hf"  # for transformers; llama.cpp; our own scripts
    out_dir: str = "out-sanguo-sft"  # the run whose best checkpoint is exported
    to: str = ""  # directory or file to write
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32"  # of the weights written


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if not config.to:
        raise UserError("to='' names nothing; pass --to=, a directory or for gguf a file")
    if config.dtype not in DTYPES[config.format]:
        choices = ", ".join(DTYPES[config.format])
        raise UserError(f"format={config.format!r} has no dtype={config.dtype!r}; pass {choices}")
    to = repo_path(config.to)
    for_ollama = to.with_name(to.name.removesuffix(".gguf") + ".Modelfile")
    for path in (to, for_ollama):
        if path.exists():
            raise UserError(f"{show_path(path)} is there; delete it, or name another --to=")
    check_writable(to.parent, "--to=")
    checkpoint = load_checkpoint(repo_path(config.out_dir))
    if config.format == "merged":
        write_merged(checkpoint, to)
    else:
        write = {"hf": write_directory, "gguf": write_gguf}[config.format]
        parts = checkpoint.model, checkpoint.tokenizer, checkpoint.answers
        try:
            with written_aside(to) as aside:
                write(*parts, aside, config.dtype)
                if config.format == "gguf" and checkpoint.answers:
                    text = modelfile(checkpoint.tokenizer, to.name)
                    with written_aside(for_ollama) as beside:
                        beside.write_text(text, encoding="utf-8", newline="")
        except (OSError, SafetensorError) as error:
            # numpy only counts the bytes that are missing
            reason = getattr(error, "strerror", None) or f"the disk is full ({error})"
            raise UserError(f"cannot write {show_path(to)}: {reason}") from None
    size = sum(file.stat().st_size for file in [to, *to.rglob("*.*")] if file.is_file())
    parameters = f"{checkpoint.n_params:,} parameters"
    print(f"{show_path(to)}: {parameters}, {size / 1e6:.1f} MB, {config.dtype}")


def write_merged(checkpoint: Checkpoint, to: Path) -> None:
    """An out_dir whose checkpoint is an adapter merged into its base."""
    if "adapter" not in checkpoint.run:
        raise UserError(f"{show_path(checkpoint.path)} holds a whole model, and no adapter")
    run = {key: value for key, value in checkpoint.run.items() if key != "adapter"}
    run["settings"] = run["settings"] | {"lora_rank": 0}
    run["merged"] = {part: checkpoint.run["adapter"][part] for part in ("rank", "alpha", "targets")}
    with claimed(to):
        save_checkpoint(to, checkpoint.model, [], checkpoint.tokenizer, run, is_best=True)


if __name__ == "__main__":
    command(main)
