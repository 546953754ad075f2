"""Mamba checkpoints of others, in both of their layouts, held to transformers' own Mamba."""

import json
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, MptConfig, T5Config

import jrt
from jrt.checkpoints.names import Kind, kind_of

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


def original_layout(model: MambaForCausalLM, folder: Path) -> Path:
    """As `mamba_ssm` writes it: other names for the embedding and in the configuration, a tied head in the file."""
    weights = {name.replace("embeddings.", "embedding."): tensor for name, tensor in model.state_dict().items()}
    assert weights["lm_head.weight"].data_ptr() == weights["backbone.embedding.weight"].data_ptr()
    config = {
        "d_model": 48,
        "n_layer": 3,
        "vocab_size": 100,  # padded to a multiple of 8
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module", params=[hf_layout, original_layout])
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


@pytest.mark.parametrize("config", [MptConfig, T5Config])
def test_a_model_with_a_d_model_is_not_mamba_for_that(config):
    raw = config().to_dict()
    assert "d_model" in raw and kind_of(raw) is Kind.OTHER
