"""What a token costs to train, and what a device can do: the two sides of model FLOP utilisation (MFU)."""

from __future__ import annotations

import torch

from jrt.config import Config

# Dense bf16 tensor-core peaks in FLOP/s, from the vendor's data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def flops_per_token(config: Config, parameters: int, length: int) -> tuple[int, int]:
    """Training FLOPs a token: 6N, and 6N with what the mixers compute besides their projections.

    Multiply-adds count 2 and a backward pass twice its forward pass. A token and layer costs forward: A, 2 x 2 x T/2 x E for
    scores and sums; S, 2 x 2 x window x E; P and L, 2 x 2 x F x (E + H) for writing and reading the state (P once more for
    the prefix's share, left out here); M, about 9 x N x E'; C, 2 x taps x channels.
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
    """Dense bf16 FLOP/s of the device; nan where it is not known."""
    if device.type != "cuda":
        return float("nan")
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), float("nan"))
