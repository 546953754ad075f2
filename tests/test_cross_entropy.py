"""The cross-entropy of a projection, with gradients computed in the forward pass: the kernel against fp64."""

import pytest
import torch
import torch.nn.functional as F
from interpreter import INTERPRETED, pass_in_the_interpreter

from jrt.ops import cross_entropy, linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# In the interpreter these run within `test_kernels_in_the_interpreter`.
kernels = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or the interpreter")
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]


def plain(hidden, head, labels, weights):
    losses = F.cross_entropy(F.linear(hidden, head).to(torch.promote_types(hidden.dtype, torch.float32)), labels,
                             reduction="none")  # fmt: skip
    return (losses if weights is None else losses * weights.to(losses.dtype)).sum()


def loss_and_gradients(function, inputs, dtype, labels, weights):
    hidden, head = (x.to(dtype).detach().requires_grad_() for x in inputs)
    loss = function(hidden, head, labels, weights)
    (3 * loss).backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "head": head.grad}


def error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("places", "rows"), [(1, 7), (21, 130), (16, 5000)])
def test_the_error_is_at_most_twice_that_of_eager_in_the_same_dtype(monkeypatch, dtype, weighted, places, rows):
    """In parts of 8 places, with places that do not count."""
    monkeypatch.setattr(cross_entropy, "PLACES", 8)
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, 16, generator=draw).to(DEVICE, dtype).double() for n in (places, rows)]
    labels = torch.randint(0, rows, (places,), generator=draw)
    labels[1::3] = -100
    weights = torch.rand(places, generator=draw).to(DEVICE) if weighted else None
    cases = [(plain, torch.float64), (plain, dtype), (linear_cross_entropy, dtype)]
    truth, eager, found = (loss_and_gradients(f, inputs, d, labels.to(DEVICE), weights) for f, d in cases)
    for name, value in truth.items():
        assert found[name].dtype == eager[name].dtype and found[name].shape == value.shape
        assert error(found[name], value) <= 2 * error(eager[name], value) + 1e-6, name


@kernels
def test_large_logits_and_places_that_do_not_count():
    hidden = torch.tensor([[100.0], [-100.0], [0.0]], device=DEVICE, requires_grad=True)
    head = torch.tensor([[1.0], [-1.0], [100.0]], device=DEVICE, requires_grad=True)
    labels = torch.tensor([0, 1, -100], device=DEVICE)
    loss = linear_cross_entropy(hidden, head, labels)
    loss.backward()
    expected = F.cross_entropy(hidden @ head.mT, labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert hidden.grad[2] == 0 and hidden.grad.isfinite().all() and head.grad.isfinite().all()


@kernels
def test_no_places_have_no_loss():
    hidden, head = (torch.zeros(n, 4, device=DEVICE, requires_grad=True) for n in (0, 9))
    loss = linear_cross_entropy(hidden, head, torch.zeros(0, dtype=torch.long, device=DEVICE))
    loss.backward()
    assert loss == 0 and not head.grad.any() and hidden.grad.shape == (0, 4)


@kernels
def test_the_operator_obeys_pytorch():
    hidden, head = (torch.randn(n, 4, device=DEVICE, requires_grad=True) for n in (6, 9))
    labels = torch.arange(6, device=DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = torch.ops.jrt.linear_cross_entropy.default
    torch.library.opcheck(operator, (hidden, head, labels, None, -100), test_utils=checks)


@pytest.mark.gpu
def test_results_repeat_and_autocast_is_obeyed():
    hidden, head = (torch.randn(n, 64, device="cuda", requires_grad=True) for n in (300, 1000))
    labels = torch.randint(0, 1000, (300,), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found = [torch.autograd.grad(linear_cross_entropy(hidden, head, labels), (hidden, head)) for _ in range(2)]
    narrow = loss_and_gradients(linear_cross_entropy, [hidden, head], torch.bfloat16, labels, None)
    for first, second, name in zip(*found, ("hidden", "head"), strict=True):
        assert torch.equal(first, second) and first.dtype == torch.float32
        torch.testing.assert_close(first, narrow[name].float() / 3, rtol=0.02, atol=0.02)


def test_fp64_is_refused():
    hidden = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected hidden in bfloat16, float16 or float32, got torch\.float64"):
        linear_cross_entropy(hidden, hidden, torch.zeros(2, dtype=torch.long))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_kernels_in_the_interpreter():
    """Triton looks for its interpreter once: a process of its own."""
    pass_in_the_interpreter(__file__)
