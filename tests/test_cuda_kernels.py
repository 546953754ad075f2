"""The Hopper kernels against the fp64 definition. Their error may be twice that of eager PyTorch in the same dtype.

Shapes: B batch, T tokens, H heads, d = 16, D value size, F = 153 features.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch

from jrt import ops
from jrt.ops import cuda, extension, packages
from jrt.ops.call import Call
from jrt.ops.feature_map import State

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda"
FACTOR = 2.0


def draw(batch, tokens, heads, value_dim, dtype=torch.bfloat16, device=DEVICE):
    q, k = (torch.randn(batch, tokens, heads, 16, device=device) for _ in range(2))
    v = torch.randn(batch, tokens, heads, value_dim, device=device) + 0.3  # a mean, so that sums grow
    return q.to(dtype), k.to(dtype), v.to(dtype)


def draw_state(batch, heads, value_dim):
    _, k, v = draw(batch, 200, heads, value_dim, torch.float64)
    return State(*(x.float() for x in ops.encode_prefix(k, v, backend="reference")))


def draw_mask(batch, tokens):
    """Left padding of two different lengths and holes; the first token of the last row counts."""
    mask = torch.rand(batch, tokens, device=DEVICE) > 0.3
    mask[0, : tokens // 3] = False
    mask[-1, 0] = True
    return mask


def relative_error(x, exact):
    return ((x.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)).item()


def assert_as_good_as_eager(result, eager, exact, mask=None):
    (o, state), (o_eager, state_eager), (o_exact, state_exact) = result, eager, exact
    assert o.isfinite().all()
    if mask is not None:
        o, o_eager, o_exact = o[mask], o_eager[mask], o_exact[mask]
    floor = torch.finfo(o.dtype).eps / 4  # where eager computes in fp32 and only the output is rounded
    for name, x, y, z in (("o", o, o_eager, o_exact), *zip(("S", "z"), state, state_eager, state_exact, strict=True)):
        error, allowed = relative_error(x, z), FACTOR * relative_error(y, z) + (floor if name == "o" else 1e-6)
        assert error <= allowed, f"{name}: relative error {error:.2e}, eager allows {allowed:.2e}"


def run(backend, q, k, v, state=None, mask=None, normalize=True):
    return ops.linear_attention(q, k, v, initial_state=state, mask=mask, normalize=normalize, backend=backend)


def exact(q, k, v, state=None, mask=None, normalize=True):
    wide = None if state is None else State(*(x.double() for x in state))
    return run("chunked", q.double(), k.double(), v.double(), wide, mask, normalize)


@pytest.fixture
def poisoned():
    """Freshly freed device memory full of NaN, where the next allocations land."""
    junk = [torch.full((size,), float("nan"), device=DEVICE) for size in (2**26, 2**22, 2**20, 2**18, 2**16)]
    del junk
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _extension(request):
    if request.node.get_closest_marker("hopper") and (reason := extension.missing(torch.cuda.current_device())):
        pytest.skip(reason)


@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value_dim", [64, 112, 128])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
def test_prefill_is_as_exact_as_eager(poisoned, dtype, value_dim, with_state, with_mask, tokens):
    q, k, v = draw(2, tokens, 3, value_dim, dtype)
    state = draw_state(2, 3, value_dim) if with_state else None
    mask = draw_mask(2, tokens) if with_mask else None
    arguments = (q, k, v, state, mask)
    assert_as_good_as_eager(run("cuda", *arguments), run("chunked", *arguments), exact(*arguments), mask)


@pytest.mark.hopper
@pytest.mark.parametrize("batch, tokens, heads", [(1, 32768 + 17, 2), (1, 4097, 16), (2, 700, 70)])
@pytest.mark.parametrize("with_mask", [False, True])
def test_long_texts_and_pieces(poisoned, batch, tokens, heads, with_mask):
    """Few heads: the sequence is cut into pieces; many: it is not."""
    q, k, v = draw(batch, tokens, heads, 64)
    state, mask = draw_state(batch, heads, 64), draw_mask(batch, tokens) if with_mask else None
    arguments = (q, k, v, state, mask)
    assert_as_good_as_eager(run("cuda", *arguments), run("chunked", *arguments), exact(*arguments), mask)


@pytest.mark.hopper
@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 18])  # 1,100 tokens are 18 chunks
@pytest.mark.parametrize("value_dim", [64, 112])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_any_number_of_pieces(poisoned, monkeypatch, pieces, value_dim, with_state, with_mask):
    monkeypatch.setattr(importlib.import_module("jrt_kernels"), "prefill_pieces", lambda *_: pieces)
    q, k, v = draw(2, 1100, 3, value_dim)
    state = draw_state(2, 3, value_dim) if with_state else None
    arguments = (q, k, v, state, draw_mask(2, 1100) if with_mask else None)
    assert_as_good_as_eager(run("cuda", *arguments), run("chunked", *arguments), exact(*arguments), arguments[-1])
    if state is None:
        wide = ops.encode_prefix(k.double(), v.double(), mask=arguments[-1], backend="chunked")
        eager = ops.encode_prefix(k, v, mask=arguments[-1], backend="chunked")
        for x, y, z in zip(ops.encode_prefix(k, v, mask=arguments[-1], backend="cuda"), eager, wide, strict=True):
            assert relative_error(x, z) <= FACTOR * relative_error(y, z) + 1e-6


@pytest.mark.hopper
def test_pieces_are_chosen_by_a_model_of_the_passes():
    pieces = importlib.import_module("jrt_kernels").prefill_pieces
    with pytest.raises(ValueError, match="sizes must be at least 1"):
        pieces(0, 32768, 16, 64, False, 132)
    assert pieces(1, 32768, 16, 64, False, 132) == 16  # two blocks on each of 132 multiprocessors
    assert pieces(1, 64, 16, 64, False, 132) == pieces(16, 32768, 16, 64, False, 132) == 1
    for tokens in (1, 65, 129, 1000, 4097, 2**20, 2**30):
        for batch, heads in ((1, 1), (1, 16), (3, 16), (17, 16), (4096, 16)):
            for only_state in (False, True):
                count, chunks = pieces(batch, tokens, heads, 64, only_state, 132), -(-tokens // 64)
                assert count >= 1 and (count - 1) * -(-chunks // count) < chunks  # no piece is empty


@pytest.mark.hopper
@pytest.mark.parametrize("batch, tokens, heads", [(2, 1, 3), (2, 333, 3), (1, 8192, 2), (16, 1024, 16)])
@pytest.mark.parametrize("with_mask", [False, True])
def test_encode_prefix(poisoned, batch, tokens, heads, with_mask):
    _, k, v = draw(batch, tokens, heads, 64)
    mask = draw_mask(batch, tokens) if with_mask else None
    state = ops.encode_prefix(k, v, mask=mask, backend="cuda")
    eager = ops.encode_prefix(k, v, mask=mask, backend="chunked")
    wide = ops.encode_prefix(k.double(), v.double(), mask=mask, backend="chunked")
    for x, y, z in zip(state, eager, wide, strict=True):
        assert relative_error(x, z) <= FACTOR * relative_error(y, z) + 1e-6


@pytest.mark.hopper
def test_unnormalized_output(poisoned):
    arguments = (*draw(2, 200, 3, 64), draw_state(2, 3, 64), None, False)
    assert_as_good_as_eager(run("cuda", *arguments), run("chunked", *arguments), exact(*arguments))


@pytest.mark.hopper
@pytest.mark.parametrize("tokens", [1, 1000])
def test_fp16_is_finite_up_to_the_bound_that_the_docstring_states(tokens):
    """Entries of q and k of size 32, with every product of the same sign."""
    q, k, v = draw(2, tokens, 3, 64, torch.float16)
    q, k = torch.full_like(q, 32.0).requires_grad_(), torch.full_like(k, -32.0).requires_grad_()
    v = v.requires_grad_()
    o, state = run("cuda", q, k, v)
    assert o.isfinite().all() and state.S.isfinite().all() and state.z.isfinite().all()
    for gradient in torch.autograd.grad(o.float().sum(), (q, k, v)):
        assert gradient.isfinite().all()


@pytest.mark.hopper
@pytest.mark.parametrize("cut", [1, 64, 100, 999])
def test_reading_in_two_parts_is_reading_at_once(cut):
    torch.manual_seed(0)
    q, k, v = draw(2, 1000, 3, 64)
    whole, state = run("cuda", q, k, v)
    first, state_first = run("cuda", q[:, :cut], k[:, :cut], v[:, :cut])
    second, state_second = run("cuda", q[:, cut:], k[:, cut:], v[:, cut:], state_first)
    assert relative_error(torch.cat([first, second], dim=1), whole) < 4e-3
    for x, y in zip(state_second, state, strict=True):
        assert relative_error(x, y) < 2e-3


@pytest.mark.hopper
@pytest.mark.parametrize("batch", [1, 5, 1024])
@pytest.mark.parametrize("value_dim", [64, 112, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_step_updates_the_state_in_place(poisoned, batch, value_dim, dtype):
    heads = 2
    q, k, v = draw(batch, 1, heads, value_dim, dtype)
    state = draw_state(batch, heads, value_dim)
    before = State(*(x.clone() for x in state))
    o = cuda.decode_step(q, k, v, state)
    o_exact, state_exact = exact(q, k, v, before)
    assert relative_error(o, o_exact) <= torch.finfo(dtype).eps / 2
    for x, y in zip(state, state_exact, strict=True):
        assert relative_error(x, y) < 1e-6


@pytest.mark.hopper
def test_decoding_token_by_token_is_prefill():
    torch.manual_seed(0)
    q, k, v = draw(3, 90, 2, 64)
    whole, final = run("cuda", q, k, v)
    _, state = run("cuda", q[:, :70], k[:, :70], v[:, :70])
    for t in range(70, 90):
        o = cuda.decode_step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state)
        assert relative_error(o, whole[:, t : t + 1]) < 1e-2
    for x, y in zip(state, final, strict=True):
        assert relative_error(x, y) < 2e-3


@pytest.mark.hopper
@pytest.mark.parametrize("shape", [(4, 2048, 16), (1, 8192, 2)])
def test_equal_inputs_give_equal_bits(shape):
    torch.manual_seed(0)
    batch, tokens, heads = shape
    q, k, v = draw(batch, tokens, heads, 64)
    o, state = run("cuda", q, k, v)
    for _ in range(10):
        again, state_again = run("cuda", q, k, v)
        assert torch.equal(o, again) and torch.equal(state.S, state_again.S) and torch.equal(state.z, state_again.z)


@pytest.mark.hopper
def test_a_row_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    q, k, v = draw(40, 300, 16, 64)
    o, state = run("cuda", q, k, v)
    alone, state_alone = run("cuda", q[7:24], k[7:24], v[7:24])
    assert torch.equal(o[7:24], alone) and torch.equal(state.S[7:24], state_alone.S)


@pytest.mark.hopper
def test_padding_leaves_no_trace():
    """Left padding with junk: the same outputs and states as without it, also where keys and values are NaN."""
    torch.manual_seed(0)
    q, k, v = draw(2, 200, 3, 64)
    junk = [x * scale for x, scale in zip(draw(2, 77, 3, 64), (50, float("nan"), float("inf")), strict=True)]
    padded = [torch.cat([x, y], dim=1) for x, y in zip(junk, (q, k, v), strict=True)]
    mask = torch.ones(2, 277, dtype=torch.bool, device=DEVICE)
    mask[:, :77] = False
    o, state = run("cuda", q, k, v)
    o_padded, state_padded = run("cuda", *padded, None, mask)
    assert relative_error(o_padded[:, 77:], o) < 4e-3
    assert (o_padded[:, :77] == 0).all()
    for x, y in zip(state_padded, state, strict=True):
        assert relative_error(x, y) < 1e-3


@pytest.mark.hopper
def test_strides_as_the_model_gives_them():
    """Slices of one projection, a transposed layout, an expanded mask: no copies, the same bits."""
    torch.manual_seed(0)
    batch, tokens, heads = 2, 150, 4
    fused = torch.randn(batch, tokens, heads * (16 + 16 + 64), device=DEVICE, dtype=torch.bfloat16)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in fused.split([heads * 16, heads * 16, heads * 64], dim=-1))
    assert not q.is_contiguous()
    expected, state = run("cuda", q.contiguous(), k.contiguous(), v.contiguous())
    o, state_sliced = run("cuda", q, k, v)
    assert torch.equal(o, expected) and torch.equal(state_sliced.S, state.S)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(run("cuda", *heads_first)[0], expected)
    mask = torch.ones(1, tokens, dtype=torch.bool, device=DEVICE).expand(batch, tokens)
    assert torch.equal(run("cuda", q, k, v, None, mask)[0], expected)


@pytest.mark.hopper
def test_stream_and_graph():
    torch.manual_seed(0)
    q, k, v = draw(1, 2000, 4, 64)
    expected, _ = run("cuda", q, k, v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream, _ = run("cuda", q, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(on_stream, expected)

    static = [torch.zeros_like(x) for x in (q, k, v)]
    state = draw_state(1, 4, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = run("cuda", *static)
        token = cuda.decode_step(*(x[:, :1] for x in static), state)
    start = State(*(x.clone() for x in state))
    for x, y in zip(static, (q, k, v), strict=True):
        x.copy_(y)
    graph.replay()
    assert torch.equal(o, expected)
    assert torch.equal(token, cuda.decode_step(q[:, :1], k[:, :1], v[:, :1], start))
    assert torch.equal(state.S, start.S)


@pytest.mark.hopper
def test_operators_are_well_behaved():
    operators = torch.ops.jrt
    q, k, v = (x.requires_grad_() for x in draw(1, 70, 2, 64))
    torch.library.opcheck(operators.linear_attention_prefill.default, (q, k, v, None, None, None, True))
    torch.library.opcheck(operators.encode_prefix.default, (k, v, None))
    token = (*(x.detach()[:, :1] for x in (q, k, v)), *draw_state(1, 2, 64))
    torch.library.opcheck(operators.linear_attention_decode.default, (*token, None, True))
    torch.library.opcheck(operators.linear_attention_decode_in_place.default, (*token, True))


@pytest.mark.hopper
def test_the_kernels_are_chosen_where_they_can_serve():
    q, k, v = draw(2, 100, 3, 64)
    chosen, _ = ops.linear_attention(q, k, v)
    assert torch.equal(chosen, run("cuda", q, k, v)[0])
    assert torch.equal(ops.linear_attention(q.requires_grad_(), k, v)[0], chosen)


@pytest.mark.hopper
@pytest.mark.parametrize("tokens", [1, 1000])
@pytest.mark.parametrize("with_mask", [False, True])
def test_gradients_are_as_exact_as_eager(poisoned, tokens, with_mask):
    """A prefix, then a text on top of it; the gradients come back through the state."""
    inputs = (*draw(2, tokens, 3, 64), *draw(2, 300, 3, 64)[1:])
    mask = draw_mask(2, tokens) if with_mask else None
    weights = torch.randn(2, tokens, 3, 64, device=DEVICE)

    def gradients(backend, dtype):
        q, k, v, prefix_k, prefix_v = leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        state = ops.encode_prefix(prefix_k, prefix_v, backend=backend)
        o, final = run(backend, q, k, v, state, mask)
        return torch.autograd.grad((o * weights).sum() + final.S.sum() * 0.02, leaves)

    found, eager = gradients("cuda", torch.bfloat16), gradients("chunked", torch.bfloat16)
    for x, y, z in zip(found, eager, gradients("chunked", torch.float64), strict=True):
        assert relative_error(x, z) <= FACTOR * relative_error(y, z) + torch.finfo(torch.bfloat16).eps / 4


@pytest.mark.hopper
@pytest.mark.parametrize("differentiated", [False, True])
def test_compiled_without_a_graph_break(differentiated):
    q, k, v = (x.requires_grad_(differentiated) for x in draw(2, 200, 2, 64))

    def read(q, k, v):
        return ops.linear_attention(q, k, v, initial_state=ops.encode_prefix(k, v, backend="cuda"), backend="cuda")[0]

    compiled = torch.compile(read, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), read(q, k, v))
    if differentiated:
        found = torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v))
        torch.testing.assert_close(found, torch.autograd.grad(read(q, k, v).square().sum(), (q, k, v)))


@pytest.mark.hopper
def test_memory_that_begins_anywhere_is_copied():
    q, k, v = draw(1, 50, 2, 64)
    shifted = [torch.cat([x.flatten()[:3], x.flatten()])[3:].view(x.shape) for x in (q, k, v)]
    assert torch.equal(run("cuda", *shifted)[0], run("cuda", q, k, v)[0])


@pytest.mark.hopper
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q.float(), k.float(), v.float()), "bfloat16 or float16"),
        (lambda q, k, v: (q[..., :8], k[..., :8], v), "d = 8"),
        (lambda q, k, v: (q, k, v[..., :60]), "D = 60"),
        (lambda q, k, v: (torch.stack([q, q], dim=-1)[..., 0], k, v), "last dimension must be contiguous"),
        (lambda q, k, v: (q, k[:1].expand(2, -1, -1, -1), v), "multiples of 8"),
    ],
)
def test_what_the_kernels_cannot_serve_is_said(change, message):
    q, k, v = change(*draw(2, 10, 1, 64))
    with pytest.raises(ValueError, match=message):
        run("cuda", q, k, v)


@pytest.mark.hopper
def test_a_mask_elsewhere_is_refused():
    q, k, v = draw(2, 10, 1, 64)
    with pytest.raises(ValueError, match="mask is on cpu; expected cuda"):
        run("cuda", q, k, v, None, torch.ones(2, 10, dtype=torch.bool))


def test_on_a_cpu_the_reason_is_said():
    q, k, v = draw(1, 5, 2, 64, device="cpu")
    assert "expected a CUDA device" in cuda.unsupported(Call(q, k, v))
    with pytest.raises(ValueError, match="backend 'cuda' cannot serve this call: tensors are on cpu"):
        run("cuda", q, k, v)


@pytest.fixture
def probed(monkeypatch):
    """Lets a test say what device and extension there are."""
    for cached in (extension._probe, extension.module):
        cached.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    yield monkeypatch
    for cached in (extension._probe, extension.module):
        cached.cache_clear()


def test_what_is_missing_is_said(probed):
    probed.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not built: install with JRT_BUILD_KERNELS=1" in extension.missing(0)
    probed.undo()
    extension._probe.cache_clear()
    probed.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert "need a Hopper GPU (compute capability 9.0), this one has 8.0" in extension.missing(0)


@pytest.mark.parametrize(
    "source, expected",
    [
        ("interface = 1", "has interface 1, expected 6: build it again"),
        (
            "raise ImportError('GLIBCXX_3.4.32 not found')",
            "cannot be loaded (GLIBCXX_3.4.32 not found): build it again",
        ),
    ],
)
def test_an_extension_that_does_not_fit_is_a_reason(probed, tmp_path, source, expected):
    (tmp_path / "jrt_kernels.py").write_text(source)
    probed.syspath_prepend(tmp_path)
    probed.delitem(sys.modules, "jrt_kernels", raising=False)
    importlib.invalidate_caches()
    assert expected in extension.missing(0)
    probed.delitem(sys.modules, "jrt_kernels", raising=False)


def test_the_compiler_takes_the_probing_for_a_constant(probed):
    probed.setattr(importlib.util, "find_spec", lambda name: None)
    compiled = torch.compile(lambda x: x + len(extension.missing(0) or ""), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == len(extension.missing(0)) > 0


def test_decode_step_says_what_does_not_fit():
    q, k, v = draw(2, 1, 3, 64, device="cpu")
    state = State(torch.zeros(2, 3, 153, 64), torch.zeros(2, 3, 153))
    for arguments, message in (
        ((q[:1], k, v, state), "q has shape"),
        ((q, k.float(), v, state), "expected torch.float32 on cpu, as k"),
        ((q, k[..., :8], v, state), "q has shape"),
        ((q, k, v, State(state.S[:, :2], state.z)), "is it from another model"),
        ((q, k, v, (state.S, state.z)), "initial_state is a tuple"),
        ((q, k, v, state), "tensors are on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.decode_step(*arguments)


def test_masks_that_32_bits_cannot_address_are_copied():
    wide = torch.empty(40, 2**26, dtype=torch.bool, device="meta")[:, :3]  # rows end beyond 2^31 bytes
    assert extension.contiguous_rows(wide).stride() == (3, 1)
    assert extension.contiguous_rows(wide[:31]).stride() == (2**26, 1)
    assert extension.contiguous_rows(torch.ones(2, 6, dtype=torch.bool)[:, ::2]).stride() == (3, 1)


def test_padding_reaches_no_kernel_and_no_copy_is_kept_for_the_backward(monkeypatch):
    """The operators themselves, with the launches replaced: what they pass on, and what autograd keeps."""
    seen = []

    def launched(q, k, v, *rest):
        seen.append((k, v))
        return v.new_zeros(*v.shape[:1], v.shape[2], 153, v.shape[3]), v.new_zeros(*v.shape[:1], v.shape[2], 153)

    monkeypatch.setattr(cuda, "_launch_prefill", launched)
    monkeypatch.setattr(cuda, "_launch_decode", lambda q, k, v, *rest: launched(q, k, v)[0])
    q, k, v = draw(2, 5, 2, 64, device="cpu")
    mask = torch.tensor([[False, False, True, True, True], [True] * 5])
    k[~mask], v[~mask] = float("nan"), float("inf")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch.ops.jrt.linear_attention_prefill(*leaves, None, None, mask, True)
        torch.ops.jrt.encode_prefix(*leaves[1:], mask)
    with torch.no_grad():
        torch.ops.jrt.linear_attention_decode(*(x[:, :1] for x in (q, k, v)), None, None, mask[:, :1], True)
    assert len(seen) == 3
    for passed_k, passed_v in seen:
        assert passed_k.isfinite().all() and passed_v.isfinite().all()
        assert (passed_k[:1, 0] == 0).all() and torch.equal(passed_k[1], k[1, : passed_k.shape[1]])
    addresses = {x.data_ptr() for x in kept}
    assert {x.data_ptr() for x in leaves} <= addresses and not {x.data_ptr() for x in seen[0]} & addresses


def test_a_derivative_that_cannot_be_had_is_a_reason(monkeypatch):
    x = torch.ones(1, 2, 1, 16)
    assert cuda._no_gradient(Call(x, x, x.clone().requires_grad_())) is None
    seen = []
    torch.func.jvp(lambda y: (seen.append(cuda._no_gradient(Call(x, x, y))), y)[1], (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = Call(x, x, torch.autograd.forward_ad.make_dual(x, x))
        seen.append(cuda._no_gradient(dual))
        with torch.no_grad():  # this switches off the other mode only
            seen.append(cuda._no_gradient(dual))
        seen.append(cuda._no_gradient(Call(x, x, x, prefix=dual)))
    assert seen == ["a forward-mode derivative is wanted and the kernels have none"] * 4
    torch.func.grad(lambda y: (seen.append(cuda._no_gradient(Call(x, x, y))), y.sum())[1])(x)
    assert "torch.func" in seen[-1]
    monkeypatch.setattr(packages, "TRITON_INSTALLED", False)
    assert cuda._no_gradient(Call(x, x, x)) is None
    assert "needs triton" in cuda._no_gradient(Call(x, x, x.clone().requires_grad_()))


def test_shapes_are_known_without_a_device():
    """The fake kernels, on tensors that have no memory."""
    q, k, v = draw(2, 70, 3, 112, device="meta")
    operators = torch.ops.jrt
    o, S, z = operators.linear_attention_prefill(q, k, v, None, None, None, True)
    assert o.shape == v.shape and o.dtype == v.dtype
    assert S.shape == (2, 3, 153, 112) and z.shape == (2, 3, 153) and S.dtype == z.dtype == torch.float32
    assert [x.shape for x in operators.encode_prefix(k, v, None)] == [S.shape, z.shape]
    token = (q[:, :1], k[:, :1], v[:, :1], S, z)
    decoded = operators.linear_attention_decode(*token, None, True)
    assert [x.shape for x in decoded] == [(2, 1, 3, 112), S.shape, z.shape]
    assert operators.linear_attention_decode_in_place(*token, True).shape == (2, 1, 3, 112)


@pytest.mark.parametrize(
    "device, backend, calls", [("cpu", "chunked", 324), pytest.param("cuda", "cuda", 330, marks=pytest.mark.hopper)]
)
def test_what_the_sanitizer_runs(device, backend, calls):
    assert runpy.run_path(str(ROOT / "benchmarks" / "kernel_launches.py"))["launch_all"](device, backend) == calls


@pytest.mark.parametrize(
    "device, backend", [("cpu", "chunked"), pytest.param("cuda", "cuda", marks=pytest.mark.hopper)]
)
def test_what_the_sanitizer_runs_of_the_scan(device, backend):
    launches = runpy.run_path(str(ROOT / "benchmarks" / "kernel_launches.py"))
    assert launches["launch_scan"](device, backend) == 72


@pytest.mark.hopper
def test_versions_are_timed_in_turns_and_compared_bit_by_bit(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    versions = importlib.import_module("kernel_versions")
    folder = Path(importlib.util.find_spec("jrt_kernels").origin).parent
    builds = {name: versions.load(name, folder) for name in ("one", "other")}
    for shape in (("causal, masked", 1, 300), ("prefix", 2, 65), ("decode step", 3, 1)):
        rows = versions.compare(builds, *shape)
        equal = None if shape[0] == "decode step" else True
        assert [(row["build"], row["equal_outputs"]) for row in rows] == [("one", equal), ("other", equal)]
        assert all(0 < row["fastest"] <= row["ms"] <= row["slowest"] for row in rows)


def test_a_folder_without_a_build_is_said(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    with pytest.raises(ValueError, match="holds no jrt_kernels"):
        importlib.import_module("kernel_versions").load("one", tmp_path)


def test_a_counter_that_ncu_leaves_out_is_none(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    counters = importlib.import_module("kernel_counters")
    kept = [counter for name, counter in counters.COUNTERS.items() if name != "spills_executed"]
    stall = "smsp__pcsamp_warps_issue_stalled_barrier"
    page = tmp_path / "page.csv"
    with open(page, "w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows(
            [
                ["Kernel Name", *kept, stall],
                ["", *("ms" if x.startswith("gpu__time") else "" for x in kept), ""],
                ["void jrt::decode_kernel<64>()", *("1,024.5" for _ in kept), "3"],
            ]
        )
    [row] = counters.counted(page, counters.KERNELS["hopper"])
    assert row["method"] == "decode_kernel" and row["spills_executed"] is None
    assert row["microseconds"] == 1024.5e3 and row["registers"] == 1024.5
    assert row["stall_percent"] == {"barrier": 100.0}


def test_building_without_a_compiler_is_one_clear_message(monkeypatch, tmp_path):
    build = runpy.run_path(str(ROOT / "kernels" / "build.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setitem(build["find_nvcc"].__globals__, "USUAL_NVCC", tmp_path / "nvcc")
    with pytest.raises(SystemExit, match=r"needs nvcc.*found none.*JRT_BUILD_KERNELS unset"):
        build["extensions"]()


@pytest.mark.parametrize(
    "release, expected", [("release 12.4", "found 12.4 at"), ("no number", "does not say its release")]
)
def test_an_old_compiler_is_one_clear_message(monkeypatch, tmp_path, release, expected):
    build = runpy.run_path(str(ROOT / "kernels" / "build.py"))
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, {release}'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=rf"needs nvcc.*12.5 or newer.*{expected}.*JRT_BUILD_KERNELS unset"):
        build["extensions"]()
