"""Marks (KTO, arXiv 2402.01306): each answer is good or bad by itself.

The loss of an answer is `kto` in losses.py. Its kl is estimated once a step, with the newest
weights, from each prompt of the step with the answer to the one before: of the whole step and of
all processes, so accumulation and processes change nothing. Both kinds weigh alike in the loss,
whatever their numbers: marks of the rarer kind count more. The reference is the model with its
adapters off.
"""

import numpy as np
import torch

from configurator import UserError
from data_utils import Dataset
from miniglm.losses import eval_mode, kto, reference_log_prob, send, sequence_log_prob
from miniglm.objectives import Batch, Objective


class Marks(Objective):
    unit = "marks"
    needs_newest_weights = True
    needs_a_model = True
    weights = {"loss": 1.0}  # noqa: RUF012
    # each a mean over the answers of its kind; accuracy and kl over all
    of_kind = ("rewards_chosen", "rewards_rejected", "logp_chosen", "logp_rejected")

    def __init__(self, config, data: Dataset, *where):
        super().__init__(config, data, *where)
        if not config.beta or not config.lora_rank:
            raise UserError("marks need --lora_rank= and a --beta= above 0")
        if config.rows_per_step < 2:
            raise UserError("marks need 2 rows a step or more; raise --batch_size=")
        good = data.is_good("train", np.arange(data.n_rows("train", 0)))
        counts = np.bincount(good, minlength=2)  # of bad and good ones
        self.kind_weights = np.where(counts, counts.max() / np.maximum(counts, 1), 1.0)

    def batches(self, start: int, step: int) -> tuple[list[Batch], int]:
        rows, parts = self.parts(start)
        kl, block_size = self.kl(self.model, "train", rows), self.config.block_size
        batches = [
            self.marked("train", part, self.data.batch(part, block_size, self.multiple), kl)
            for part in parts
        ]
        return batches, self.data.input_tokens(rows, block_size)

    def marked(self, split: str, rows: np.ndarray, arrays: tuple, kl: float) -> Batch:
        good = self.data.is_good(split, rows)
        more = self.kind_weights[good.astype(int)], np.full(len(rows), kl)
        return Batch("loss", rows, (*arrays, good, *(x.astype(np.float32) for x in more)))

    @torch.no_grad()
    def kl(self, model: torch.nn.Module, split: str, rows: np.ndarray) -> float:
        """The mean of policy - reference in log-probability over these rows' prompts, each with the
        answer of the row before; 0 if it is negative."""
        total = 0.0
        mine = self.world.share(np.stack([rows, np.roll(rows, 1)], axis=1))
        with eval_mode(model), self.autocast():
            for first in range(0, len(mine), self.config.batch_size):
                part = mine[first : first + self.config.batch_size]
                arrays = self.data.crossed(split, part, self.config.block_size, self.multiple)
                batch = send(arrays, self.device)
                ratio = sequence_log_prob(model, *batch) - reference_log_prob(model, *batch)
                total += ratio.double().sum().item()
        return max(0.0, self.world.sums([total])[0] / len(rows))

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        n, good = (sum(int(f(batch.arrays[2])) for batch in batches) for f in (len, np.sum))
        kinds = dict(zip(self.of_kind, (good, n - good) * 2, strict=True))
        return {"loss": n} | kinds | {"kl": n, "accuracy": n}

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """accuracy: of the marks, those whose answer became likelier than kl if it is good, or
        less likely if it is bad."""
        *rows, good, weight, kl = batch.arrays
        with self.autocast():
            reference, log_p = reference_log_prob(model, *rows), sequence_log_prob(model, *rows)
        ratio = log_p - reference
        values = {"loss": weight * kto(ratio, good, kl, self.config.beta)}
        rewards, log_p = self.config.beta * ratio.detach(), log_p.detach()
        both = [value * kind for value in (rewards, log_p) for kind in (good, ~good)]
        values |= zip(self.of_kind, both, strict=True)
        values |= {"kl": kl, "accuracy": ((ratio.detach() > kl) == good).to(kl.dtype)}
        return {name: value.sum() for name, value in values.items()}

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        rows = np.random.default_rng(0).permutation(self.data.n_rows("val", 0))  # files have pairs
        kl = self.kl(model, "val", rows)
        batches = self.data.row_batches("val", self.config.batch_size)
        return self.judge(model, (self.marked("val", *batch, kl) for batch in batches))

    def describe(self, record: dict) -> str:
        moved = f"{record['val_accuracy']:.0%} of the answers moved as they are marked"
        return f"{record['val_loss']:.3f} in validation, where {moved}"
