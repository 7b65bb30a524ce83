"""llama.cpp in a process of its own, for bench and the tests.

    python -m venv llama-venv                                # once, some 15 minutes on two cores
    CMAKE_ARGS=-DGGML_NATIVE=ON llama-venv/bin/pip install llama-cpp-python==0.3.36
    python -m bench generate --llama_cpp=llama-venv/bin/python --out_dir=out-sanguo-sft

That environment's python runs this file: it reads a request a line and writes its result, as JSON.
Keys, values and weights are float32 there, too.
"""

import json
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from configurator import ROOT, UserError


class LlamaCpp(AbstractContextManager):
    """A GGUF file in llama.cpp, in a process of its own. n_ctx: tokens of the longest text. Raises
    UserError if the process cannot start."""

    module = "bench.llama"  # that the process runs; tests have one with more functions

    def __init__(self, python: str | Path, file: Path, n_ctx: int, threads: int):
        words = [str(python), "-m", self.module, str(file), str(n_ctx), str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        try:
            self.process = subprocess.Popen(words, cwd=ROOT, **pipes, encoding="utf-8")
        except OSError as error:
            raise UserError(f"llama_cpp={str(python)!r} does not start: {error.strerror}") from None

    def __exit__(self, *error: object) -> None:
        self.process.communicate()

    def ask(self, what: str, **arguments: object) -> object:
        """The result of a function that the process serves. Raises UserError if it has ended."""
        try:
            self.process.stdin.write(json.dumps([what, arguments]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: the line below is empty
        line = self.process.stdout.readline()
        if not line:
            said = self.process.stderr.read().strip().splitlines() or ["it ended"]
            raise UserError(f"llama.cpp failed: {said[-1]}")
        return json.loads(line)


# --- in the other process ----------------------------------------------------------------------


def greedy(llm, ids: list[int], n: int) -> list[int]:
    """The next n ids, whatever they are, by the calls of llama.cpp's own programs."""
    import llama_cpp as api

    api.llama_memory_clear(api.llama_get_memory(llm.ctx), True)
    sampler = api.llama_sampler_init_greedy()
    new = []
    while len(new) < n:
        tokens = (api.llama_token * len(ids))(*ids)
        if api.llama_decode(llm.ctx, api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        ids = [api.llama_sampler_sample(sampler, llm.ctx, -1)]
        new += ids
    api.llama_sampler_free(sampler)
    return new


def serve(functions: dict, file: str, n_ctx: str, threads: str) -> None:
    """Calls the functions of the model that stdin names, a line each."""
    from llama_cpp import GGML_TYPE_F32, Llama

    llm = Llama(
        file,
        n_ctx=int(n_ctx),
        n_batch=int(n_ctx),  # a prompt goes in at once
        n_threads=int(threads),
        n_threads_batch=int(threads),
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        flash_attn=False,
        verbose=False,
    )
    for line in sys.stdin:
        what, arguments = json.loads(line)
        print(json.dumps(functions[what](llm, **arguments)), flush=True)


if __name__ == "__main__":
    serve({"greedy": greedy}, *sys.argv[1:])
