"""The layers that mix tokens, one class a pattern letter.

Each is called as `mixer(x (B, T, E), reading, state) -> (y (B, T, E), state)`; the state is None at the start of a
text, and a tuple of tensors (or one tensor) with the batch first afterwards.
"""

from jrt.mixers.attention import Attention, WindowAttention
from jrt.mixers.conv import ShortConvolution
from jrt.mixers.linear_attention import LinearAttention, PrefixLinearAttention
from jrt.mixers.mamba import Mamba
from jrt.mixers.reading import Reading

MIXERS = {
    "C": ShortConvolution,
    "P": PrefixLinearAttention,
    "L": LinearAttention,
    "S": WindowAttention,
    "A": Attention,
    "M": Mamba,
}
__all__ = ["MIXERS", "Reading"]
