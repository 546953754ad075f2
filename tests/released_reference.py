"""A slow reference model of the released checkpoint format, written from its description alone (docs/released.md).

It loops over layers and heads, computes full score matrices and the full feature map in fp64, and uses no code of
`jrt`.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

CONV = {"_target_": "based.models.mixers.convolution.BaseConv", "expand_proj": 4, "kernel_sizes": [3], "use_bias": True}
PREFIX = {
    "_target_": "based.models.mixers.prefix_linear_attention.PrefixLinearAttention",
    "num_heads": 4,
    "feature_dim": 8,
    "enc_length": 16,
    "use_mask": True,
}
LINEAR = {
    "_target_": "based.models.mixers.linear_attention.LinearAttention",
    "num_heads": 4,
    "feature_dim": 8,
    "feature_map": {"_target_": "based.models.mixers.linear_attention.TaylorExp", "input_dim": 8},
}
SLIDE = {"_target_": "based.models.mixers.slide_attention.SlidingAttention", "window_size": 8, "causal": True}
BASE = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 4,
    "n_inner": 64,
    "vocab_size": 250,
    "n_positions": 0,
    "activation_function": "swiglu",
    "rms_norm": True,
    "rotary_emb_fraction": 1,
    "mixer": CONV,
    "alt_mixer": PREFIX,
    "alt_mixer_layers": [1],
    "alt_mixer_2": SLIDE,
    "alt_mixer_2_layers": [2],
}
ATTENTION = {key: value for key, value in BASE.items() if "mixer" not in key} | {"rotary_emb_fraction": 0.5}
BASED = BASE | {"alt_mixer": LINEAR}


def with_(config: dict, **changes: object) -> dict:
    """A copy with other fields; `part__field=value` reaches into a mixer, None removes a field."""
    config = json.loads(json.dumps(config))
    for name, value in changes.items():
        *parts, field = name.split("__")
        target = config
        for part in parts:
            target = target[part]
        target[field] = value
        if value is None and field != "n_inner":
            del target[field]
    return config


def mixer_of(config: dict, layer: int) -> dict:
    for part, layers in (("alt_mixer_2", "alt_mixer_2_layers"), ("alt_mixer", "alt_mixer_layers")):
        if layer in (config.get(layers) or []):
            return config[part]
    return config.get("mixer") or {}


def kind_of(mixer: dict) -> str:
    name = mixer.get("_target_", "MHA").split(".")[-1]
    return next(k for k in ("BaseConv", "PrefixLinear", "LinearAttention", "Sliding", "MHA") if name.startswith(k))


def random_weights(
    config: dict, *, hidden: int, rows: int = 256, filter_bias: bool = False, gain: bool = False, alt_mlp: bool = False
) -> dict[str, Tensor]:
    """A checkpoint's tensors with activations of order one, under the released names."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) / math.sqrt(shape[-1])

    d, found = config["n_embd"], {}
    for layer in range(config["n_layer"]):
        mixer, at = mixer_of(config, layer), f"transformer.layers.{layer}."
        kind = kind_of(mixer)
        found |= {at + f"norm{i}.weight": 1 + 0.1 * torch.randn(d, generator=draw) for i in (1, 2)}
        if kind == "BaseConv":
            channels = mixer["expand_proj"] * d
            found |= {at + "mixer.in_proj.weight": normal(channels, d), at + "mixer.in_proj.bias": normal(channels)}
            found |= {at + "mixer.out_proj.weight": normal(d, channels // 2), at + "mixer.out_proj.bias": normal(d)}
            found[at + "mixer.conv.conv.weight"] = normal(channels // 2, 1, mixer.get("kernel_size", 3))
            if filter_bias:
                found[at + "mixer.conv.conv.bias"] = torch.randn(channels // 2, generator=draw)
        elif kind in ("PrefixLinear", "LinearAttention"):
            keys = mixer["num_heads"] * mixer["feature_dim"]
            sizes = {"proj_q": keys, "proj_k": keys, "proj_v": d, "out_proj": d}
            if kind == "PrefixLinear":
                sizes |= {"proj_k_enc": keys, "proj_v_enc": d}
            found |= {at + f"mixer.{name}.weight": normal(size, d) for name, size in sizes.items()}
            if gain:
                found[at + "mixer.decay_proj.weight"] = normal(mixer["num_heads"], d)
        else:
            found |= {at + "mixer.Wqkv.weight": normal(3 * d, d), at + "mixer.out_proj.weight": normal(d, d)}
        if alt_mlp:
            found |= {at + f"mlp.{name}.weight": normal(hidden, d) for name in ("fc1", "fc3")}
        else:
            found[at + "mlp.fc1.weight"] = normal(2 * hidden, d)
        found[at + "mlp.fc2.weight"] = normal(d, hidden)
    found["transformer.ln_f.weight"] = torch.ones(d)
    found["transformer.embeddings.word_embeddings.weight"] = torch.randn(rows, d, generator=draw)
    found["lm_head.weight"] = found["transformer.embeddings.word_embeddings.weight"]
    return found


def write(folder: Path, config: dict, weights: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stored = {"model." + name: tensor for name, tensor in weights.items()}
    torch.save(stored | {"train_metrics.num-tokens.count": torch.tensor(1)}, folder / "pytorch_model.bin")
    return folder


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def taylor(q: Tensor, k: Tensor, scale: int) -> Tensor:
    """phi(q).phi(k) for all pairs, from the full map of section 4.1: (T, f) x (M, f) -> (T, M)."""

    def phi(x: Tensor) -> Tensor:
        pairs = (x[:, :, None] * x[:, None, :]).flatten(1) / (math.sqrt(2) * math.sqrt(scale))
        return torch.cat([torch.ones(len(x), 1), x / scale**0.25, pairs], 1)

    return phi(q) @ phi(k).T


def rotated(x: Tensor, dim: int) -> Tensor:
    out, half = x.clone(), (dim + 1) // 2
    for i in range(half):
        angle = torch.arange(len(x)) * 10_000.0 ** (-2 * i / dim)
        a, b = x[:, i], x[:, half + i]
        out[:, i], out[:, half + i] = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return out


def linear_reference(config: dict, mixer: dict, x: Tensor, w, blank: Tensor | None, prompt: int, doubled) -> Tensor:
    length, f, h = len(x), mixer["feature_dim"], mixer["num_heads"]
    if kind_of(mixer) == "PrefixLinear":
        scale = mixer.get("scale_dim") or f
    else:
        scale = mixer.get("feature_map", {}).get("input_dim", f)
    heads = x.shape[1] // h
    q, k, v = x @ w("proj_q").T, x @ w("proj_k").T, x @ w("proj_v").T
    prefix = kind_of(mixer) == "PrefixLinear"
    if prefix:
        read = min(mixer["enc_length"], prompt)
        k_enc, v_enc = x[:read] @ w("proj_k_enc").T, x[:read] @ w("proj_v_enc").T
        if blank is not None and prompt > 1 and mixer.get("use_mask", True) and len(blank) <= read:
            later = torch.zeros(length - prompt, dtype=torch.bool)
            k, k_enc = k.masked_fill(torch.cat([blank, later])[:, None], 0), k_enc.masked_fill(blank[:, None], 0)
    gain = x @ w("decay_proj").T if w("decay_proj") is not None else None
    decays = bool(config.get("fixed_decay")) and gain is not None
    age = torch.arange(length)[:, None] - torch.arange(length)
    out = []
    for head in range(h):
        a, b = slice(head * f, (head + 1) * f), slice(head * heads, (head + 1) * heads)
        scores = taylor(q[:, a], k[:, a], scale).tril()
        den = scores.sum(1)
        if decays:
            rate = math.log(1 - 2 ** (config["decay_const"] - head))
            scores = scores * torch.exp(rate * age.clamp(min=0)) * gain[:, head, None]
        if doubled and not prefix:
            scores[:, prompt:] *= 2
        num = scores @ v[:, b]
        if prefix:
            enc = taylor(q[:, a], k_enc[:, a], scale)
            num, den = num + enc @ v_enc[:, b], den + enc.sum(1)
        out.append(num / den[:, None])
    return torch.cat(out, 1) @ w("out_proj").T


def attention_reference(config: dict, mixer: dict, layer: int, x: Tensor, w) -> Tensor:
    h, d = config["n_head"], config["n_embd"]
    size, dim = d // h, int(config["rotary_emb_fraction"] * (d // h))
    window = mixer.get("window_size")
    window = 256 if window == 4096 and layer in (7, 17) else window
    qkv = (x @ w("Wqkv").T).reshape(len(x), 3, h, size)
    age = torch.arange(len(x))[:, None] - torch.arange(len(x))
    seen = (age >= 0) if window is None else (age >= 0) & (age <= window // 2)
    divide = layer + 1 if config.get("scale_attn_by_inverse_layer_idx") else 1
    out = []
    for head in range(h):
        q, k, v = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
        if dim:
            q, k = rotated(q, dim), rotated(k, dim)
        scores = (q @ k.T / math.sqrt(size) / divide).masked_fill(~seen, -torch.inf)
        out.append(scores.softmax(-1) @ v)
    return torch.cat(out, 1) @ w("out_proj").T


def conv_reference(mixer: dict, x: Tensor, w) -> Tensor:
    u, gate = (x @ w("in_proj").T + w("in_proj", "bias")).chunk(2, -1)
    taps = w("conv.conv")[:, 0]
    padded = F.pad(u, (0, 0, taps.shape[1] - 1, 0))
    c = sum(padded[j : j + len(u)] * taps[:, j] for j in range(taps.shape[1]))
    c = c if w("conv.conv", "bias") is None else c + w("conv.conv", "bias")
    return (F.silu(c) * gate) @ w("out_proj").T + w("out_proj", "bias")


def reference(
    config: dict,
    weights: dict[str, Tensor],
    ids: Tensor,
    keep: Tensor | None = None,
    prompt: int | None = None,
    doubled: bool = False,
) -> Tensor:
    """Logits (T, V) of one row.

    Its first `prompt` tokens (None: all) were read at once, under the release's attn_mask `keep`; the others one by one,
    as the release does where `doubled`: Based then counts each twice in its numerator.
    """
    prompt = len(ids) if prompt is None else prompt
    weights = {name: tensor.double() for name, tensor in weights.items()}
    x = weights["transformer.embeddings.word_embeddings.weight"][ids]
    for layer in range(config["n_layer"]):
        mixer, at = mixer_of(config, layer), f"transformer.layers.{layer}."

        def w(name: str, kind: str = "weight", at: str = at) -> Tensor | None:
            return weights.get(f"{at}mixer.{name}.{kind}")

        h = norm(x, weights[at + "norm1.weight"])
        match kind_of(mixer):
            case "BaseConv":
                y = conv_reference(mixer, h, w)
            case "PrefixLinear" | "LinearAttention":
                y = linear_reference(config, mixer, h, w, None if keep is None else ~keep, prompt, doubled)
            case _:
                y = attention_reference(config, mixer, layer, h, w)
        x = x + y
        h = norm(x, weights[at + "norm2.weight"])
        if at + "mlp.fc3.weight" in weights:
            value, gate = h @ weights[at + "mlp.fc3.weight"].T, h @ weights[at + "mlp.fc1.weight"].T
        else:
            value, gate = (h @ weights[at + "mlp.fc1.weight"].T).chunk(2, -1)
        x = x + (value * F.silu(gate)) @ weights[at + "mlp.fc2.weight"].T
    return norm(x, weights["transformer.ln_f.weight"]) @ weights["lm_head.weight"].T


def token_ids(length: int = 24) -> Tensor:
    return torch.randint(0, 250, (1, length), generator=torch.Generator().manual_seed(9))


def assert_close(found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max()
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=1e-4, atol=1e-5)
