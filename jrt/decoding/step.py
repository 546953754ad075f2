"""The interface of a step, which reads one token for each row: the model, and the states, which it updates in place.

Shapes: B batch rows, V vocabulary rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from jrt.cache import LayerState, ModelState
from jrt.decoding.states import ConvolutionInputs, KeyRing, LayerBuffers, LinearSums, MambaSums, Position
from jrt.decoding.tables import Rotary, rotary_table
from jrt.mixers import Attention, LinearAttention, Mamba, ShortConvolution
from jrt.model import Block, LanguageModel


class Step(ABC):
    """Computes the logits of the next token, for a fixed number of rows.

    Weights are not copied. So a step stays valid if their values change, but not if a parameter is replaced by another
    tensor.
    """

    def __init__(self, model: LanguageModel, rows: int, capacity: int) -> None:
        """Allocates the states.

        Args:
            model: its parameters decide device and dtype.
            rows: B.
            capacity: the most columns that a text will have, prompt and padding included.
        """
        self.model, self.rows, self.capacity = model, rows, capacity
        config, weight = model.config, model.embedding.weight
        self.position = Position(
            torch.zeros(1, dtype=torch.long, device=weight.device),
            torch.zeros(rows, dtype=torch.long, device=weight.device),
        )
        self.rotary: Rotary | None = None
        if config.rotary_dim and config.has("AS"):
            self.rotary = rotary_table(capacity, config.rotary_dim, config.width // config.heads, weight.device)
        self.blocks = [block for block in model.blocks if isinstance(block, Block)]
        self.buffers = [self._buffers(block.mixer) for block in self.blocks]

    @abstractmethod
    def advance(self, ids: Tensor) -> Tensor:
        """Reads one token for each row, (B,), and returns the logits (B, V) of the next, in the dtype of the weights.

        It advances `position.column` on the device. The caller advances `position.seen`, because a captured step runs
        no Python code.
        """

    def likeliest(self, logits: Tensor) -> Tensor:
        """The tokens (B,) with the largest logits of (B, V); of equal ones, the first."""
        return torch.argmax(logits, dim=-1)

    def load(self, state: ModelState) -> None:
        """Copies `state` into the buffers, to continue from it. Raises ValueError if it is from another model or batch
        size."""
        state.check(self.model.config, self.rows)
        self.position.load(state.seen, state.lengths, filled_columns(state))
        for buffers, layer in zip(self.buffers, state.layers, strict=True):
            buffers.load(layer, self.position)

    def export(self) -> ModelState:
        """The state after the last token that was read, in new tensors."""
        layers: list[LayerState] = [buffers.export(self.position) for buffers in self.buffers]
        seen = self.position.seen - self.position.filled
        return ModelState(self.model.config, layers, seen, self.position.lengths())

    def copies_of_z(self) -> int:
        """Number of equal copies of linear attention's z that the buffers need (`states.LinearSums`)."""
        return 1

    def _buffers(self, mixer: nn.Module) -> LayerBuffers:
        config, like, rows = self.model.config, self.model.embedding.weight, self.rows
        if isinstance(mixer, ShortConvolution):
            return ConvolutionInputs(rows, config.conv_kernel, config.conv_channels, like)
        if isinstance(mixer, LinearAttention):
            heads = config.linear_heads
            return LinearSums(rows, heads, config.feature_dim, config.width // heads, self.copies_of_z(), like)
        if isinstance(mixer, Attention):
            ring = self.capacity if mixer.window is None else mixer.window + 1
            return KeyRing(rows, config.heads, ring, config.width // config.heads, mixer.window, like)
        assert isinstance(mixer, Mamba)
        return MambaSums(rows, config, like)


def filled_columns(state: ModelState) -> int:
    """By how many columns the state's prompt was filled up: `state.seen` does not count them, `state.lengths` does."""
    return max(0, int(state.lengths.max()) - state.seen)
