"""Mamba-2 in its authors' layout, compared with an fp64 loop written from the paper.

The tests need no network. They use folders with random weights in the layout of `state-spaces/mamba2-*`."""

import pytest
import torch
import torch.nn.functional as F
from random_mamba import CONV, HEAD, HEADS, INNER, LAYERS, ROWS, STATE, save_random_mamba2, weights
from torch import Tensor

from jrt.checkpoints.files import CheckpointError
from jrt.cli import main
from jrt.evaluate.mamba2 import open_mamba2
from jrt.evaluate.models import ModelSpec, is_ours, open_model, open_tokenizer


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def by_the_paper(ids: Tensor) -> Tensor:
    """Logits (T, V) of one sequence: Mamba-2's recurrence (arXiv 2405.21060, section 3.1 and figure 6), a token at a time."""
    w = {name: tensor.double() for name, tensor in weights().items()}
    hidden = w["backbone.embedding.weight"][ids]  # (T, E)
    for layer in range(LAYERS):
        part = {name.split("mixer.")[1]: t for name, t in w.items() if f"layers.{layer}.mixer." in name}
        x = rms_norm(hidden, w[f"backbone.layers.{layer}.norm.weight"])
        gate, xbc, dt = (x @ part["in_proj.weight"].T).split([INNER, INNER + 2 * STATE, HEADS], dim=-1)
        padded = F.pad(xbc.T, (CONV - 1, 0))  # (channels, T + 3)
        convolved = F.conv1d(padded, part["conv1d.weight"], part["conv1d.bias"], groups=len(padded)).T
        values, b, c = F.silu(convolved).split([INNER, STATE, STATE], dim=-1)
        step = F.softplus(dt + part["dt_bias"])  # (T, H)
        decay = torch.exp(-step * part["A_log"].exp())  # (T, H)
        state = torch.zeros(HEADS, HEAD, STATE, dtype=torch.float64)
        outputs = []
        for time in range(len(ids)):
            value = values[time].view(HEADS, HEAD)
            update = torch.einsum("h,hp,n->hpn", step[time], value, b[time])
            state = decay[time, :, None, None] * state + update
            outputs.append((state @ c[time] + part["D"][:, None] * value).flatten())
        mixed = rms_norm(torch.stack(outputs) * F.silu(gate), part["norm.weight"])
        hidden = hidden + mixed @ part["out_proj.weight"].T
    return rms_norm(hidden, w["backbone.norm_f.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("length", [1, 3, 40])
def test_the_authors_layout_computes_what_the_paper_says(tmp_path, length):
    model = open_mamba2(save_random_mamba2(tmp_path / "mamba2", None), torch.float32).eval()
    ids = torch.arange(7, 7 + length) * 977 % 50277
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double()
    truth = by_the_paper(ids)
    assert (logits - truth).abs().max() <= 2e-5 * truth.abs().max()


def test_it_is_opened_as_a_model_of_others_with_its_tokenizer(tmp_path, shared):
    folder = save_random_mamba2(tmp_path / "mamba2", shared / "gpt2")
    assert not is_ours(str(folder))
    opened = open_model(ModelSpec(str(folder)))
    assert type(opened.model).__name__ == "Mamba2ForCausalLM" and opened.ours is None
    assert (
        opened.vocabulary == ROWS
        and opened.model.get_output_embeddings().weight is opened.model.get_input_embeddings().weight
    )


def test_without_tokenizer_files_the_size_names_gpt_neox(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = save_random_mamba2(tmp_path / "mamba2", None)
    with pytest.raises(ValueError, match="GPT-NeoX's cannot be had: download 'EleutherAI/gpt-neox-20b'"):
        open_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("settings", "changes", "said"),
    [
        ({"ngroups": 8}, {}, "ssm_cfg.ngroups = 8"),
        ({"norm_before_gate": True}, {}, "norm_before_gate"),
        ({"D_has_hdim": True}, {}, "D_has_hdim"),
        ({"dt_limit": [0.001, 0.1]}, {}, "dt_limit"),
        ({}, {"d_model": 10**30}, "backbone.embedding.weight has shape"),
        ({}, {"n_layer": 10**9}, "layers.999999999.norm.weight is missing"),
        ({}, {"tie_embeddings": None}, "tie_embeddings = None; expected true or false"),
        ({}, {"residual_in_fp32": "no"}, "residual_in_fp32 = 'no'; expected true or false"),
        ({"headdim": 48}, {}, "no multiple of headdim"),
        ({"d_state": 8}, {}, "has shape"),
        ({"d_state": "16"}, {}, "whole number"),
        ({}, {"n_layer": 3}, "missing"),
        ({}, {"n_layer": 1}, "left over"),
        ({}, {"attn_layer_idx": [1]}, "attn_layer_idx"),
    ],
)
def test_what_it_cannot_compute_is_refused(tmp_path, settings, changes, said):
    with pytest.raises(CheckpointError, match=said):
        open_mamba2(save_random_mamba2(tmp_path / "mamba2", None, changes, **settings), torch.float32)


def test_what_reads_no_mamba_2_says_so(tmp_path, capsys):
    folder = str(save_random_mamba2(tmp_path / "mamba2", None))
    for words in (["info", folder], ["convert", folder, str(tmp_path / "out")]):
        assert main(words) == 2
        assert "is Mamba-2, which only `jrt eval`" in capsys.readouterr().err


@pytest.mark.parametrize("size", [{"d_conv": 10**30}, {"d_state": 2**62}])
def test_sizes_beyond_numbers_of_pytorch_are_refused(tmp_path, size):
    with pytest.raises(ValueError, match="sizes that no model can have"):
        open_mamba2(save_random_mamba2(tmp_path / "mamba2", None, **size), torch.float32)


def test_settings_that_spell_the_defaults_change_nothing(tmp_path):
    folder = save_random_mamba2(
        tmp_path / "mamba2", None, D_has_hdim=False, d_ssm=None, dt_limit=[0.0, float("inf")], conv_init=None
    )
    open_mamba2(folder, torch.float32)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_is_kept_or_refused(tmp_path, tied):
    """A head that differs from the embedding contradicts `tie_embeddings`, which would silently drop one of the two."""
    folder = save_random_mamba2(tmp_path / "mamba2", None, {"tie_embeddings": tied})
    head = torch.randn(ROWS, 64)
    torch.save(weights() | {"lm_head.weight": head}, folder / "pytorch_model.bin")
    if tied:
        with pytest.raises(CheckpointError, match="differs from the embedding"):
            open_mamba2(folder, torch.float32)
    else:
        assert torch.equal(open_mamba2(folder, torch.float32).lm_head.weight, head)
