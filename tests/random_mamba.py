"""Writes small random Mamba and Mamba-2 checkpoints, in the layouts of their authors and of the release."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM


def original_config(model: MambaForCausalLM) -> dict:
    """The configuration of `state-spaces/mamba-*`; the vocabulary is 4 less than the embedding's rows, a multiple of 8."""
    sizes = {"d_model": model.config.hidden_size, "n_layer": model.config.num_hidden_layers}
    usual = {"ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    return {**sizes, "vocab_size": model.config.vocab_size - 4, **usual, "pad_vocab_size_multiple": 8}


def original_layout(model: MambaForCausalLM, folder: Path) -> Path:
    """As `mamba_ssm` writes it: other names for the embedding and in the configuration, a tied head in the file."""
    weights = {name.replace("embeddings.", "embedding."): tensor for name, tensor in model.state_dict().items()}
    assert weights["lm_head.weight"].data_ptr() == weights["backbone.embedding.weight"].data_ptr()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(original_config(model)))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def released_layout(model: MambaForCausalLM, folder: Path) -> Path:
    """As the original release's class writes it: all fields of its dataclass, GPT's among them, at their defaults."""
    original_layout(model, folder)
    config = original_config(model) | {
        "reorder_and_upcast_attn": False,
        "scale_attn_by_inverse_layer_idx": False,
        "n_positions": 2048,
        "n_embd": 1024,
        "n_head": 16,
        "use_flash_attn": False,
        "fused_dropout_add_ln": False,
        "fused_mlp": False,
        "fused_bias_fc": False,
        "use_fast_path": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = torch.load(folder / "pytorch_model.bin")
    counters = {f"{split}_metrics.num-tokens.count": torch.tensor(1) for split in ("train", "val", "test")}
    torch.save({"model." + name: tensor for name, tensor in weights.items()} | counters, folder / "pytorch_model.bin")
    return folder


def save_random_mamba(folder: Path, tokenizer: Path) -> Path:
    """A small Mamba in the release's layout, with the vocabulary and the files of GPT-2's tokenizer."""
    torch.manual_seed(0)
    released_layout(MambaForCausalLM(MambaConfig(vocab_size=50264, hidden_size=32, num_hidden_layers=2)), folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


# Mamba-2

WIDTH, LAYERS, STATE, HEAD, ROWS, CONV = 64, 2, 16, 32, 50288, 4
INNER, HEADS = 2 * WIDTH, 2 * WIDTH // 32
SETTINGS = {"layer": "Mamba2", "d_state": STATE, "headdim": HEAD}


def config(**changes) -> dict:
    """As state-spaces/mamba2-130m has it, smaller."""
    usual = {"d_model": WIDTH, "d_intermediate": 0, "n_layer": LAYERS, "vocab_size": 50277, "ssm_cfg": SETTINGS}
    usual |= {"attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    return {**usual, "pad_vocab_size_multiple": 16, "tie_embeddings": True, **changes}


def weights() -> dict[str, Tensor]:
    """Random, scaled so that the state matters; the names and shapes of `mamba_ssm`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    found = {"backbone.embedding.weight": normal(ROWS, WIDTH, scale=WIDTH**-0.5)}
    for layer in range(LAYERS):
        at = f"backbone.layers.{layer}"
        found |= {
            f"{at}.norm.weight": 1 + normal(WIDTH, scale=0.1),
            f"{at}.mixer.in_proj.weight": normal(2 * INNER + 2 * STATE + HEADS, WIDTH, scale=WIDTH**-0.5),
            f"{at}.mixer.conv1d.weight": normal(INNER + 2 * STATE, 1, CONV, scale=0.5),
            f"{at}.mixer.conv1d.bias": normal(INNER + 2 * STATE, scale=0.1),
            f"{at}.mixer.dt_bias": normal(HEADS, scale=0.5) - 1,
            f"{at}.mixer.A_log": normal(HEADS, scale=0.5),
            f"{at}.mixer.D": normal(HEADS),
            f"{at}.mixer.norm.weight": 1 + normal(INNER, scale=0.1),
            f"{at}.mixer.out_proj.weight": normal(WIDTH, INNER, scale=INNER**-0.5),
        }
    found["backbone.norm_f.weight"] = 1 + normal(WIDTH, scale=0.1)
    found["lm_head.weight"] = found["backbone.embedding.weight"]
    return found


def save_random_mamba2(folder: Path, tokenizer: Path | None, changes: dict | None = None, **settings: object) -> Path:
    """tokenizer: a folder whose files are copied. changes, settings: of config.json and of its ssm_cfg."""
    folder.mkdir()
    raw = config(ssm_cfg={**SETTINGS, **settings}, **(changes or {}))
    (folder / "config.json").write_text(json.dumps(raw))
    torch.save(weights(), folder / "pytorch_model.bin")
    if tokenizer:
        for file in tokenizer.iterdir():
            shutil.copy(file, folder)
    return folder
