"""Half precision and int8 weights against fp32; docs/released.md states the bounds."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import jrt
from jrt import Quirks
from jrt.ops import State

GOLDENS = ("attn", "attn_oddrotary_m128", "based_decay_legacy", "based_fla", "jrt_f16", "jrt_main", "mamba")
NORM_BOUND = 0.02  # |logits - fp32| / |fp32|; rounding the weights alone makes 0.004 to 0.010 of it
LARGEST_BOUND = 0.04  # the largest single difference / max |logit|


def assert_within(found: Tensor, exact: Tensor, scale: float = 1.0) -> None:
    difference = found.float() - exact
    assert difference.norm() <= scale * NORM_BOUND * exact.norm()
    assert difference.abs().max() <= scale * LARGEST_BOUND * exact.abs().max()


@pytest.fixture(params=GOLDENS)
def golden(request, shared):
    tensors = load_file(shared / "golden" / request.param / "golden.safetensors")
    ids = [tensor for name, tensor in tensors.items() if name.endswith("input_ids")]
    ids += [torch.randint(0, 229, (2, 64), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    return shared / "golden" / request.param, ids


@torch.no_grad()
def test_bfloat16_is_close_to_fp32(golden):
    folder, inputs = golden
    exact, half = jrt.load(folder), jrt.load(folder, dtype=torch.bfloat16)
    for ids in inputs:
        logits = half(ids).logits
        assert logits.dtype == torch.bfloat16
        assert_within(logits, exact(ids).logits)


@torch.no_grad()
def test_bfloat16_steps_do_not_drift(golden):
    """A prefix and then one token at a time: errors do not pile up, because states stay in fp32."""
    folder, _ = golden
    exact, half = jrt.load(folder), jrt.load(folder, dtype=torch.bfloat16)
    ids = torch.randint(0, exact.config.vocab_tokens, (2, 120), generator=torch.Generator().manual_seed(0))
    first = 48
    ours, truth = half(ids[:, :first], use_cache=True), exact(ids[:, :first], use_cache=True)
    for column in range(first, ids.shape[1]):
        ours = half(ids[:, column : column + 1], past_key_values=ours.past_key_values)
        truth = exact(ids[:, column : column + 1], past_key_values=truth.past_key_values)
    assert_within(ours.logits, truth.logits, scale=1.5)
    for layer in ours.past_key_values.state.layers:
        if isinstance(layer, State):
            assert layer.S.dtype == layer.z.dtype == torch.float32
        elif hasattr(layer, "ssm"):
            assert layer.ssm.dtype == torch.float32


@torch.no_grad()
def test_half_states_are_the_release_s_not_ours(shared):
    """The quirk rounds what the default keeps, in half precision only."""
    folder = shared / "golden" / "jrt_main"
    ids = torch.randint(0, 200, (1, 40), generator=torch.Generator().manual_seed(0))

    def state(dtype, quirks) -> State:
        cache = jrt.load(folder, dtype=dtype, compat=quirks)(ids, use_cache=True).past_key_values
        return next(layer for layer in cache.state.layers if isinstance(layer, State))

    rounded = state(torch.bfloat16, Quirks(half_states=True)).S
    kept = state(torch.bfloat16, None).S
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(kept, kept.bfloat16().float())
    assert torch.equal(state(None, Quirks(half_states=True)).S, state(None, None).S)


@torch.no_grad()
def test_int8_weights(shared):
    """The recipe of docs/released.md: projections in int8, the tied embedding and head as they are."""
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed: pip install 'jrt[lowbit]'")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    folder = shared / "golden" / "jrt_main"
    exact, small = jrt.load(folder), jrt.load(folder)
    quantize_(small, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and "head" not in name)
    ids = torch.randint(0, 200, (2, 60), generator=torch.Generator().manual_seed(0))
    assert_within(small(ids).logits, exact(ids).logits, scale=2)
    assert not torch.equal(small(ids).logits, exact(ids).logits)
    assert small.model.head.weight is small.model.embedding.weight
    out = small(ids[:, :50], use_cache=True)
    steps = [out.logits]
    for column in range(50, 60):
        steps.append(small(ids[:, column : column + 1], past_key_values=out.past_key_values).logits)
    torch.testing.assert_close(torch.cat(steps, 1), small(ids).logits, rtol=1e-3, atol=1e-3)
