"""Splitting and rotating queries, keys and values: the kernel against fp64, and when it runs."""

import pytest
import torch
from interpreter import INTERPRETED, pass_in_the_interpreter

from jrt.mixers.attention import rotary_angles
from jrt.ops import rotary_pytorch, split_rotated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# In the interpreter these run within `test_kernels_in_the_interpreter`.
kernels = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or the interpreter")
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]


def results(function, qkv, angles, heads, weights):
    leaf = qkv.detach().requires_grad_()
    found = function(leaf, *angles, heads)
    torch.autograd.backward(found, [w.to(x.dtype) for w, x in zip(weights, found, strict=True)])
    return [x.detach() for x in found] + [leaf.grad]


def error(found, truth):
    return ((found.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size", "rotary"), [(2, 8, 8), (3, 6, 2), (5, 10, 5), (2, 600, 64)])
def test_the_error_is_at_most_twice_that_of_eager_in_the_same_dtype(dtype, heads, size, rotary):
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 7, 3 * heads * size, generator=draw).to(DEVICE, dtype)
    weights = torch.randn(3, 2, 7, heads, size, generator=draw).to(DEVICE, dtype)
    positions = torch.arange(7).expand(2, -1) + torch.tensor([[0], [50]])
    angles = [x.to(DEVICE) for x in rotary_angles(positions, rotary)]
    truth = results(rotary_pytorch.split_rotated, qkv.double(), [x.double() for x in angles], heads, weights)
    eager, found = (results(f, qkv, angles, heads, weights) for f in (rotary_pytorch.split_rotated, split_rotated))
    for value, plain, exact in zip(found, eager, truth, strict=True):
        assert value.dtype == dtype and value.shape == exact.shape and value.is_contiguous()
        assert error(value, exact) <= 2 * error(plain, exact) + 1e-6


@kernels
def test_gradients_in_other_layouts():
    """Attention kernels return gradients whose heads lie before the tokens in memory."""
    qkv, angles = torch.randn(2, 5, 36, device=DEVICE), rotary_angles(torch.arange(5, device=DEVICE).expand(2, -1), 4)
    weights = torch.randn(3, 2, 2, 5, 6, device=DEVICE).transpose(2, 3)
    found, plain = (results(f, qkv, angles, 2, weights) for f in (split_rotated, rotary_pytorch.split_rotated))
    torch.testing.assert_close(found, plain)


@kernels
def test_operators_obey_pytorch():
    qkv = torch.randn(2, 5, 36, device=DEVICE, requires_grad=True)
    angles = rotary_angles(torch.arange(5, device=DEVICE).expand(2, -1), 4)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.jrt.split_rotated.default, (qkv, *angles, 2), test_utils=checks)


@kernels
def test_compiled_training_takes_the_kernel_without_a_graph_break():
    qkv = torch.randn(2, 5, 36, device=DEVICE, requires_grad=True)
    angles = rotary_angles(torch.arange(5, device=DEVICE).expand(2, -1), 4)
    operators = []

    def counted(graph, inputs):
        operators.extend(node.target for node in graph.graph.nodes)
        return graph

    found = torch.compile(split_rotated, fullgraph=True, backend=counted)(qkv, *angles, 2)
    torch.testing.assert_close(found, rotary_pytorch.split_rotated(qkv, *angles, 2))
    assert any("split_rotated" in str(operator) for operator in operators)


@pytest.mark.gpu
def test_no_memory_is_read_before_it_is_written():
    qkv = torch.randn(2, 300, 3 * 16 * 64, device="cuda", dtype=torch.bfloat16)
    angles = rotary_angles(torch.arange(300, device="cuda").expand(2, -1), 32)
    weights = torch.randn(3, 2, 300, 16, 64, device="cuda")
    before = results(split_rotated, qkv, angles, 16, weights)
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty now returns NaN
    try:
        poisoned = results(split_rotated, qkv, angles, 16, weights)
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]
    for old, new in zip(before, poisoned, strict=True):
        assert torch.equal(old, new)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_kernels_in_the_interpreter():
    """Triton looks for its interpreter once: a process of its own."""
    pass_in_the_interpreter(__file__)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.zeros(2, 7, 25)}, r"expected \(B, T, 3 H D\) for H = 2 heads"),
        ({"heads": 0}, "for H = 0 heads"),
        ({"cos": torch.zeros(2, 7, 1, 1)}, r"cos and sin have shapes .* expected \(B, T, 1, R\) = \(2, 7, 1\)"),
        ({"cos": torch.zeros(1, 7, 1, 2), "sin": torch.zeros(1, 7, 1, 2)}, r"\(2, 7, 1\) and R at most D / 2 = 2.0"),
        ({"sin": None}, "sin is a NoneType; expected a tensor"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    """The kernel would read memory that is not the angles'."""
    angles = torch.zeros(2, 7, 1, 2)
    with pytest.raises(ValueError, match=message):
        split_rotated(**{"qkv": torch.zeros(2, 7, 24), "cos": angles, "sin": angles, "heads": 2} | changes)
