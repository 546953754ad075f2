"""The Hopper kernels' gradients against fp64. Their error may be twice that of eager PyTorch in bf16.

Shapes: B batch, T tokens, H heads, d = 16, D value size, F = 153 features.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jrt.ops import State, cuda_backward, encode_prefix, extension, linear_attention

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda"
FACTOR = 2.0
ROUNDING = torch.finfo(torch.bfloat16).eps / 4


@pytest.fixture(autouse=True)
def _extension(request):
    if request.node.get_closest_marker("hopper") and (reason := extension.missing(torch.cuda.current_device())):
        pytest.skip(reason)


@pytest.fixture
def poisoned():
    """Freshly freed device memory full of NaN, where the next allocations land."""
    junk = [torch.full((size,), float("nan"), device=DEVICE) for size in (2**26, 2**22, 2**20, 2**18, 2**16)]
    del junk


@pytest.fixture
def cut(monkeypatch):
    """Sets the number of pieces of a sequence."""

    def set_pieces(count: int) -> None:
        monkeypatch.setattr(cuda_backward, "_piece_tokens", lambda blocks, chunks, *_: -(-chunks // count) * 64)

    return set_pieces


def draw(batch=2, tokens=300, heads=3, D=64, state=False, dtype=torch.bfloat16, seed=0) -> dict[str, Tensor]:
    """q, k, v (with a mean, so that sums grow), and S and z of an earlier text if `state`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = {"q": normal(batch, tokens, heads, 16), "k": normal(batch, tokens, heads, 16)}
    x["v"] = normal(batch, tokens, heads, D) + 0.3
    x = {name: value.to(DEVICE, dtype) for name, value in x.items()}
    if state:
        k, v = normal(batch, 40, heads, 16).to(DEVICE), normal(batch, 40, heads, D).to(DEVICE)
        x |= encode_prefix(k, v, backend="chunked")._asdict()
    return x


def ragged_mask(batch: int, tokens: int) -> Tensor:
    """Left padding of two lengths, and holes."""
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[0, : tokens // 3] = False
    mask[-1, 0] = True
    return mask.to(DEVICE)


def gradients(x: dict[str, Tensor], name: str, dtype: torch.dtype | None = None, **arguments) -> dict[str, Tensor]:
    """Gradients of all tensors of x under a fixed random loss on outputs and states."""
    leaves = {key: value.to(dtype or value.dtype, copy=True).requires_grad_() for key, value in x.items()}
    state = State(leaves["S"], leaves["z"]) if "S" in leaves else None
    o, final = linear_attention(leaves["q"], leaves["k"], leaves["v"], initial_state=state, backend=name, **arguments)
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for value, scale in ((o, 1.0), (final.S, 0.02), (final.z, 0.02)):
        weights = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        loss = loss + (value * weights).sum() * scale
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def relative_error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


def assert_as_good_as_eager(x: dict[str, Tensor], **arguments) -> None:
    """At most twice the error of PyTorch in the same dtype, and a rounding where that has hardly any."""
    truth, eager = gradients(x, "chunked", torch.float64, **arguments), gradients(x, "chunked", **arguments)
    for name, value in gradients(x, "cuda", **arguments).items():
        assert value.dtype == x[name].dtype
        rounding = torch.finfo(value.dtype).eps / 4 if value.dtype != torch.float32 else 1e-6
        error, allowed = relative_error(value, truth[name]), FACTOR * relative_error(eager[name], truth[name])
        assert error <= allowed + rounding, f"d{name}: relative error {error:.2e}, eager allows {allowed:.2e}"


@pytest.mark.hopper
@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 128, 1000, 4097])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "ragged"])
def test_lengths(poisoned, tokens, masked):
    assert_as_good_as_eager(draw(tokens=tokens, state=True), mask=ragged_mask(2, tokens) if masked else None)


@pytest.mark.hopper
@pytest.mark.parametrize("D", [64, 112])
def test_one_token_is_as_good_as_eager_in_every_draw(D):
    for seed in range(20):
        assert_as_good_as_eager(draw(tokens=1, D=D, state=True, seed=seed))


@pytest.mark.hopper
@pytest.mark.parametrize("tokens", [15, 64, 130])
def test_from_nothing(poisoned, tokens):
    assert_as_good_as_eager(draw(tokens=tokens))


@pytest.mark.hopper
@pytest.mark.parametrize("D", [16, 64, 72, 112, 128])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "ragged"])
def test_widths(poisoned, D, masked):
    assert_as_good_as_eager(draw(D=D, state=True), mask=ragged_mask(2, 300) if masked else None)


@pytest.mark.hopper
@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 18])  # 1,100 tokens are 18 chunks
@pytest.mark.parametrize("D", [64, 112])
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
def test_any_number_of_pieces(poisoned, cut, pieces, D, state):
    cut(pieces)
    assert_as_good_as_eager(draw(tokens=1100, D=D, state=state), mask=ragged_mask(2, 1100))


@pytest.mark.hopper
@pytest.mark.parametrize(("batch", "heads", "tokens"), [(1, 1, 9000), (1, 16, 2048), (32, 16, 2048)])
def test_few_and_many_heads(poisoned, batch, heads, tokens):
    assert_as_good_as_eager(draw(batch, tokens, heads))


@pytest.mark.hopper
@pytest.mark.parametrize("used", [("o",), ("S",), ("o", "z"), ("S", "z")], ids="+".join)
@pytest.mark.parametrize("pieces", [1, 3])
def test_results_that_no_loss_uses(poisoned, cut, used, pieces):
    cut(pieces)
    x = draw(state=True)

    def found(name: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        leaves = {key: value.to(dtype or value.dtype, copy=True).requires_grad_() for key, value in x.items()}
        q, k, v, S, z = leaves.values()
        o, final = linear_attention(q, k, v, initial_state=State(S, z), backend=name)
        loss = sum(value.sin().sum() for key, value in {"o": o, "S": final.S, "z": final.z}.items() if key in used)
        return dict(zip(leaves, torch.autograd.grad(loss, tuple(leaves.values()), materialize_grads=True), strict=True))

    truth, eager = found("chunked", torch.float64), found("chunked")
    for name, value in found("cuda").items():
        error, allowed = relative_error(value, truth[name]), FACTOR * relative_error(eager[name], truth[name])
        assert truth[name].norm() == 0 == value.norm() or error <= allowed + ROUNDING, (
            f"d{name}: {error:.2e}, {allowed:.2e}"
        )


@pytest.mark.hopper
def test_without_a_denominator(poisoned):
    assert_as_good_as_eager(draw(tokens=200, state=True), normalize=False)


@pytest.mark.hopper
def test_fp16_is_served_by_the_triton_kernels(poisoned):
    assert_as_good_as_eager(draw(tokens=200, state=True, dtype=torch.float16))


@pytest.mark.hopper
@pytest.mark.parametrize("cut_at", [64, 333, 999])
def test_reading_in_two_parts_is_reading_at_once(cut_at):
    x = draw(tokens=1000)
    leaves = {key: value.clone().requires_grad_() for key, value in x.items()}
    q, k, v = leaves.values()
    first, state = linear_attention(q[:, :cut_at], k[:, :cut_at], v[:, :cut_at], backend="cuda")
    rest, _ = linear_attention(q[:, cut_at:], k[:, cut_at:], v[:, cut_at:], initial_state=state, backend="cuda")
    do = torch.randn_like(x["v"])
    found = torch.autograd.grad(torch.cat([first, rest], 1), (q, k, v), do)
    whole = torch.autograd.grad(linear_attention(q, k, v, backend="cuda")[0], (q, k, v), do)
    for value, expected in zip(found, whole, strict=True):
        assert relative_error(value, expected) < 1e-2


@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "ragged"])
def test_a_prefix_and_a_text(poisoned, masked, dtype):
    x = draw(tokens=700, dtype=dtype)
    x |= {"prefix_k": x["q"][:, :350] * 0.7, "prefix_v": x["v"][:, 350:] * 0.5}
    mask = ragged_mask(2, 350) if masked else None

    def found(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v, prefix_k, prefix_v = leaves = [value.to(dtype, copy=True).requires_grad_() for value in x.values()]
        state = encode_prefix(prefix_k, prefix_v, mask=mask, backend=name)
        o, _ = linear_attention(q, k, v, initial_state=state, backend=name)
        return torch.autograd.grad(o.square().sum(), leaves)

    narrow = found("cuda", dtype), found("chunked", dtype)
    for value, eager, truth in zip(*narrow, found("chunked", torch.float64), strict=True):
        rounding = torch.finfo(dtype).eps / 4
        assert relative_error(value, truth) <= FACTOR * relative_error(eager, truth) + rounding


@pytest.mark.hopper
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "D"), [(2, 1, 3, 64), (2, 63, 3, 64), (2, 300, 3, 112), (1, 8192, 2, 64)]
)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("pieces", [None, 1, 2])
def test_a_prefix_alone(poisoned, cut, batch, tokens, heads, D, masked, pieces):
    if pieces is not None:
        cut(pieces)
    x = draw(batch, tokens, heads, D)
    mask = ragged_mask(batch, tokens) if masked else None

    def found(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        k, v = (x[key].to(dtype, copy=True).requires_grad_() for key in "kv")
        state = encode_prefix(k, v, mask=mask, backend=name)
        generator = torch.Generator().manual_seed(1)
        weights = (torch.randn(value.shape, generator=generator).to(DEVICE, value.dtype) for value in state)
        return torch.autograd.grad(
            sum((value * weight).sum() for value, weight in zip(state, weights, strict=True)), (k, v)
        )

    narrow = found("cuda", torch.bfloat16), found("chunked", torch.bfloat16)
    for value, eager, truth in zip(*narrow, found("chunked", torch.float64), strict=True):
        assert relative_error(value, truth) <= FACTOR * relative_error(eager, truth) + ROUNDING
        if masked:
            assert (value[~mask] == 0).all()


MANY_PREFIXES = """
import torch
from jrt.ops import cuda, cuda_backward

k, v = (torch.randn(16, 8192, 16, size, device="cuda").bfloat16() for size in (16, 64))
dS, dz = (torch.randn_like(x) for x in cuda.empty_state(v))
for tokens in (1024, 8192):
    for _ in range(1500 * 1024 // tokens):
        torch.ops.jrt.encode_prefix_prefill_backward(k[:, :tokens], v[:, :tokens], None, dS, dz)
    torch.cuda.synchronize()
"""


@pytest.mark.hopper
def test_the_two_token_sides_of_a_prefix_may_run_at_any_pace():
    """In its own process: a kernel that waits for itself forever stops the process that launched it."""
    subprocess.run([sys.executable, "-c", MANY_PREFIXES], check=True, timeout=120, cwd=ROOT)


@pytest.mark.hopper
@pytest.mark.parametrize("tokens", [1, 200])
def test_nan_in_padding_leaves_no_trace(tokens):
    x = draw(tokens=tokens, state=True)
    mask = torch.ones(2, tokens, dtype=torch.bool, device=DEVICE)
    mask[0, : (tokens + 1) // 2] = False
    clean = gradients(x, "cuda", mask=mask)
    dirty = dict(x, k=x["k"].clone(), v=x["v"].clone())
    dirty["k"][~mask] = float("nan")
    dirty["v"][~mask] = float("inf")
    for name, value in gradients(dirty, "cuda", mask=mask).items():
        assert torch.equal(value, clean[name]), name
    assert (clean["k"][~mask] == 0).all() and (clean["v"][~mask] == 0).all()


@pytest.mark.hopper
@pytest.mark.parametrize("pieces", [1, 4])
def test_ten_runs_give_equal_bits(cut, pieces):
    cut(pieces)
    x = draw(tokens=3000, heads=16, D=112, state=True)
    expected = gradients(x, "cuda")
    for _ in range(9):
        for name, value in gradients(x, "cuda").items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.hopper
def test_large_values_give_no_nan():
    x = draw(tokens=500)
    x["q"], x["k"] = x["q"] * 1e3, x["k"] * 1e3
    for name, value in gradients(x, "cuda").items():
        assert value.isfinite().all(), name


@pytest.mark.hopper
def test_layouts_of_the_model_and_of_autograd():
    """Slices of one projection, heads first, and a gradient of the output that is expanded or not contiguous."""
    x = draw(tokens=150)
    fused = torch.cat([x[key].flatten(2) for key in "qkv"], -1)
    sliced = [part.unflatten(-1, (3, -1)) for part in fused.split([48, 48, 192], -1)]
    heads_first = [x[key].transpose(1, 2).contiguous().transpose(1, 2) for key in "qkv"]
    ones = torch.ones((), device=DEVICE, dtype=torch.bfloat16).expand(x["v"].shape)
    do = torch.randn(2, 150, 64, 3, device=DEVICE, dtype=torch.bfloat16).transpose(2, 3)

    def found(layout: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [value.detach().requires_grad_() for value in layout]
        return torch.autograd.grad(linear_attention(*leaves, backend="cuda")[0], leaves, grad)

    for grad in (ones, do):
        expected = found([x[key] for key in "qkv"], grad.contiguous())
        for layout in (sliced, heads_first, [x[key] for key in "qkv"]):
            for value, right in zip(found(layout, grad), expected, strict=True):
                assert torch.equal(value, right)


@pytest.mark.hopper
def test_the_operator_obeys_pytorch():
    x = draw(tokens=70, heads=2, state=True)
    o, dS, dz = torch.ops.jrt.linear_attention_prefill(*x.values(), None, True)
    backward = torch.ops.jrt.linear_attention_prefill_backward.default
    torch.library.opcheck(backward, (*x.values(), ragged_mask(2, 70), o, o, dS, dz, True))
    torch.library.opcheck(backward, (x["q"], x["k"], x["v"], None, None, None, o, o, None, None, True))
    prefix = torch.ops.jrt.encode_prefix_prefill_backward.default
    torch.library.opcheck(prefix, (x["k"], x["v"], ragged_mask(2, 70), dS, dz))


def test_shapes_are_known_without_a_device():
    """The fake kernel, on tensors that have no memory."""
    q, k = (torch.empty(2, 70, 3, 16, dtype=torch.bfloat16, device="meta") for _ in range(2))
    v = torch.empty(2, 70, 3, 112, dtype=torch.bfloat16, device="meta")
    o, S, z = torch.ops.jrt.linear_attention_prefill(q, k, v, None, None, None, True)
    found = torch.ops.jrt.linear_attention_prefill_backward(q, k, v, None, None, None, o, o, S, z, True)
    assert [x.shape for x in found] == [x.shape for x in (q, k, v, S, z)]
    assert [x.dtype for x in found] == [torch.bfloat16] * 3 + [torch.float32] * 2
    assert [x.shape for x in torch.ops.jrt.encode_prefix_prefill_backward(k, v, None, S, z)] == [k.shape, v.shape]


@pytest.mark.parametrize(
    ("device", "name"), [("cpu", "chunked"), pytest.param("cuda", "cuda", marks=pytest.mark.hopper)]
)
def test_what_the_sanitizer_runs(device, name):
    launches = runpy.run_path(str(ROOT / "benchmarks" / "kernel_launches.py"))
    assert launches["launch_hopper_gradients"](device, name) == 64


def test_pieces_are_chosen_by_a_model_of_the_kernels():
    assert (
        cuda_backward.piece_count(128, 32, 132, cuda_backward.SUMMING) == 1
    )  # B8 H16 T2,048: a block for nearly every multiprocessor
    assert cuda_backward.piece_count(16, 512, 132, cuda_backward.SUMMING) == 8  # B1 H16 T32,768
    for blocks in (1, 3, 16, 100, 133, 4096):
        for chunks in (1, 2, 3, 16, 65, 512):
            tokens = cuda_backward._piece_tokens(blocks, chunks, 132, cuda_backward.SUMMING)
            pieces = -(-chunks * 64 // tokens)
            assert tokens % 64 == 0 and pieces >= 1 and (pieces - 1) * tokens < chunks * 64  # none is empty
