"""Triton kernels of the synthetic tasks against the same functions in PyTorch and fp64.

Without a GPU they run in Triton's interpreter."""

import math

import pytest
import torch
from interpreter import INTERPRETED, pass_in_the_interpreter
from torch import Tensor, nn

from synthetics.convolution import gated_convolution
from synthetics.optimizer import BETAS, EPS, LARGEST_NORM, WEIGHT_DECAY, StackedAdamW
from synthetics.residual import add_and_norm
from synthetics.runs import METHODS, Run
from synthetics.tasks import TASKS
from synthetics.taylor import taylor_attention, weighted_sums
from synthetics.training import Training

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter multiplies no matrices in bf16
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of the relative error

kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="run by test_the_kernels_run_in_the_interpreter"
)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run in this process")
def test_the_kernels_run_in_the_interpreter():
    pass_in_the_interpreter(__file__)


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    random = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(DEVICE, dtype)


def of_a_table(*weights: Tensor) -> list[Tensor]:
    """The same weights (M, ...) as views of one table (M, P), which `StackedAdamW` makes of them."""
    table = torch.cat([each.flatten(1) for each in weights], dim=1)
    columns = table.split([each[0].numel() for each in weights], dim=1)
    return [part.unflatten(1, each.shape[1:]) for part, each in zip(columns, weights, strict=True)]


def check(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape
    assert not found.isnan().any()
    difference = torch.linalg.vector_norm(found.double().cpu() - expected)
    assert difference <= BOUND[dtype] * torch.linalg.vector_norm(expected)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])


@kernels
@dtypes
@pytest.mark.parametrize("prefixed", [False, True], ids=["causal", "prefix"])
@pytest.mark.parametrize(("length", "keys", "values"), [(1, 4, 18), (23, 24, 32), (70, 16, 8)])
def test_attention(length, keys, values, prefixed, dtype):
    from synthetics import taylor_kernels

    heads = 2
    columns = heads * (2 * keys + values) + (heads * (keys + values) if prefixed else 0)
    x, do = draw((2, length, columns), (2, length, heads * values))
    x[..., : heads * keys] *= keys**-0.5
    x = x.to(dtype).double().requires_grad_()
    expected = taylor_attention(x, heads, keys, values)
    o, denominator = taylor_kernels.forward(cast(x, dtype), heads, keys, values)
    check(o, expected.detach(), dtype)
    dx = taylor_kernels.backward(cast(x, dtype), o, denominator, cast(do, dtype), heads, keys, values)
    check(dx, torch.autograd.grad(expected, x, do)[0], dtype)


@kernels
@dtypes
@pytest.mark.parametrize(("queries", "length", "width"), [(1, 1, 36), (2, 70, 36), (4, 33, 128), (16, 40, 64)])
def test_sums_for_a_few_queries(queries, length, width, dtype):
    from synthetics import asked_kernels

    q, x, dsums, dtotals = draw((3, queries, width), (3, length, width), (3, queries, width), (3, queries))
    q, x = ((each * size).to(dtype).double().requires_grad_() for each, size in ((q, width**-0.5), (x, 1)))
    last = torch.arange(3 * queries).view(3, queries) * 7 % length
    expected = weighted_sums(q, x, last)
    found = asked_kernels.forward(cast(q, dtype), cast(x, dtype), last.to(DEVICE))
    gradients = torch.autograd.grad(expected, (q, x), (dsums, dtotals))
    ours = asked_kernels.backward(
        cast(q, dtype), cast(x, dtype), last.to(DEVICE), cast(dsums, dtype), cast(dtotals, torch.float32)
    )
    for own, their in zip((*found, *ours), (*expected, *gradients), strict=True):
        check(own, their.detach(), dtype)


@kernels
@dtypes
@pytest.mark.parametrize(("rows", "length", "width", "taps"), [(2, 40, 36, 3), (1, 5, 128, 3), (3, 2, 64, 4)])
def test_gated_convolution(rows, length, width, taps, dtype, monkeypatch):
    from synthetics import convolution_kernels

    models = 2
    monkeypatch.setattr(convolution_kernels, "PROGRAMS", 4)  # so that one sums over several tiles
    shapes = ((models * rows, length, 2 * width), (models, 2 * width), (models, width, taps), (models, width))
    u, bias, filters, filter_bias, dy = draw(*shapes, (models * rows, length, width))
    u = u.to(dtype).double()
    inputs = [each.requires_grad_() for each in (u, bias, filters, filter_bias)]
    expected = gated_convolution(*inputs)
    ours = cast(u, dtype), *of_a_table(*(cast(each, torch.float32) for each in inputs[1:]))
    check(convolution_kernels.forward(*ours), expected.detach(), dtype)
    gradients = torch.autograd.grad(expected, inputs, dy)
    for own, their in zip(convolution_kernels.backward(cast(dy, dtype), *ours), gradients, strict=True):
        check(own, their, dtype)


@kernels
@dtypes
@pytest.mark.parametrize("adds", ["", "y", "y and bias"])
@pytest.mark.parametrize(("tokens", "width"), [(150, 36), (5, 128)])
def test_residual_and_norm(tokens, width, adds, dtype, monkeypatch):
    from synthetics import residual_kernels

    models = 2
    monkeypatch.setattr(residual_kernels, "PROGRAMS", 4)
    x, y, dtotal, dnormed, bias, weight = draw(*[(models, tokens, width)] * 4, *[(models, width)] * 2)
    y = y.to(dtype).double()
    inputs = [x, y if "y" in adds else None, bias if "bias" in adds else None, weight]
    given = [each.requires_grad_() for each in inputs if each is not None]
    expected = add_and_norm(*inputs, 1e-5, torch.float64)
    kinds = (torch.float32, dtype, torch.float32, torch.float32)
    ours = [None if each is None else cast(each, kind) for each, kind in zip(inputs, kinds, strict=True)]
    filled = of_a_table(*(each for each in ours[2:] if each is not None), cast(bias, torch.float32))
    ours[2:] = [None, filled[0]] if ours[2] is None else filled[:2]
    total, normed = residual_kernels.forward(*ours, 1e-5, dtype)
    check(total, expected[0].detach(), torch.float32)
    check(normed, expected[1].detach(), dtype)
    found = residual_kernels.backward(
        cast(dtotal, torch.float32), cast(dnormed, dtype), total, ours[3], 1e-5, adds=bool(adds)
    )
    gradients = iter(torch.autograd.grad(expected, given, (dtotal, dnormed)))
    for own, input_ in zip(found, inputs, strict=True):
        if input_ is not None:
            check(own, next(gradients), dtype)


@kernels
def test_steps_of_adamw_are_those_without_kernels(monkeypatch):
    from synthetics import optimizer_kernels

    monkeypatch.setattr(optimizer_kernels, "PARTS", 2)
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(3, 3000))
    optimizer = StackedAdamW(module, [1e-2, 3e-2, 1e-1])
    tables = [each.float() for each in draw(*[(3, 3000)] * 4)]
    tables[2].abs_()  # second moments
    tables[3] *= torch.tensor([1e-4, 1e-2, 1.0])[:, None]  # gradients, of which the last are clipped
    own = (optimizer.weights, optimizer.first, optimizer.second)
    for table, values in zip(own, tables, strict=False):
        table.copy_(values)
    module.weight.grad = tables[3].clone()
    optimizer.factor.fill_(0.7)
    optimizer.steps.fill_(3)
    found = [each.to(DEVICE) for each in tables]
    optimizer.step()
    scalars = (each.to(DEVICE) for each in (optimizer.peak, optimizer.factor, optimizer.steps))
    optimizer_kernels.step(*found, *scalars, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, largest_norm=LARGEST_NORM)
    assert math.isclose(float(optimizer.steps), 4)
    for ours, theirs in zip(found, own, strict=False):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["causal", "prefix", "window", "mamba"])
def test_a_model_in_a_stack_is_trained_as_it_is_alone(method):
    device, different = torch.device("cuda"), ((1e-3, 1), (3e-3, 2), (1e-3, 3))  # rates and seeds
    runs = [Run(METHODS[method], TASKS["debug"], 16, 4, rate, seed, batch=16) for rate, seed in different]
    trainings = [Training(runs, device), *(Training([run], device) for run in runs)]
    starts = [each.optimizer.weights.clone() for each in trainings]
    for training in trainings:
        for segment, part in list(training.order())[:20]:
            training.steps(training.step, *segment.batch(training.places, part))
    together, *alone = (each.optimizer.weights - start for each, start in zip(trainings, starts, strict=True))
    for own, its in zip(together, alone, strict=True):
        assert torch.linalg.vector_norm(own - its[0]) < 0.05 * torch.linalg.vector_norm(its)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["causal", "prefix"])
def test_recorded_steps_change_weights_as_launched_ones_do(method):
    device, different = torch.device("cuda"), ((4, 1e-3), (2, 3e-3))  # feature sizes and rates
    runs = [Run(METHODS[method], TASKS["debug"], 16, size, rate, 1, batch=16) for size, rate in different]
    recorded, launched = Training(runs, device), Training(runs, device)
    start = launched.optimizer.weights.clone()
    for segment, part in list(launched.order())[:10]:
        batch = segment.batch(launched.places, part)
        recorded.steps(recorded.step, *batch)
        launched.step(*batch)
    assert recorded.steps.graphs
    change = torch.linalg.vector_norm(launched.optimizer.weights - start)
    assert torch.linalg.vector_norm(recorded.optimizer.weights - launched.optimizer.weights) < 0.05 * change
    assert all(0 <= mean <= 1 for mean in recorded.test_accuracy()[0].values())
