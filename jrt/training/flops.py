"""Floating-point operations of a model for each token, and the peak rates of devices. A multiply and an add are two."""

from __future__ import annotations

import torch

from jrt.config import Config

# Dense bf16 tensor-core peaks in FLOP/s, from the vendor's data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def mixing_flops(config: Config, layer: int, length: int) -> int:
    """Operations of one layer's mixer for a token that `length` others precede, without the products with weights.

    They are its work on its state; of P the encoder's is left out."""
    match config.pattern[layer]:
        case "C":
            return 2 * config.conv_kernel * config.conv_channels
        case "P" | "L":  # one outer product, one product with the state
            return 4 * config.features * (config.width + config.linear_heads)
        case "S":
            return 4 * config.width * (min(config.window_of(layer), length) + 1)
        case "A":
            return 4 * config.width * (length + 1)
        case _:
            return config.mamba_expand * config.width * (2 * config.mamba_kernel + 7 * config.state_dim)


def flops_per_token(config: Config, parameters: int, length: int) -> tuple[int, int]:
    """Training FLOPs for each token, in two counts: 6 N for N parameters; and 6 N plus the mixers' work.

    A backward pass counts twice its forward pass, and a mixer as in the middle of a sequence of `length` tokens.
    """
    mixing = sum(mixing_flops(config, layer, length // 2) for layer in range(len(config.pattern)))
    return 6 * parameters, 6 * parameters + 3 * mixing


def peak_flops(device: torch.device) -> float:
    """Peak rate of the device for dense bf16 products, in FLOP/s; nan if it is not in PEAKS."""
    if device.type != "cuda":
        return float("nan")
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), float("nan"))
