"""`jrt info NAME`: describes a model and its costs from its configuration alone. No weights are read."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from jrt.checkpoints.load import configuration, has_tokenizer, trained_tokenizer
from jrt.checkpoints.names import Kind, find, kind_of, kind_of_model, read_config, resolve
from jrt.config import LETTERS, Config, presets, releases
from jrt.model import LanguageModel
from jrt.released.configurations import has_gpt_fields
from jrt.released.quirks import Quirks
from jrt.system.breaks import as_value_error
from jrt.training.flops import mixing_flops

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
_RELEASED_DEFAULTS = (("tokenizer", "GPT-2's"), ("quirks switched on", "none"))


def describe(name: str, lengths: Sequence[int] = LENGTHS) -> list[tuple[str, str]]:
    """(label, value) pairs for a preset, a model of this project, or any other causal language model.

    lengths: numbers of tokens read, for which sizes of states and operations are given if they depend on it. Raises
    ValueError for an unknown name."""
    preset = releases().get(name, name)
    if preset in presets() and find(name) is None:
        core = presets()[preset]
        note = (
            "a preset: an architecture without weights" if preset == name else "weights are not here: from the preset"
        )
        measured = [*_RELEASED_DEFAULTS, *_measured(core)] if preset in releases().values() else []
        return [("model", f"{name} ({note})"), *_ours(core, lengths), *measured]
    folder = resolve(name)
    if kind_of_model(folder) is Kind.OTHER:
        return [("model", name), *_others(folder, lengths)]
    config = configuration(folder, name)
    tokenizer = "in the folder" if has_tokenizer(folder) else f"not in the folder: {trained_tokenizer(folder)}"
    measured = _measured(config.core) if _is_released(folder, config.source or "") else []
    found = [*_ours(config.core, lengths), ("tokenizer", tokenizer)]
    found.append(("quirks switched on", ", ".join(Quirks(**config.quirks).active()) or "none"))
    if config.core.has("P"):
        found.append(("short prompts", config.short_prompt))
    return [("model", name), *found, *measured]


def _ours(core: Config, lengths: Sequence[int]) -> list[tuple[str, str]]:
    letters = ", ".join(
        f"{letter} {LETTERS[letter]} x {core.pattern.count(letter)}" for letter in dict.fromkeys(core.pattern)
    )
    with torch.device("meta"):
        model = LanguageModel(core)
    named = [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and name.endswith("weight")]
    weights = sum(p.numel() for name, p in named if "_enc." not in name and name != "embedding.weight")
    weights += model.head.weight.numel() if core.tied else 0

    def flops(length: int) -> int:
        """To decode one token: products with weights, the head included, and the mixers' work. Norms, activations and
        the prefix encoder, which reads no generated tokens, are not counted."""
        return 2 * weights + sum(mixing_flops(core, layer, length) for layer in range(len(core.pattern)))

    def baseline(length: int) -> int:
        """Bytes of fp32 keys and values, if all layers were attention."""
        return 4 * 2 * core.width * length * len(core.pattern)

    found = [
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"),
        ("pattern", f"{core.pattern} ({letters})"),
        (
            "width",
            f"{core.width}, vocabulary {core.vocab_rows:,} rows, training sequences {core.train_length:,} tokens",
        ),
    ]
    if core.has("P"):
        found.append(("prefix encoder", f"reads up to {core.enc_length:,} tokens"))
    found.append(("state a sequence", _by_length(core.state_bytes, lengths)))
    found.append(("attention baseline", _by_length(baseline, lengths)))
    found.append(("FLOPs a token", _flops(flops, lengths)))
    return found


def _is_released(folder: Path, source: str) -> bool:
    """Whether a folder holds a checkpoint of the release, also if `jrt convert` wrote it from one."""
    raw = read_config(folder)
    last_part = source.rsplit("/", 1)[-1]
    return (
        kind_of(raw) is Kind.RELEASED_GPT
        or (kind_of(raw) is Kind.MAMBA_SSM and has_gpt_fields(raw))
        or any(hub_id.endswith(f"/{last_part}") for hub_id in releases())
    )


def _measured(core: Config) -> list[tuple[str, str]]:
    """How the published numbers of a released model were measured: only quirks that concern its kinds of layers are
    named."""
    concerned = {"double_add": "L", "decay_in_steps": "L", "half_states": "LP", "leak_continuation": "P"}
    quirks = [name for name in Quirks.released().active() if core.has(concerned.get(name, core.pattern))]
    rule = ", short_prompt='pad'" if core.has("P") else ""
    return [("released checkpoint, as measured", f"compat='released'{rule}: {', '.join(quirks)}")]


def _others(folder: Path, lengths: Sequence[int]) -> list[tuple[str, str]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    from jrt.foreign.architectures import register_architecture

    register_architecture(str(folder))
    with as_value_error(f"{folder} is no causal language model that can be built"), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config)
    found = [
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"),
        ("class", f"{type(model).__name__}, used as it is"),
    ]
    # A field that the model's class does not have may hold anything.
    names = ("num_key_value_heads", "num_attention_heads", "num_hidden_layers", "head_dim")
    keys, queries, layers, size = (n if type(n := getattr(config, name, None)) is int else None for name in names)
    heads = keys or queries
    products = [module for module in model.modules() if not isinstance(module, torch.nn.Embedding)]
    flops = 2 * sum(p.numel() for module in products for p in module.parameters(recurse=False) if p.ndim == 2)
    attention = 0
    if layers:
        found.append(("layers", f"{layers}"))
    if heads and queries and layers:
        size = size or config.hidden_size // queries
        attention = 4 * queries * size * layers
        found.append(("keys and values", _by_length(lambda n: 4 * 2 * heads * size * layers * n, lengths)))
    found.append(("FLOPs a token", _flops(lambda length: flops + attention * (length + 1), lengths)))
    found.append(("tokenizer", "in the folder" if has_tokenizer(folder) else "not in the folder"))
    return found


def _by_length(count: Callable[[int], int], lengths: Sequence[int]) -> str:
    if len({count(length) for length in (*LENGTHS, *lengths)}) == 1:
        return f"{count(lengths[0]):,} bytes (fp32) at any length"
    return ", ".join(f"{count(length):,} at {length:,}" for length in lengths) + " tokens (bytes, fp32)"


def _flops(count: Callable[[int], int], lengths: Sequence[int]) -> str:
    if len({count(length) for length in (*LENGTHS, *lengths)}) == 1:
        return f"{count(lengths[0]) / 1e6:,.1f} M at any length"
    return ", ".join(f"{count(length) / 1e6:,.1f} M at {length:,}" for length in lengths)
