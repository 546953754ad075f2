"""Released-format checkpoints in shapes the goldens do not have, held to a small quadratic reading of the format.

`reference` is written from the specification alone (original_spec sections 1-4): loops over layers and heads, full
score matrices, the full feature map, no code of the package.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import jrt
from jrt import Quirks

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


def linear_reference(config: dict, mixer: dict, x: Tensor, w, blank: Tensor | None) -> Tensor:
    length, f, h = len(x), mixer["feature_dim"], mixer["num_heads"]
    scale = mixer.get("scale_dim") or f
    heads = x.shape[1] // h
    q, k, v = x @ w("proj_q").T, x @ w("proj_k").T, x @ w("proj_v").T
    prefix = kind_of(mixer) == "PrefixLinear"
    if prefix:
        read = min(mixer["enc_length"], length)
        k_enc, v_enc = x[:read] @ w("proj_k_enc").T, x[:read] @ w("proj_v_enc").T
        if blank is not None and mixer.get("use_mask", True) and len(blank) <= read:
            k, k_enc = k.masked_fill(blank[:, None], 0), k_enc.masked_fill(blank[:, None], 0)
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


def reference(config: dict, weights: dict[str, Tensor], ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """Logits (T, V) of one row; `keep` is the release's attn_mask."""
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
                y = linear_reference(config, mixer, h, w, None if keep is None else ~keep)
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


@torch.no_grad()
def assert_same(folder: Path, config: dict, weights: dict[str, Tensor]) -> None:
    """Full forward and one-token steps against the reference."""
    model, ids = jrt.load(folder), token_ids()
    expected = reference(config, weights, ids[0])
    assert_close(model(ids).logits[0], expected)
    if not model.config.core.has("P") or model.config.core.enc_length < ids.shape[1]:
        first = 20
        out = model(ids[:, :first], use_cache=True)
        steps = [out.logits]
        for column in range(first, ids.shape[1]):
            out = model(ids[:, column : column + 1], past_key_values=out.past_key_values)
            steps.append(out.logits)
        assert_close(torch.cat(steps, 1)[0], expected)


OLD = "src.models.mixers."
CASES = {
    "plain": (BASE, {}),
    "feature dim 16, 2 heads": (with_(BASE, alt_mixer__feature_dim=16, alt_mixer__num_heads=2), {}),
    "scale_dim": (with_(BASE, alt_mixer__scale_dim=16), {}),
    "kernel_size beside kernel_sizes": (with_(BASE, mixer__kernel_size=4), {}),
    "expand_proj 2": (with_(BASE, mixer__expand_proj=2), {}),
    "filter bias": (BASE, {"filter_bias": True}),
    "rotary 5 of 8": (with_(BASE, rotary_emb_fraction=0.7), {}),
    "no rotary": (with_(BASE, rotary_emb_fraction=0), {}),
    "inverse layer scale": (with_(BASE, scale_attn_by_inverse_layer_idx=True), {}),
    "no alt layers": (with_(BASE, alt_mixer_layers=None, alt_mixer_2_layers=None), {}),
    "empty alt layers": (with_(BASE, alt_mixer_layers=[], alt_mixer_2_layers=[]), {}),
    "alt_mixer_2 goes first": (with_(BASE, alt_mixer_layers=[1, 2]), {}),
    "no mixer: attention": (with_(BASE, mixer=None), {}),
    "aliases": (
        with_(BASE, n_embd=None, n_head=None, n_layer=None)
        | {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4},
        {},
    ),
    "older targets": (
        with_(
            BASED,
            mixer___target_=OLD + "base_conv.BaseConvWithSiLU4",
            alt_mixer___target_=OLD + "linear_attention.LinearAttention",
            alt_mixer_2___target_=OLD + "slide_fa2.SlidingsMHA",
            alt_mixer_2__do_update=True,
        ),
        {},
    ),
    "old public targets": (
        with_(
            BASED,
            mixer___target_="based.models.mixers.base_conv.BaseConv",
            alt_mixer___target_="based.models.mixers.linear_attn.LinearAttention",
            alt_mixer__feature_map=None,
            alt_mixer_2___target_="based.models.mixers.slide_fa2.SlidingsMHA",
        ),
        {},
    ),
    "decay and gain": (BASED | {"fixed_decay": True, "decay_const": -3}, {"gain": True}),
    "decay alone": (BASED | {"fixed_decay": True, "decay_const": -2}, {}),
    "gain alone": (BASED, {"gain": True, "ignored": "decay_proj"}),
    "attention, n_inner null": (ATTENTION | {"n_inner": None}, {"hidden": 128}),
    "attention, odd rotary": (ATTENTION | {"rotary_emb_fraction": 0.375, "n_head": 2}, {}),
    "attention, inverse scale": (ATTENTION | {"scale_attn_by_inverse_layer_idx": True}, {}),
    "mlp alt": (BASE | {"mlp_type": "alt", "ff_mult": 4}, {"hidden": 256, "alt_mlp": True}),
    "19 layers with window 4096": (
        with_(BASE, n_layer=19, alt_mixer_2_layers=[2, 7, 17], alt_mixer_2__window_size=4096),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case, tmp_path):
    config, options = CASES[case]
    if "hidden_size" in config:
        plain = config | {"n_embd": 32, "n_head": 4, "n_layer": 4}
    else:
        plain = config
    ignored = options.get("ignored")
    options = {"hidden": 64} | {name: value for name, value in options.items() if name != "ignored"}
    weights = random_weights(plain, **options)
    folder = write(tmp_path / "model", config, weights)
    if ignored:  # the parallel form does not use it
        weights = {name: tensor for name, tensor in weights.items() if ignored not in name}
    assert_same(folder, plain, weights)


@pytest.mark.parametrize("hidden", [64, 128, 256])
def test_mlp_width_comes_from_the_file(hidden, tmp_path):
    weights = random_weights(BASE, hidden=hidden)
    assert_same(write(tmp_path / "model", BASE, weights), BASE, weights)


def test_window_4096_is_4096_elsewhere(tmp_path):
    config = with_(BASE, n_layer=19, alt_mixer_2_layers=[2, 7, 17], alt_mixer_2__window_size=4096)
    core = jrt.load(write(tmp_path / "model", config, random_weights(config, hidden=64))).config.core
    assert core.window == (2048, 128, 128)


def renamed_conv1(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("mixer.conv.", "mixer.conv1."): tensor for name, tensor in weights.items()}


def without_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}


def norms_behind(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layout before the norms moved in front of the mixers: one norm before, then two after each layer's parts."""
    layers = BASE["n_layer"]
    order = [f"transformer.layers.{i}.norm{j}.weight" for i in range(layers) for j in (1, 2)]
    order.append("transformer.ln_f.weight")
    values = [weights[name] for name in order]
    rest = {name: tensor for name, tensor in weights.items() if name not in order}
    return rest | dict(zip(["transformer.ln_0.weight", *order[:-1]], values, strict=True))


@pytest.mark.parametrize("layout", [renamed_conv1, without_head, norms_behind])
def test_older_layouts(layout, tmp_path):
    weights = random_weights(BASE, hidden=64)
    assert_same(write(tmp_path / "model", BASE, layout(weights)), BASE, weights)


def test_untied_head(tmp_path):
    config = BASE | {"tie_word_embeddings": False}
    weights = random_weights(config, hidden=64)
    weights["lm_head.weight"] = torch.randn(256, 32, generator=torch.Generator().manual_seed(4)) / 6
    assert_same(write(tmp_path / "model", config, weights), config, weights)


def test_decay_buffer_of_the_file(tmp_path):
    config = BASED | {"fixed_decay": True, "decay_const": -3}
    weights = random_weights(config, hidden=64, gain=True)
    decay = torch.log(1 - 2.0 ** (-3 - torch.arange(4.0)))
    folder = write(tmp_path / "model", config, weights | {"transformer.decay.decay": decay})
    assert_same(folder, config, weights)
    assert torch.equal(jrt.load(folder).model.log_decay, decay)


def test_a_gain_that_the_file_lacks_is_missed(tmp_path):
    config = with_(BASED, alt_mixer__use_decay_proj=True)
    folder = write(tmp_path / "model", config, random_weights(config, hidden=64))
    with pytest.raises(ValueError, match=r"missing .*decay_proj"):
        jrt.load(folder)
    config = with_(BASE, alt_mixer__use_decay_proj=True)  # the prefix mixer swallows what it does not know
    weights = random_weights(config, hidden=64)
    assert_same(write(tmp_path / "model", config, weights), config, weights)


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16])
def test_mixed_dtypes_become_the_widest(other, tmp_path):
    weights = random_weights(BASE, hidden=64)
    name = "transformer.layers.2.mixer.Wqkv.weight"
    weights[name] = weights[name].to(other)
    folder = write(tmp_path / "model", BASE, weights)
    assert jrt.load(folder).dtype == torch.promote_types(other, torch.float32)
    assert_same(folder, BASE, weights)


def test_shards(tmp_path):
    weights = random_weights(BASE, hidden=64)
    folder = write(tmp_path / "model", BASE, {})
    (folder / "pytorch_model.bin").unlink()
    places = {}
    for index, name in enumerate(weights):
        places["model." + name] = f"pytorch_model-{index % 3}.bin"
    for file in set(places.values()):
        part = {name: weights[name.removeprefix("model.")] for name in places if places[name] == file}
        torch.save(part, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same(folder, BASE, weights)


@pytest.mark.parametrize("use_mask", [True, False])
@pytest.mark.parametrize("length", [16, 20])
@torch.no_grad()
def test_the_release_s_mask(use_mask, length, tmp_path):
    config = with_(BASE, alt_mixer__use_mask=use_mask)
    weights = random_weights(config, hidden=64)
    model = jrt.load(write(tmp_path / "model", config, weights), compat="released")
    ids = token_ids(length)
    ids[0, :5] = 220
    keep = torch.arange(length) >= 5
    expected = reference(config, weights, ids[0], keep)
    assert_close(model(ids, attention_mask=keep[None].long()).logits[0], expected)
    unmasked = reference(config, weights, ids[0])
    assert torch.allclose(expected, unmasked) == (not use_mask or length > 16)


def released_steps(config: dict, weights: dict[str, Tensor], x: Tensor, first: int) -> Tensor:
    """Based's mixer as the release runs it token by token after a prefill: (T - first, E) (original_spec 4.3)."""
    mixer = config["alt_mixer"]
    f, h, length = mixer["feature_dim"], mixer["num_heads"], len(x)
    size = x.shape[1] // h
    w = {name.split("mixer.")[1]: t.double() for name, t in weights.items() if "layers.1.mixer" in name}
    q, k, v = (x @ w[f"proj_{name}.weight"].T for name in "qkv")
    gain = x @ w["decay_proj.weight"].T if "decay_proj.weight" in w else None
    out = torch.zeros(length - first, x.shape[1], dtype=torch.double)
    for head in range(h):
        a, b = slice(head * f, (head + 1) * f), slice(head * size, (head + 1) * size)
        rate = 1 - 2 ** (config["decay_const"] - head) if config.get("fixed_decay") else 1.0
        coefficient = torch.zeros(length, dtype=torch.double)  # of each token's v phi(k) in kv
        for t in range(first):
            coefficient[t] = rate ** (first - 1 - t)
        for t in range(first, length):
            coefficient *= rate
            coefficient[t] += 1 + rate
            scores = taylor(q[t : t + 1, a], k[: t + 1, a], f)[0]
            y = (scores * coefficient[: t + 1]) @ v[: t + 1, b] / scores.sum()
            out[t - first, b] = y if gain is None else y * gain[t, head]
    return out @ w["out_proj.weight"].T


@pytest.mark.parametrize(("fixed", "gain"), [(True, False), (False, True), (True, True), (False, False)])
@torch.no_grad()
def test_decay_in_released_steps(fixed, gain, tmp_path):
    config = BASED | ({"fixed_decay": True, "decay_const": -2} if fixed else {})
    weights = random_weights(config, hidden=64, gain=gain)
    folder = write(tmp_path / "model", config, weights)
    seen: dict[str, list[Tensor]] = {"x": [], "y": []}
    ids, first = token_ids(), 20

    def steps(compat) -> tuple[Tensor, Tensor]:
        model = jrt.load(folder, dtype=torch.float64, compat=compat)
        seen["x"], seen["y"] = [], []

        def keep(_, inputs, out) -> None:
            seen["x"].append(inputs[0][0])
            seen["y"].append(out[0][0])

        model.model.blocks[1].mixer.register_forward_hook(keep)
        cache = model(ids[:, :first], use_cache=True).past_key_values
        for column in range(first, ids.shape[1]):
            model(ids[:, column : column + 1], past_key_values=cache)
        return torch.cat(seen["x"]), torch.cat(seen["y"][1:])

    x, y = steps("released")
    torch.testing.assert_close(y, released_steps(config, weights, x, first))
    _, alone = steps(Quirks(decay_in_steps=True))
    _, correct = steps(None)
    assert torch.allclose(alone, correct) == (fixed == gain)  # the quirk is about one without the other
