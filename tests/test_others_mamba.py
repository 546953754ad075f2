"""Mamba checkpoints that were not trained here, in both common layouts, compared with transformers' own Mamba."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from random_mamba import original_layout, released_layout
from transformers import MambaConfig, MambaForCausalLM, MptConfig, PreTrainedConfig, T5Config

import jrt
from jrt.checkpoints.convert import convert
from jrt.checkpoints.load import trained_tokenizer
from jrt.checkpoints.names import Kind, kind_of
from jrt.info import describe

TOLERANCE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def theirs() -> MambaForCausalLM:
    """Random weights, scaled so that the state matters."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=104, hidden_size=48, num_hidden_layers=3, state_size=16)
    config = MambaConfig(**sizes, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("in_proj.weight", "x_proj.weight", "out_proj.weight", "embeddings.weight")):
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            if name.endswith(("norm.weight", "norm_f.weight", ".D", "conv1d.bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def hf_layout(model: MambaForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[hf_layout, original_layout, released_layout])
def ours(request, theirs, tmp_path_factory):
    return jrt.load(request.param(theirs, tmp_path_factory.mktemp("mamba") / "model"))


def token_ids(batch: int = 2, length: int = 70) -> torch.Tensor:
    return torch.randint(1, 100, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits(ours, theirs):
    ids = token_ids()
    expected = theirs(ids).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours(ids).logits, expected, **TOLERANCE)


@torch.no_grad()
def test_steps(ours, theirs):
    ids = token_ids()
    out = ours(ids[:, :60], use_cache=True)
    steps = []
    for column in range(60, 70):
        steps.append(ours(ids[:, column : column + 1], past_key_values=out.past_key_values).logits)
    torch.testing.assert_close(torch.cat(steps, 1), theirs(ids).logits[:, 60:], **TOLERANCE)


@torch.no_grad()
def test_left_padded_batch(ours, theirs):
    """Ours equals each row alone; theirs agrees with that on the rows' own tokens."""
    ids, pads = token_ids(), 13
    ids[1, :pads] = 0
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    found = ours(ids, attention_mask=mask).logits
    alone = ours(ids[1:, pads:]).logits
    torch.testing.assert_close(found[1, pads:], alone[0], **TOLERANCE)
    torch.testing.assert_close(found[1, pads:], theirs(ids[1:, pads:]).logits[0], **TOLERANCE)
    torch.testing.assert_close(found[0], theirs(ids, attention_mask=mask).logits[0], **TOLERANCE)


def test_greedy_generation(ours, theirs):
    ids = token_ids(length=20)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected = theirs.generate(ids, **options)
    assert torch.equal(ours.generate(ids, **options), expected)


def test_sizes_that_only_the_configuration_tells(theirs, tmp_path):
    folder = original_layout(theirs, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for wrong in ({"ssm_cfg": {"d_state": 8}}, {"d_model": 64}, {"n_layer": 2}, {"vocab_size": 105}):
        (folder / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(ValueError):
            jrt.load(folder)


def test_mamba_2_is_refused(theirs, tmp_path):
    folder = original_layout(theirs, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"ssm_cfg": {"layer": "Mamba2"}}))
    with pytest.raises(ValueError, match="Mamba-2"):
        jrt.load(folder)


# For each field of transformers' configuration another value. True: it may change the computation, and is refused.
OTHER_VALUES = {
    "hidden_act": ("gelu", True),
    "use_bias": (True, True),
    "use_conv_bias": (False, True),
    "intermediate_size": (64, True),
    "quantization_config": ({"quant_method": "gptq", "bits": 8}, True),
    "hidden_size": (32, True),
    "state_size": (8, True),
    "num_hidden_layers": (2, True),
    "expand": (3, True),
    "conv_kernel": (3, True),
    "time_step_rank": (2, True),
    "vocab_size": (300, True),
    "layer_norm_epsilon": (0.1, False),
    "pad_token_id": (5, False),
    "bos_token_id": (5, False),
    "eos_token_id": ([5, 6], False),
    "initializer_range": (0.5, False),
    "residual_in_fp32": (False, False),
    "time_step_scale": (2.0, False),
    "time_step_min": (0.01, False),
    "time_step_max": (0.2, False),
    "time_step_init_scheme": ("constant", False),
    "time_step_floor": (1e-3, False),
    "rescale_prenorm_residual": (True, False),
    "use_cache": (False, False),
    "use_mambapy": (True, False),
    "use_associative_scan": (False, False),
    "tie_word_embeddings": (False, True),
}


def test_every_field_of_transformers_configuration_is_tried_here():
    own = {field.name for field in dataclasses.fields(MambaConfig)} - {
        field.name for field in dataclasses.fields(PreTrainedConfig)
    }
    assert own <= set(OTHER_VALUES)


@pytest.mark.parametrize("name", OTHER_VALUES)
@torch.no_grad()
def test_a_field_is_computed_as_transformers_does_or_refused(name, theirs, tmp_path):
    value, refused = OTHER_VALUES[name]
    folder = hf_layout(theirs, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    if refused:
        with pytest.raises(ValueError) as caught:
            jrt.load(folder)
        assert len(str(caught.value).splitlines()) == 1
        return
    expected = MambaForCausalLM(MambaConfig.from_pretrained(folder)).eval()
    expected.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(jrt.load(folder)(token_ids()).logits, expected(token_ids()).logits, **TOLERANCE)


def test_silu_has_two_names(theirs, tmp_path):
    folder = hf_layout(theirs, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "swish"}))
    assert jrt.load(folder).num_parameters() == theirs.num_parameters()


def test_both_end_tokens_of_a_configuration_count(theirs, tmp_path):
    folder = hf_layout(theirs, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [7, 9]}))
    assert jrt.load(folder).generation_config.eos_token_id == [7, 9]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"conv_bias": False}, "ssm_cfg.conv_bias"),
        ({"bias": True}, "ssm_cfg.bias"),
        ({"headdim": 64}, "ssm_cfg.headdim"),
        ({"layer": "Mamba2"}, "Mamba-2"),
        ({"layer": "Mamba3"}, "ssm_cfg.layer"),
        ({"d_state": "16"}, "d_state"),
        ({"dt_min": 0.01, "use_fast_path": False, "dt_rank": 3, "layer": "Mamba1"}, None),
    ],
)
def test_settings_of_the_original_layout(settings, said, theirs, tmp_path):
    folder = original_layout(theirs, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"ssm_cfg": settings}))
    if said is None:
        return torch.testing.assert_close(jrt.load(folder)(token_ids()).logits, theirs(token_ids()).logits, **TOLERANCE)
    with pytest.raises(ValueError, match=re.escape(said)):
        jrt.load(folder)


@pytest.mark.parametrize(
    "change", [{"rms_norm": False}, {"d_intermediate": 96}, {"attn_layer_idx": [1]}, {"tie_embeddings": False}]
)
def test_what_else_the_original_layout_can_ask_for_is_refused(change, theirs, tmp_path):
    folder = original_layout(theirs, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    if "tie_embeddings" in change:  # the file has both tensors, so an untied model is what it says
        assert not jrt.load(folder).config.core.tied
        return
    with pytest.raises(ValueError, match=r"config\.json has"):
        jrt.load(folder)


@pytest.mark.parametrize("config", [MptConfig, T5Config])
def test_a_model_with_a_d_model_is_not_mamba_for_that(config):
    raw = config().to_dict()
    assert "d_model" in raw and kind_of(raw) is Kind.OTHER


@pytest.mark.parametrize(
    ("layout", "wanted", "end"), [(original_layout, "EleutherAI/gpt-neox-20b", 0), (released_layout, "gpt2", 50256)]
)
@pytest.mark.parametrize("is_converted", [False, True])
def test_the_tokenizer_that_it_was_trained_with(layout, wanted, end, is_converted, tmp_path, monkeypatch):
    """Both have GPT-NeoX's number of tokens; the release's Mamba was trained with GPT-2's tokenizer all the same."""
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=50280, hidden_size=16, num_hidden_layers=1))
    folder = layout(model, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": 50277}))
    if is_converted:
        folder = convert(folder, tmp_path / "converted")
    assert trained_tokenizer(folder) == wanted
    assert jrt.load(folder).generation_config.eos_token_id == end
    assert dict(describe(str(folder), [100]))["tokenizer"].endswith(wanted)
