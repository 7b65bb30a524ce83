"""The LSTM (Hochreiter and Schmidhuber, 1997), a baseline with the same methods as the GPT.

    hidden = model(idx)              (B, T) -> (B, T, n_embd)
    logits = model.head(hidden)      (..., n_embd) -> (..., n_vocab)

The recurrence is torch's. A text is read from a state of zeros, so a long one is remembered only as
far as the state does; block_size is the length of training rows, and the limit in generation too.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from configurator import UserError
from miniglm.devices import pick_dtype
from model import NORMS, Architecture, KVCache, LanguageModel, ModelConfig, matrix_flops

SETTINGS = {"model", "block_size", "n_layer", "n_embd", "norm", "norm_eps", "tie_weights"}
SETTINGS |= {"dropout"}  # of an Architecture; the others are the GPT's


class StateCache(KVCache):
    """The states of B rows after their last tokens, as a KVCache of a single slot: k holds h and v
    holds c, (n_layer, B, 1, 1, n_embd)."""

    def reserve(self, length: int) -> None:
        """Does nothing: the size of a state does not depend on the length."""


class LSTM(LanguageModel):
    def __init__(self, config: ModelConfig):
        super().__init__()
        refuse_settings_of_the_gpt(config)
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.norm_in = NORMS[config.norm](config)
        self.lstm = nn.LSTM(
            config.n_embd,
            config.n_embd,
            config.n_layer,
            batch_first=True,
            dropout=config.dropout if config.n_layer > 1 else 0.0,  # between layers
        )
        self.norm = NORMS[config.norm](config)
        self.drop = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    def forward(
        self, idx: Tensor, cache: StateCache | None = None, new_tokens: list[int] | None = None
    ) -> Tensor:
        """(B, T) ids -> (B, T, n_embd) hidden states after the last norm.

        With a cache the ids continue its rows and are added to it: the first new_tokens[row] ids of
        each row (None: all T), the others are padding.
        """
        B, T = idx.shape
        end = T + (max(cache.lengths) if cache else 0)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens exceed block_size={self.config.block_size}")
        x = self.drop(self.norm_in(self.wte(idx)))
        if new_tokens:  # the recurrence of each row then ends at its own last token
            x = pack_padded_sequence(x, new_tokens, batch_first=True, enforce_sorted=False)
        state = None
        if cache:
            state = cache.k.flatten(2).contiguous(), cache.v.flatten(2).contiguous()
        native = pick_dtype("auto", "cpu") == torch.bfloat16  # else torch's LSTM has none on a CPU
        with torch.autocast("cpu", enabled=native and torch.is_autocast_enabled("cpu")):
            x, (h, c) = self.lstm(x, state)
        if new_tokens:
            x, _ = pad_packed_sequence(x, batch_first=True, total_length=T)
        if cache:
            cache.k.copy_(h.view_as(cache.k))
            cache.v.copy_(c.view_as(cache.v))
            added = new_tokens or [T] * B
            cache.lengths = [old + new for old, new in zip(cache.lengths, added, strict=True)]
        return self.norm(self.drop(x))

    def new_cache(self, batch_size: int, length: int | None = None) -> StateCache:
        """batch_size empty rows; the length does not matter."""
        shape = self.config.n_layer, batch_size, 1, 1, self.config.n_embd
        return StateCache(shape, self.wte.weight)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Embeddings have std 0.02, matrices preserve the scale of their input, biases are 0 except
        for the forget gate's 1, which keeps a new state (Jozefowicz et al., 2015)."""
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
        """Floating-point operations of training on one token, at any T: 6 for each weight of a
        matmul (the head's, not the embedding's lookup), 4 if it is frozen."""
        matrices = [p for p in self.lstm.parameters() if p.dim() == 2]
        return float(matrix_flops([*matrices, *self.lm_head.parameters()]))


def refuse_settings_of_the_gpt(config: ModelConfig) -> None:
    """Raises UserError if a setting that only the GPT reads is not at its default."""
    for field in dataclasses.fields(Architecture):
        value = getattr(config, field.name)
        if value != field.default and field.name not in SETTINGS:
            raise UserError(
                f"{field.name}={value!r} means nothing to model='lstm'; leave one of them out"
            )
