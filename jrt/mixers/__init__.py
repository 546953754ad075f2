"""The layers that mix tokens: one class a pattern letter.

Every mixer is made as `Mixer(config, layer)` and called as `mixer(x, batch, state) -> (y, state)`: x and y are
(B, T, E), batch is a `TokenBatch`, and the state is None at the start of a text, later a tensor or a tuple of tensors
whose first dimension is B.
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
    """Makes `mixer` the layer that `letter` stands for in patterns; raises ValueError for a letter that is taken.

    `meaning` is what the error message for an unknown letter says of it.
    """
    if len(letter) != 1 or letter in LETTERS:
        raise ValueError(f"letter {letter!r}: expected one character that is not among {', '.join(LETTERS)}")
    LETTERS[letter] = meaning
    MIXERS[letter] = mixer
