"""The state of a model after the text that it has read: one state for each layer, and the number of tokens of each row.

A layer's state is a tensor, or a tuple of tensors, whose first dimension is the batch. The code here is the same for
all kinds of layers.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from jrt.config import Config

LayerState = Tensor | tuple[Tensor, ...]


@dataclass
class ModelState:
    """The states of all layers after `seen` columns of input. In each row, the last `lengths[row]` of them were its own
    tokens, and those before them padding on the left."""

    config: Config  # of the model that computed the states
    layers: list[LayerState]
    seen: int
    lengths: Tensor  # (B,) int64

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> ModelState:
        """A new state: `function` is applied to each tensor. It may choose, repeat or reorder rows (dimension 0)."""
        layers = [_mapped(layer, function) for layer in self.layers]
        return ModelState(self.config, layers, self.seen, function(self.lengths))

    def select(self, rows: Tensor) -> ModelState:
        """The rows with these indices, in this order (beam search, dropping finished rows)."""
        return self.map_rows(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def repeat(self, times: int) -> ModelState:
        """Each row repeated `times` times, copies side by side."""
        return self.map_rows(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def check(self, config: Config, rows: int) -> None:
        """Raises ValueError unless a model with this configuration and this number of rows can continue from the
        state."""
        if self.config != config:
            own, other = config.pattern, self.config.pattern
            raise ValueError(
                f"the state is from another model: expected pattern {own} and its sizes, got {other} and its own"
            )
        if self.lengths.shape != (rows,):
            raise ValueError(f"the state has {self.lengths.shape[0]} rows and the input {rows}: expected the same")

    def nbytes(self) -> int:
        """Memory of the states in bytes."""
        return sum(tensor.nbytes for layer in self.layers for tensor in _tensors(layer))


def _mapped(layer: LayerState, function: Callable[[Tensor], Tensor]) -> LayerState:
    if isinstance(layer, Tensor):
        return function(layer)
    return type(layer)(*(function(tensor) for tensor in layer))


def _tensors(layer: LayerState) -> tuple[Tensor, ...]:
    return (layer,) if isinstance(layer, Tensor) else tuple(layer)
