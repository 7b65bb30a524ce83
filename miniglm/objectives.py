"""What a stage trains: the rows of a step, what is computed of them, and how the model is judged.

train.py has one loop for every stage, and asks an objective:

    batches(start, step)    this process's batches of the step that begins after `start` rows, and
                            the tokens of the whole step, padding left out
    counts(batches)         before the forward pass: what each sum is divided by
    sums(model, batch)      {term: sum over the batch}, of which the loss is made
    evaluate(model)         {name: value} on the validation split, if there is one, with "val_loss"
    describe(record)        the line that is printed of an evaluation

loss = sum of weights[term] x sums[term] / counts[term], where counts are those of all micro-batches
and processes: gradient accumulation equals the full batch under any mask, and a batch without a
trained target gives 0, not NaN. What else `sums` returns is logged as a mean.

A new objective is a class with these methods, and its kind of data in stages.py.
"""

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from configurator import UserError, show_path
from data_utils import IGNORE, Dataset, Mixture
from miniglm.checkpoint import load_reference, save_reference, weights_sha256
from miniglm.devices import autocast, pick_dtype
from miniglm.distributed import ALONE, World
from miniglm.losses import (
    dpo,
    eval_mode,
    next_token,
    reference_log_prob,
    send,
    sequence_log_prob,
    split_sums,
)


class Batch(NamedTuple):
    """Rows that are computed together: arrays of numpy, or tensors once they are on the device."""

    term: str
    rows: np.ndarray  # as the dataset names them
    arrays: tuple  # idx and targets, (B, T) each, with IGNORE; on the device what `send` gives


class Objective:
    """What objectives share. config: train.py's Settings."""

    unit = "rows"  # what a step counts
    copies = 1  # rows that the model reads of each
    pieces = 1  # batches of each part
    needs_newest_weights = False  # to make its rows, as samples do: then no step is made ahead
    needs_a_model = False  # to begin with; dropout is then off by default
    weights: dict[str, float]  # of each term in the loss

    def __init__(self, config, data: Dataset | Mixture, device: str, world: World = ALONE):
        self.config, self.data, self.device, self.world = config, data, device, world
        # few lengths of rows: compiled code is reused on a GPU, what oneDNN keeps of each on a CPU
        self.multiple = 64 if device.startswith("cuda") else 16

    def start_from(self, checkpoint: Path) -> None:
        """Called with the path of the model whose weights are all trained on, if there is one."""

    def saved(self) -> dict:
        """What run.json keeps of the objective."""
        return {}

    def restore(self, run: dict) -> None:
        """Takes what `saved` gave from the run.json of a run that is resumed."""

    def begin(self, model: torch.nn.Module, out_dir: Path | None, step: int) -> None:
        """Called before the first step, and when a run is resumed after `step` of them. Without an
        out_dir steps are only timed."""
        self.model = model

    def parts(self, start: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The rows of the step that begins after `start` rows, and those of each micro-batch of
        this process."""
        config = self.config
        rows = self.data.step_rows(config.seed, start, config.rows_per_step, config.block_size)
        mine = self.world.share(rows)
        return rows, np.array_split(mine, -(-len(mine) // config.batch_size)) if len(mine) else []

    def row_length(self, tokens: int, rows: int, step: int) -> float:
        """The mean length of rows, as attention sees them, that hold these tokens."""
        return tokens / (rows * self.copies)

    def show_rows(self, start: int, step: int, rank: int, micro: int) -> str:
        """The place of the rows that a process had in one micro-batch of a step."""
        other = copy.copy(self)
        other.world = dataclasses.replace(self.world, rank=rank)
        if self.needs_newest_weights:  # which have changed since
            return self.data.show_rows(other.parts(start)[1][micro // self.pieces])
        return self.data.show_rows(other.batches(start, step)[0][micro].rows)

    def judge(self, model: torch.nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """The means of what `sums` gives over a split's batches, in eval mode, named val_."""
        sums, counts = Counter(), Counter()
        with eval_mode(model), torch.no_grad():
            for batch, is_own in self.world.deal(batches):
                values, own = self.sums(model, self.to_device(batch)), self.counts([batch])
                for name, count in own.items():
                    sums[name] += values[name].item() * is_own
                    counts[name] += count * is_own
        totals = self.world.sums(list(sums.values())), self.world.sums(list(counts.values()))
        return {
            f"val_{name}": total / count
            for name, total, count in zip(sums, *totals, strict=True)
            if count
        }

    def to_device(self, batch: Batch) -> Batch:
        return batch._replace(arrays=send(batch.arrays, self.device))

    def autocast(self):
        return autocast(self.config.dtype, self.device)


class NextToken(Objective):
    """The next token of texts, of answers, or of answers with texts beside them.

    Of the latter each kind's mean loss is a term of its own: answers at 1, texts at mix_weight.
    """

    def __init__(self, config, data: Dataset | Mixture, device: str, world: World = ALONE):
        super().__init__(config, data, device, world)
        self.term_of = {data.kind: "loss"} | ({"pretrain": "loss_text"} if data.beside else {})
        self.weights = {"loss": 1.0} | ({"loss_text": config.mix_weight} if data.beside else {})

    def batches(self, start: int, step: int) -> tuple[list[Batch], int]:
        rows, parts = self.parts(start)
        batches = []
        for part in parts:
            of_kind = self.data.by_kind(part)
            for kind, term in self.term_of.items():
                if kind in of_kind:
                    batches.append(
                        Batch(term, of_kind[kind], self.arrays(kind, of_kind[kind], step))
                    )
                elif self.config.shard:  # all processes run a sharded model equally often
                    nothing = np.zeros((1, 1), np.int64), np.full((1, 1), IGNORE)
                    batches.append(Batch(term, part[:0], nothing))
        return batches, self.data.input_tokens(rows, self.config.block_size)

    def arrays(self, kind: str, rows: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        arrays = self.data.batch(rows, self.config.block_size, self.multiple)
        if kind == "pretrain" and self.is_short(step):  # the same targets, from less context
            length = self.config.short_block
            arrays = tuple(np.ascontiguousarray(array).reshape(-1, length) for array in arrays)
        return arrays

    def is_short(self, step: int) -> bool:
        """Whether text is cut: early, when far context teaches least (arXiv 2108.06084)."""
        return self.config.short_block is not None and step < self.config.decay_end // 2

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        counts = dict.fromkeys(self.weights, 0)
        for batch in batches:
            counts[batch.term] += int((batch.arrays[1] != IGNORE).sum())
        return counts

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        with self.autocast():
            return {batch.term: next_token(model, *batch.arrays)}

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        nats, count, n_bytes = self.split_sums(model, self.data)
        scores = {"val_loss": nats / count, "val_bits_per_byte": nats / math.log(2) / n_bytes}
        if beside := [text for text in self.data.beside if "val" in text.tokens]:
            sums = [self.split_sums(model, text) for text in beside]
            nats, _, n_bytes = map(sum, zip(*sums, strict=True))
            scores["val_bits_per_byte_text"] = nats / math.log(2) / n_bytes
        return scores

    def split_sums(self, model: torch.nn.Module, data: Dataset | Mixture) -> tuple[float, int, int]:
        with self.autocast():
            return split_sums(model, data, "val", self.config.batch_size, self.world)

    def describe(self, record: dict) -> str:
        line = (
            f"{record['val_loss']:.3f} in validation (nats per token), "
            f"{record['val_bits_per_byte']:.3f} bits per byte"
        )
        text = record.get("val_bits_per_byte_text")
        return line if text is None else f"{line}, {text:.3f} of texts"

    def row_length(self, tokens: int, rows: int, step: int) -> float:
        if self.data.kind == "pretrain" and self.is_short(step):
            return self.config.short_block
        return tokens / rows


class Preferences(Objective):
    """Chosen answers over rejected ones (DPO). A batch's rows are chosen, rejected, chosen, ...

    The reference is the model before its first step: with adapters it is the model with them off;
    else its log-probabilities of all pairs are computed once, and kept in the out_dir.
    """

    unit, copies = "pairs", 2
    needs_a_model = True
    # besides the loss a pair: what tells how training goes, each a mean over pairs
    measures = ("rewards_chosen", "rewards_rejected", "margin", "accuracy")
    measures += ("logp_chosen", "logp_rejected")

    def __init__(self, config, data: Dataset, device: str, world: World = ALONE):
        super().__init__(config, data, device, world)
        if not config.beta:
            raise UserError("preferences need a --beta= above 0")
        self.weights = {"loss": 1.0}
        if config.dpo_sft_weight:
            self.weights["loss_sft"] = config.dpo_sft_weight
        self.reference: dict[str, torch.Tensor] | None = None  # (pairs, 2) a split
        self.reference_key: dict[str, str] | None = None  # the model and data that it is of

    def start_from(self, checkpoint: Path) -> None:
        """From now on the model at this path is the reference."""
        splits = self.data.meta["splits"]
        self.reference_key = {split: splits[split]["fingerprint"] for split in self.data.splits} | {
            "model": weights_sha256(checkpoint),
            "precision": str(pick_dtype(self.config.dtype, self.device)).removeprefix("torch."),
        }

    def saved(self) -> dict:
        return {"reference": self.reference_key} if self.reference_key else {}

    def restore(self, run: dict) -> None:
        self.reference_key = run.get("reference")

    def begin(self, model: torch.nn.Module, out_dir: Path | None, step: int) -> None:
        """Reads the reference's log-probabilities, or computes and writes them before step 0.

        Raises UserError if they were lost since, or if the validation split is another one.
        """
        if not self.reference_key:
            return
        if not out_dir:
            self.reference = {"train": torch.zeros(self.data.n_rows("train", 0), 2)}  # same cost
            return
        val = self.data.meta["splits"].get("val", {})
        if self.reference_key.get("val") != val.get("fingerprint"):
            raise UserError(
                f"{show_path(self.data.path)}/val.bin is not what this run began with; train again "
                "in another --out_dir="
            )
        self.reference = load_reference(out_dir, self.reference_key)
        if not self.world.any(self.reference is None):
            return
        if step:
            raise UserError(
                f"{show_path(out_dir)} has lost its reference.safetensors, the log-probabilities "
                "of the model it started from; train again in another --out_dir="
            )
        print(f"reading {self.data.name} with the model as it is, for reference.safetensors")
        self.reference = {split: self.log_probs(model, split) for split in self.data.splits}
        if self.world.is_first:
            save_reference(out_dir, self.reference, self.reference_key)

    def log_probs(self, model: torch.nn.Module, split: str) -> torch.Tensor:
        """Log-probabilities of each pair of a split by the model as it is, (P, 2) float32."""
        out = torch.zeros(self.data.n_rows(split, 0), 2)
        batches = self.data.row_batches(split, self.config.batch_size)
        for (pairs, arrays), is_own in self.world.deal(batches):
            # as its policy is computed: attention may round otherwise where gradients are wanted
            with self.autocast(), torch.set_grad_enabled(split == "train"):
                log_p = reference_log_prob(model, *send(arrays, self.device))
            if is_own:
                out[pairs] = log_p.view(-1, 2).float().cpu()
        return self.world.add(out)

    def batches(self, start: int, step: int) -> tuple[list[Batch], int]:
        (rows, parts), size = self.parts(start), self.config.block_size
        batches = [Batch("loss", p, self.data.batch(p, size, self.multiple)) for p in parts]
        batches = [self.with_reference(batch, "train") for batch in batches]
        return batches, self.data.input_tokens(rows, size)

    def with_reference(self, batch: Batch, split: str) -> Batch:
        """The batch with its reference's log-probabilities (B, 2), if they were computed."""
        if self.reference is None:
            return batch
        return batch._replace(arrays=(*batch.arrays, self.reference[split][batch.rows].numpy()))

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        pairs = sum(len(batch.rows) for batch in batches)
        chosen = sum(int((batch.arrays[1][::2] != IGNORE).sum()) for batch in batches)
        return {"loss": pairs, "loss_sft": chosen} | dict.fromkeys(self.measures, pairs)

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Chosen and rejected rows are read in one forward pass."""
        idx, targets, places, *given = batch.arrays
        rows = idx, targets, places
        with self.autocast():
            reference = given[0] if given else reference_log_prob(model, *rows).view(-1, 2)
            log_p = sequence_log_prob(model, *rows).view(-1, 2)  # of chosen, of rejected
        losses = dpo(log_p, reference, self.config.beta)
        rewards = self.config.beta * (log_p - reference).detach()
        margins = rewards[:, 0] - rewards[:, 1]
        measured = (*rewards.T, margins, (margins > 0).to(losses.dtype), *log_p.detach().T)
        values = {"loss": losses, "loss_sft": -log_p[:, 0]}
        values |= zip(self.measures, measured, strict=True)
        return {name: value.sum() for name, value in values.items()}

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        batches = self.data.row_batches("val", self.config.batch_size)
        return self.judge(
            model, (self.with_reference(Batch("loss", *batch), "val") for batch in batches)
        )

    def describe(self, record: dict) -> str:
        return (
            f"{record['val_loss']:.3f} in validation (nats per pair); there the chosen answer has "
            f"the higher reward in {record['val_accuracy']:.0%}, by {record['val_margin']:.3f}"
        )
