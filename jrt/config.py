"""The architecture of a model: a letter for each layer, and the sizes of each kind of layer.

Only the standard library is imported, so that a configuration can be read and checked where torch is not installed.
"""

from __future__ import annotations

import dataclasses
import reprlib
from dataclasses import dataclass
from functools import partial

LETTERS = {
    "C": "gated short convolution",
    "P": "prefix linear attention",
    "L": "causal linear attention",
    "S": "sliding-window attention",
    "A": "full attention",
    "M": "Mamba",
}
LARGEST = 1 << 31  # sizes must be smaller; no real model comes near it
MAY_BE_ZERO = ("mlp_width", "rotary_dim", "window", "enc_length")  # every other whole number is at least 1
OPTIONAL_BIASES = ("conv.projections", "conv.filter", "attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture of one `jrt.model.LanguageModel`; raises ValueError for what cannot be built."""

    pattern: str  # one letter of LETTERS per layer, the first layer's first
    width: int  # size of the residual stream
    vocab_rows: int  # rows of the embedding, padding rows included
    mlp_width: int = 0  # hidden units of the SwiGLU MLP after each mixer; 0: no MLP
    heads: int = 16  # of A and S
    rotary_dim: int = 0  # rotated dimensions per head of A and S; an odd count rotates one more
    window: int | tuple[int, ...] = 128  # S: earlier keys that a query sees besides its own; a tuple: one per S layer
    inverse_layer_scale: bool = False  # A and S: divide scores by (layer index + 1)
    linear_heads: int = 16  # of P and L
    feature_dim: int = 16  # P and L: query and key dimensions before the feature map
    feature_scale: int | None = None  # P and L: scores are q.k / sqrt(feature_scale); None: sqrt(feature_dim)
    enc_length: int = 0  # P: the most tokens that the prefix encoder reads
    encoder_mask: bool = True  # P: False only in released configurations whose encoder ignored masks
    decay_const: float | None = None  # L: gamma_h = 1 - 2^(decay_const - h); None: no decay
    decay_projection: bool = False  # L: an output gain per head and token
    conv_expand: float = 2  # C: channels / width, a multiple of 1/2
    conv_kernel: int = 3  # C: taps
    state_dim: int = 16  # M: states per channel
    mamba_expand: int = 2  # M: channels / width
    mamba_kernel: int = 4  # M: taps
    dt_rank: int | None = None  # M: None: ceil(width / 16)
    biases: tuple[str, ...] = ("conv.projections",)  # which of OPTIONAL_BIASES exist
    norm_eps: float = 1e-5
    tied: bool = True  # the output head is the embedding
    train_length: int = 2048  # tokens per training sequence: longer prompts are marked in reports

    def __post_init__(self) -> None:
        for name in ("biases", "window"):  # from JSON, which has no tuples
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_kinds()
        unknown = sorted(set(self.pattern) - set(LETTERS))
        if not self.pattern or unknown:
            expected = ", ".join(f"{letter} ({meaning})" for letter, meaning in LETTERS.items())
            raise ValueError(f"pattern {self.pattern!r}: expected one letter per layer out of {expected}")
        if self.conv_channels < 1:
            raise ValueError(f"conv_expand is {self.conv_expand}: expected at least one channel of width {self.width}")
        if self.norm_eps < 0:
            raise ValueError(f"norm_eps is {self.norm_eps}; expected at least 0")
        if self.decay_const is not None and self.decay_const >= 0:
            raise ValueError(
                f"decay_const is {self.decay_const}: expected below 0, so that 1 - 2^decay_const is positive"
            )
        if any(name not in OPTIONAL_BIASES for name in self.biases):
            raise ValueError(f"biases {self.biases}: expected names out of {OPTIONAL_BIASES}")
        if self.has("AS") and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.has("AS") and self.rotary_dim + self.rotary_dim % 2 > self.width // self.heads:
            raise ValueError(f"rotary_dim {self.rotary_dim}: a head has {self.width // self.heads} dimensions only")
        if self.has("PL") and self.width % self.linear_heads:
            raise ValueError(f"width {self.width} is not a multiple of linear_heads {self.linear_heads}")
        if self.has("P") and self.enc_length < 1:
            raise ValueError("a pattern with P needs enc_length, the most tokens that the prefix encoder reads")
        if isinstance(self.window, tuple) and len(self.window) != self.pattern.count("S"):
            raise ValueError(f"window has {len(self.window)} entries for {self.pattern.count('S')} S layers")

    def _check_kinds(self) -> None:
        """Raises ValueError for a field that does not have its annotated type, or is too small or too large."""
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            if value is None and kind.endswith("None"):
                continue
            for part in value if isinstance(value, tuple) else (value,):
                number = type(part) is int or (type(part) is float and kind.startswith("float"))
                if kind.startswith(("int", "float")) and not (number and abs(part) < LARGEST):
                    raise ValueError(f"{field.name} is {reprlib.repr(value)}; expected {kind} below {LARGEST}")
                least = 0 if field.name in MAY_BE_ZERO else 1
                if kind.startswith("int") and part < least:
                    raise ValueError(f"{field.name} must be at least {least}, not {reprlib.repr(value)}")
            if not kind.startswith(("int", "float")) and type(value).__name__ != kind.split("[")[0]:
                raise ValueError(f"{field.name} is {reprlib.repr(value)}; expected {kind}")

    def has(self, letters: str) -> bool:
        """Whether any layer is one of these letters."""
        return any(letter in self.pattern for letter in letters)

    def window_of(self, layer: int) -> int:
        """How many earlier keys a query of the S layer at this index sees, besides its own."""
        if isinstance(self.window, int):
            return self.window
        return self.window[self.pattern[:layer].count("S")]

    @property
    def conv_channels(self) -> int:
        return int(self.conv_expand * self.width)

    @property
    def mamba_rank(self) -> int:
        return self.dt_rank or -(-self.width // 16)

    @property
    def features(self) -> int:
        """Size of the symmetric second-order Taylor feature map: 1 + d + d (d + 1) / 2."""
        return 1 + self.feature_dim + self.feature_dim * (self.feature_dim + 1) // 2

    def state_bytes(self, length: int) -> int:
        """Bytes of all layers' states after one sequence of `length` tokens, in fp32; keys and values of A and S
        included."""
        return 4 * sum(self._state_floats(layer, length) for layer in range(len(self.pattern)))

    def _state_floats(self, layer: int, length: int) -> int:
        match self.pattern[layer]:
            case "C":
                return (self.conv_kernel - 1) * self.conv_channels
            case "P" | "L":
                return self.features * (self.width + self.linear_heads)
            case "S":
                return 2 * self.width * min(self.window_of(layer), length)
            case "A":
                return 2 * self.width * length
            case _:
                return self.mamba_expand * self.width * (self.mamba_kernel - 1 + self.state_dim)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> Config:
        """The inverse of `to_dict`; raises ValueError for unknown or missing fields."""
        known = {field.name for field in dataclasses.fields(cls)}
        required = {"pattern", "width", "vocab_rows"}
        if set(fields) - known or required - set(fields):
            unknown, missing = sorted(set(fields) - known), sorted(required - set(fields))
            raise ValueError(f"not a jrt configuration: unknown fields {unknown}, missing fields {missing}")
        return cls(**fields)


def _published() -> dict[str, tuple[str, Config]]:
    """{preset: (hub id of the released checkpoint, its architecture)}: the paper's eight models (Tables 15 to 18)."""
    small = partial(Config, width=1024, vocab_rows=50264, mlp_width=2048, rotary_dim=64)
    large = partial(Config, width=1792, vocab_rows=50264, mlp_width=3584, rotary_dim=112)
    attention = partial(Config, vocab_rows=50272)
    mamba = partial(Config, pattern="M" * 46, vocab_rows=50288)
    first, last = "C{0}SCC" * 5, "CC{0}SCC" + "CC{0}SC"  # {0} is the letter of linear attention
    return {
        "jrt-360m": ("hazyresearch/JRT-360M-30B", small(pattern=first.format("P") + "C", enc_length=1024)),
        "jrt-1.3b": ("hazyresearch/JRT-1B-50B", large(pattern=(first + last).format("P"), enc_length=1024)),
        "based-360m": (
            "hazyresearch/based-360M-30B",
            small(pattern=first.format("L") + "CC", decay_const=-3, decay_projection=True),
        ),
        "based-1.3b": ("hazyresearch/based-1b-50b", large(pattern=(first + last).format("L"))),
        "attention-360m": (
            "hazyresearch/attn-360M-30B",
            attention(pattern="A" * 24, width=1024, mlp_width=2816, rotary_dim=32),
        ),
        "attention-1.3b": (
            "hazyresearch/attn-1b-50bn",
            attention(pattern="A" * 36, width=1680, mlp_width=4608, heads=24, rotary_dim=35),
        ),
        "mamba-360m": ("hazyresearch/mamba-360M-30B", mamba(width=1024)),
        "mamba-1.3b": ("hazyresearch/mamba-1b-50b", mamba(width=2048)),
    }


def _small() -> dict[str, Config]:
    """Small sizes: those of the shipped mini models (docs/minis.md), and `debug`, which trains in seconds."""
    mini = partial(Config, width=192, vocab_rows=4096, train_length=4608)
    hybrid = partial(mini, mlp_width=384, heads=4, linear_heads=4, rotary_dim=48, window=64)
    return {
        "mini-attention": hybrid(pattern="CACCACCA"),
        "mini-mamba": mini(pattern="M" * 14),
        "mini-based": hybrid(pattern="CLSCCLSC"),
        "mini-jrt": hybrid(pattern="CPSCCPSC", enc_length=4608),
        "debug": Config(
            pattern="CPSLAM",
            width=32,
            vocab_rows=4096,
            mlp_width=64,
            heads=2,
            linear_heads=2,
            feature_dim=4,
            rotary_dim=8,
            window=8,
            enc_length=64,
            train_length=128,
        ),
    }


def presets() -> dict[str, Config]:
    """All named configurations: the eight published ones, `mini-*` and `debug`."""
    return {name: config for name, (_, config) in _published().items()} | _small()


def releases() -> dict[str, str]:
    """{hub id: preset} of the eight released checkpoints."""
    return {hub_id: name for name, (hub_id, _) in _published().items()}
