"""llama.cpp in a process of its own, with what the tests ask besides greedy ids."""

import ctypes
import sys

from bench import llama
from bench.llama import greedy, serve


class LlamaCpp(llama.LlamaCpp):
    module = "tests.interop.llama"


def tokenize(llm, text: str) -> list[int]:
    """Ids of a text; names of special tokens in it are plain text."""
    return llm.tokenize(text.encode(), add_bos=True, special=False)


def chat(llm, messages: list[dict], **options) -> list[int]:
    """Ids of a prompt, as create_chat_completion makes them: by the file's own template. options:
    of that template."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    eos, bos = (llm._model.token_get_text(id) for id in (llm.token_eos(), llm.token_bos()))
    write = Jinja2ChatFormatter(llm.metadata["tokenizer.chat_template"], eos, bos)
    text = write(messages=messages, **options).prompt
    return llm.tokenize(text.encode(), add_bos=True, special=True)


def ends(llm) -> list[int]:
    """The ids at which it stops."""
    import llama_cpp as api

    return [id for id in range(llm.n_vocab()) if api.llama_vocab_is_eog(llm._model.vocab, id)]


def answer(llm, messages: list[dict], n: int) -> str:
    """The greedy answer's text, by the call that users of llama-cpp-python make."""
    done = llm.create_chat_completion(messages, temperature=0.0, max_tokens=n, repeat_penalty=1.0)
    return done["choices"][0]["message"]["content"]


def logits(llm, ids: list[int]) -> list[float]:
    """Logits of the next id."""
    import llama_cpp as api

    greedy(llm, ids, 1)
    row = api.llama_get_logits_ith(llm.ctx, -1)
    return list(ctypes.cast(row, ctypes.POINTER(ctypes.c_float * llm.n_vocab())).contents)


def quantize(llm, to: str, file_type: int) -> int:
    """Writes its file in another type, as llama-quantize does; 0 if that went well."""
    import llama_cpp as api

    params = api.llama_model_quantize_default_params()
    params.ftype = file_type
    return api.llama_model_quantize(llm.model_path.encode(), to.encode(), params)


if __name__ == "__main__":
    functions = tokenize, chat, ends, answer, greedy, logits, quantize
    serve({f.__name__: f for f in functions}, *sys.argv[1:])
