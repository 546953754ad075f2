"""Trains many small models of one shape as one large model, the *stack*.

The rows of all models form one batch, and each row is computed with the weights of its own model. A stack is made from
ordinary jrt models. Layers with weights are replaced by layers that hold the weights of all models
(`synthetics.stacked`). Layers without weights are used unchanged, on a larger batch. A mixer that `synthetics.stacked`
does not know (Mamba, your own) is called once for each model. A stack reads whole texts, without padding and without
states.

Shapes: M models, B rows of each, R = M x B rows in all, T tokens, K asked columns, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jrt.model import Block, LanguageModel, RMSNorm
from synthetics.residual import add_and_norm
from synthetics.stacked import (
    OneByOne,
    StackedEmbedding,
    StackedLinear,
    StackedLinearAttention,
    late_bias,
    stacked,
    weights,
)


class StackedNorm(nn.Module):
    """Adds a layer's output to the residual stream, and norms the sum for the next layer."""

    def __init__(self, copies: Sequence[RMSNorm], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weights(copies, "weight")  # (M, E)
        self.eps, self.dtype = copies[0].eps, dtype

    def forward(self, x: Tensor, y: Tensor | None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the sum of x, y (R, ..., E) and bias (M, E) in the dtype of x, and its norm in the layers' dtype."""
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
    """A stack of models without MLPs. Each parameter is (M, ...), the models' parameters stacked."""

    def __init__(self, models: Sequence[LanguageModel], dtype: torch.dtype = torch.float32) -> None:
        """The models must have the same configuration, except for feature_dim.

        Layers compute in `dtype`. Weights and the residual stream keep their own dtype."""
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
        """Returns the logits (R, K, V) at the columns `asked` (R, K) of the tokens (R, T).

        The rows of the first model come first, then those of the second, and so on."""
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
        """Removes all models except these (their numbers) from buffers. `StackedAdamW.keep` does so for parameters."""
        for module in self.modules():
            if isinstance(module, StackedLinearAttention):
                module.scales = module.scales[models]
            elif isinstance(module, OneByOne):
                module.copies = [module.copies[index] for index in models.tolist()]


def _columns(x: Tensor, asked: Tensor) -> Tensor:
    """Takes the asked columns: (R, T, E) to (R, K, E)."""
    return x.take_along_dim(asked[..., None], dim=1)
