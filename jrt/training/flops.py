"""Operations that training costs for each token, and the peak rates of devices: both are needed for model FLOP
utilisation."""

from __future__ import annotations

import torch

from jrt.config import Config

# Dense bf16 tensor-core peaks in FLOP/s, from the vendor's data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def flops_per_token(config: Config, parameters: int, length: int) -> tuple[int, int]:
    """Training FLOPs for each token, in two counts: 6 N for N parameters; and 6 N plus the mixers' work beside
    projections.

    A multiply-add counts 2, and a backward pass twice its forward pass. Forward, a token costs in a layer of kind A 2 x
    2 x T/2 x E (scores and sums); S 2 x 2 x window x E; P and L 2 x 2 x F x (E + H) (writing and reading the state; the
    encoder's writing is left out); M about 9 x states x channels; C 2 x taps x channels.

    Args:
        config: the architecture, with width E, H heads and F features of linear attention.
        parameters: N.
        length: T, tokens of a training sequence.
    """
    simple = 6 * parameters
    forward = 0
    for layer, letter in enumerate(config.pattern):
        match letter:
            case "A":
                forward += 2 * length * config.width
            case "S":
                forward += 4 * min(config.window_of(layer), length) * config.width
            case "P" | "L":
                forward += 4 * config.features * (config.width + config.linear_heads)
            case "M":
                forward += 9 * config.state_dim * config.mamba_expand * config.width
            case _:
                forward += 2 * config.conv_kernel * config.conv_channels
    return simple, simple + 3 * forward


def peak_flops(device: torch.device) -> float:
    """Peak rate of the device for dense bf16 products, in FLOP/s; nan if it is not in PEAKS."""
    if device.type != "cuda":
        return float("nan")
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), float("nan"))
