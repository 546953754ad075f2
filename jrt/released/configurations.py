"""Turns the configurations of other releases into a `JRTConfig`: the eight JRT, Based, attention and Mamba
checkpoints, their older layouts (original_spec sections 0-4), and state-spaces/mamba in both of its layouts.

What the files' own shapes tell (MLP width, optional biases, vocabulary rows) is taken from there, within the bounds
that the configuration allows, so that a file can never ask for more memory than its configuration does.
"""

from __future__ import annotations

from jrt.config import Config
from jrt.configuration_jrt import JRTConfig
from jrt.released.quirks import Quirks
from jrt.short_prompts import SPACE_TOKEN

Shapes = dict[str, tuple[int, ...]]

# Class names at the end of a Hydra target, whatever module path stands before them.
CLASSES = (
    ("BaseConv", "C"),
    ("PrefixLinearAttention", "P"),
    ("LinearAttention", "L"),
    ("Sliding", "S"),
    ("MHA", "A"),
    ("MultiheadAttention", "A"),
)
# What each field must be where it is given; null counts as not given.
NUMBERS = ("layer_norm_epsilon", "rotary_emb_fraction", "decay_const")
COUNTS = ("vocab_size", "n_inner", "enc_length", "ff_mult", "state_size", "expand", "conv_kernel", "d_state", "d_conv")
MIXER_COUNTS = ("num_heads", "feature_dim", "scale_dim", "enc_length", "window_size", "expand_proj", "kernel_size")
# GPT2Config's other names of the same fields.
ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
# Fields that would change the computation; null counts as not given.
ALWAYS = {
    "rms_norm": True,
    "activation_function": "swiglu",
    "scale_attn_weights": True,
    "n_positions": 0,
    "prenorm": True,
    "parallel_block": False,
    "attn_dwconv": False,
    "rotary_emb_base": 10000,
    "rotary_emb_scale_base": False,
    "rotary_emb_interleaved": False,
}
LARGEST = 1 << 31  # no size of a model comes near it
MLP_ROUNDING = 256  # flash-attn rounded hidden sizes up to 256, later to 128
VOCABULARY_ROUNDING = 128


def is_mamba(raw: dict) -> bool:
    """Whether a configuration describes Mamba, as transformers (`model_type`) or its authors (`d_model`) write it."""
    if "model_type" in raw:
        return raw["model_type"] == "mamba"
    return ("d_model" in raw or "ssm_cfg" in raw) and "n_embd" not in raw


def is_released(raw: dict) -> bool:
    """Whether a configuration is one that `translate` knows."""
    if is_mamba(raw):
        return True
    return raw.get("model_type", "gpt2") == "gpt2" and any(
        key in raw for key in ("alt_mixer", "alt_mixer_2", "mixer", "rotary_emb_fraction")
    )


def translate(raw: dict, shapes: Shapes, compat: str | Quirks | None, source: str) -> JRTConfig:
    """The configuration of a released checkpoint.

    Args:
        raw: its config.json.
        shapes: the shapes of its tensors, under the names of this package.
        compat: as in `jrt.load`.
        source: where it came from, kept for the record.

    Raises:
        ValueError: something that no released model has; the message names it.
    """
    quirks = Quirks.of(compat)
    _check_types(raw)
    core, tokens = _mamba(raw, shapes) if is_mamba(raw) else _gpt(raw, shapes)
    return JRTConfig(
        architecture=core.to_dict(),
        vocab_tokens=tokens,
        short_prompt="pad" if core.has("P") else "none",
        quirks={name: True for name in quirks.active()},
        source=source,
        bos_token_id=_token(raw, "bos_token_id", core),
        eos_token_id=_token(raw, "eos_token_id", core),
        pad_token_id=SPACE_TOKEN,
    )


def _token(raw: dict, name: str, core: Config) -> int | None:
    token = raw.get(name, 50256)  # GPT-2's end of text
    return token if isinstance(token, int) and token < core.vocab_rows else None


def _gpt(raw: dict, shapes: Shapes) -> tuple[Config, int]:
    raw = _without_aliases(raw)
    layers, width, heads = _of(raw, "n_layer"), _of(raw, "n_embd"), _of(raw, "n_head")
    _refuse(raw)
    _check_layers(layers, shapes)
    mixers = [_mixer_of(raw, layer) for layer in range(layers)]
    pattern = "".join(_letter(mixer) for mixer in mixers)
    linear, conv = _only(mixers, pattern, "PL"), _only(mixers, pattern, "C")
    windows = tuple(_window(mixer, layer) for layer, mixer in enumerate(mixers) if pattern[layer] == "S")
    linear_heads, feature_dim = _linear_sizes(linear, shapes)
    scale = linear.get("scale_dim") if "P" in pattern else (linear.get("feature_map") or {}).get("input_dim")
    tokens = raw.get("vocab_size") or 50257
    has_gain = any(name.endswith("decay_proj.weight") for name in shapes)
    has_decay = "L" in pattern and (bool(raw.get("fixed_decay")) or "log_decay" in shapes)
    core = Config(
        pattern=pattern,
        width=width,
        vocab_rows=_rows(shapes, tokens),
        mlp_width=_mlp_width(raw, width, shapes),
        heads=heads,
        rotary_dim=int((raw.get("rotary_emb_fraction") or 0.0) * (width // heads)),
        window=windows[0] if len(set(windows)) == 1 else windows or 128,
        inverse_layer_scale=bool(raw.get("scale_attn_by_inverse_layer_idx", False)),
        linear_heads=linear_heads,
        feature_dim=feature_dim,
        feature_scale=scale if scale != feature_dim else None,
        enc_length=(linear.get("enc_length") or raw.get("enc_length") or 1024) if "P" in pattern else 0,
        encoder_mask=bool(linear.get("use_mask", True)),
        decay_const=raw.get("decay_const", -3) if has_decay else None,
        decay_projection=("L" in pattern and bool(linear.get("use_decay_proj"))) or has_gain,
        conv_expand=_expand(conv, width, shapes) / 2,
        conv_kernel=conv.get("kernel_size") or 3,
        biases=_biases(shapes, pattern),
        norm_eps=raw.get("layer_norm_epsilon") or 1e-5,
        tied=raw.get("tie_word_embeddings", True),
        train_length=2048,
    )
    return core, tokens


def _mamba(raw: dict, shapes: Shapes) -> tuple[Config, int]:
    settings = raw.get("ssm_cfg") or {}
    if settings.get("layer", "Mamba1") not in ("Mamba1", "Mamba"):
        raise ValueError(
            f"ssm_cfg.layer {settings['layer']!r} is not supported; expected Mamba1: use transformers for Mamba-2"
        )
    if raw.get("attn_layer_idx"):
        raise ValueError("Mamba checkpoints with attention layers (attn_layer_idx) are not supported")
    if not raw.get("rms_norm", True):
        raise ValueError("rms_norm: false is not supported; expected RMSNorm")
    width = _of(raw, "d_model", "hidden_size", default=1024)
    layers = _of(raw, "n_layer", "num_hidden_layers", default=64)
    _check_layers(layers, shapes)
    tokens = raw.get("vocab_size") or 50277
    core = Config(
        pattern="M" * layers,
        width=width,
        vocab_rows=_rows(shapes, tokens),
        state_dim=raw.get("state_size", settings.get("d_state", 16)),
        mamba_expand=raw.get("expand", settings.get("expand", 2)),
        mamba_kernel=raw.get("conv_kernel", settings.get("d_conv", 4)),
        dt_rank=_rank(raw.get("time_step_rank", settings.get("dt_rank", "auto"))),
        norm_eps=raw.get("layer_norm_epsilon") or 1e-5,
        tied=raw.get("tie_word_embeddings", raw.get("tie_embeddings", True)),
        train_length=2048,
    )
    return core, tokens


def _check_types(raw: dict) -> None:
    """Raises ValueError for a field whose value no release could have written."""
    parts = {name: raw.get(name) for name in ("mixer", "alt_mixer", "alt_mixer_2", "ssm_cfg")}
    for name, part in parts.items():
        if part is not None and not isinstance(part, dict):
            raise ValueError(f"config.json has {name}: {part!r}; expected an object")
        for count in MIXER_COUNTS if name != "ssm_cfg" else COUNTS:
            _check_count(part or {}, count, name)
        feature_map = (part or {}).get("feature_map")
        if feature_map is not None:
            if not isinstance(feature_map, dict):
                raise ValueError(f"config.json has {name}.feature_map: {feature_map!r}; expected an object")
            _check_count(feature_map, "input_dim", f"{name}.feature_map")
            if not str(feature_map.get("_target_", "TaylorExp")).endswith("TaylorExp"):
                raise ValueError(f"config.json has {name}.feature_map {feature_map['_target_']!r}; expected TaylorExp")
    for name in ("alt_mixer_layers", "alt_mixer_2_layers"):
        layers = raw.get(name)
        if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
            raise ValueError(f"config.json has {name}: {layers!r}; expected a list of layer numbers")
    for name in COUNTS:
        _check_count(raw, name, "")
    for name in NUMBERS:
        value = raw.get(name)
        if value is not None and not (type(value) in (int, float) and abs(value) < LARGEST):
            raise ValueError(f"config.json has {name}: {value!r}; expected a number below {LARGEST}")
    if not 0 <= (raw.get("rotary_emb_fraction") or 0) <= 1:
        raise ValueError(f"config.json has rotary_emb_fraction: {raw['rotary_emb_fraction']!r}; expected 0 to 1")


def _check_count(fields: dict, name: str, where: str) -> None:
    value = fields.get(name)
    if value is not None and not (type(value) is int and 0 < value < LARGEST):
        path = f"{where}.{name}" if where else name
        raise ValueError(f"config.json has {path}: {value!r}; expected an integer from 1 to {LARGEST - 1}")


def _without_aliases(raw: dict) -> dict:
    """GPT-2's own names; where a configuration has both, its alias counts, because transformers sets it last."""
    return raw | {name: raw[alias] for alias, name in ALIASES.items() if raw.get(alias) is not None}


def _of(raw: dict, *names: str, default: int | None = None) -> int:
    value = next((raw[name] for name in names if raw.get(name) is not None), default)
    if type(value) is not int or not 0 < value < LARGEST:
        raise ValueError(f"config.json has no valid {' or '.join(names)}: found {value!r}, expected a positive integer")
    return value


def _check_layers(layers: int, shapes: Shapes) -> None:
    if layers > len(shapes):
        raise ValueError(f"config.json has {layers} layers and the file only {len(shapes)} tensors")


def _refuse(raw: dict) -> None:
    for name, value in ALWAYS.items():
        if raw.get(name) not in (None, value):
            raise ValueError(f"config.json has {name}: {raw[name]!r}; the released models have {value!r} only")


def _mixer_of(raw: dict, layer: int) -> dict:
    """The first of alt_mixer_2, alt_mixer and mixer that claims the layer; {} for plain attention."""
    if layer in (raw.get("alt_mixer_2_layers") or ()):
        return raw.get("alt_mixer_2") or {}
    if layer in (raw.get("alt_mixer_layers") or ()):
        return raw.get("alt_mixer") or {}
    return raw.get("mixer") or {}


def _letter(mixer: dict) -> str:
    if not mixer:
        return "A"
    name = str(mixer.get("_target_", "")).rsplit(".", 1)[-1]
    for start, letter in CLASSES:
        if name.startswith(start):
            return letter
    raise ValueError(
        f"mixer target {mixer.get('_target_')!r}: expected a class named {', '.join(c for c, _ in CLASSES)}"
    )


def _only(mixers: list[dict], pattern: str, letters: str) -> dict:
    """The one mixer of these letters, {} where there is none; what tells layers apart does not count."""
    found = [mixer for mixer, letter in zip(mixers, pattern, strict=True) if letter in letters]
    if any(mixer != found[0] for mixer in found):
        raise ValueError(f"config.json has two different mixers of the kinds {letters}; the released models have one")
    return found[0] if found else {}


def _expand(conv: dict, width: int, shapes: Shapes) -> int:
    """`expand_proj`; where it is not given, the file's own rows tell."""
    rows = next((shape[0] for name, shape in shapes.items() if name.endswith("mixer.in_proj.weight") and shape), 0)
    return conv.get("expand_proj") or max(1, rows // width)


def _linear_sizes(linear: dict, shapes: Shapes) -> tuple[int, int]:
    """Heads and feature dimension of linear attention; where one is not given, the file's queries tell."""
    heads, feature_dim = linear.get("num_heads"), linear.get("feature_dim")
    rows = next((shape[0] for name, shape in shapes.items() if name.endswith("mixer.proj_q.weight") and shape), None)
    if rows is not None and heads is None:
        heads = max(1, rows // (feature_dim or 16))
    if rows is not None and feature_dim is None:
        feature_dim = max(1, rows // heads)
    return heads or 16, feature_dim or 16


def _window(mixer: dict, layer: int) -> int:
    size = mixer.get("window_size") or 128  # the release's own default
    if size == 4096 and layer in (7, 17):
        size = 256  # the release replaces this one size on these two layers (original_spec 4.4)
    return size // 2


def _rank(rank: int | str) -> int | None:
    return None if rank == "auto" else rank


def _rows(shapes: Shapes, tokens: int) -> int:
    rows = shapes["embedding.weight"][0] if "embedding.weight" in shapes else tokens
    if not tokens <= rows < tokens + VOCABULARY_ROUNDING:
        raise ValueError(
            f"the embedding has {rows} rows for a vocabulary of {tokens}; expected up to {VOCABULARY_ROUNDING} more"
        )
    return rows


def _mlp_width(raw: dict, width: int, shapes: Shapes) -> int:
    """The file's own width, if it is what the configuration asks for rounded up as some flash-attn did."""
    least = raw.get("n_inner") or int(8 * width / 3)
    if raw.get("mlp_type") == "alt":
        least = int(2 * width * raw.get("ff_mult", 4) / 3)
    stored = next((shape[0] // 2 for name, shape in shapes.items() if name.endswith("mlp.fc1.weight") and shape), None)
    hidden = -(-least // MLP_ROUNDING) * MLP_ROUNDING if stored is None else stored
    if not least <= hidden < least + MLP_ROUNDING:
        raise ValueError(
            f"the MLP has {hidden} hidden units; expected {least} rounded up to a multiple of at most {MLP_ROUNDING}"
        )
    return hidden


def _biases(shapes: Shapes, pattern: str) -> tuple[str, ...]:
    """Which optional biases the file has."""
    kinds = {
        "mixer.in_proj.bias": "conv.projections",
        "mixer.conv.bias": "conv.filter",
        "mixer.Wqkv.bias": "attention.qkv",
        "mlp.fc1.bias": "mlp.fc1",
        "mlp.fc2.bias": "mlp.fc2",
    }
    found = {kind for name in shapes for end, kind in kinds.items() if name.endswith(end)}
    attention = (index for index, letter in enumerate(pattern) if letter in "AS")
    if any(f"blocks.{index}.mixer.out_proj.bias" in shapes for index in attention):
        found.add("attention.out")
    return tuple(sorted(found))
