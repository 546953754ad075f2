"""Mamba-2 in its authors' layout, which transformers cannot open without help."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from jrt.checkpoints.files import CheckpointError, Reader, entries
from jrt.checkpoints.names import read_config
from jrt.system.breaks import as_value_error

# Fields of a Mamba-2 config.json (arXiv 2405.21060). _SIZES: the defaults of `mamba_ssm` for sizes that ssm_cfg leaves
# out. _FIXED (in ssm_cfg) and _MODEL_FIXED (beside it): the only values that transformers' class computes correctly.
# _WITHOUT_EFFECT: fields that do not change what a trained model computes. _FLAGS: true if they are left out.
_SIZES = {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64}
_FIXED = {
    "layer": "Mamba2",
    "ngroups": 1,
    "bias": False,
    "conv_bias": True,
    "rmsnorm": True,
    "norm_before_gate": False,
    "D_has_hdim": False,
    "d_ssm": None,
    "dt_limit": [0, math.inf],
}
_WITHOUT_EFFECT = ("chunk_size", "use_mem_eff_path", "dt_min", "dt_max", "dt_init_floor", "A_init_range", "conv_init")
_MODEL_FIXED = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": []}
_FLAGS = ("residual_in_fp32", "tie_embeddings")


def open_mamba2(folder: Path, dtype: torch.dtype) -> Mamba2ForCausalLM:
    """Reads Mamba-2 as `mamba_ssm` saves it (`state-spaces/mamba2-*`) into transformers' class.

    dtype: of the weights. Raises CheckpointError for settings that transformers' class does not compute, and for
    tensors that do not fit; ValueError for sizes that no model can have."""
    raw = read_config(folder)
    settings = raw["ssm_cfg"]
    for fixed, given, place in ((_MODEL_FIXED, raw, ""), (_FIXED, settings, "ssm_cfg.")):
        for key, expected in fixed.items():
            if given.get(key, expected) != expected:
                raise CheckpointError(f"config.json has {place}{key} = {given[key]!r}; expected {expected!r}")
    if unknown := sorted(settings.keys() - {*_SIZES, *_FIXED, *_WITHOUT_EFFECT}):
        raise CheckpointError(f"config.json has ssm_cfg.{unknown[0]}, whose meaning here is unknown")
    sizes = {key: settings.get(key, default) for key, default in _SIZES.items()}
    numbers = {"d_model": raw.get("d_model"), "n_layer": raw.get("n_layer"), **sizes}
    for key, value in numbers.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(f"config.json has {key} = {value!r}; expected a whole number of at least 1")
    for key in _FLAGS:
        if type(raw.get(key, True)) is not bool:
            raise CheckpointError(f"config.json has {key} = {raw[key]!r}; expected true or false")
    width, head = sizes["expand"] * numbers["d_model"], sizes["headdim"]
    if width % head:
        raise CheckpointError(f"config.json: expand * d_model = {width} is no multiple of headdim = {head}")
    found = entries(folder)
    embedding = found.get("backbone.embedding.weight")
    if embedding is None:
        raise CheckpointError(
            f"{folder} has no tensor backbone.embedding.weight: expected Mamba-2 as mamba_ssm saves it"
        )
    # The two sizes that decide how much is built below are compared with the file first.
    expected_shape = (embedding.shape[0], numbers["d_model"])
    if embedding.shape != expected_shape:
        raise CheckpointError(
            f"{folder}: backbone.embedding.weight has shape {embedding.shape}; expected {expected_shape}"
        )
    if (last := f"backbone.layers.{numbers['n_layer'] - 1}.norm.weight") not in found:
        raise CheckpointError(f"{folder}: the tensor {last} is missing")
    config = Mamba2Config(
        vocab_size=embedding.shape[0],
        hidden_size=numbers["d_model"],
        num_hidden_layers=numbers["n_layer"],
        state_size=sizes["d_state"],
        conv_kernel=sizes["d_conv"],
        expand=sizes["expand"],
        head_dim=head,
        num_heads=width // head,
        n_groups=1,
        residual_in_fp32=raw.get("residual_in_fp32", True),
        tie_word_embeddings=raw.get("tie_embeddings", True),
        bos_token_id=0,  # of GPT-NeoX's tokenizer: <|endoftext|>
        eos_token_id=0,
        pad_token_id=0,
    )
    with as_value_error("config.json has sizes that no model can have"), torch.device("meta"):
        model = Mamba2ForCausalLM(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    named = {name.replace("backbone.embedding.", "backbone.embeddings."): entry for name, entry in found.items()}
    if config.tie_word_embeddings:
        named.setdefault("lm_head.weight", embedding)
    for name in sorted(wanted.keys() | named.keys()):
        if name not in named or name not in wanted:
            raise CheckpointError(f"{folder}: the tensor {name} is {'missing' if name in wanted else 'left over'}")
        if named[name].shape != wanted[name]:
            raise CheckpointError(f"{folder}: {name} has shape {named[name].shape}; expected {wanted[name]}")
    reader = Reader("cpu", dtype)
    tensors = {name: reader.read(entry) for name, entry in named.items()}
    if config.tie_word_embeddings and not torch.equal(tensors["lm_head.weight"], tensors["backbone.embeddings.weight"]):
        raise CheckpointError(
            f"{folder}: lm_head.weight differs from the embedding; expected the same, or tie_embeddings: false"
        )
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model
