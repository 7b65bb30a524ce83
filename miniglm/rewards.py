"""Rewards (GRPO): the model answers each question several times, and learns what scored well.

A step samples num_samples answers to each of its questions with the newest weights, at TEMPERATURE,
by which the logits are divided in the loss, too. They have room for twice the reference's tokens
and 16 more. An answer's advantage is its reward less the mean of its question's, over their
standard deviation (arXiv 2402.03300); each of its tokens takes it, and the loss is the mean over
all tokens of the step (arXiv 2503.14476). Samples are used once, so the ratio of the new to the old
policy is 1, and nothing is clipped. beta is the weight of the KL to the model with its adapters
off, by the estimator exp(d) - d - 1 of d = log p(reference) - log p(policy).

A reward is a function of this file, or `reward` in a file of your own:

    def reward(question: str, answer: str, reference: str, ended: bool) -> float

ended: whether the answer came to its end token. Several rewards add up. Training reads references
of the training split alone; evaluations those of validation.
"""

import dataclasses
import runpy
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch

from configurator import UserError, in_a_line, nearest, user_path
from data_utils import IGNORE, Dataset, collate
from miniglm import generation, metrics
from miniglm.generation import Request, Sampling
from miniglm.lora import adapters_off
from miniglm.losses import eval_mode, token_log_prob
from miniglm.objectives import Batch, Objective
from miniglm.scoring import without_reasoning

TEMPERATURE = 0.6  # of samples and of the policy that is trained: at 1 a small model's are noise

# --- rewards: 0 is worst, 1 is best ------------------------------------------------------------


def chrf(question: str, answer: str, reference: str, ended: bool) -> float:
    """chrF++ against the reference."""
    return metrics.sentence("chrf", answer, reference) / 100


def bleu(question: str, answer: str, reference: str, ended: bool) -> float:
    """BLEU of the sentence against the reference."""
    return metrics.sentence("bleu", answer, reference) / 100


def rouge_l(question: str, answer: str, reference: str, ended: bool) -> float:
    """ROUGE-L over characters against the reference."""
    return metrics.rouge_l(answer, reference)


def form(question: str, answer: str, reference: str, ended: bool) -> float:
    """The share of 4-grams that are new; 0 if the answer is empty, broken or does not end."""
    whole = ended and answer.strip() and "\ufffd" not in answer
    return 1 - metrics.repeated([answer]) if whole else 0.0


REWARDS = {function.__name__: function for function in (chrf, bleu, rouge_l, form)}


def find_reward(name: str) -> Callable:
    """The function of this name, or the one of a file. Raises UserError if there is none."""
    if name in REWARDS:
        return REWARDS[name]
    path = user_path(name)
    if path.suffix != ".py" or not path.is_file():
        near = nearest(name, REWARDS) or f"; it takes {', '.join(REWARDS)} or a file.py"
        raise UserError(f"reward={name}: no such file or reward{near}")
    try:
        reward = runpy.run_path(str(path)).get("reward")
    except (Exception, SystemExit) as error:
        raise UserError(f"reward={name}: {in_a_line(error)}") from None
    if not callable(reward):
        raise UserError(f"reward={name} has no function reward(question, answer, reference, ended)")
    return reward


def total(rewards: list[tuple[str, Callable]], *of: object) -> float:
    """The sum of the rewards, by name, of (question, answer, reference, ended). Raises UserError if
    one fails, or gives no number within a million (advantages are float32)."""
    values = []
    for name, reward in rewards:
        where = f"for the answer {of[1][:30]!r} to {of[0][:30]!r}"
        try:
            values.append(reward(*of))
        except (Exception, SystemExit) as error:
            raise UserError(f"reward={name} failed {where}: {in_a_line(error)}") from None
        is_number = isinstance(values[-1], int | float | np.floating | np.integer | np.bool_)
        if not is_number or not abs(values[-1]) <= 1e6:
            what = f"reward={name} gave {values[-1]!s:.40} {where}"
            raise UserError(f"{what}; it must be a number within a million")
    return float(sum(values))


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Rewards of each question's answers, (questions, samples) -> their advantages, the same."""
    spread = rewards.std(axis=1, ddof=1, keepdims=True)
    return (rewards - rewards.mean(axis=1, keepdims=True)) / (spread + 1e-4)


# --- the objective -----------------------------------------------------------------------------


class Sample(NamedTuple):
    ids: list[int]  # the prompt, the answer and its end token, if it has one
    mask: list[int]  # 1 for each token of the answer
    reward: float
    ended: bool


class Rewards(Objective):
    """Sampled answers, weighed by their advantages. A batch's rows are samples alike in length."""

    unit = "questions"
    needs_newest_weights = True
    needs_a_model = True
    # each a mean over answers; spread: the standard deviation of a question's rewards
    measures = ("reward", "spread", "length", "ended")

    def __init__(self, config, data: Dataset, *where):
        super().__init__(config, data, *where)
        if data.kind != "sft" or not isinstance(data, Dataset):
            raise UserError(f"dataset={config.dataset}: reward= takes one data set of questions")
        if config.beta and not config.lora_rank:
            raise UserError(f"beta={config.beta:g} needs adapters; pass --lora_rank=, or --beta=0")
        self.weights = {"loss": 1.0} | ({"kl": config.beta} if config.beta else {})
        self.copies, self.pieces = config.num_samples, min(4, config.num_samples)
        self.rewards = [(name, find_reward(name)) for name in config.reward]

    def batches(self, start: int, step: int) -> tuple[list[Batch], int]:
        rows, parts = self.parts(start)
        n, sampling = self.copies, Sampling(temperature=TEMPERATURE, seed=self.config.seed)
        numbers = np.array_split(start + self.world.share(np.arange(len(rows))), len(parts) or 1)
        batches, tokens = [], 0
        for part, own in zip(parts, numbers, strict=False):
            wanted = [(*which, i) for which in zip(part, own, strict=True) for i in range(n)]
            samples = self.samples(self.model, "train", wanted, sampling)
            measured = np.array([(s.reward, 0, sum(s.mask), s.ended) for s in samples], np.float32)
            rewards = measured[:, 0].reshape(-1, n)
            measured[:, 1] = rewards.std(axis=1, ddof=1).repeat(n)
            lengths, scores = [len(s.ids) for s in samples], advantages(rewards).ravel()
            # few are long: those alike in length together, so that little is padding
            for few in np.array_split(np.argsort(lengths, kind="stable"), self.pieces):
                rows = collate([samples[i][:2] for i in few], self.multiple, self.config.block_size)
                batches.append(Batch("loss", part[few // n], (*rows, scores[few], measured[few])))
            tokens += sum(len(sample.ids) - 1 for sample in samples)
        return batches, self.world.sums([tokens])[0]

    def samples(
        self, model: torch.nn.Module, split: str, wanted: list[tuple[int, ...]], sampling: Sampling
    ) -> list[Sample]:
        """An answer to each of wanted: a row of the split, and two numbers of which, with the seed,
        its random stream depends."""
        tokenizer, size = self.data.tokenizer, self.config.batch_size * self.config.num_samples
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
        asked = {row: self.question(split, row) for row in {row for row, *_ in wanted}}
        with eager, eval_mode(model):
            batch, requests = generation.Batch(model, tokenizer.stop_ids, size), []
            for row, *stream in wanted:
                prompt, most, *_ = asked[row]
                limit = dataclasses.replace(sampling, max_new_tokens=most)
                requests.append(Request(prompt, limit, *stream))
                batch.add(requests[-1])
            while batch:
                batch.step()
        samples = []
        for (row, *_), request in zip(wanted, requests, strict=True):
            prompt, _, question, reference = asked[row]
            answer, ended = tokenizer.decode(request.ids), request.finish == "stop"
            answer = without_reasoning(answer).strip()
            reward = total(self.rewards, question, answer, reference, ended)
            mask = [0] * len(prompt) + [1] * request.n_new
            samples.append(Sample(request.text, mask, reward, ended))
        return samples

    def question(self, split: str, row: int) -> tuple[list[int], int, str, str]:
        """Of a row the prompt's ids, the most ids of an answer, the question and the reference."""
        here = slice(*self.data.bounds[split][row : row + 2].astype(int))
        ids, mask = self.data.tokens[split][here], self.data.mask[split][here]
        [[*_, question, answer]] = self.data.conversations(split, slice(row, row + 1))
        prompt = ids[: mask.tobytes().rindex(b"\0\1") + 1].tolist()
        # a step waits for its longest answer
        most = min(self.data.meta["max_tokens"] - len(prompt), 2 * (len(ids) - len(prompt)) + 16)
        return prompt, most, question["content"], without_reasoning(answer["content"])

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        tokens = sum(int((batch.arrays[1] != IGNORE).sum()) for batch in batches)
        answers = sum(len(batch.arrays[1]) for batch in batches)
        return dict.fromkeys(self.weights, tokens) | dict.fromkeys(self.measures, answers)

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        *rows, advantage, measured = batch.arrays  # of rows the last are the places
        with self.autocast():
            log_p = token_log_prob(model, *rows, temperature=TEMPERATURE)
        advantage = advantage[rows[2] // rows[1].shape[1]]  # of each token
        values = {"loss": -advantage * (log_p - log_p.detach()).exp()}
        if "kl" in self.weights:
            with self.autocast(), torch.no_grad(), eval_mode(model), adapters_off(model):
                d = token_log_prob(model, *rows, temperature=TEMPERATURE)
            d = d - log_p
            values["kl"] = d.exp() - d - 1
        values |= zip(self.measures, measured.T, strict=True)
        return {name: value.sum() for name, value in values.items()}

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Of greedy answers to all validation questions; the loss is the reward, less is better."""
        n, greedy = self.data.n_rows("val", 0), Sampling(temperature=0.0)
        rows = self.world.share(np.arange(n)).tolist()
        samples = self.samples(model, "val", [(row, row, 0) for row in rows], greedy)
        facts = np.array([(s.reward, sum(s.mask), s.ended) for s in samples], float).reshape(-1, 3)
        reward, tokens, ended = (s / n for s in self.world.sums(facts.sum(axis=0).tolist()))
        return {"val_loss": -reward, "val_reward": reward, "val_length": tokens, "val_ended": ended}

    def describe(self, record: dict) -> str:
        what = f"{record['val_length']:.1f} tokens and {record['val_ended']:.0%} end"
        return f"{record['val_reward']:.3f} in validation, where answers have {what}"
