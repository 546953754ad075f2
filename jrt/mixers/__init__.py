"""The mixers: layers that combine the vectors of different tokens. There is one class for each letter of a pattern.

A mixer is made as `Mixer(config, layer)`, where layer is its index in the pattern. It is called as `mixer(x, batch,
state) -> (y, state)`: x and y are (B, T, E), batch is a `TokenBatch`, and the state is None at the start of a text,
else a tensor or a tuple of tensors whose first dimension is B.
"""

from torch import nn

from jrt.config import LETTERS
from jrt.mixers.attention import Attention, WindowAttention
from jrt.mixers.batch import Prefix, TokenBatch
from jrt.mixers.conv import ShortConvolution
from jrt.mixers.linear_attention import LinearAttention, PrefixLinearAttention
from jrt.mixers.mamba import Mamba

MIXERS: dict[str, type[nn.Module]] = {
    "C": ShortConvolution,
    "P": PrefixLinearAttention,
    "L": LinearAttention,
    "S": WindowAttention,
    "A": Attention,
    "M": Mamba,
}
__all__ = ["MIXERS", "Prefix", "TokenBatch", "register"]


def register(letter: str, meaning: str, mixer: type[nn.Module]) -> None:
    """Adds a mixer class under a new letter of patterns (how to write one: docs/architecture.md).

    Args:
        letter: one character that no mixer has.
        meaning: a short description, shown in error messages and by `jrt info`.
        mixer: the class; its interface is described at the top of this file.

    Raises:
        ValueError: the letter is taken, or not one character.
    """
    if len(letter) != 1 or letter in LETTERS:
        raise ValueError(f"letter {letter!r}: expected one character that is not among {', '.join(LETTERS)}")
    LETTERS[letter] = meaning
    MIXERS[letter] = mixer
