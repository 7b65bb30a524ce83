"""A checkpoint's answers to conversations, and the figures of a report.

Scores of texts are metrics.py's; what is asked, a split or a file, is evaluations.py's.
"""

import math
from collections import Counter
from collections.abc import Callable

from tqdm import tqdm

from data_utils import collate
from miniglm.checkpoint import Checkpoint
from miniglm.losses import send, target_losses
from miniglm.metrics import METRICS, distinct, look_up, mean, repeated, rouge_l, score, signature
from miniglm.prep.parallel import TO_SIMPLIFIED, traditional
from miniglm.text import complete
from miniglm.tokenizer import Tokenizer

# --- answers and losses ------------------------------------------------------------------------

Ask = Callable[[Tokenizer, list[dict]], tuple[list[int], list[int]]]


def in_chat(tokenizer: Tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """Ids that ask for the last answer, and those of the answer with its end token."""
    (ids, mask), prompt = tokenizer.render(messages), tokenizer.render_prompt(messages[:-1])
    if ids[: len(prompt)] != prompt:  # the answer has reasoning: from there on
        prompt = ids[: bytes(mask).rindex(b"\0\1") + 1]
    end = bytes(mask).rindex(b"\1") + 1  # a template may write more behind it
    return prompt, ids[len(prompt) : end]


def in_text(tokenizer: Tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """The same for a model that only continues texts and so has not learnt the chat format: as
    miniglm/prep/parallel.py writes them, the source in a line and its translation in the next."""
    source, target = (message["content"] for message in messages)
    prompt = [tokenizer.end_of_text, *tokenizer.encode(f"{source}\n")]
    return prompt, [*tokenizer.encode(target), tokenizer.end_of_text]


def answer_nats(
    checkpoint: Checkpoint, pairs: list[tuple[list[int], list[int]]], batch_size: int
) -> list[float]:
    """The sum of -log p in nats of each answer, from pairs of the ids of a prompt and an answer;
    those of like length are scored at once."""
    model, nats = checkpoint.model, [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda row: -sum(map(len, pairs[row])))
    for first in tqdm(range(0, len(pairs), batch_size), unit="batch"):
        rows = order[first : first + batch_size]
        chosen = [pairs[row] for row in rows]
        batch = collate([(a + b, [0] * len(a) + [1] * len(b)) for a, b in chosen])
        losses = target_losses(model, *send(batch, str(model.wte.weight.device))).cpu().double()
        for row, loss in zip(rows, losses.sum(dim=1).tolist(), strict=True):
            nats[row] = loss
    return nats


def answer_all(
    checkpoint: Checkpoint, conversations: list[list[dict]], config, ask: Ask = in_chat
) -> tuple[list[dict], dict]:
    """A record for each conversation: question, reference, the model's answer, the reference's
    perplexity; and per_token of all the references. config: Sampling with a batch_size."""
    pairs = [ask(checkpoint.tokenizer, messages) for messages in conversations]
    outputs = complete(checkpoint, [prompt for prompt, _ in pairs], config, 1, config.batch_size)
    answers = [output for [output] in tqdm(outputs, total=len(pairs), unit="answer")]
    losses = answer_nats(checkpoint, pairs, config.batch_size)  # with the end tokens
    tokens = [len(reference) for _, reference in pairs]
    n_bytes = sum(int(checkpoint.tokenizer.bytes_per_id[ids].sum()) for _, ids in pairs)
    records = [
        {
            "question": messages[-2]["content"],
            "reference": without_reasoning(messages[-1]["content"]),
            "answer": without_reasoning(answer.text),
            "perplexity": math.exp(nats / n),
            "ended": answer.ended,
        }
        for messages, answer, nats, n in zip(conversations, answers, losses, tokens, strict=True)
    ]
    return records, per_token(sum(losses), sum(tokens), n_bytes)


def without_reasoning(text: str) -> str:
    return text.rpartition("</think>")[2].lstrip("\n")


def per_token(nats: float, tokens: int, n_bytes: int) -> dict[str, float]:
    """A report's figures of the tokens scored, from the sum of their -log p."""
    return {
        "tokens": tokens,
        "bytes": n_bytes,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / n_bytes,
    }


# --- scores ------------------------------------------------------------------------------------


def score_answers(asked: list[dict], seen: list[dict], known: list[tuple[str, str]]) -> dict:
    """A report's figures of answers to questions: asked are those of the split or file, seen are
    trained ones. Adds rouge_l to each record."""
    for record in asked + seen:
        record["rouge_l"] = rouge_l(record["answer"], record["reference"])
    nearest = look_up([r["question"] for r in asked], known) if known else []
    looked_up = zip(nearest, asked, strict=bool(known))
    return {
        "n": len(asked),
        "rouge_l": mean([record["rouge_l"] for record in asked]),
        "n_seen": len(seen),
        "rouge_l_seen": mean([record["rouge_l"] for record in seen]),
        "rouge_l_lookup": mean([rouge_l(text, r["reference"]) for text, r in looked_up]),
        "ended": mean([record["ended"] for record in asked]),
    } | lengths_and_repetition(asked)


def score_translations(asked: list[dict]) -> dict:
    """A report's figures of translations. A look-up among tens of thousands of sentences would
    take minutes, and a sentence of the training set is no translation of another one."""
    answers = [record["answer"] for record in asked]
    report = {"n": len(asked)}
    for name, metric in METRICS.items():
        scores = score(metric, answers, [record["reference"] for record in asked])
        report[name], report[f"{name}_low"], report[f"{name}_high"] = scores
        report[f"{name}_signature"] = signature(metric)
    report["empty"] = mean([not answer.strip() for answer in answers])
    report["unfinished"] = mean([not record["ended"] for record in asked])
    report["simplified"] = mean([bool(simplified(answer)) for answer in answers])
    return report | lengths_and_repetition(asked)


def lengths_and_repetition(asked: list[dict]) -> dict:
    texts = [record["answer"] for record in asked]
    return {
        "distinct_2": distinct(texts),
        "repeated_4grams": repeated(texts),
        "answer_characters": mean([len(text) for text in texts]),
        "reference_characters": mean([len(record["reference"]) for record in asked]),
    }


def simplified(text: str) -> str:
    """The Simplified characters of a text: those that conversion as in the datasets
    (miniglm/prep/parallel.py) replaces, and that are not Traditional characters themselves.

    Conversion also replaces Traditional ones: variants that Hong Kong does not write (臺, 裡, which
    going to Simplified changes), and ones that Simplified writes for others, too (后, 布, 余). So
    以后 for 以後 is not found, and 皇后, 公布 and 余先生 count as the Traditional that they are.
    """
    replaced = Counter(text) - Counter(traditional(text))
    return "".join(c for c in replaced if TO_SIMPLIFIED.convert(c) == c and not is_traditional(c))


def is_traditional(char: str) -> bool:
    """Whether a character is among Big5's 5,401 common ones (its first level), or one of those that
    its second level calls rare, but Hong Kong writes: 年息五厘, 永恒."""
    code = char.encode("big5", errors="ignore")
    return b"\xa4\x40" <= code <= b"\xc6\x7e" or char in "厘恒熏蚝涂"
