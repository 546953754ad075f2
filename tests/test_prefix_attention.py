"""`prefix_linear_attention`, a prefix and a text in one call: every backend against the fp64 definition and two calls.

The Triton kernels run in Triton's interpreter where there is no GPU, in a process of their own (`interpreter.py`).

Shapes: B batch, N packed sequences, T tokens, M prefix tokens, H heads, d query/key size, D value size.
"""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from interpreter import INTERPRETED, pass_in_the_interpreter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jrt import presets
from jrt.mixers import PrefixLinearAttention
from jrt.mixers.batch import Prefix, TokenBatch
from jrt.ops import State, encode_prefix, extension, linear_attention, prefix_linear_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FACTOR = 2.0
NARROW = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies no bfloat16
PYTORCH = ("reference", "chunked")

kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="run by test_the_kernels_run_in_the_interpreter"
)
plain = pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run in this process")
def test_the_kernels_run_in_the_interpreter():
    pass_in_the_interpreter(__file__, "-m", "not gpu and not hopper and not slow")


@pytest.fixture(autouse=True)
def _extension(request):
    if request.node.get_closest_marker("hopper") and (reason := extension.missing(torch.cuda.current_device())):
        pytest.skip(reason)


@pytest.fixture
def cut(monkeypatch):
    """Sets the number of pieces of a sequence in the Triton kernels."""
    from jrt.ops.triton import sizes

    def set_pieces(count: int) -> None:
        monkeypatch.setattr(sizes, "piece_count", lambda programs, chunks, *_: min(count, chunks))

    return set_pieces


@pytest.fixture
def joined(monkeypatch):
    """The interpreter multiplies no bfloat16, for which the kernel of all keys is made. There it takes fp32, for d > 16,
    where prefix and text have tiles of one size."""
    from jrt.ops.triton import pair

    if DEVICE == "cpu":
        monkeypatch.setattr(pair, "fits_both", lambda d, D, dtype: d > 16)


@pytest.fixture
def poisoned():
    """Freshly freed device memory full of NaN, where the next allocations land."""
    junk = [torch.full((size,), float("nan"), device=DEVICE) for size in (2**26, 2**22, 2**20, 2**18, 2**16)]
    del junk


def draw(batch=2, tokens=70, prefix=40, heads=2, d=8, D=24, dtype=torch.float32, seed=0) -> dict[str, Tensor]:
    """Values of the text have a mean, so that sums grow."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = {"q": normal(batch, tokens, heads, d), "k": normal(batch, tokens, heads, d)}
    x |= {"v": normal(batch, tokens, heads, D) + 0.3}
    x |= {"prefix_k": normal(batch, prefix, heads, d), "prefix_v": normal(batch, prefix, heads, D)}
    return {name: value.to(DEVICE, dtype) for name, value in x.items()}


def ragged(batch: int, tokens: int, seed: int) -> Tensor:
    """Left padding of two lengths, and holes. With several rows, nothing of the first is left."""
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) > 0.3
    mask[-1, : tokens // 3] = False
    if batch > 1:
        mask[0] = False
    return mask.to(DEVICE)


def masks(x: dict[str, Tensor], text: bool = True, prefix: bool = True) -> dict[str, Tensor | None]:
    text_mask, prefix_mask = (ragged(*x[name].shape[:2], seed) for seed, name in enumerate(("k", "prefix_k")))
    return {"mask": text_mask if text else None, "prefix_mask": prefix_mask if prefix else None}


def packed(tokens: int, prefix: int) -> dict[str, Tensor]:
    """Three texts, of which one is empty, after prefixes of which another is empty."""
    ends = [0, tokens // 3, tokens // 3, tokens], [0, 0, prefix - 1, prefix]
    return dict(zip(("cu_seqlens", "prefix_cu_seqlens"), (torch.tensor(x, device=DEVICE) for x in ends), strict=True))


def decay(x: dict[str, Tensor]) -> Tensor:
    return torch.linspace(-0.02, -0.3, x["k"].shape[2], device=DEVICE)


def in_two_calls(q, k, v, prefix_k, prefix_v, *, prefix_mask=None, prefix_cu_seqlens=None, backend, **of_text):
    state = encode_prefix(prefix_k, prefix_v, mask=prefix_mask, cu_seqlens=prefix_cu_seqlens, backend=backend)
    return linear_attention(q, k, v, initial_state=state, backend=backend, **of_text)


def loss_of(o: Tensor, final: State) -> Tensor:
    """A fixed random sum of outputs and states."""
    generator = torch.Generator().manual_seed(1)
    loss = o.new_zeros(())
    for value, scale in ((o, 1.0), (final.S, 0.02), (final.z, 0.02)):
        weights = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        loss = loss + (value * weights).sum() * scale
    return loss


def results(x: dict[str, Tensor], name: str, dtype=None, call=prefix_linear_attention, **arguments):
    """Outputs, states and all gradients."""
    leaves = {key: value.to(dtype or value.dtype, copy=True).requires_grad_() for key, value in x.items()}
    o, final = call(*leaves.values(), backend=name, **arguments)
    gradients = torch.autograd.grad(loss_of(o, final), list(leaves.values()))
    named = {f"d{key}": gradient for key, gradient in zip(leaves, gradients, strict=True)}
    return {"o": o.detach(), "S": final.S.detach(), "z": final.z.detach()} | named


def relative_error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


def assert_as_good_as_eager(x: dict[str, Tensor], name: str, truth_by: str = "reference", **arguments) -> None:
    """At most twice the error of PyTorch in the same dtype, and a rounding where that has hardly any."""
    truth, eager = results(x, truth_by, torch.float64, **arguments), results(x, "chunked", **arguments)
    for key, value in results(x, name, **arguments).items():
        assert value.dtype == eager[key].dtype and value.shape == eager[key].shape
        rounding = torch.finfo(value.dtype).eps / 4 if value.dtype != torch.float32 else 1e-6
        error, allowed = relative_error(value, truth[key]), FACTOR * relative_error(eager[key], truth[key])
        assert error <= allowed + rounding, f"{key}: relative error {error:.2e}, eager allows {allowed:.2e}"


# ---- in PyTorch


@plain
@pytest.mark.parametrize("name", PYTORCH)
@pytest.mark.parametrize(("tokens", "prefix"), [(1, 1), (64, 63), (129, 300)])
@pytest.mark.parametrize("how", ["plain", "masked", "decaying", "packed", "unnormalised"])
def test_one_call_is_two_calls(name, tokens, prefix, how):
    x = draw(1 if how == "packed" else 2, tokens, prefix, dtype=torch.float64)
    arguments = {
        "plain": {},
        "masked": masks(x),
        "decaying": {"log_decay": decay(x)},
        "packed": packed(tokens, prefix),
        "unnormalised": {"normalize": False},
    }[how]
    found = results(x, name, **arguments)
    for key, value in results(x, "reference", call=in_two_calls, **arguments).items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}")


@plain
@pytest.mark.parametrize("name", PYTORCH)
def test_a_row_without_a_prefix_is_a_text_alone(name):
    x = draw(dtype=torch.float64)
    o, state = prefix_linear_attention(*x.values(), prefix_mask=masks(x)["prefix_mask"], backend=name)
    alone, after = linear_attention(*(x[key][:1] for key in "qkv"), backend=name)
    torch.testing.assert_close(o[:1], alone)
    torch.testing.assert_close(State(*(part[:1] for part in state)), after)


def assert_two_parts_are_the_whole(name: str, dtype: torch.dtype, **tolerance: float) -> None:
    """Prefix and first part in one call, the rest in another: the same outputs, state and gradients."""
    x = draw(tokens=40, prefix=20, dtype=dtype)
    whole = results(x, name, log_decay=decay(x))

    def in_parts(q, k, v, prefix_k, prefix_v, **arguments):
        first, state = prefix_linear_attention(q[:, :17], k[:, :17], v[:, :17], prefix_k, prefix_v, **arguments)
        rest, state = linear_attention(q[:, 17:], k[:, 17:], v[:, 17:], initial_state=state, **arguments)
        return torch.cat([first, rest], 1), state

    for key, value in results(x, name, call=in_parts, log_decay=decay(x)).items():
        torch.testing.assert_close(value, whole[key], **tolerance)


@plain
@pytest.mark.parametrize("name", PYTORCH)
def test_reading_on_in_pytorch_is_reading_at_once(name):
    assert_two_parts_are_the_whole(name, torch.float64)


@plain
@pytest.mark.parametrize("name", PYTORCH)
@pytest.mark.parametrize("how", ["masked", "packed"])
def test_compiled_in_pytorch_without_a_graph_break(name, how):
    x = draw(1 if how == "packed" else 2, dtype=torch.float64)
    arguments = masks(x) if how == "masked" else packed(70, 40)
    leaves = [value.requires_grad_() for value in x.values()]

    def loss(*tensors: Tensor) -> Tensor:
        o, state = prefix_linear_attention(*tensors, backend=name, **arguments)
        return o.square().sum() + state.S.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*lru_cache")  # Dynamo's, which speaks of silent incorrectness
        found = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(loss(*leaves), leaves))


@plain
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(prefix_k=None), "prefix_k is a NoneType; expected a tensor"),
        (dict(prefix_v=torch.zeros(2, 3, 3)), r"expected prefix_k \(B, T, H, d\) and prefix_v"),
        (dict(prefix_v=torch.zeros(2, 4, 3, 12)), r"prefix_k has \(B, T, H\) = \(2, 3, 3\) and prefix_v \(2, 4, 3\)"),
        (dict(prefix_k=torch.zeros(2, 0, 3, 8), prefix_v=torch.zeros(2, 0, 3, 12)), "at least one token, got prefix_k"),
        (dict(prefix_k=torch.zeros(2, 3, 3, 7)), r"prefix_k has shape \(2, 3, 3, 7\); expected \(2, M, 3, 8\), as k"),
        (dict(prefix_v=torch.zeros(2, 3, 3, 11)), r"prefix_v has shape .*; expected \(2, M, 3, 12\), as v"),
        (
            dict(prefix_k=torch.zeros(1, 3, 3, 8), prefix_v=torch.zeros(1, 3, 3, 12)),
            r"prefix_k has shape \(1, 3, 3, 8\); expected \(2, M, 3, 8\)",
        ),
        (
            dict(prefix_k=torch.zeros(2, 3, 3, 8).double(), prefix_v=torch.zeros(2, 3, 3, 12).double()),
            "prefix_k is torch.float64 on cpu; expected torch.float32 on cpu, as k",
        ),
        (dict(prefix_v=torch.zeros(2, 3, 3, 12).half()), "prefix_v is torch.float16 on cpu; expected torch.float32"),
        (dict(prefix_mask=torch.ones(2, 5, dtype=torch.bool)), r"prefix_mask has shape \(2, 5\); expected .* \(2, 3\)"),
        (dict(prefix_mask=torch.ones(2, 3)), "prefix_mask is torch.float32; expected torch.bool"),
        (dict(mask=torch.ones(2, 3, dtype=torch.bool)), r"mask has shape \(2, 3\)"),
        (dict(log_decay=torch.zeros(2)), r"expected \(H,\)"),
        (dict(cu_seqlens=torch.tensor([0, 5])), "prefix_cu_seqlens is None and the other is given; expected both"),
        (dict(prefix_cu_seqlens=torch.tensor([0, 3])), "^cu_seqlens is None and the other is given"),
        (dict(prefix_v=torch.zeros(2, 3, 3, 12).to_sparse()), "prefix_v has layout torch.sparse_coo; expected a dense"),
        (dict(normalize="no"), "normalize is 'no'; expected True or False"),
        (dict(backend="cuda"), "cannot serve this call: tensors are on cpu"),
        (dict(backend="magic"), "expected one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_says_what_was_expected(change, said):
    sizes = {"q": (5, 8), "k": (5, 8), "v": (5, 12), "prefix_k": (3, 8), "prefix_v": (3, 12)}
    arguments = {key: torch.zeros(2, length, 3, size) for key, (length, size) in sizes.items()} | change
    with pytest.raises(ValueError, match=said):
        prefix_linear_attention(**arguments)


@plain
@pytest.mark.parametrize(
    ("of_text", "of_prefix", "said"),
    [
        ([0, 4, 9], [0, 5], r"prefix_cu_seqlens has shape \(2,\); expected that of cu_seqlens, \(3,\)"),
        ([0, 9], [0, 4], r"prefix_cu_seqlens is \[0, 4\]; expected to rise from 0 to T = 5"),
        ([0, 8], [0, 5], r"^cu_seqlens is \[0, 8\]; expected to rise from 0 to T = 9"),
    ],
)
def test_packing_that_does_not_fit_is_said(of_text, of_prefix, said):
    x = draw(1, 9, 5)
    with pytest.raises(ValueError, match=said):
        prefix_linear_attention(
            *x.values(), cu_seqlens=torch.tensor(of_text), prefix_cu_seqlens=torch.tensor(of_prefix)
        )


def test_shapes_are_known_without_a_device():
    """The fake kernels, on tensors that have no memory."""
    x = [torch.empty(2, T, 3, size, device="meta", dtype=torch.bfloat16) for T, size in ((70, 16), (70, 16), (70, 112))]
    x += [torch.empty(2, 30, 3, size, device="meta", dtype=torch.bfloat16) for size in (16, 112)]
    states = [(2, 3, 153, 112), (2, 3, 153)]
    for name, absent in (("triton", [None] * 5), ("prefill", [None] * 2)):
        found = getattr(torch.ops.jrt, f"prefix_linear_attention_{name}")(*x, *absent, True)
        assert [tuple(y.shape) for y in found] == [x[2].shape, *states, *states]
        assert [y.dtype for y in found] == [torch.bfloat16] + [torch.float32] * 4
        o, S, z, *between = found
        backward = "backward" if name == "triton" else "prefill_backward"
        found = getattr(torch.ops.jrt, f"prefix_linear_attention_{backward}")(*x, *absent, o, *between, o, S, z, True)
        assert [y.shape for y in found] == [y.shape for y in x]


# ---- in Triton


@kernels
@pytest.mark.parametrize(
    ("shape", "pieces", "how"),
    [
        (dict(), 1, "plain"),
        (dict(batch=1, tokens=140, d=16, D=16), 3, "plain"),
        (dict(tokens=30, prefix=40), 2, "masked"),
        (dict(tokens=30, prefix=40, heads=1), 2, "text masked"),
        (dict(tokens=30, prefix=40, heads=1), 2, "prefix masked"),
        (dict(batch=1, tokens=50, prefix=20), 2, "decaying"),
        (dict(batch=1, tokens=60, prefix=40), 1, "packed"),
        (dict(batch=1, tokens=60, prefix=40), 2, "packed"),
        (dict(tokens=30, prefix=40, heads=1, d=20, D=40), 2, "masked"),  # one launch for the gradients of all keys
        (dict(batch=1, tokens=50, prefix=30, heads=1, d=20), 2, "packed"),
        (dict(tokens=1, prefix=20), 1, "masked"),
        (dict(tokens=20, prefix=1), 2, "decaying"),
        (dict(heads=1, dtype=NARROW), 2, "masked"),
    ],
    ids=str,
)
def test_error_is_at_most_twice_that_of_eager(cut, joined, shape, pieces, how):
    cut(pieces)
    x = draw(**shape)
    arguments = {
        "plain": {},
        "masked": masks(x),
        "text masked": masks(x, prefix=False),
        "prefix masked": masks(x, text=False),
        "decaying": {"log_decay": decay(x), "normalize": False},
        "packed": packed(x["k"].shape[1], x["prefix_k"].shape[1]) | masks(x) | {"log_decay": decay(x)},
    }[how]
    assert_as_good_as_eager(x, "triton", **arguments)


@kernels
@pytest.mark.parametrize("pieces", [1, 3])
def test_output_and_state_are_those_of_two_calls(cut, pieces):
    cut(pieces)
    x = draw(tokens=70, prefix=100)
    arguments = masks(x) | {"log_decay": decay(x)}
    with torch.no_grad():
        o, state = prefix_linear_attention(*x.values(), backend="triton", **arguments)
        expected, expected_state = in_two_calls(*x.values(), backend="triton", **arguments)
    assert torch.equal(o, expected)
    assert torch.equal(state.S, expected_state.S) and torch.equal(state.z, expected_state.z)


@kernels
def test_reading_on_is_reading_at_once(cut):
    cut(2)
    assert_two_parts_are_the_whole("triton", torch.float32, rtol=1e-4, atol=1e-4)


@kernels
@pytest.mark.parametrize("pieces", [1, 2])
def test_nan_in_padding_leaves_no_trace_in_triton(cut, joined, pieces):
    cut(pieces)
    x = draw(tokens=20, prefix=20, heads=1, d=20, D=16)
    assert_no_trace_of_padding(x, "triton")


def assert_no_trace_of_padding(x: dict[str, Tensor], name: str) -> None:
    given = masks(x)
    clean = results(x, name, **given)
    dirty = {key: value.clone() for key, value in x.items()}
    for key, mask in (("k", "mask"), ("v", "mask"), ("prefix_k", "prefix_mask"), ("prefix_v", "prefix_mask")):
        dirty[key][~given[mask]] = float("nan") if key.endswith("k") else float("inf")
        assert (clean[f"d{key}"][~given[mask]] == 0).all()
    for key, value in results(dirty, name, **given).items():
        assert torch.equal(value, clean[key]), key


@kernels
def test_equal_inputs_give_equal_bits_and_no_memory_is_read_before_it_is_written(cut, joined):
    cut(2)
    x = draw(tokens=20, prefix=20, heads=1, d=20, D=16)
    before = results(x, "triton", **masks(x))
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty now returns NaN
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        filled = results(x, "triton", **masks(x))
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]
    for name, value in before.items():
        assert torch.equal(value, filled[name]), name


def layouts(x: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The same tensors as slices of one projection, and with heads first."""
    sliced = {}
    for names in (("q", "k", "v"), ("prefix_k", "prefix_v")):
        widths = [x[name][0, 0].numel() for name in names]
        parts = torch.cat([x[name].flatten(2) for name in names], -1).split(widths, -1)
        sliced |= {name: part.unflatten(-1, x[name].shape[2:]) for name, part in zip(names, parts, strict=True)}
    return [sliced, {name: value.transpose(1, 2).contiguous().transpose(1, 2) for name, value in x.items()}]


@kernels
def test_strides_as_the_model_gives_them(cut, joined):
    cut(2)
    x = draw(batch=1, tokens=20, prefix=18, heads=2, d=20, D=16)
    every_second = {"prefix_mask": torch.ones(1, 36, dtype=torch.bool, device=DEVICE)[:, ::2]}
    expected = results(x, "triton")
    for given in layouts(x):
        leaves = [value.detach().requires_grad_() for value in given.values()]
        o, state = prefix_linear_attention(*leaves, backend="triton", **every_second)
        for key, gradient in zip(given, torch.autograd.grad(loss_of(o, state), leaves), strict=True):
            torch.testing.assert_close(gradient, expected[f"d{key}"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(o, expected["o"], rtol=1e-5, atol=1e-6)


@kernels
@pytest.mark.parametrize("pieces", [1, 2])
def test_the_operators_obey_pytorch(cut, joined, pieces):
    cut(pieces)
    x = [value.requires_grad_() for value in draw(1, 18, 5, heads=1, d=20, D=16).values()]
    given = (torch.arange(18, device=DEVICE)[None] > 3, None, torch.tensor([-0.1], device=DEVICE), None, None)
    torch.library.opcheck(torch.ops.jrt.prefix_linear_attention_triton.default, (*x, *given, True))
    with torch.no_grad():
        o, S, z, *between = torch.ops.jrt.prefix_linear_attention_triton(*x, *given, True)
        arguments = (*x, *given, o, *between, o, S, z, True)
        torch.library.opcheck(torch.ops.jrt.prefix_linear_attention_backward.default, arguments)


@kernels
@pytest.mark.parametrize("how", ["masked", "packed"])
def test_compiled_without_a_graph_break(how):
    x = draw(1 if how == "packed" else 2, 40, 20, heads=1)
    arguments = masks(x) if how == "masked" else packed(40, 20)
    assert_compiled_as_eager(x, "triton", **arguments)


def assert_compiled_as_eager(x: dict[str, Tensor], name: str, **arguments) -> None:
    leaves = [value.requires_grad_() for value in x.values()]

    def loss(*tensors: Tensor) -> Tensor:
        o, final = prefix_linear_attention(*tensors, backend=name, **arguments)
        return o.square().sum() + final.S.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    found = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(loss(*leaves), leaves))


@kernels
def test_activation_checkpointing():
    leaves = [value.requires_grad_() for value in draw(tokens=20, heads=1).values()]

    def attend(*tensors: Tensor) -> Tensor:
        return prefix_linear_attention(*tensors, backend="triton")[0]

    kept = torch.autograd.grad(attend(*leaves).square().sum(), leaves)
    again = torch.utils.checkpoint.checkpoint(attend, *leaves, use_reentrant=False)
    for value, expected in zip(torch.autograd.grad(again.square().sum(), leaves), kept, strict=True):
        assert torch.equal(value, expected)


class Operators(TorchDispatchMode):
    """Notes the project's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "jrt":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


@kernels
def test_the_mixer_reads_prefix_and_text_by_one_operator():
    """One forward and one backward, and it goes on from the state by another call."""
    config = dataclasses.replace(presets()["debug"], pattern="P")
    torch.manual_seed(0)
    mixer = PrefixLinearAttention(config, 0).to(DEVICE)
    x = torch.randn(2, 30, config.width, device=DEVICE, requires_grad=True)
    place = torch.arange(30, device=DEVICE).expand(2, 30)
    batch = TokenBatch(positions=place, mask=None, prefix=Prefix(20, None, None), rotary=None, log_decay=None)
    with Operators() as seen:
        y, state = mixer(x, batch, None)
    assert seen.names == ["prefix_linear_attention_triton"]
    with Operators() as seen:
        y.sum().backward()
    assert seen.names == ["prefix_linear_attention_backward"]
    with Operators() as seen, torch.no_grad():
        mixer(x[:, :1], dataclasses.replace(batch, positions=place[:, :1] + 30, prefix=None), state)
    assert seen.names == ["linear_attention_triton"]


@kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {key: value.double() for key, value in x.items()}, "expected bfloat16, float16 or float32"),
        (lambda x: {key: value.repeat(1, 1, 1, 9) for key, value in x.items()}, "expected at most 32"),
    ],
)
def test_what_the_kernels_cannot_serve_is_said(change, message):
    with pytest.raises(ValueError, match=f"'triton' cannot serve this call: .*{message}"):
        prefix_linear_attention(*change(draw(tokens=4, heads=1)).values(), backend="triton")


FUNCTIONS = {
    "linear_attention": lambda x, name: linear_attention(x["q"], x["k"], x["v"], backend=name)[0],
    "encode_prefix": lambda x, name: encode_prefix(x["k"], x["v"], backend=name).S,
    "prefix_linear_attention": lambda x, name: prefix_linear_attention(**x, backend=name)[0],
}


@kernels
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_a_forward_mode_derivative_is_refused_and_else_computed_in_pytorch(function, grad_mode):
    """PyTorch would take zero for the derivative of an operator without a rule, and say nothing."""
    x, call = draw(tokens=5, prefix=3), FUNCTIONS[function]

    def derivative(name: str | None) -> Tensor:
        with torch.autograd.forward_ad.dual_level(), grad_mode():
            dual = x | {"k": torch.autograd.forward_ad.make_dual(x["k"], x["k"])}
            return torch.autograd.forward_ad.unpack_dual(call(dual, name)).tangent

    torch.testing.assert_close(derivative(None), derivative("reference"), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"'triton' cannot serve this call: .*forward-mode derivative"):
        derivative("triton")


@kernels
@pytest.mark.parametrize("function", FUNCTIONS)
def test_transforms_of_functions_are_refused_and_else_computed_in_pytorch(function):
    x, call = draw(tokens=5, prefix=3), FUNCTIONS[function]

    def gradient(name: str | None) -> Tensor:
        return torch.func.grad(lambda k: call(x | {"k": k}, name).square().sum())(x["k"])

    torch.testing.assert_close(gradient(None), gradient("reference"), rtol=1e-4, atol=1e-4)
    each = torch.vmap(lambda k: call(x | {"k": k}, None))(torch.stack([x["k"], x["k"] + 1]))
    torch.testing.assert_close(each[1], call(x | {"k": x["k"] + 1}, "reference"), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"'triton' cannot serve this call: .*torch\.func"):
        gradient("triton")


@kernels
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_second_derivative_is_an_error_and_not_zero(function):
    x, call = draw(tokens=5, prefix=3), FUNCTIONS[function]
    x["k"].requires_grad_()
    gradient = torch.autograd.grad(call(x, "triton").square().sum(), x["k"], create_graph=True)[0]
    expected = torch.autograd.grad(call(x, "reference").square().sum(), x["k"])[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match=r"second derivative.*backend='chunked'"):
        gradient.sum().backward()


# ---- on a GPU: the lengths and widths that models have


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 1000, 4097])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "ragged"])
def test_lengths(poisoned, dtype, tokens, masked):
    x = draw(2, tokens, (tokens + 1) // 2, 3, 16, 64, dtype)
    assert_as_good_as_eager(x, "triton", truth_by="chunked", **(masks(x) if masked else {}))


@pytest.mark.gpu
@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize(("d", "D", "dtype"), [(8, 16, NARROW), (16, 112, NARROW), (32, 128, NARROW), (32, 64, None)])
def test_widths_and_pieces(poisoned, cut, pieces, decays, d, D, dtype):
    cut(pieces)
    x = draw(2, 700, 400, 2, d, D, dtype or torch.float32)
    arguments = masks(x) | {"log_decay": decay(x) / 10 if decays else None}
    assert_as_good_as_eager(x, "triton", truth_by="chunked", **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 16), (8, 16), (32, 16)])
def test_few_and_many_heads(poisoned, batch, heads):
    assert_as_good_as_eager(draw(batch, 2048, 1024, heads, 16, 64, NARROW), "triton", truth_by="chunked")


@pytest.mark.gpu
def test_packed_texts(poisoned):
    x = draw(1, 8192, 3000, 4, 16, 64, NARROW)
    ends = [0, 700, 701, 701, 3000, 8192], [0, 1, 1, 1200, 1300, 3000]
    cu_seqlens, prefix_cu_seqlens = (torch.tensor(part, device=DEVICE) for part in ends)
    arguments = dict(cu_seqlens=cu_seqlens, prefix_cu_seqlens=prefix_cu_seqlens)
    assert_as_good_as_eager(x, "triton", truth_by="chunked", **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", pytest.param("cuda", marks=pytest.mark.hopper)])
def test_ten_runs_give_equal_bits(name):
    x = draw(2, 5000, 2500, 4, 16, 64, NARROW)
    expected = results(x, name)
    for _ in range(9):
        for key, value in results(x, name).items():
            assert torch.equal(value, expected[key]), key


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", pytest.param("cuda", marks=pytest.mark.hopper)])
def test_large_values_give_no_nan(name):
    x = draw(2, 500, 300, 2, 16, 64, NARROW)
    x |= {key: x[key] * 1e3 for key in ("q", "k", "prefix_k")}
    for key, value in results(x, name).items():
        assert value.isfinite().all(), key


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", pytest.param("cuda", marks=pytest.mark.hopper)])
def test_in_a_captured_graph(name):
    x = draw(2, 500, 300, 2, 16, 64, NARROW)
    expected, _ = prefix_linear_attention(*x.values(), backend=name)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = prefix_linear_attention(*x.values(), backend=name)
    graph.replay()
    assert torch.equal(o, expected)


# ---- the Hopper kernels


@pytest.mark.hopper
@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 1000, 4097])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "ragged"])
def test_lengths_on_hopper(poisoned, tokens, masked):
    x = draw(2, tokens, (tokens + 1) // 2, 3, 16, 64, NARROW)
    assert_as_good_as_eager(x, "cuda", truth_by="chunked", **(masks(x) if masked else {}))


@pytest.mark.hopper
@pytest.mark.parametrize(("D", "dtype"), [(16, NARROW), (112, NARROW), (64, torch.float16)])
def test_widths_on_hopper(poisoned, D, dtype):
    x = draw(2, 700, 350, 3, 16, D, dtype)
    assert_as_good_as_eager(x, "cuda", truth_by="chunked", **masks(x))


@pytest.mark.hopper
@pytest.mark.parametrize("tokens", [1, 200])
def test_nan_in_padding_leaves_no_trace_on_hopper(tokens):
    assert_no_trace_of_padding(draw(2, tokens, 100, 2, 16, 64, NARROW), "cuda")


@pytest.mark.hopper
@pytest.mark.parametrize(("tokens", "masked"), [(700, False), (5000, True)])
def test_output_state_and_gradients_are_those_of_two_calls_on_hopper(tokens, masked):
    """The same kernels run, so every bit is equal."""
    x = draw(2, tokens, 300, 4, 16, 64, NARROW)
    arguments = masks(x) if masked else {}
    expected = results(x, "cuda", call=in_two_calls, **arguments)
    for key, value in results(x, "cuda", **arguments).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.hopper
@pytest.mark.parametrize("layout", [0, 1])
def test_strides_on_hopper(layout):
    x = draw(2, 150, 80, 4, 16, 64, NARROW)
    expected = results(x, "cuda")
    given = layouts(x)[layout]
    leaves = [value.detach().requires_grad_() for value in given.values()]
    o, state = prefix_linear_attention(*leaves, backend="cuda")
    for key, gradient in zip(given, torch.autograd.grad(loss_of(o, state), leaves), strict=True):
        assert torch.equal(gradient, expected[f"d{key}"]), key


@pytest.mark.hopper
@pytest.mark.parametrize("used", [("o",), ("S",), ("o", "z")], ids="+".join)
def test_results_that_no_loss_uses_on_hopper(used):
    x = draw(2, 200, 100, 2, 16, 64, NARROW)

    def found(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in x.values()]
        o, state = prefix_linear_attention(*leaves, backend=name)
        loss = sum(value.sin().sum() for key, value in {"o": o, "S": state.S, "z": state.z}.items() if key in used)
        return torch.autograd.grad(loss, leaves, materialize_grads=True)

    narrow = found("cuda", NARROW), found("chunked", NARROW)
    for value, eager, truth in zip(*narrow, found("chunked", torch.float64), strict=True):
        rounding = torch.finfo(NARROW).eps / 4
        assert relative_error(value, truth) <= FACTOR * relative_error(eager, truth) + rounding


@pytest.mark.hopper
def test_the_operators_obey_pytorch_on_hopper():
    x = [value.requires_grad_() for value in draw(1, 70, 40, 2, 16, 64, NARROW).values()]
    given = (torch.arange(70, device=DEVICE)[None] > 3, None)
    torch.library.opcheck(torch.ops.jrt.prefix_linear_attention_prefill.default, (*x, *given, True))
    with torch.no_grad():
        o, S, z, *between = torch.ops.jrt.prefix_linear_attention_prefill(*x, *given, True)
        arguments = (*x, *given, o, *between, o, S, z, True)
        torch.library.opcheck(torch.ops.jrt.prefix_linear_attention_prefill_backward.default, arguments)


@pytest.mark.hopper
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "ragged"])
def test_compiled_without_a_graph_break_on_hopper(masked):
    x = draw(2, 200, 100, 2, 16, 64, NARROW)
    assert_compiled_as_eager(x, "cuda", **(masks(x) if masked else {}))


@pytest.mark.hopper
def test_chosen_by_itself_on_hopper():
    x = draw(2, 200, 100, 2, 16, 64, NARROW)
    with Operators() as seen:
        prefix_linear_attention(*x.values())
    assert seen.names == ["prefix_linear_attention_prefill"]
