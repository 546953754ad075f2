"""The synthetic recall tasks: examples, readings, stacks of models, training, sweeps, folders, tables and figures."""

import argparse
import csv
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from jrt import mixers
from jrt.mixers.linear_attention import LinearAttention
from jrt.ops import encode_prefix, linear_attention
from jrt.system.locks import only_writer
from synthetics import __main__ as command
from synthetics import equal_state, folder, measure, plot, readings, summary, sweeps
from synthetics.data import IGNORED, PREFIX, SEPARATE_ANSWER, SEPARATE_LISTS, draw_unseen, fingerprints, generator
from synthetics.mqar import MQAR, draw_pairs
from synthetics.optimizer import StackedAdamW
from synthetics.permutations import draw_distinct
from synthetics.released import disjoint_sets
from synthetics.runs import METHODS, Method, Run, groups
from synthetics.set_disjointness import SetDisjointness, draw_pair
from synthetics.stack import Stack
from synthetics.summary import PANELS, Estimate, summarize
from synthetics.tasks import TASKS
from synthetics.taylor import taylor_attention
from synthetics.training import Training, train

CPU = torch.device("cpu")
DEBUG = TASKS["debug"]
TINY = SetDisjointness("tiny", 32, ((1, 3), (3, 1)), 64, ((1, 3), (3, 1), (2, 4)), 32)


# ---- Data


def test_released_generator_draws_the_released_examples(shared):
    cases = json.loads((shared / "golden" / "synthetic.json").read_text())["cases"]
    tensors = load_file(shared / "golden" / "synthetic.safetensors")
    for index, case in enumerate(cases):
        inputs, labels = disjoint_sets(
            case["vocab_size"], case["num_examples"], case["short_length"], case["long_length"], case["seed"]
        )
        assert torch.equal(inputs, tensors[f"data{index}.inputs"])
        assert torch.equal(labels, tensors[f"data{index}.labels"])


def released(vocab_size: int, count: int, first: int, second: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = disjoint_sets(vocab_size, count, first, second, seed=3)
    assert (labels[:, :-1] == IGNORED).all()
    return inputs, labels[:, -1]


def vectorised(vocab_size: int, count: int, first: int, second: int) -> tuple[torch.Tensor, torch.Tensor]:
    examples = draw_pair(vocab_size, count, (first, second), generator(3))
    return readings.once(examples), examples.answers[:, 0]


@pytest.mark.parametrize("draw", [released, vectorised])
@pytest.mark.parametrize(("first", "second"), [(4, 16), (16, 4), (1, 28)])
def test_two_lists_share_exactly_the_answer(draw, first, second):
    inputs, answers = draw(64, 50, first, second)
    assert inputs.shape == (50, first + second + 3)
    assert (inputs[:, 0] == PREFIX).all() and (inputs[:, 1 + first] == SEPARATE_LISTS).all()
    assert (inputs[:, -1] == SEPARATE_ANSWER).all()
    for row, answer in zip(inputs.tolist(), answers.tolist(), strict=True):
        own, other = row[1 : 1 + first], row[2 + first : -1]
        assert len(set(own)) == first and len(set(other)) == second and min(own + other) > 3
        assert set(own) & set(other) == {answer}


@pytest.mark.parametrize("draw", [released, vectorised])
def test_shared_tokens_and_their_places_are_uniform(draw):
    inputs, answers = draw(32, 4000, 3, 5)
    first = (inputs[:, 1:4] == answers[:, None]).nonzero()[:, 1].bincount(minlength=3)
    second = (inputs[:, 5:10] == answers[:, None]).nonzero()[:, 1].bincount(minlength=5)
    tokens = answers.bincount(minlength=32)[4:]
    elsewhere = inputs[:, 1].bincount(minlength=32)[4:]
    for counts in (first, second, tokens, elsewhere):
        assert chi_square(counts) < 2.5  # a uniform draw exceeds this once in 10,000 times or less (27 degrees)


def chi_square(counts: torch.Tensor) -> float:
    """Per degree of freedom: about 1 for a uniform draw."""
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum() / (len(counts) - 1))


@pytest.mark.parametrize("pair", [(2, 5), (5, 2), (1, 1)])
def test_a_separator_behind_both_lists_changes_nothing_else(pair):
    task = replace(DEBUG, train=(pair,), test=(pair,), train_examples=9, test_examples=3)
    for usual, moved in zip(*(each.draw(1).train for each in (task, replace(task, separator_last=True))), strict=True):
        first, second = pair
        lists = torch.cat([usual.context[:, 1 : 1 + first], usual.context[:, 2 + first :]], dim=1)
        assert torch.equal(moved.context[:, 1:-1], lists) and (moved.context[:, 0] == PREFIX).all()
        assert (moved.context[:, -1] == SEPARATE_LISTS).all() and torch.equal(moved.answers, usual.answers)
        other = readings.other_order(moved)
        assert torch.equal(other[:, 1 : 1 + second], lists[:, first:])
        assert torch.equal(other[:, 1 + second : 1 + first + second], lists[:, :first])
        assert torch.equal(other[:, -2:], readings.once(moved)[:, -2:])


@pytest.mark.parametrize(("count", "choices"), [(5, 5), (3, 4), (5, 28), (30, 127), (30, 129), (40, 300), (40, 2044)])
def test_distinct_numbers_are_distinct_and_uniform(count, choices):
    drawn = draw_distinct(20_000, count, 10, 10 + choices, generator(1))
    assert drawn.min() >= 10 and drawn.max() < 10 + choices
    ordered = drawn.sort(1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    for column in (0, count - 1):
        assert chi_square((drawn[:, column] - 10).bincount(minlength=choices)) < 2.5
    steps = ((drawn[:, 1] - drawn[:, 0]) % choices).bincount(minlength=choices)[1:]  # neighbours are independent
    assert chi_square(steps) < 2.5


def test_distinct_numbers_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="5 distinct numbers of 4: expected at most 4"):
        draw_distinct(2, 5, 0, 4, generator(1))


@pytest.mark.parametrize("task", [DEBUG, TASKS["mqar-debug"]], ids=lambda task: task.name)
def test_a_seed_decides_everything_and_no_test_example_is_trained_on(task):
    split, again, other = task.draw(1), task.draw(1), task.draw(2)
    three = ((*each.train, *each.test) for each in (split, again, other))
    for own, same, different in zip(*three, strict=True):
        assert torch.equal(fingerprints(own), fingerprints(same))
        assert not torch.equal(fingerprints(own), fingerprints(different))
    trained = torch.cat([fingerprints(each) for each in split.train])
    assert not any(torch.isin(fingerprints(each), trained).any() for each in split.test)
    assert {len(each) for each in split.train} == {task.train_examples}
    assert {len(each) for each in split.test} == {task.test_examples}


def test_examples_that_were_seen_are_drawn_again():
    def draw(count, random):
        return draw_pair(16, count, (1, 1), random)  # one token of 12, twice: 12 examples in all

    examples = draw(500, generator(1))
    some = examples.rows(examples.answers[:, 0] > 4)
    unseen = draw_unseen(draw, 50, generator(2), fingerprints(some))
    assert unseen.answers.unique().tolist() == [4] and (unseen.context[:, 1] == 4).all()
    with pytest.raises(ValueError, match="1_1: training holds nearly all examples"):
        draw_unseen(draw, 50, generator(2), fingerprints(examples))


def test_every_key_of_mqar_is_asked_for_once_and_answered_by_its_value():
    examples = draw_pairs(64, 40, 5, 12, generator(4))
    assert examples.context.shape == (40, 11) and examples.question.shape == (40, 12)
    for row in range(40):
        pairs = dict(examples.context[row, 1:].view(5, 2).tolist())
        assert len(pairs) == 5 and max(pairs) < 32 <= min(pairs.values())
        question, asked = examples.question[row], examples.asked[row]
        assert [pairs[key] for key in question[asked].tolist()] == examples.answers[row].tolist()
        rest = torch.ones(12, dtype=torch.bool)
        rest[asked] = False
        assert rest.sum() == 7 and (question[rest] >= 32).all()


def test_readings_of_any_task():
    lists = draw_pair(64, 1, (2, 3), generator(5))
    _, a1, a2, sep, b1, b2, b3 = lists.context[0].tolist()
    context, swapped = [PREFIX, a1, a2, sep, b1, b2, b3], [PREFIX, b1, b2, b3, sep, a1, a2]
    question = [SEPARATE_ANSWER]
    expected = {
        "once": context + question,
        "twice": context + context + question,
        "both-orders": context + swapped + question,
        "other-order": swapped + question,
        "question-first": question + context + question,
    }
    assert {name: reading(lists)[0].tolist() for name, reading in readings.READINGS.items()} == expected
    pairs = draw_pairs(64, 1, 2, 3, generator(5))
    _, k1, v1, k2, v2 = pairs.context[0].tolist()
    question = pairs.question[0].tolist()
    assert readings.other_order(pairs)[0].tolist() == [PREFIX, k2, v2, k1, v1, *question]
    assert readings.question_first(pairs)[0].tolist() == question + pairs.context[0].tolist() + question


# ---- Stacks of models


@pytest.mark.parametrize("prefixed", [False, True])
def test_attention_by_scores_is_that_of_the_ops(prefixed):
    random = torch.Generator().manual_seed(0)
    q, k, k_enc = (torch.randn(2, 9, 3, 4, generator=random, dtype=torch.float64) for _ in range(3))
    v, v_enc = (torch.randn(2, 9, 3, 5, generator=random, dtype=torch.float64) for _ in range(2))
    inputs = [x.requires_grad_() for x in (q, k, v, k_enc, v_enc)][: 5 if prefixed else 3]
    state = encode_prefix(k_enc, v_enc, backend="reference") if prefixed else None
    expected, _ = linear_attention(q, k, v, initial_state=state, backend="reference")
    side_by_side = torch.cat([each.flatten(2) for each in (q * 0.5, *inputs[1:])], dim=2)
    found = taylor_attention(side_by_side, heads=3, keys=4, values=5).view_as(expected)
    torch.testing.assert_close(found, expected)
    direction = torch.randn(expected.shape, generator=random, dtype=torch.float64)
    gradients = (torch.autograd.grad(each, inputs, direction, retain_graph=True) for each in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def trained_alone(run: Run, batches: list, rate: float, dtype: torch.dtype) -> nn.Module:
    """jrt's model with PyTorch's optimizer and clipping, step by step."""
    model = run.model().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    for tokens, asked, answers in batches:
        hidden, _ = model.read(tokens)
        logits = model.head(hidden.take_along_dim(asked[..., None], dim=1))
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


STACKED = {  # task and steps
    "causal": (TINY, 50),
    "twice": (TINY, 50),
    "prefix": (TINY, 50),
    "attention": (TINY, 20),
    "based": (TASKS["mqar-debug"], 10),
    "mamba": (TINY, 5),
}


@pytest.mark.parametrize("method", STACKED)
def test_a_model_in_a_stack_equals_itself_trained_alone(method):
    task, steps = STACKED[method]
    different = ((4, 1e-4, 1), (4, 5e-4, 2), (3, 8e-4, 1))  # feature sizes, rates and seeds
    runs = [Run(METHODS[method], task, 16, features, rate, seed, batch=8) for features, rate, seed in different]
    training = Training(runs, CPU)
    order = (list(training.order()) * 50)[:steps]
    for segment, part in order:
        training.step(*segment.batch(training.places, part))
    segment = training.test[-1]
    tokens, asked, _ = segment.batch(training.places, slice(0, 8))
    with torch.no_grad():
        together = training.model(tokens, asked).unflatten(0, (3, -1))
    for index, run in enumerate(runs):
        place = training.places[index : index + 1]
        alone = trained_alone(run, [each.batch(place, part) for each, part in order], run.rate, torch.float32)
        tokens, asked, _ = segment.batch(place, slice(0, 8))
        with torch.no_grad():
            hidden, _ = alone.read(tokens)
            logits = alone.head(hidden.take_along_dim(asked[..., None], dim=1))
        torch.testing.assert_close(together[index], logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(training.model.embedding.weight[index], alone.embedding.weight, rtol=0, atol=1e-4)


class Negative(LinearAttention):
    """An own mixer that is a known one with another result."""

    def forward(self, x, batch, state):
        y, state = super().forward(x, batch, state)
        return -3 * y, state


class RandomGate(torch.nn.Module):
    """An own mixer with a buffer that differs between models, and without weights."""

    def __init__(self, config, layer):
        super().__init__()
        self.register_buffer("gate", torch.randn(config.width))

    def forward(self, x, batch, state):
        return x.cumsum(1) * self.gate, x[:, -1]


@pytest.mark.parametrize("mixer", [Negative, RandomGate])
def test_a_mixer_of_ones_own_is_itself_in_a_stack(mixer, monkeypatch):
    monkeypatch.setitem(mixers.MIXERS, "N", mixer)
    monkeypatch.setitem(mixers.LETTERS, "N", "own")
    runs = [Run(Method("own", "CN"), TINY, 16, 4, 1e-3, seed) for seed in (1, 2, 3)]
    training = Training(runs, CPU)
    alone = [block.mixer for block in (each.blocks[1] for each in (run.model() for run in runs))]
    if mixer is RandomGate:
        alone = training.model.blocks[1].mixer.copies
        assert len({float(each.gate[0]) for each in alone}) == 3
    x = torch.randn(6, 5, 16)
    batch = training.model.template[0].token_batch(torch.zeros(6, 5, dtype=torch.int64), None, None, None)
    found, _ = training.model.blocks[1].mixer(x, batch, None)
    for index, each in enumerate(alone):
        torch.testing.assert_close(found[2 * index : 2 * index + 2], each(x[2 * index : 2 * index + 2], batch, None)[0])
    training.keep([0, 2])
    found, _ = training.model.blocks[1].mixer(x[:4], batch, None)
    torch.testing.assert_close(found[2:], alone[2](x[2:4], batch, None)[0])
    assert len(groups([*runs, replace(runs[0], feature_dim=8)])) == 2  # its weights may depend on the size


def test_runs_of_several_shapes_are_refused():
    runs = [Run(METHODS["causal"], TINY, width, 4, 1e-3, 1) for width in (8, 16)]
    with pytest.raises(ValueError, match=r"divide them by synthetics\.runs\.groups"):
        Training(runs, CPU)


def test_results_are_added_by_one_process_at_a_time(tmp_path, monkeypatch):
    runs = [Run(METHODS["causal"], TINY, 8, 2, 1e-3, seed) for seed in (1, 2)]
    ours = folder.Folder(tmp_path / "out", "mine", runs, resume=False)
    monkeypatch.setattr(folder, "PATIENCE", 0.2)
    with only_writer(tmp_path / "out", 0), pytest.raises(ValueError, match="another process is writing to"):
        ours.add([])
    ours.rows = {"lost": {name: {"1_4": 1.0} if name == "accuracy" else 0 for name in folder.NEEDED} | {"run": "lost"}}
    ours.add([])  # a row that another process has overwritten comes back
    assert [row["run"] for row in folder.read(tmp_path / "out")["rows"]] == ["lost"]


def test_optimizer_is_adamw_with_clipping_for_each_model_also_at_large_rates():
    rates, random = (1e-2, 3e-2, 1e-1), torch.Generator().manual_seed(0)
    method = Method("linear attention alone", "LL")
    runs = [Run(method, TINY, 8, 2, rate, seed) for rate, seed in zip(rates, (1, 2, 3), strict=True)]
    model = Stack([run.model().double() for run in runs], torch.float64)
    alone = [run.model().double() for run in runs]
    ours = StackedAdamW(model, list(rates))
    theirs = [
        torch.optim.AdamW(each.parameters(), lr=rate, weight_decay=0.1) for each, rate in zip(alone, rates, strict=True)
    ]
    for step in range(5):
        ours.factor.fill_(1 - step / 5)
        for parameter, *copies in zip(model.parameters(), *(each.parameters() for each in alone), strict=True):
            gradient = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            gradient *= torch.tensor([1e-4, 1e-2, 1.0]).view(3, *[1] * (gradient.ndim - 1))  # the last are clipped
            parameter.grad = gradient.clone()
            for copy, own in zip(copies, gradient, strict=True):
                copy.grad = own.clone()
        ours.step()
        for each, optimizer, rate in zip(alone, theirs, rates, strict=True):
            torch.nn.utils.clip_grad_norm_(each.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = rate * (1 - step / 5)
            optimizer.step()
    for parameter, *copies in zip(model.parameters(), *(each.parameters() for each in alone), strict=True):
        torch.testing.assert_close(parameter, torch.stack(copies))
        assert parameter.grad is None


def test_models_that_leave_a_stack_change_nothing_for_the_others():
    different = ((4, 1e-3, 1), (2, 5e-3, 2))  # feature sizes, rates and seeds
    runs = [Run(METHODS["prefix"], TINY, 8, size, rate, seed, epochs=4, batch=16) for size, rate, seed in different]
    both, one = Training(runs, CPU), Training(runs[1:], CPU)
    for training in (both, one):
        training.epoch()
    both.keep([1])
    assert both.runs == runs[1:]
    for training in (both, one):
        training.epoch()
    tokens, asked, _ = one.test[0].batch(one.places, slice(0, 16))
    torch.testing.assert_close(both.model(tokens, asked), one.model(tokens, asked), rtol=0, atol=1e-5)
    assert both.accuracy == one.accuracy


def test_only_prefix_readers_know_the_second_list_while_they_read_the_first():
    tokens = readings.once(draw_pair(32, 1, (4, 6), generator(0)))
    changed = tokens.clone()
    changed[0, -2] = 31 if tokens[0, -2] != 31 else 30
    for name in ("causal", "prefix"):
        model = Run(METHODS[name], DEBUG, 8, 2, 1e-3, 1).model()
        first, second = (model.read(each)[0][:, :5] for each in (tokens, changed))
        assert torch.equal(first, second) == (name == "causal")


# ---- Training


def test_a_model_learns_what_one_token_lists_ask():
    task = SetDisjointness("easy", 32, ((1, 4),), 512, ((1, 4),), 64)
    training = Training([Run(METHODS["causal"], task, 16, 4, rate, 1, 20, batch=32) for rate in (1e-9, 1e-2)], CPU)
    for _ in range(20):
        untrained, trained = training.epoch()
    assert untrained < 0.2 and trained > 0.9  # by chance 1 in 28


def test_training_ends_for_each_model_at_99_percent(monkeypatch):
    runs = [Run(METHODS["causal"], TINY, 8, 2, 1e-3, seed, epochs=3, batch=32) for seed in (1, 2)]
    solved = dict.fromkeys(("1_3", "3_1", "2_4"), 1.0)
    poor = dict.fromkeys(solved, 0.5)
    monkeypatch.setattr(Training, "test_accuracy", lambda self: [solved if r.seed == 2 else poor for r in self.runs])
    rows = train(runs, CPU, None, None)
    assert [row["epochs_read"] for row in rows] == [3, 1]
    for row in rows:
        assert len(row["curve"]) == row["epochs_read"]
        assert row["curve"][-1] == pytest.approx(sum(row["accuracy"].values()) / len(row["accuracy"]), abs=2e-4)
    assert [row["run"] for row in rows] == [run.name for run in runs]


def test_a_stopped_group_goes_on_as_if_nothing_had_happened(tmp_path):
    runs = [Run(METHODS["prefix"], TINY, 8, 2, rate, 1, epochs=3, batch=32) for rate in (1e-3, 1e-2)]
    whole = train(runs, CPU, tmp_path / "whole.pt", None)
    over = time.monotonic() - 1  # each call does one epoch
    assert train(runs, CPU, tmp_path / "parts.pt", over) is None
    assert train(runs, CPU, tmp_path / "parts.pt", over) is None
    parts = train(runs, CPU, tmp_path / "parts.pt", over)
    for row in (*whole, *parts):
        assert row.pop("seconds") >= 0
    assert parts == whole
    states = [
        torch.load(tmp_path / f"{name}.pt", weights_only=True)["optimizer"]["weights"] for name in ("whole", "parts")
    ]
    assert torch.equal(*states)


def test_a_stopped_group_goes_on_after_its_largest_model_has_left(tmp_path, monkeypatch):
    runs = [Run(METHODS["prefix"], TINY, 8, size, 1e-2, 1, epochs=3, batch=32) for size in (4, 2)]
    measured = Training.test_accuracy

    def test_accuracy(self):
        solved = dict.fromkeys(("1_3", "3_1", "2_4"), 1.0)
        pairs = zip(measured(self), self.runs, strict=True)
        return [solved if run.feature_dim == 4 else found for found, run in pairs]

    monkeypatch.setattr(Training, "test_accuracy", test_accuracy)
    whole, rows = train(runs, CPU, None, None), None
    while rows is None:  # each call does one epoch
        rows = train(runs, CPU, tmp_path / "parts.pt", time.monotonic() - 1)
    for row in (*whole, *rows):
        assert row.pop("seconds") >= 0
    assert [row["epochs_read"] for row in whole] == [1, 3] and rows == whole


def test_states_are_counted_on_the_models():
    for name in ("causal", "prefix", "mamba", "attention", "window"):
        run = Run(METHODS[name], DEBUG, 8, 2, 1e-3, 1, window=3)
        assert run.state_bytes(9) == run.config.state_bytes(9), name


@pytest.mark.parametrize(("reads", "tokens"), [("once", 8), ("twice", 8 + 8), ("question-first", 1 + 8)])
def test_a_cache_of_keys_and_values_grows_with_what_is_read(reads, tokens):
    """TINY's longest example has 8 tokens of context and one of question; the last token needs no place in the cache."""
    run = Run(Method("mine", "AA", reads), TINY, 8, 2, 1e-3, 1, epochs=1)
    (row,) = train([run], CPU, None, None)
    assert row["state_bytes"] == 2 * tokens * 2 * 8 * 4  # layers, tokens, keys and values, width, fp32


# ---- Sweeps and folders


def test_every_run_of_every_sweep_can_be_built():
    for name, runs in sweeps.SWEEPS.items():
        folder.check(name, runs)
    assert len([run for run in sweeps.figure2 if run.method.name in ("causal", "prefix")]) == 360
    sizes = [len(group) for group in groups(sweeps.figure2)]  # rates, seeds and small feature sizes share a stack
    assert sorted(sizes) == [9] * 12 + [27] * 12
    assert {run.method.pattern for run in sweeps.mqar_frontier} == {"CLCL", "CPCP", "CLCS", "CSCS", "CACA", "MM"}
    paper = TASKS["paper"]
    assert len(paper.train) == 12 and len(paper.test) == 20 and paper.longest == 787


def test_the_readme_counts_the_models_of_each_sweep():
    text = (Path(__file__).resolve().parent.parent / "synthetics" / "README.md").read_text()
    for name in ("figure2_causes", "depth", "figure2_small", "mqar_frontier", "reading_order", "state_size"):
        assert f"| `{name}` | {len(sweeps.SWEEPS[name])} |" in text
    assert "| `figure2` | 360, and 72 that read twice |" in text and len(sweeps.figure2) == 360 + 72


BAD = {
    "lists of 15 and 2 tokens cannot share one token of 16 ids: expected 1 to 8": replace(
        TINY, vocab_size=16, train=((15, 2),)
    ),
    "lists of 0 and 4 tokens cannot share": replace(TINY, test=((0, 4),)),
    "40 pairs of key and value of 64 ids: expected 1 to 28": MQAR("m", 64, (40,), 8, (2,), 8),
}


@pytest.mark.parametrize("message", BAD)
def test_impossible_tasks_are_refused_before_anything_is_written(message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        folder.Folder(tmp_path / "out", "mine", [Run(METHODS["causal"], BAD[message], 8, 2, 1e-3, 1)], resume=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "mine is an empty sweep: expected at least one run"),
        ([Run(METHODS["causal"], TINY, 9, 2, 1e-3, 1)], "width 9 is not a multiple of linear_heads 2"),
        (
            [Run(METHODS["causal"], TINY, 8, 2, 1e-3, 1, epochs=0)],
            "epochs of a run is 0: expected a whole number of at least 1",
        ),
        ([Run(METHODS["causal"], TINY, 8, 2, 1e-3, 1)] * 2, "mine has one run twice"),
        ([Run(Method("mine", "QQ"), TINY, 8, 2, 1e-3, 1)], "expected one letter per layer"),
        (
            [Run(Method("x", pattern), TINY, 8, 2, 1e-3, seed) for seed, pattern in enumerate(("CL", "CP"))],
            "mine has two methods with the name x: expected a name for each",
        ),
        (
            [Run(METHODS["causal"], replace(TINY, test_examples=n), 8, 2, 1e-3, n) for n in (8, 16)],
            "mine has two tasks with the name tiny",
        ),
    ],
)
def test_impossible_sweeps_are_refused_before_anything_is_written(runs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        folder.Folder(tmp_path / "out", "mine", runs, resume=False)
    assert not list(tmp_path.iterdir())


def test_unknown_readings_are_refused():
    with pytest.raises(ValueError, match="mine reads 'thrice': expected one of once, twice"):
        Method("mine", "CLCL", "thrice")


def test_a_sweep_in_parts_is_the_sweep_and_is_drawn(tmp_path, capsys, monkeypatch):
    out = tmp_path / "debug"
    monkeypatch.setitem(sweeps.SWEEPS, "debug", [run for run in sweeps.debug if run.rate == 1e-2])
    arguments = ["debug", "--out", str(out), "--device", "cpu", "--workers", "1"]
    assert command.main([*arguments, "--minutes", "1e-9"]) == 0
    assert "0 of 6 runs are done" in capsys.readouterr().out
    assert command.main([*arguments, "--part", "2/3"]) == 0
    assert "2 of 6 runs are done" in capsys.readouterr().out
    assert command.main([*arguments, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 runs are done" in printed
    assert all(f"| {name} | 8 | 2 | - | 608 | 0.01 | 2 |" in printed for name in ("causal", "prefix", "twice"))
    report = json.loads((out / "results.json").read_text())
    assert {"device", "versions", "commit", "date"} <= set(report["rows"][0]) and not list(out.glob("*.partial"))
    for name in ("order", "frontier", "lengths"):
        assert (out / f"{name}.png").stat().st_size > 10_000 and "<svg" in (out / f"{name}.svg").read_text()
    with (out / "summary.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [line["method"] for line in lines] == ["causal", "prefix", "twice"]
    assert float(lines[0]["difference"]) == pytest.approx(
        float(lines[0]["short list first"]) - float(lines[0]["long list first"])
    )

    assert command.main(arguments) == 2
    assert "has 6 results of this sweep: add --resume" in capsys.readouterr().err
    assert command.main([*arguments, "--resume"]) == 0
    assert json.loads((out / "results.json").read_text()) == report
    assert command.main(["mqar_debug", *arguments[1:], "--resume"]) == 2
    assert "is the folder of another sweep (debug)" in capsys.readouterr().err


def test_processes_do_what_is_missing_of_mqar(tmp_path):
    out = tmp_path / "mqar"
    done = subprocess.run(
        [sys.executable, "-m", "synthetics", "mqar_debug", "--out", out, "--device", "cpu", "--workers", "2"],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "12 of 12 runs are done" in done.stdout and "| mamba | 8 | 2 | - |" in done.stdout
    assert (out / "frontier.png").exists() and not (out / "order.png").exists()  # MQAR has no lists
    assert not list((out / "unfinished").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure3"], "unknown sweep 'figure3': expected one of figure2, figure2_causes"),
        (["debug", "--device", "tpu"], "device 'tpu': expected cpu or cuda"),
        (["debug", "--workers", "0"], "0 workers: expected at least 1"),
        (["debug", "--minutes", "0"], "--minutes 0: expected more than 0"),
        (["debug", "--part", "3"], "--part 3: expected K/N, as in 1/3"),
        (["debug", "--part", "4/3"], "--part 4/3: expected 1 <= K <= N <= 3, which is the number of groups"),
    ],
)
def test_bad_commands_get_one_line_and_write_nothing(arguments, message, tmp_path, capsys):
    assert command.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not a sweep's folder: expected an empty or a new one"):
        folder.Folder(tmp_path, "debug", sweeps.debug, resume=True)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="was not written by python -m synthetics"):
        folder.Folder(tmp_path, "debug", sweeps.debug, resume=True)
    with pytest.raises(ValueError, match="holds no results"):
        plot.draw_all(tmp_path / "nowhere")


# ---- Tables


def row(rate: float, seed: int, short: float, long: float, method: str = "causal", state_bytes: int = 608) -> dict:
    """A row of results with accuracies for the shorter and for the longer list first."""
    model = {"method": method, "state_bytes": state_bytes, "width": state_bytes, "feature_dim": 2, "window": None}
    model |= {"task": "debug", "epochs": 1, "batch": 128}
    return {**model, "rate": rate, "seed": seed, "seconds": 10, "accuracy": {"1_4": short, "4_1": long}}


def test_the_best_rate_counts_in_every_panel_and_seeds_give_the_interval():
    rows = [row(1e-3, 1, 0.9, 0.1), row(1e-3, 2, 0.7, 0.3), row(2e-3, 1, 0.6, 0.6), row(2e-3, 2, 0.6, 0.5)]
    (line,) = summarize([*rows, row(3e-3, 1, 1.0, 1.0)])  # the last rate has one seed only
    assert (line.rate, line.seeds, line.seconds) == (2e-3, 2, 50)
    assert [line.panels[panel].mean for panel in PANELS] == pytest.approx([0.6, 0.55, 0.05])
    assert line.panels["long list first"].half_width == pytest.approx(12.706 * 0.05)  # t for two, standard error 0.05
    assert Estimate.of([0.5]).half_width is None and str(Estimate.of([0.5])) == "50.0"


def test_prefix_reading_is_compared_at_equal_state(tmp_path):
    rows = [
        *(row(1e-3, 1, 1.0, 0.5), row(1e-3, 1, 1.0, 0.99, "prefix"), row(1e-3, 1, 1.0, 0.9, "twice")),
        *(row(1e-3, 1, 1.0, 0.6, state_bytes=1216), row(1e-3, 1, 1.0, 1.0, "prefix", 1216)),  # causal is not below 60%
        *(row(1e-3, 1, 1.0, 0.3, state_bytes=304), row(1e-3, 1, 1.0, 0.9, "prefix", 304)),  # prefix is below 99%
        *(row(1e-3, 1, 1.0, 0.5, "twice", 304), row(1e-3, 1, 1.0, 0.1, "prefix", 152)),  # 152: no causal model
    ]
    states = equal_state.equal_states(summarize(rows))
    assert [each.causal.state_bytes for each in states] == [304, 608, 1216]
    assert [each.separates for each in states] == [False, True, False]
    assert [each.closed for each in states] == [pytest.approx(1 / 3), pytest.approx(40 / 49), None]
    text = equal_state.markdown(states)
    assert "| 608 | 608 | 2 | - | 99.5 | 99.0 | 50.0 | 90.0 | 82 | yes |" in text
    assert (
        text.count("at 1 of 3 sizes of state (608 bytes).") == text.count("at 1 of 2 sizes of state (608 bytes).") == 1
    )
    equal_state.write_csv(states, tmp_path / "equal_state.csv")
    with (tmp_path / "equal_state.csv").open() as stream:
        *_, last = csv.DictReader(stream)
    assert (last["causal"], last["causal ±"], last["twice"], last["separates"]) == ("0.6", "", "", "False")


def test_models_of_other_training_are_not_compared():
    longer = [{**row(1e-3, 1, 1.0, share, method), "epochs": 4} for share, method in ((0.9, "causal"), (1.0, "prefix"))]
    rows = [row(1e-3, 1, 1.0, 0.5), row(1e-3, 1, 1.0, 0.99, "prefix"), *longer]
    states = equal_state.equal_states(summarize(rows))
    assert [(each.causal.training, each.separates) for each in states] == [
        ("1 epochs, batch 128", True),
        ("4 epochs, batch 128", False),
    ]
    assert "| 4 epochs, batch 128 | 100.0 |" in equal_state.markdown(states)


def test_deeper_models_are_compared_with_each_other():
    deep = [row(1e-3, 1, 1.0, share, method) for share, method in ((0.3, "causal-deep"), (1.0, "prefix-deep"))]
    rows = [row(1e-3, 1, 1.0, 0.5), row(1e-3, 1, 1.0, 0.9, "prefix"), *deep]
    found = [(each.causal.method, each.prefix.method) for each in equal_state.equal_states(summarize(rows))]
    assert sorted(found) == [("causal", "prefix"), ("causal-deep", "prefix-deep")]


def test_texts_of_two_sizes_that_are_equal_are_not_in_training_and_test():
    task = SetDisjointness("last", 12, ((1, 2),), 100, ((2, 1),), 100, separator_last=True)
    split = task.draw(1)
    trained = set(map(tuple, split.train[0].context.tolist()))
    assert not trained & set(map(tuple, split.test[0].context.tolist()))


def test_trained_lengths_are_those_of_the_run_not_of_another_task_of_its_name():
    accuracy = {"1_4": 1.0, "2_6": 0.2}
    rows = [{**row(1e-3, seed, 0, 0), "accuracy": accuracy, "longest_trained": 8} for seed in (1, 2)]
    assert list(plot.parts_of(rows)) == [""]  # the debug task of this version trains on 5 tokens
    rows = [{**each, "task": "mine", "longest_trained": 5} for each in rows]
    assert list(plot.parts_of(rows)) == ["", "trained-lengths"]


def test_files_of_a_part_of_several_tasks_do_not_stay(tmp_path):
    rows = [{**row(1e-3, 1, 0.9, 0.1), "run": name, "task": name} for name in ("one", "two")]
    for finished in (rows[:1], rows):
        (tmp_path / "results.json").write_text(json.dumps({"sweep": "mine", "fingerprint": "", "rows": finished}))
        plot.draw_all(tmp_path)
    assert not (tmp_path / "summary.csv").exists() and not (tmp_path / "frontier.png").exists()
    assert (tmp_path / "summary-one.csv").is_file() and (tmp_path / "frontier-two.png").is_file()


def test_sizes_of_other_tasks_are_no_pairs():
    assert [summary.pair_of(size) for size in ("4_16", "two_hops", "4_16_1", "7")] == [(4, 16), None, None, None]


def test_the_next_command_goes_on_with_the_same_part():
    given = argparse.Namespace(sweep="debug", out=Path("a b"), device="cpu", part="1/3", workers=2, ray=False)
    assert command.following(given) == (
        "python -m synthetics debug --out 'a b' --device cpu --resume --part 1/3 --workers 2"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--out", "."], "expected a file, and this is a folder"), (["--out", "m.json", "--minutes", "-1"], "at least 0")],
)
def test_measuring_is_refused_before_it_begins(arguments, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["measure", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit):
        measure.main()
    assert told in capsys.readouterr().err


def test_lists_longer_than_in_training_have_tables_without_them(tmp_path, monkeypatch):
    assert max(map(sum, TASKS["debug"].train)) == 5
    accuracy = {"1_4": 1.0, "4_1": 0.9, "2_6": 0.2, "6_2": 0.1}
    rows = [{**row(1e-3, seed, 0, 0), "accuracy": accuracy} for seed in (1, 2)]
    assert {name: list(part[0]["accuracy"]) for name, part in plot.parts_of(rows).items()} == {
        "": list(accuracy),
        "trained-lengths": ["1_4", "4_1"],
    }
    (line,) = summarize(plot.parts_of(rows)["trained-lengths"])
    assert line.panels["mean"].mean == pytest.approx(0.95)
    other = [{**each, "task": "another"} for each in rows]
    assert list(plot.parts_of([*rows, *other])) == ["debug", "debug-trained-lengths", "another"]
    assert list(plot.parts_of([{**each, "accuracy": {"1_4": 1.0}} for each in rows])) == [""]
    assert list(plot.parts_of([{**each, "task": "mqar", "accuracy": {"4": 1.0}} for each in rows])) == [""]


def test_figures_show_intervals_of_several_seeds_only():
    short, long, difference = plot.by_order(
        summarize([row(1e-3, 1, 0.9, 0.1), row(1e-3, 1, 0.8, 0.2, "prefix"), row(1e-3, 2, 0.6, 0.3, "prefix")])
    ).axes
    assert short.get_ylim() == long.get_ylim()
    assert difference.get_ylabel() == "short minus long, points"
    (one,), (two,) = (bars[2][0].get_segments() for bars in short.containers)
    assert not len(one) and two[:, 1] == pytest.approx([70 - 12.706 * 10, 70 + 12.706 * 10])


def test_time_of_figure2_is_estimated_along_a_line_through_what_was_measured():
    def row(group):  # one second an epoch and another for each thousand numbers of a token
        first, numbers = group[0].shape, len(group) * (group[0].width + 4 * group[0].shape.feature_dim)
        seconds = {"epoch_seconds": {"recorded": 1 + numbers / 1000}, "test_seconds": 0}
        return {
            "method": "prefix",
            "models": len(group),
            "width": first.width,
            "feature_dim": first.feature_dim,
        } | seconds

    stacks = [group for group in groups(sweeps.figure2) if group[0].method.name == "prefix"]
    found = measure.figure2_minutes([row(group) for group in measure.widest_and_narrowest("prefix")])
    assert found == {
        "prefix": pytest.approx(sum(12 * row(group)["epoch_seconds"]["recorded"] / 60 for group in stacks))
    }


# ---- The notebook


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_places_an_own_mixer_on_the_frontier():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    root = Path(__file__).resolve().parent.parent
    notebook = nbformat.read(root / "synthetics" / "own_mixer.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    settings.source = "EXAMPLES, EPOCHS, SEEDS, WIDTHS = 64, 1, (1, 2), (8,)"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(root)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    table = next(output.data["text/plain"] for output in outputs if output.output_type == "execute_result")
    assert table.count("running average, twice") == 2 and "mqar" in table
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
