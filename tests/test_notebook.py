"""notebooks/colab.ipynb: what it names is there, and all its cells run, in few steps on a CPU."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from configurator import ROOT
from tests.runs import ENVIRONMENT, free_port
from tests.test_readme import fault, files, is_there, misspelt

NOTEBOOK = json.loads((ROOT / "notebooks" / "colab.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
TEXT = "\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"])
RAW = ROOT / "data" / "raw" / "sanguo"
TINY = "--n_layer=1 --n_head=2 --n_kv_head=1 --n_embd=32"
FEW = "--max_iters=2 --eval_interval=2 --batch_size=4 --gradient_accumulation_steps=1 --prompts="
FEW += " --short_block=None --warmup_iters=1 --device=cpu --dtype=float32 --compile=False"
# settings behind the notebook's own, by how a command begins
SHORTER = {"python train.py": FEW, "python train.py config/pretrain": TINY}
SHORTER |= {"python sample.py": "--max_new_tokens=4", "python evaluations.py": "--max_new_tokens=2"}
# what a notebook brings along; a command that fails ends the run. Scripts run in forks, which need
# not import torch again
KERNEL = f"""
import os, runpy, shlex, shutil, subprocess, sys, types
import numpy, safetensors.torch, tiktoken, tokenizers, torch, torch._dynamo, tqdm

def shell(command):
    command = " ".join([command, *(w for b, w in {SHORTER}.items() if command.startswith(b))])
    first, *argv = shlex.split(command)
    sys.stdout.flush()
    if first != "python":
        subprocess.run(command, shell=True, check=True)
    elif child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, command
    else:
        del sys.modules["IPython"], sys.modules["IPython.display"]  # a notebook's own
        sys.argv, sys.path[0] = argv, os.path.dirname(os.path.abspath(argv[0]))
        runpy.run_path(argv[0], run_name="__main__")
        sys.exit()
    if command.startswith("git clone") and os.path.exists({str(RAW)!r}):
        shutil.copytree({str(RAW)!r}, "MiniGLM/data/raw/sanguo")

def picture(name):
    with open(name, "rb") as file:
        assert file.read(4) == b"\\x89PNG"

sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython.display"] = types.SimpleNamespace(Image=picture)
"""


def script(cell: str) -> str:
    """A cell's `!command` and `%cd folder` as Python."""
    cell = re.sub(r"^( *)!(.*)", r"\1shell(f'\2')", cell, flags=re.MULTILINE)
    return re.sub(r"^( *)%cd (.*)", r"\1os.chdir('\2')", cell, flags=re.MULTILINE)


def test_the_notebook_is_one_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_commands_and_files_of_the_notebook_are_there():
    assert [name for name in files(TEXT) if not is_there(name)] == []
    commands = re.findall(r"^ *!((?:python|pip) .*)", TEXT, re.MULTILINE)
    assert len(commands) > 10
    for command in commands:
        assert fault(command) is None, command
        assert all(map(fault, misspelt(command)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="scripts run in forks")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="it clones a repository")
def test_all_cells_run_in_order_and_again(tmp_path):
    cells = [script(cell) for cell in CODE]
    cells[0] = f"REPO = {str(ROOT)!r}"
    again = [cell for cell in cells if re.search("clone|train.py", cell)]
    chat = next(number for number, cell in enumerate(cells) if "Popen" in cell)
    cells[chat] += "\nassert b'MiniGLM' in urllib.request.urlopen('http://127.0.0.1:7860').read()"
    cells += ["assert page.poll() is not None", *again]
    code = "\n".join([KERNEL, *cells]).replace("7860", str(free_port()))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | ENVIRONMENT | {"PATH": path}
    environment["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as Jupyter sets it
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("nothing to do") == 2  # both trainings, the second time
