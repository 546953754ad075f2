"""`jrt info NAME`: what a model is and costs, from its configuration; weights are counted on the meta device."""

import json
from pathlib import Path

import torch

from jrt.config import LETTERS, Config, presets
from jrt.hub_config import JRTConfig
from jrt.loading import MINIS, RELEASED, load, resolve
from jrt.model import LanguageModel
from jrt.quirks import Quirks

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
_RELEASED_PRESETS = dict(
    zip(
        RELEASED,
        (
            "jrt-360m",
            "based-360m",
            "mamba-360m",
            "attention-360m",
            "jrt-1.3b",
            "based-1.3b",
            "mamba-1.3b",
            "attention-1.3b",
        ),
        strict=True,
    )
)


def parameters(config: Config) -> int:
    """Weights of a model, tied ones once."""
    with torch.device("meta"):
        model = LanguageModel(config)
    return sum(parameter.numel() for parameter in model.parameters())


def decode_flops(config: Config, length: int) -> int:
    """Floating-point operations (a multiply and an add are two) to read one more token after `length` tokens.

    Weight products, the head included, and what each mixer does with its state; norms and activations are left out."""
    with torch.device("meta"):
        model = LanguageModel(config)
    weights = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 2 and name.endswith("weight") and name != "embedding.weight"
    )
    if config.tied:
        weights += model.head.weight.numel()
    return 2 * weights + sum(_mixing_flops(config, layer, length) for layer in range(len(config.pattern)))


def attention_twin_bytes(config: Config, length: int) -> int:
    """fp32 keys and values of a Transformer with the same width and one attention layer for each mixer of the pattern."""
    return 4 * 2 * config.width * length * len(config.pattern)


def describe(name: str) -> list[tuple[str, str]]:
    """Labels and values, for a preset, a model of this project, or any other causal language model.

    Raises ValueError for a name that leads to nothing."""
    if name in _RELEASED_PRESETS and not _is_at_hand(name):
        return [
            ("model", f"{name} (weights are not here: from the preset)"),
            *_ours(presets()[_RELEASED_PRESETS[name]], None),
        ]
    if name in presets() and not (MINIS / name).is_dir():
        return [("model", f"{name} (a preset: an architecture without weights)"), *_ours(presets()[name], None)]
    folder = resolve(name)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8")) if (folder / "config.json").is_file() else {}
    if raw.get("model_type") == "jrt":
        config = JRTConfig.from_pretrained(folder)
        return [("model", name), *_ours(config.core, config)]
    from jrt.released import is_released

    if is_released(raw):
        config = load(folder).config  # its sizes come from the shapes of the file
        return [("model", name), *_ours(config.core, config)]
    return [("model", name), *_others(folder)]


def _ours(core: Config, config: JRTConfig | None) -> list[tuple[str, str]]:
    letters = ", ".join(
        f"{letter} {LETTERS[letter]} x {core.pattern.count(letter)}" for letter in dict.fromkeys(core.pattern)
    )
    found = [
        ("parameters", f"{parameters(core):,}"),
        ("pattern", f"{core.pattern} ({letters})"),
        (
            "width",
            f"{core.width}, vocabulary {core.vocab_rows:,} rows, training sequences {core.train_length:,} tokens",
        ),
    ]
    if core.has("P"):
        found.append(("prefix encoder", f"reads up to {core.enc_length:,} tokens"))
    found.append(("state a sequence", _by_length(core.state_bytes)))
    found.append(("attention baseline", _by_length(lambda length: attention_twin_bytes(core, length))))
    found.append(
        (
            "FLOPs a token",
            ", ".join(f"{decode_flops(core, length) / 1e6:,.1f} M at {length:,}" for length in LENGTHS[::2]),
        )
    )
    tokenizer = "of the folder, else GPT-2's" if core.vocab_rows > 50_000 else f"own, {core.vocab_rows:,} entries"
    found.append(("tokenizer", tokenizer))
    quirks = Quirks(**config.quirks).active() if config is not None else ()
    found.append(("quirks switched on", ", ".join(quirks) or "none"))
    if config is not None and core.has("P"):
        found.append(("short prompts", config.short_prompt))
    if config is None or config.source is not None:
        rule = ", short_prompt='pad'" if core.has("P") else ""
        found.append(
            ("released checkpoint, as measured", f"compat='released'{rule}: {', '.join(Quirks.released().active())}")
        )
    return found


def _others(folder: Path) -> list[tuple[str, str]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no causal language model: {str(error).splitlines()[0]}") from error
    found = [
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"),
        ("class", f"{type(model).__name__}, used as it is"),
    ]
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if heads and getattr(config, "num_hidden_layers", None):
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        found.append(("keys and values", _by_length(lambda n: 4 * 2 * heads * size * config.num_hidden_layers * n)))
    return found


def _mixing_flops(config: Config, layer: int, length: int) -> int:
    width = config.width
    match config.pattern[layer]:
        case "C":
            return 2 * config.conv_kernel * config.conv_channels
        case "P" | "L":
            return 4 * config.features * (width + config.linear_heads)  # one outer product, one product with the state
        case "S":
            return 4 * width * (min(config.window_of(layer), length) + 1)
        case "A":
            return 4 * width * (length + 1)
        case _:
            return config.mamba_expand * width * (2 * config.mamba_kernel + 7 * config.state_dim)


def _by_length(count) -> str:
    values = [count(length) for length in LENGTHS]
    if len(set(values)) == 1:
        return f"{values[0]:,} bytes (fp32) at any length"
    return (
        ", ".join(f"{value:,} at {length:,}" for length, value in zip(LENGTHS, values, strict=True))
        + " tokens (bytes, fp32)"
    )


def _is_at_hand(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)
