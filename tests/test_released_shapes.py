"""Released-format checkpoints in shapes that the golden folders lack, compared with the slow reference model."""

import json
from pathlib import Path

import pytest
import torch
from released_reference import (
    ATTENTION,
    BASE,
    BASED,
    LINEAR,
    PREFIX,
    SLIDE,
    assert_close,
    random_weights,
    reference,
    taylor,
    token_ids,
    with_,
    write,
)
from torch import Tensor

import jrt
from jrt import Quirks
from jrt.released import configurations


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
    "expand_proj 3": (with_(BASE, mixer__expand_proj=3), {}),
    "window of one token": (with_(BASE, alt_mixer_2__window_size=1), {}),
    "scale_dim that Based swallows": (with_(BASED, alt_mixer__scale_dim=16), {}),
    "scale in Based's feature map": (with_(BASED, alt_mixer__feature_map__input_dim=16), {}),
    "both names, the alias counts": (BASE | {"n_positions": 2048, "max_position_embeddings": 0}, {}),
    "no model_type": (with_(BASE, model_type=None), {}),
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
        | {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "d_model": 32},
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


def test_sizes_that_are_not_given(tmp_path):
    """The release's own default window is 128; the convolution's width is that of the file."""
    shown = with_(BASE, mixer__expand_proj=6)
    weights = random_weights(shown, hidden=64)
    config = with_(shown, mixer__expand_proj=None, alt_mixer_2__window_size=None)
    folder = write(tmp_path / "model", config, weights)
    assert_same(folder, shown | {"alt_mixer_2": SLIDE | {"window_size": 128}}, weights)
    assert jrt.load(folder).config.core.window == 64


def test_an_alias_counts_before_the_name_it_stands_for(tmp_path):
    weights = random_weights(BASE, hidden=64)
    other = {"n_embd": 48, "n_head": 3, "n_layer": 7, "n_positions": 1024}
    given = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "max_position_embeddings": 0}
    assert_same(write(tmp_path / "model", BASE | other | given, weights), BASE, weights)


@pytest.mark.parametrize("extra", ["train_metrics.loss", "my_metrics.count", "metrics"])
def test_whatever_is_called_metrics_is_no_weight(extra, tmp_path):
    weights = random_weights(BASE, hidden=64)
    assert_same(write(tmp_path / "model", BASE, weights | {extra: torch.tensor(3)}), BASE, weights)


# A value of each field with which the same weights would compute something else.
OTHERS = {
    "activation_function": "geglu",
    "mlp_type": "sparse",
    "rms_norm": False,
    "prenorm": False,
    "parallel_block": True,
    "n_positions": 1024,
    "rotary_emb_base": 500.0,
    "rotary_emb_scale_base": 512,
    "rotary_emb_interleaved": True,
    "scale_attn_weights": False,
    "attn_dwconv": True,
    "word_embed_proj_dim": 16,
    "quantization_config": {"bits": 8},
}
OTHERS_OF_ATTENTION = {
    "use_alibi": True,
    "window_size": [64, 0],
    "lm_head_bias": True,
    "mup_width_scale": 0.5,
    "mup_embeddings_multiplier": 10.0,
    "mup_output_multiplier": 2.0,
    "mup_attn_multiplier": 2.0,
    "mup_scale_qk_dot_by_d": True,
}


def test_every_field_of_the_tables_is_tried_here():
    assert set(OTHERS) == set(configurations.GPT_FIXED)
    assert set(OTHERS_OF_ATTENTION) == set(configurations.ATTENTION_FIXED)


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name, value in OTHERS.items()),
        {"max_position_embeddings": 1024},
        {"head_dim": 16},
        {"n_head_kv": 2},
        {"num_head_kv": 2},
        {"rotary_emb_fraction": 2},
        {"tie_word_embeddings": "no"},
        {"scale_attn_by_inverse_layer_idx": "yes"},
        {"eos_token_id": "<end>"},
        {"alt_mixer": PREFIX | {"use_mask": "sometimes"}},
        {"alt_mixer": LINEAR | {"head_dim": 16}},
        {"alt_mixer": LINEAR | {"feature_map": {"_target_": "a.SoftmaxMap", "input_dim": 8}}},
        {"alt_mixer": LINEAR | {"feature_map": {"_target_": "a.TaylorExp", "input_dim": "8"}}},
        {"alt_mixer": LINEAR | {"feature_map": "TaylorExp"}},
        {"mixer": LINEAR},
    ],
)
def test_what_would_compute_something_else_is_refused(change, tmp_path):
    write(tmp_path / "model", BASE | change, random_weights(BASE, hidden=64))
    with pytest.raises(ValueError, match=r"config\.json has") as caught:
        jrt.load(tmp_path / "model")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", OTHERS_OF_ATTENTION)
def test_what_only_attention_models_know_counts_in_them_alone(name, tmp_path):
    change = {name: OTHERS_OF_ATTENTION[name]}
    write(tmp_path / "attention", ATTENTION | change, random_weights(ATTENTION, hidden=64))
    with pytest.raises(ValueError, match=rf"config\.json has {name}"):
        jrt.load(tmp_path / "attention")
    weights = random_weights(BASE, hidden=64)
    assert_same(write(tmp_path / "jrt", BASE | change, weights), BASE, weights)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({}, "causal"),  # flash-attn's own default is to look ahead
        ({"causal": True}, "rotary_emb_dim"),
        ({"causal": True, "rotary_emb_dim": 8, "num_heads": 2}, "num_heads"),
        ({"causal": True, "rotary_emb_dim": 8, "num_heads": 4}, None),
    ],
)
def test_attention_as_a_mixer_takes_nothing_from_the_fields_around_it(fields, wrong, tmp_path):
    config = BASE | {"mixer": {"_target_": "flash_attn.modules.mha.MHA", **fields}}
    weights = random_weights(config, hidden=64)
    folder = write(tmp_path / "model", config, weights)
    if wrong is None:
        return assert_same(folder, config, weights)
    with pytest.raises(ValueError, match=rf"config\.json has mixer\.{wrong}"):
        jrt.load(folder)


@pytest.mark.parametrize("epsilon", [0, 0.5])
def test_the_epsilon_is_the_file_s(epsilon, tmp_path):
    weights = random_weights(BASE, hidden=64)
    found = jrt.load(write(tmp_path / "model", BASE | {"layer_norm_epsilon": epsilon}, weights))
    assert found.config.core.norm_eps == epsilon
    assert {module.eps for module in found.modules() if type(module).__name__ == "RMSNorm"} == {epsilon}


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


def head_alone(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`safetensors.torch.save_model` keeps one name of a tied tensor, the first in the alphabet."""
    return {name: tensor for name, tensor in weights.items() if not name.endswith("word_embeddings.weight")}


@pytest.mark.parametrize("layout", [renamed_conv1, without_head, head_alone, norms_behind])
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


def test_a_decay_buffer_tells_what_the_configuration_does_not(tmp_path):
    told = BASED | {"fixed_decay": True, "decay_const": -3}
    weights = random_weights(told, hidden=64, gain=True)
    buffer = {"transformer.decay.decay": torch.log(1 - 2.0 ** (-3 - torch.arange(4.0)))}
    assert_same(write(tmp_path / "based", BASED, weights | buffer), told, weights)
    weights = random_weights(BASE, hidden=64)  # a prefix mixer swallows the decay that the release hands it
    assert_same(write(tmp_path / "jrt", BASE | {"fixed_decay": True}, weights | buffer), BASE, weights)


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
    """Based's mixer as the release runs it token by token after a prefill: (T - first, E) (docs/released.md)."""
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
