"""What a model keeps of the text it has read: one state a layer, and how many tokens each row really has.

Layer states are tensors, or tuples of tensors, whose first dimension is the batch; nothing here knows which mixer
made them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from jrt.config import Config

LayerState = Tensor | tuple[Tensor, ...]


@dataclass
class ModelState:
    """The states of all layers after `seen` columns, of which each row's last `lengths[row]` were its own tokens."""

    config: Config  # of the model that read
    layers: list[LayerState]
    seen: int
    lengths: Tensor  # (B,) int64

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> ModelState:
        """A state whose tensors went through `function`, which may pick, repeat or reorder rows."""
        layers = [_mapped(layer, function) for layer in self.layers]
        return ModelState(self.config, layers, self.seen, function(self.lengths))

    def select(self, rows: Tensor) -> ModelState:
        """The rows with these indices, in this order (beam search, dropping finished rows)."""
        return self.map_rows(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def repeat(self, times: int) -> ModelState:
        """Each row `times` times, neighbours together."""
        return self.map_rows(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def check(self, config: Config, rows: int) -> None:
        """Raises ValueError where a model of this configuration cannot go on from here with so many rows."""
        if self.config != config:
            own, other = config.pattern, self.config.pattern
            raise ValueError(
                f"the state is from another model: expected pattern {own} and its sizes, got {other} and its own"
            )
        if self.lengths.shape != (rows,):
            raise ValueError(f"the state has {self.lengths.shape[0]} rows and the input {rows}: expected the same")

    def nbytes(self) -> int:
        """Bytes that the states take."""
        return sum(tensor.nbytes for layer in self.layers for tensor in _tensors(layer))


def _mapped(layer: LayerState, function: Callable[[Tensor], Tensor]) -> LayerState:
    if isinstance(layer, Tensor):
        return function(layer)
    return type(layer)(*(function(tensor) for tensor in layer))


def _tensors(layer: LayerState) -> tuple[Tensor, ...]:
    return (layer,) if isinstance(layer, Tensor) else tuple(layer)
