"""Turns the configurations of other packages into a `JRTConfig`: the eight released checkpoints and their older
layouts, and state-spaces/mamba as its authors and as transformers write it (docs/released.md).

MLP width, optional biases and vocabulary rows are read off the shapes of the tensors. They must lie within bounds that
the configuration sets, so that the tensors cannot ask for more memory than the configuration does.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from typing import Any

from jrt.config import LARGEST, Config
from jrt.configuration_jrt import JRTConfig
from jrt.short_prompts import SPACE_TOKEN

Shapes = dict[str, tuple[int, ...]]
Fixed = dict[str, tuple[object, ...]]

# Class names at the end of a mixer's `_target_`, whatever module stands before them.
CLASSES = (
    ("BaseConv", "C"),
    ("PrefixLinearAttention", "P"),
    ("LinearAttention", "L"),
    ("Sliding", "S"),
    ("MHA", "A"),
    ("MultiheadAttention", "A"),
)
# GPT2Config's second names of some fields; if a configuration has both, the second name counts, as in transformers.
ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
# Fields with their allowed values. With any other value the same weights would compute something that is not
# implemented here. In all tables, a field that is null counts as not given, and an empty tuple allows no value at all.
GPT_FIXED: Fixed = {
    "activation_function": ("swiglu",),
    "mlp_type": ("base", "alt"),
    "rms_norm": (True,),
    "prenorm": (True,),
    "parallel_block": (False,),
    "n_positions": (0,),
    "rotary_emb_base": (10000,),
    "rotary_emb_scale_base": (False,),
    "rotary_emb_interleaved": (False,),
    "scale_attn_weights": (True,),
    "attn_dwconv": (False,),
    "word_embed_proj_dim": (),
    "quantization_config": (),
}
# Fields of flash-attn's GPT, the class of the attention models. The class of the release's other models does not have
# them.
ATTENTION_FIXED: Fixed = {
    "use_alibi": (False,),
    "window_size": ([-1, -1],),
    "lm_head_bias": (False,),
    "mup_width_scale": (1,),
    "mup_embeddings_multiplier": (1,),
    "mup_output_multiplier": (1,),
    "mup_attn_multiplier": (1,),
    "mup_scale_qk_dot_by_d": (False,),
}
MAMBA_SSM_FIXED: Fixed = {"rms_norm": (True,), "d_intermediate": (0,), "attn_layer_idx": ([],)}
SSM_FIXED: Fixed = {"layer": ("Mamba1", "Mamba"), "conv_bias": (True,), "bias": (False,)}
SSM_SIZES = ("d_state", "d_conv", "expand", "dt_rank")
# Fields that matter for initialisation or speed only.
SSM_WITHOUT_EFFECT = ("use_fast_path", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor")
MAMBA_TRANSFORMERS_FIXED: Fixed = {
    "hidden_act": ("silu", "swish"),
    "use_bias": (False,),
    "use_conv_bias": (True,),
    "quantization_config": (),
}
MLP_ROUNDING = 256  # flash-attn rounded hidden sizes up to 256, later to 128
VOCABULARY_ROUNDING = 128
NEOX_END = 0  # GPT-NeoX's end-of-text token: that of Mamba's authors
GPT2_END = 50256  # GPT-2's end-of-text token: the default if a configuration of the release names none


def released_gpt(raw: dict, shapes: Shapes, source: str) -> JRTConfig:
    """The configuration of a released JRT, Based or attention checkpoint.

    Args:
        raw: its config.json.
        shapes: the shapes of its tensors, under the names of this package.
        source: where it came from, kept for the record.

    Raises:
        ValueError: the configuration asks for something that no released model has; the message names the field.
    """
    raw = raw | {name: raw[alias] for alias, name in ALIASES.items() if raw.get(alias) is not None}
    _check_fixed(raw, GPT_FIXED)
    layers, width, heads = (_count(raw, name) for name in ("n_layer", "n_embd", "n_head"))
    _check_layers(layers, shapes)
    for name, value in (("head_dim", width // heads), ("n_head_kv", heads), ("num_head_kv", heads)):
        _check_fixed(raw, {name: (value,)})
    head_rotary = int(_number(raw, "rotary_emb_fraction", 0, most=1) * (width // heads))
    mixers = _mixers(raw, layers)
    if not any(mixers):
        _check_fixed(raw, ATTENTION_FIXED)
    letters = [_letter(mixer) for mixer in mixers]
    pattern = "".join(letters)
    for mixer, letter in zip(mixers, letters, strict=True):
        if letter == "A" and mixer:  # flash-attn's class, which does not use the model's other fields
            given = {"causal": False, "num_heads": None, "rotary_emb_dim": 0} | mixer
            _check_fixed(given, {"causal": (True,), "num_heads": (heads,), "rotary_emb_dim": (head_rotary,)}, "mixer.")
    linear, conv = _the_one(mixers, pattern, "PL"), _the_one(mixers, pattern, "C")
    windows = tuple(_window(mixer, layer) for layer, mixer in enumerate(mixers) if pattern[layer] == "S")
    linear_heads, feature_dim = _linear_sizes(linear, width, shapes)
    feature_map = _part(linear, "feature_map")
    if not str(feature_map.get("_target_", "TaylorExp")).endswith("TaylorExp"):
        raise ValueError(f"config.json has feature_map {feature_map['_target_']!r}; expected TaylorExp")
    scale = _count_or(linear, "scale_dim") if "P" in pattern else _count_or(feature_map, "input_dim")
    encoder = _count_or(linear, "enc_length") or _count_or(raw, "enc_length") or 1024
    tokens = _count_or(raw, "vocab_size") or 50257
    decays = "L" in pattern and (_flag(raw, "fixed_decay", False) or "log_decay" in shapes)
    gains = "L" in pattern and _flag(linear, "use_decay_proj", False)
    core = Config(
        pattern=pattern,
        width=width,
        vocab_rows=_rows(shapes, tokens),
        mlp_width=_mlp_width(raw, width, shapes),
        heads=heads,
        rotary_dim=head_rotary,
        window=windows[0] if len(set(windows)) == 1 else windows or 128,
        inverse_layer_scale=_flag(raw, "scale_attn_by_inverse_layer_idx", False),
        linear_heads=linear_heads,
        feature_dim=feature_dim,
        feature_scale=scale if scale != feature_dim else None,
        enc_length=encoder if "P" in pattern else 0,
        encoder_mask=_flag(linear, "use_mask", True),
        decay_const=_number(raw, "decay_const", -3, least=-LARGEST) if decays else None,
        decay_projection=gains or any(name.endswith("decay_proj.weight") for name in shapes),
        conv_expand=_expand(conv, width, shapes) / 2,
        conv_kernel=_count_or(conv, "kernel_size") or 3,
        biases=_biases(shapes, pattern),
        norm_eps=_number(raw, "layer_norm_epsilon", 1e-5),
        tied=_flag(raw, "tie_word_embeddings", True),
        train_length=2048,
    )
    return _configuration(core, tokens, raw, GPT2_END, source)


def mamba_ssm(raw: dict, shapes: Shapes, source: str) -> JRTConfig:
    """As `released_gpt`, for Mamba in the layout of its authors' package and of the release (`d_model`, `ssm_cfg`).

    The release also saves fields of its GPT models there (n_embd, n_head, n_positions). Mamba does not use them.
    """
    settings = _part(raw, "ssm_cfg")
    _check_fixed(raw, MAMBA_SSM_FIXED)
    _check_fixed(settings, SSM_FIXED, "ssm_cfg.")
    unknown = sorted(set(settings) - {*SSM_FIXED, *SSM_SIZES, *SSM_WITHOUT_EFFECT})
    if unknown:
        raise ValueError(f"config.json has ssm_cfg.{unknown[0]}, which Mamba's first version does not have")
    tokens = _count_or(raw, "vocab_size") or 50277
    core = _mamba(
        shapes,
        tokens,
        layers=_count(raw, "n_layer"),
        width=_count(raw, "d_model"),
        state_dim=_count_or(settings, "d_state") or 16,
        mamba_expand=_count_or(settings, "expand") or 2,
        mamba_kernel=_count_or(settings, "d_conv") or 4,
        dt_rank=_rank(settings, "dt_rank"),
        tied=_flag(raw, "tie_embeddings", True),
    )
    return _configuration(core, tokens, raw, GPT2_END if has_gpt_fields(raw) else NEOX_END, source)


def has_gpt_fields(raw: dict) -> bool:
    """Whether a Mamba's configuration was saved by the release, which keeps fields of its GPT models there."""
    return "n_embd" in raw


def mamba_transformers(raw: dict, shapes: Shapes, source: str) -> JRTConfig:
    """As `released_gpt`, for Mamba in transformers' layout; a field that is not given has transformers' default."""
    _check_fixed(raw, MAMBA_TRANSFORMERS_FIXED)
    width, expand = _count_or(raw, "hidden_size") or 768, _count_or(raw, "expand") or 2
    _check_fixed(raw, {"intermediate_size": (expand * width,)})
    tokens = _count_or(raw, "vocab_size") or 50280
    core = _mamba(
        shapes,
        tokens,
        layers=_count_or(raw, "num_hidden_layers") or 32,
        width=width,
        state_dim=_count_or(raw, "state_size") or 16,
        mamba_expand=expand,
        mamba_kernel=_count_or(raw, "conv_kernel") or 4,
        dt_rank=_rank(raw, "time_step_rank"),
        norm_eps=_number(raw, "layer_norm_epsilon", 1e-5),
        tied=_flag(raw, "tie_word_embeddings", True),
    )
    return _configuration(core, tokens, raw, 0, source)


def _mamba(shapes: Shapes, tokens: int, layers: int, **sizes) -> Config:
    _check_layers(layers, shapes)
    return Config(pattern="M" * layers, vocab_rows=_rows(shapes, tokens), train_length=2048, **sizes)


def _configuration(core: Config, tokens: int, raw: dict, end: int, source: str) -> JRTConfig:
    return JRTConfig(
        architecture=core.to_dict(),
        vocab_tokens=tokens,
        short_prompt="pad" if core.has("P") else "none",
        source=source,
        bos_token_id=_token(raw, "bos_token_id", end, core),
        eos_token_id=_token(raw, "eos_token_id", end, core),
        pad_token_id=SPACE_TOKEN,
    )


# ---- fields of config.json: each is read and checked by one of these


def _check_fixed(fields: dict, fixed: Fixed, where: str = "") -> None:
    """Raises ValueError for a field that is given and has none of its allowed values."""
    for name, allowed in fixed.items():
        if fields.get(name) is not None and fields[name] not in allowed:
            expected = " or ".join(repr(value) for value in allowed) or "nothing"
            raise ValueError(f"config.json has {where}{name}: {reprlib.repr(fields[name])}; expected {expected}")


def _value(fields: dict, name: str, default: Any, is_valid: Callable[[Any], bool], expected: str) -> Any:
    """A field's value, `default` where it is not given. Raises ValueError for another kind of value."""
    value = fields.get(name)
    if value is None:
        return default
    if not is_valid(value):
        raise ValueError(f"config.json has {name}: {reprlib.repr(value)}; expected {expected}")
    return value


def _count_or(fields: dict, name: str) -> int | None:
    return _value(
        fields, name, None, lambda n: type(n) is int and 0 < n < LARGEST, f"an integer from 1 to {LARGEST - 1}"
    )


def _count(fields: dict, name: str) -> int:
    value = _count_or(fields, name)
    if value is None:
        raise ValueError(f"config.json has no {name}; expected a positive integer")
    return value


def _number(fields: dict, name: str, default: float, least: float = 0, most: float = LARGEST) -> float:
    def is_valid(value: Any) -> bool:
        return type(value) in (int, float) and least <= value <= most

    return _value(fields, name, default, is_valid, f"a number from {least} to {most}")


def _flag(fields: dict, name: str, default: bool) -> bool:
    return _value(fields, name, default, lambda x: x in (True, False), "true or false")


def _part(fields: dict, name: str) -> dict:
    return _value(fields, name, {}, lambda x: isinstance(x, dict), "an object")


def _layer_numbers(fields: dict, name: str) -> list[int]:
    def is_valid(value: object) -> bool:
        return isinstance(value, list) and all(type(layer) is int for layer in value)

    return _value(fields, name, [], is_valid, "a list of layer numbers")


def _rank(fields: dict, name: str) -> int | None:
    return None if fields.get(name) == "auto" else _count_or(fields, name)


def _token(raw: dict, name: str, default: int, core: Config) -> int | list[int] | None:
    """A token id, or a list of ids, which transformers allows too. Ids beyond the embedding's rows are left out."""
    value = raw.get(name, default)
    if isinstance(value, list):
        return [token for token in value if 0 <= token < core.vocab_rows] or None
    return value if value is not None and 0 <= value < core.vocab_rows else None


def _check_layers(layers: int, shapes: Shapes) -> None:
    if layers > len(shapes):
        raise ValueError(f"config.json has {layers} layers and the file only {len(shapes)} tensors")


# ---- mixers of the release


def _mixers(raw: dict, layers: int) -> list[dict]:
    """Each layer's mixer, {} for plain attention: alt_mixer_2 or alt_mixer if it lists the layer, else mixer."""
    mixer, first, second = (_part(raw, name) for name in ("mixer", "alt_mixer", "alt_mixer_2"))
    in_first, in_second = (set(_layer_numbers(raw, f"{name}_layers")) for name in ("alt_mixer", "alt_mixer_2"))
    return [second if layer in in_second else first if layer in in_first else mixer for layer in range(layers)]


def _letter(mixer: dict) -> str:
    if not mixer:
        return "A"
    name = str(mixer.get("_target_", "")).rsplit(".", 1)[-1]
    for start, letter in CLASSES:
        if name.startswith(start):
            return letter
    expected = ", ".join(start for start, _ in CLASSES)
    raise ValueError(f"config.json has a mixer {mixer.get('_target_')!r}; expected a class named {expected}")


def _the_one(mixers: Sequence[dict], pattern: str, letters: str) -> dict:
    """The configuration that all mixers with one of these letters share; {} if there are none."""
    found = [mixer for mixer, letter in zip(mixers, pattern, strict=True) if letter in letters]
    if any(mixer != found[0] for mixer in found):
        raise ValueError(f"config.json has two different mixers of the kinds {letters}; the released models have one")
    return found[0] if found else {}


def _first_rows(shapes: Shapes, end: str) -> int | None:
    return next((shape[0] for name, shape in shapes.items() if name.endswith(end) and shape), None)


def _expand(conv: dict, width: int, shapes: Shapes) -> int:
    """`expand_proj`, or if it is not given, the rows of the projection divided by the width."""
    return _count_or(conv, "expand_proj") or max(1, (_first_rows(shapes, "mixer.in_proj.weight") or 0) // width)


def _linear_sizes(linear: dict, width: int, shapes: Shapes) -> tuple[int, int]:
    """Heads and feature dimension of linear attention; if one is not given, it follows from the query projection's
    rows."""
    heads, feature_dim = _count_or(linear, "num_heads"), _count_or(linear, "feature_dim")
    rows = _first_rows(shapes, "mixer.proj_q.weight")
    if rows is not None:
        heads = heads or max(1, rows // (feature_dim or 16))
        feature_dim = feature_dim or max(1, rows // heads)
    _check_fixed(linear, {"head_dim": (width // (heads or 16),)})
    return heads or 16, feature_dim or 16


def _window(mixer: dict, layer: int) -> int:
    """Earlier keys that a query sees: half of `window_size`."""
    size = _count_or(mixer, "window_size") or 128  # the release's own default
    if size == 4096 and layer in (7, 17):
        size = 256  # the release's code replaces 4096 by 256 on these two layers
    return size // 2


def _rows(shapes: Shapes, tokens: int) -> int:
    rows = _first_rows(shapes, "embedding.weight") or tokens
    if not tokens <= rows < tokens + VOCABULARY_ROUNDING:
        raise ValueError(
            f"the embedding has {rows} rows for a vocabulary of {tokens}; expected up to {VOCABULARY_ROUNDING} more"
        )
    return rows


def _mlp_width(raw: dict, width: int, shapes: Shapes) -> int:
    """Hidden units of the MLP: the file's, which must be the configured number rounded up as a version of flash-attn
    did."""
    least = _count_or(raw, "n_inner") or int(8 * width / 3)
    if raw.get("mlp_type") == "alt":
        least = int(2 * width * (_count_or(raw, "ff_mult") or 4) / 3)
    stored = _first_rows(shapes, "mlp.fc1.weight")
    hidden = -(-least // MLP_ROUNDING) * MLP_ROUNDING if stored is None else stored // 2
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
