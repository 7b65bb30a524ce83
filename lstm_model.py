"""The LSTM (Hochreiter and Schmidhuber, 1997), a baseline with the same methods as the GPT.

    hidden = model(idx)              (B, T) -> (B, T, n_embd)
    logits = model.head(hidden)      (..., n_embd) -> (..., n_vocab)

The recurrence is torch's. A text is read from a state of zeros, so its context is what the state
keeps of it; block_size is the length that training shows, and is kept in generation.
"""

import torch
import torch.nn as nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from model import GPT, ModelConfig, make_norm, matrix_flops


class StateCache:
    """The states of B rows after their last tokens, and how many tokens each has read.

    h, c: (n_layer, B, n_embd); lengths: list of B ints.
    """

    def __init__(self, config: ModelConfig, batch_size: int, dtype: torch.dtype, device):
        shape = (config.n_layer, batch_size, config.n_embd)
        self.h = torch.zeros(shape, dtype=dtype, device=device)
        self.c = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * batch_size

    def keep_rows(self, count: int) -> None:
        """The first `count` rows are there, no others."""
        self.h, self.c, self.lengths = self.h[:, :count], self.c[:, :count], self.lengths[:count]

    def reserve(self, length: int) -> None:
        """A state is as large whatever the length."""

    def append(self, source: "StateCache", rows: list[int]) -> None:
        """Adds rows of another cache."""
        self.h = torch.cat([self.h, source.h[:, rows]], dim=1)
        self.c = torch.cat([self.c, source.c[:, rows]], dim=1)
        self.lengths += [source.lengths[row] for row in rows]

    def copy_rows(self, source: "StateCache", rows: list[int], to: list[int]) -> None:
        """Row rows[i] of source becomes row to[i] of this cache."""
        self.h[:, to], self.c[:, to] = source.h[:, rows], source.c[:, rows]
        for row, target in zip(rows, to, strict=True):
            self.lengths[target] = source.lengths[row]

    def drop_row(self, row: int) -> None:
        """Removes a row: the last one takes its place, as in the GPT's cache."""
        last = len(self.lengths) - 1
        if row != last:
            self.copy_rows(self, [last], [row])
        self.keep_rows(last)


class LSTM(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.norm_in = make_norm(config)
        self.lstm = nn.LSTM(
            config.n_embd,
            config.n_embd,
            config.n_layer,
            batch_first=True,
            dropout=config.dropout if config.n_layer > 1 else 0.0,  # between layers
        )
        self.norm = make_norm(config)
        self.drop = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    def forward(
        self,
        idx: torch.Tensor,
        cache: StateCache | None = None,
        new_tokens: list[int] | None = None,
    ) -> torch.Tensor:
        """(B, T) ids -> (B, T, n_embd) hidden states after the last norm.

        With a cache the ids follow those it holds, row by row, and are added to it: the first
        new_tokens[row] of each row, the rest is padding; None is all T.
        """
        B, T = idx.shape
        end = T + (max(cache.lengths) if cache else 0)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens exceed block_size={self.config.block_size}")
        x = self.drop(self.norm_in(self.wte(idx)))
        if new_tokens:  # the recurrence of each row then ends at its own last token
            x = pack_padded_sequence(x, new_tokens, batch_first=True, enforce_sorted=False)
        before = (cache.h.contiguous(), cache.c.contiguous()) if cache else None
        x, state = self.lstm(x, before)
        if new_tokens:
            x, _ = pad_packed_sequence(x, batch_first=True, total_length=T)
        if cache:
            cache.h, cache.c = state
            added = new_tokens or [T] * B
            cache.lengths = [old + new for old, new in zip(cache.lengths, added, strict=True)]
        return self.norm(self.drop(x))

    def decode(self, idx: torch.Tensor, cache: StateCache) -> torch.Tensor:
        """One id a row (B,), added to the cache -> hidden states (B, n_embd)."""
        return self(idx[:, None], cache)[:, -1]

    def new_cache(self, batch_size: int, length: int | None = None) -> StateCache:
        """Of batch_size empty rows; a state is as large whatever the length."""
        weight = self.wte.weight
        return StateCache(self.config, batch_size, weight.dtype, weight.device)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Embeddings have std 0.02, matrices keep the size of what they read, biases are 0, but 1
        at the forget gate: a new state is kept (Jozefowicz et al., 2015)."""
        for name, parameter in self.named_parameters():
            if name.startswith(("wte", "lm_head")):
                parameter.normal_(std=0.02)
            elif parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif "bias" in name:
                parameter.zero_()
            if name.startswith("lstm.bias_ih"):  # gates: input, forget, cell, output
                parameter.chunk(4)[1].fill_(1.0)

    def flops_per_token(self, T: int) -> float:
        """Of training, forward and backward: 6 for each weight of a matrix, 4 where it is frozen,
        whatever T. The look-up of the embedding is none, the head is one."""
        matrices = [p for p in self.lstm.parameters() if p.dim() == 2]
        return float(matrix_flops([*matrices, *self.lm_head.parameters()]))

    # these read nothing but the config, wte and lm_head, or any parameter
    head = GPT.head
    n_params = GPT.n_params
