"""Linear attention: every backend against fp64, and the properties that prefill, decoding and prefix attention need."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from jrt.ops import (
    BACKENDS,
    State,
    encode_prefix,
    feature_count,
    linear_attention,
    prefix_linear_attention,
    taylor_features,
)

BATCH, HEADS, DIM, VALUE = 2, 3, 8, 12
LENGTHS = (1, 63, 64, 129, 1000)


def inputs(
    length: int, dtype: torch.dtype = torch.float64, dim: int = DIM, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((BATCH, length, HEADS, dim), (BATCH, length, HEADS, dim), (BATCH, length, HEADS, VALUE))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def some_state(dtype: torch.dtype = torch.float64) -> State:
    _, k, v = inputs(50, seed=1)
    return State(*(part.to(dtype) for part in encode_prefix(k, v, backend="reference")))


def ragged_mask(length: int) -> Tensor:
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    mask[0, : length // 3] = False
    return mask


def test_features_reproduce_the_taylor_kernel():
    q, k, _ = inputs(5, dim=16)
    s = (q * k).sum(-1) / 4
    torch.testing.assert_close((taylor_features(q) * taylor_features(k)).sum(-1), 1 + s + s**2 / 2)
    assert taylor_features(q).shape[-1] == feature_count(16) == 153


def test_features_of_whole_numbers_are_refused():
    """Their weights would be rounded to 0 and 1."""
    with pytest.raises(ValueError, match=r"x is torch\.int64; expected a floating-point dtype"):
        taylor_features(torch.ones(3, 4).long())


def test_features_are_exact_in_fp64():
    """Weights that were rounded to fp32 on the way cost half the digits of the definition that all backends are held to."""
    q, k, _ = inputs(300, dim=5)
    s = (q * k).sum(-1) / math.sqrt(5)
    expected = 1 + s + s**2 / 2
    for some in (slice(1), slice(None)):  # few vectors and many take different ways
        features = (taylor_features(q[:, some]) * taylor_features(k[:, some])).sum(-1)
        torch.testing.assert_close(features, expected[:, some], rtol=1e-13, atol=1e-13)


def test_reference_equals_the_sums_written_one_by_one():
    """Equation 3 for one head, with Python loops."""
    q, k, v = inputs(6)
    prefix_k, prefix_v = inputs(4, seed=2)[1:]
    o, state = linear_attention(q, k, v, initial_state=encode_prefix(prefix_k, prefix_v), backend="reference")
    b, h, i = 1, 2, 5

    def kernel(key: Tensor) -> Tensor:
        s = q[b, i, h] @ key / DIM**0.5
        return 1 + s + s * s / 2

    keys = [*prefix_k[b, :, h], *k[b, : i + 1, h]]
    values = [*prefix_v[b, :, h], *v[b, : i + 1, h]]
    weights = [kernel(key) for key in keys]
    expected = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
    torch.testing.assert_close(o[b, i, h], expected)
    torch.testing.assert_close(state.z[b, h, 0], torch.tensor(10.0, dtype=torch.float64))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("started", [False, True], ids=["from_nothing", "from_a_state"])
def test_chunked_equals_reference(length, masked, started):
    q, k, v = inputs(length)
    mask = ragged_mask(length) if masked else None
    initial = some_state() if started else None
    expected, expected_state = linear_attention(q, k, v, initial_state=initial, mask=mask, backend="reference")
    o, state = linear_attention(q, k, v, initial_state=initial, mask=mask, backend="chunked")
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("length", LENGTHS)
def test_decay_fades_the_numerator_only(length):
    q, k, v = inputs(length)
    log_decay = torch.tensor([-0.001, -0.1, -1.0], dtype=torch.float64)
    arguments = dict(initial_state=some_state(), log_decay=log_decay)
    expected, expected_state = linear_attention(q, k, v, **arguments, backend="reference")
    o, state = linear_attention(q, k, v, **arguments, backend="chunked")
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(state, expected_state)
    undecayed = linear_attention(q, k, v, initial_state=some_state(), backend="reference")[1]
    torch.testing.assert_close(state.z, undecayed.z)
    assert not torch.allclose(state.S, undecayed.S)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cut", [1, 100, 128, 299])
@pytest.mark.parametrize("decays", [False, True])
def test_reading_on_from_a_state_equals_reading_at_once(backend, cut, decays):
    """f(xy) = f(y | state(x)): prefill, chunking, decoding and prefixes are this one property."""
    q, k, v = inputs(300)
    log_decay = torch.tensor([-0.01, -0.1, -1.0], dtype=torch.float64) if decays else None
    whole, final = linear_attention(q, k, v, log_decay=log_decay, backend=backend)
    first, state = linear_attention(q[:, :cut], k[:, :cut], v[:, :cut], log_decay=log_decay, backend=backend)
    second, state = linear_attention(
        q[:, cut:], k[:, cut:], v[:, cut:], initial_state=state, log_decay=log_decay, backend=backend
    )
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_prefix_is_the_state_of_a_text_without_its_queries(backend):
    q, k, v = inputs(300)
    mask = ragged_mask(300)
    state = linear_attention(q, k, v, mask=mask, backend=backend)[1]
    torch.testing.assert_close(encode_prefix(k, v, mask=mask, backend=backend), state)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_padding_leaves_no_trace(backend, poison):
    q, k, v = inputs(40)
    alone, state = linear_attention(q, k, v, backend=backend)
    queries, keys, values = (x.new_full((BATCH, 9, *x.shape[2:]), poison) for x in (q, k, v))
    mask = torch.arange(49).expand(BATCH, 49) >= 9
    keys, values = torch.cat([keys, k], 1), torch.cat([values, v], 1)
    padded, padded_state = linear_attention(torch.cat([queries, q], 1), keys, values, mask=mask, backend=backend)
    torch.testing.assert_close(padded[:, 9:], alone)
    torch.testing.assert_close(padded_state, state)
    torch.testing.assert_close(encode_prefix(keys, values, mask=mask, backend=backend), state)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_text_that_begins_with_padding_is_finite(backend):
    q, k, v = inputs(40)
    mask = torch.arange(40).expand(BATCH, 40) >= 9
    assert linear_attention(q, k, v, mask=mask, backend=backend)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("decays", [False, True])
def test_packed_sequences_are_as_if_apart(backend, decays):
    """One is empty, one a single token."""
    ends = [0, 3, 3, 4, 200]
    q, k, v = (x[:1] for x in inputs(200))
    S, z = (torch.cat([part, part + 1]) for part in some_state())
    arguments = dict(log_decay=torch.tensor([-0.01, -0.1, -1.0], dtype=torch.float64) if decays else None)
    offsets = torch.tensor(ends)
    o, state = linear_attention(
        q, k, v, initial_state=State(S, z), cu_seqlens=offsets, mask=ragged_mask(200)[:1], backend=backend, **arguments
    )
    prefix = encode_prefix(k, v, cu_seqlens=offsets, backend=backend)
    for n, (start, end) in enumerate(itertools.pairwise(ends)):
        before = State(S[n : n + 1], z[n : n + 1])
        if start == end:
            torch.testing.assert_close(State(*(part[n : n + 1] for part in state)), before)
            assert (prefix.S[n] == 0).all() and (prefix.z[n] == 0).all()
            continue
        part = [x[:, start:end] for x in (q, k, v)]
        mask = ragged_mask(200)[:1, start:end]
        alone, after = linear_attention(*part, initial_state=before, mask=mask, backend=backend, **arguments)
        torch.testing.assert_close(o[:, start:end], alone)
        torch.testing.assert_close(State(*(part[n : n + 1] for part in state)), after)
        torch.testing.assert_close(State(*(x[n : n + 1] for x in prefix)), encode_prefix(*part[1:], backend=backend))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_compiled_without_a_graph_break(backend):
    q, k, v = (x.requires_grad_() for x in inputs(140))

    def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = encode_prefix(k, v, mask=ragged_mask(140), backend=backend)
        return linear_attention(q, k, v, initial_state=state, backend=backend)[0].square().sum()

    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    torch.testing.assert_close(found, torch.autograd.grad(read(q, k, v), (q, k, v)))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("started", [False, True], ids=["from_nothing", "from_a_state"])
def test_packed_sequences_are_compiled_without_a_graph_break(backend, decays, started):
    """A second set of lengths needs no second graph."""
    q, k, v = (x[:1].requires_grad_() for x in inputs(70))
    mask = torch.arange(70)[None] % 7 != 3
    log_decay = torch.tensor([-0.2, -0.01, -1.0]) if decays else None
    S, z = (torch.cat([x, x[:1]]).requires_grad_() for x in some_state())
    state = State(S, z) if started else None
    arguments = dict(mask=mask, log_decay=log_decay, backend=backend)

    def results(offsets):
        o, after = linear_attention(q, k, v, cu_seqlens=offsets, initial_state=state, **arguments)
        prefix = encode_prefix(k, v, cu_seqlens=offsets, mask=mask, backend=backend)
        return o.masked_fill(~mask[..., None, None], 0), *after, *prefix

    torch._dynamo.reset()
    compiled = torch.compile(results, backend="aot_eager", fullgraph=True)
    for ends in ([0, 20, 20, 70], [0, 1, 64, 70]):
        expected, found = (f(torch.tensor(ends)) for f in (results, compiled))
        torch.testing.assert_close(found, expected)
        leaves = (q, k, v, S, z) if started else (q, k, v)
        gradients = [torch.autograd.grad(sum(x.sin().sum() for x in y), leaves) for y in (found, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("length", [1, 140])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiles", [False, True])
def test_autocast_changes_nothing(backend, length, dtype, compiles):
    """States stay in fp32, and the products of fp32 inputs too."""
    leaves = [x.requires_grad_() for x in inputs(length, dtype)]

    def read(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        state = encode_prefix(k, v, backend=backend)
        o, after = linear_attention(q, k, v, initial_state=state, backend=backend)
        return [o, *after, *prefix_linear_attention(q, k, v, k, v, backend=backend)[1]]

    expected = read(*leaves)
    torch._dynamo.reset()
    call = torch.compile(read, fullgraph=True, backend="aot_eager") if compiles else read
    with torch.autocast("cpu", torch.bfloat16):
        found = call(*leaves)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    if not compiles:  # PyTorch traces the backward pass of compiled code under the autocast that surrounds the call
        gradients = [torch.autograd.grad(sum(x.float().sin().sum() for x in y), leaves) for y in (found, expected)]
        torch.testing.assert_close(*gradients)


def test_backends_are_tried_in_order():
    assert BACKENDS == ("cuda", "triton", "chunked", "reference")
    q, k, v = inputs(30)
    assert torch.equal(linear_attention(q, k, v)[0], linear_attention(q, k, v, backend="chunked")[0])


@pytest.mark.parametrize("length", [1, 64, 300])
def test_chunked_gradients_equal_those_of_the_reference(length):
    def gradients(backend: str) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in (*inputs(length), *some_state())]
        q, k, v, S, z = leaves
        o, state = linear_attention(q, k, v, initial_state=State(S, z), mask=ragged_mask(length), backend=backend)
        weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
        (o * weights).sum().add(state.S.sin().sum()).add(state.z.cos().sum()).backward()
        return [leaf.grad for leaf in leaves]

    for actual, expected in zip(gradients("chunked"), gradients("reference"), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_is_at_most_twice_as_wrong_as_eager_in_the_same_dtype(dtype):
    exact = inputs(1000, dtype)
    expected, expected_state = linear_attention(*(x.double() for x in exact), backend="reference")
    o, state = linear_attention(*exact, backend="chunked")
    eager, eager_state = _eager(*exact)

    def error(actual: Tensor, truth: Tensor) -> float:
        return ((actual.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()

    assert error(o, expected) <= 2 * error(eager, expected) + 1e-7
    assert error(state.S, expected_state.S) <= 2 * error(eager_state.S, expected_state.S) + 1e-7
    assert o.dtype == dtype
    assert state.S.dtype == state.z.dtype == torch.float32


def _eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
    """The quadratic form with every intermediate in the inputs' dtype."""
    phi_q, phi_k = taylor_features(q), taylor_features(k)
    scores = torch.einsum("bihf,bjhf->bhij", phi_q, phi_k).tril()
    o = torch.einsum("bhij,bjhe->bihe", scores, v) / scores.sum(-1).transpose(1, 2)[..., None]
    return o, State(torch.einsum("bjhf,bjhe->bhfe", phi_k, v), phi_k.sum(1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(q=torch.zeros(2, 5, 3, 7)), "expected that of k"),
        (dict(k=torch.zeros(2, 5, 3)), "expected k"),
        (dict(v=torch.zeros(2, 4, 3, 12)), "expected the same"),
        (dict(v=torch.zeros(2, 5, 3, 12, dtype=torch.float64)), "as k"),
        (dict(q=torch.zeros(2, 5, 3, 8, dtype=torch.bfloat16)), "as k"),
        (dict(mask=torch.ones(2, 4, dtype=torch.bool)), "expected \\(B, T\\)"),
        (dict(mask=torch.ones(2, 5)), "torch.bool"),
        (dict(log_decay=torch.zeros(2)), "expected \\(H,\\)"),
        (dict(initial_state=State(torch.zeros(2, 3, 44, 12), torch.zeros(2, 3, 44))), "another model"),
        (dict(initial_state=(torch.zeros(2, 3, 45, 12), torch.zeros(2, 3, 45))), "expected a jrt.ops.State"),
        (dict(k=[[1.0]]), "k is a list; expected a tensor"),
        (dict(q=None), "q is a NoneType; expected a tensor"),
        (dict(mask=[[True] * 5] * 2), "mask is a list; expected a tensor"),
        (dict(log_decay=-0.5), "log_decay is a float; expected a tensor"),
        (dict(log_decay=torch.zeros(3, device="meta")), "log_decay is on meta; expected cpu"),
        (dict(mask=torch.ones(2, 5, dtype=torch.bool, device="meta")), "mask is on meta; expected cpu"),
        (dict(initial_state=State(None, None)), "initial_state.S is a NoneType"),
        (dict(initial_state=State(torch.zeros(2, 3, 45, 12), torch.zeros(2, 3, 45).long())), "floating-point"),
        (dict(k=torch.zeros(2, 5, 3, 8).long(), v=torch.zeros(2, 5, 3, 12).long()), "floating-point"),
        (dict(cu_seqlens=torch.tensor([0, 5])), "expected all sequences in one"),
        (dict(cu_seqlens=[0, 5]), "cu_seqlens is a list; expected a tensor"),
        (dict(cu_seqlens=torch.zeros(3)), "expected int32 or int64"),
        (dict(log_decay=torch.zeros(3).long()), "log_decay is torch.int64; expected a floating-point dtype"),
        (dict(k=torch.zeros(2, 5, 3, 8).to_sparse()), "k has layout torch.sparse_coo; expected a dense tensor"),
        (dict(mask=torch.ones(2, 5, dtype=torch.bool).to_sparse()), "mask has layout torch.sparse_coo"),
        (dict(normalize="no"), "normalize is 'no'; expected True or False"),
        (dict(normalize=None), "normalize is None; expected True or False"),
        (dict(backend="magic"), "expected one of"),
        (dict(backend=["cuda"]), "expected one of"),
        (dict(backend="triton"), "cannot serve"),
        (dict(backend="cuda"), "cannot serve"),
        (dict(k=torch.zeros(2, 0, 3, 8), v=torch.zeros(2, 0, 3, 12), q=torch.zeros(2, 0, 3, 8)), "at least one token"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_says_what_was_expected(change, said):
    arguments = dict(q=torch.zeros(2, 5, 3, 8), k=torch.zeros(2, 5, 3, 8), v=torch.zeros(2, 5, 3, 12)) | change
    with pytest.raises(ValueError, match=said):
        linear_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_packing_that_does_not_fit_the_tokens_is_said():
    q, k, v = (x[:1] for x in inputs(9))
    for ends in ([0, 4, 8], [1, 9], [0, 6, 4, 9]):
        with pytest.raises(ValueError, match="expected to rise from 0 to T = 9"):
            linear_attention(q, k, v, cu_seqlens=torch.tensor(ends))
    with pytest.raises(ValueError, match="is it from another model"):
        linear_attention(
            q, k, v, cu_seqlens=torch.tensor([0, 4, 9]), initial_state=State(*(x[:1] for x in some_state()))
        )


def test_short_convolution_equals_conv1d_and_goes_on():
    from jrt.ops import short_convolution

    u, weight, bias = torch.randn(2, 10, 4), torch.randn(4, 3), torch.randn(4)
    expected = torch.nn.functional.conv1d(u.mT, weight[:, None], bias, padding=2, groups=4)[..., :10].mT
    whole, _ = short_convolution(u, weight, bias, None)
    torch.testing.assert_close(whole, expected)
    first, state = short_convolution(u[:, :1], weight, bias, None)
    second, _ = short_convolution(u[:, 1:], weight, bias, state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
