"""C, the gated short convolution (BaseConv): y = out(silu(conv(u)) * gate).

Shapes: B batch, T tokens, E channels, K taps.
"""

from __future__ import annotations

from torch import Tensor, nn

from jrt.config import Config
from jrt.mixers.batch import TokenBatch
from jrt.ops import gated_convolution_linear


class ShortConvolution(nn.Module):
    """Gated short convolution. Its state, (B, K - 1, E), holds the last K - 1 inputs of the convolution."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        channels, bias = config.conv_channels, "conv.projections" in config.biases
        self.in_proj = nn.Linear(config.width, 2 * channels, bias=bias)
        self.conv = nn.Conv1d(
            channels, channels, config.conv_kernel, groups=channels, bias="conv.filter" in config.biases
        )
        self.out_proj = nn.Linear(channels, config.width, bias=bias)

    def forward(self, x: Tensor, batch: TokenBatch, state: Tensor | None) -> tuple[Tensor, Tensor]:
        weight, bias = self.conv.weight[:, 0], self.conv.bias
        return gated_convolution_linear(self.in_proj(x), weight, bias, self.out_proj, state, batch.mask)
