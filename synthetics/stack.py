"""Many models of one shape as one model: their rows share a batch, and each row meets the weights of its own model.

A stack is made out of jrt's own models. Layers with weights are replaced by ones that hold the weights of all models
(`synthetics.stacked`); what only mixes tokens sees a larger batch and stays as it is. A mixer that is not known there
(Mamba, your own) is called once for each model. A stack reads whole texts without padding and keeps no states.

Shapes: M models, B rows of each, R = M x B rows in all, T tokens, K asked columns, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jrt.model import Block, LanguageModel, RMSNorm
from synthetics.residual import add_and_norm
from synthetics.stacked import StackedEmbedding, StackedLinear, StackedLinearAttention, late_bias, stacked, weights


class StackedNorm(nn.Module):
    """Adds what a layer gave to the residual stream and norms the sum for the next layer."""

    def __init__(self, copies: Sequence[RMSNorm], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weights(copies, "weight")  # (M, E)
        self.eps, self.dtype = copies[0].eps, dtype

    def forward(self, x: Tensor, y: Tensor | None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x and y (R, ..., E), bias (M, E): their sum, in the dtype of x, and its norm, in the dtype of layers."""
        by_model = (len(self.weight), -1, x.shape[-1])
        rows = None if y is None else y.reshape(by_model)
        total, normed = add_and_norm(x.reshape(by_model), rows, bias, self.weight, self.eps, self.dtype)
        return total.view(x.shape), normed.view(x.shape)


class StackedBlock(nn.Module):
    """A norm and a mixer."""

    def __init__(self, copies: Sequence[Block], dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = StackedNorm([each.norm1 for each in copies], dtype)
        self.mixer = stacked([each.mixer for each in copies])


class Stack(nn.Module):
    """Models without MLPs; its parameters are theirs, stacked: (M, ...) each."""

    def __init__(self, models: Sequence[LanguageModel], dtype: torch.dtype = torch.float32) -> None:
        """`models` are of one configuration, but for feature_dim. Layers compute in `dtype`; weights and residual stream keep theirs."""
        super().__init__()
        first = models[0]
        assert not first.config.mlp_width
        self.template = [first]  # in a list, so that its own weights are no parameters of the stack
        self.embedding = StackedEmbedding([each.embedding for each in models])
        layers = range(len(first.blocks))
        self.blocks = nn.ModuleList(
            StackedBlock([each.get_submodule(f"blocks.{layer}") for each in models], dtype) for layer in layers
        )
        self.norm = StackedNorm([each.norm for each in models], dtype)
        self.head = StackedLinear([each.head for each in models])
        if first.config.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """Logits (R, K, V) after the columns `asked` (R, K) of the tokens (R, T), the first model's rows first."""
        batch = self.template[0].token_batch(tokens, None, None, None)
        x, y, bias = self.embedding(tokens), None, None  # (R, T, E)
        *before, last = self.blocks
        for block in before:
            x, normed = block.norm(x, y, bias)
            y, _ = block.mixer(normed, batch, None)
            bias = late_bias(block.mixer)
        x, normed = last.norm(x, y, bias)
        x = _columns(x, asked)  # (R, K, E)
        if isinstance(last.mixer, StackedLinearAttention) and last.mixer.can_answer(asked):
            y = last.mixer.answer(normed, last.norm(x, None)[1], asked)
        else:
            y = _columns(last.mixer(normed, batch, None)[0], asked)
        _, normed = self.norm(x, y, late_bias(last.mixer))
        return self.head(normed)

    def keep(self, models: Tensor) -> None:
        """Goes on with these models (their numbers) where something else than a parameter differs between models."""
        for module in self.modules():
            if isinstance(module, StackedLinearAttention):
                module.scales = module.scales[models]


def _columns(x: Tensor, asked: Tensor) -> Tensor:
    """(R, T, E) to (R, K, E)."""
    return x.take_along_dim(asked[..., None], dim=1)
