"""Set disjointness: the released generator's examples, and what they must be; runs, sweeps and the figure."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synthetics import plot, sweeps
from synthetics.data import IGNORED, disjoint_sets, read_twice
from synthetics.methods import METHODS
from synthetics.tasks import TASKS
from synthetics.train import Run, SetDisjointness, train

ROOT = Path(__file__).resolve().parent.parent
DEBUG = sweeps.SWEEPS["debug"][0]


def test_examples_are_the_released_ones(shared):
    cases = json.loads((shared / "golden" / "synthetic.json").read_text())["cases"]
    tensors = load_file(shared / "golden" / "synthetic.safetensors")
    for index, case in enumerate(cases):
        drawn = disjoint_sets(
            case["vocab_size"], case["num_examples"], case["short_length"], case["long_length"], case["seed"]
        )
        assert torch.equal(drawn.inputs, tensors[f"data{index}.inputs"])
        assert torch.equal(drawn.labels, tensors[f"data{index}.labels"])


@pytest.mark.parametrize(("first", "second"), [(4, 16), (16, 4), (1, 28)])
def test_exactly_one_token_is_shared(first, second):
    drawn = disjoint_sets(64, 50, first, second, seed=3)
    for row, label in zip(drawn.inputs.tolist(), drawn.labels, strict=True):
        shared = set(row[1 : 1 + first]) & set(row[2 + first : -1])
        assert shared == {label[-1].item()}
        assert (label[:-1] == IGNORED).all()


def test_lists_longer_than_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="expected 1 to"):
        disjoint_sets(16, 2, 9, 2, seed=0)


def test_a_task_draws_each_pair_from_seeds_of_its_own():
    train_segments, test_segments = TASKS["debug"].draw(123)
    assert [(each.first, each.second) for each in train_segments] == [(1, 4), (4, 1)]
    assert [(each.first, each.second) for each in test_segments] == [(1, 4), (4, 1), (2, 6), (6, 2)]
    assert not torch.equal(train_segments[0].inputs[:64], test_segments[0].inputs)
    again, _ = TASKS["debug"].draw(123)
    other, _ = TASKS["debug"].draw(2)
    assert torch.equal(again[0].inputs, train_segments[0].inputs)
    assert not torch.equal(other[0].inputs, train_segments[0].inputs)
    sizes = [len(batch.inputs) for batch in train_segments[0].batches(200)]
    assert sizes == [200, 200, 112]


def test_reading_twice_repeats_all_but_the_last_separator():
    inputs = torch.tensor([[1, 7, 5, 2, 9, 7, 8, 3]])
    assert read_twice(inputs).tolist() == [[1, 7, 5, 2, 9, 7, 8, 1, 7, 5, 2, 9, 7, 8, 3]]


def test_only_jrt_rnn_knows_the_second_list_while_it_reads_the_first():
    inputs = disjoint_sets(32, 1, 4, 6, seed=0).inputs
    for name, method in METHODS.items():
        model = SetDisjointness(Run(name, "debug", width=8, feature_dim=2, rate=1e-3, epochs=1)).model
        changed = inputs.clone()
        changed[0, -2] = 31 if inputs[0, -2] != 31 else 30
        prefix = torch.tensor([inputs.shape[1]]) if method.encodes else None
        first, second = (model.read(each, prefix_length=prefix)[0][:, :5] for each in (inputs, changed))
        assert torch.equal(first, second) == (name != "jrt-rnn")


def test_every_run_of_every_sweep_can_be_built():
    for name, runs in sweeps.SWEEPS.items():
        assert len({run.name for run in runs}) == len(runs), name
        for run in runs:
            METHODS[run.method].config(run.width, run.feature_dim, TASKS[run.task].vocab_size, 2048)
    paper = [run for run in sweeps.SWEEPS["paper"] if run.method == "based" and run.seed == 123]
    assert len(paper) == 60  # original_spec section 9
    assert len(TASKS["paper"].train) == 12 and len(TASKS["paper"].test) == 20
    with pytest.raises(ValueError, match="unknown method 'rwkv': expected one of based"):
        Run("rwkv", "debug", width=8, feature_dim=2, rate=1e-3, epochs=1)


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    run = Run("jrt-rnn", "debug", width=8, feature_dim=2, rate=5e-3, epochs=2)
    whole = train(run, tmp_path / "whole", "cpu", quiet=True)

    def stop(module):
        if module.current_epoch == 1:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(SetDisjointness, "on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            train(run, tmp_path / "cut", "cpu", quiet=True)
    resumed = train(run, tmp_path / "cut", "cpu", quiet=True)
    assert resumed == whole
    weights = [torch.load(tmp_path / each / "last.ckpt", weights_only=True)["state_dict"] for each in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert train(run, tmp_path / "cut", "cpu", quiet=True) == whole  # nothing left to do


def test_a_model_learns_what_one_token_lists_ask(tmp_path):
    run = Run("based", "debug", width=16, feature_dim=4, rate=1e-2, epochs=20, batch=32)
    accuracy = train(run, tmp_path, "cpu", quiet=True)["accuracy"]
    assert accuracy["1_4"] > 0.9  # by chance 1 in 28


def test_a_sweep_does_what_is_missing_and_is_drawn(tmp_path, capsys, monkeypatch):
    for run in sweeps.SWEEPS["debug"][1:]:
        sweeps.do(run, tmp_path, "cpu")
    before = sweeps.result_file(tmp_path, sweeps.SWEEPS["debug"][1]).stat().st_mtime_ns
    command = [sys.executable, "synthetics/sweeps.py", "debug", "--output", str(tmp_path), "--accelerator", "cpu"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert sweeps.result_file(tmp_path, DEBUG).exists() and not list(tmp_path.glob("*.part"))
    assert sweeps.result_file(tmp_path, sweeps.SWEEPS["debug"][1]).stat().st_mtime_ns == before
    kept = tmp_path / "kept" / "all.json"
    kept.parent.mkdir()
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path), "--json", str(kept)])
    runpy.run_path(str(ROOT / "synthetics" / "plot.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(f"| {name} | 8 | 2 | 608 |" in printed for name in METHODS)
    report = json.loads(kept.read_text())
    assert [line["method"] for line in report["rows"]] == ["based", "jrt-prompt", "jrt-rnn"] and len(
        report["runs"]
    ) == 3
    assert (tmp_path / "set_disjointness.png").stat().st_size > 10_000


def test_the_best_rate_counts_in_every_panel_and_seeds_are_averaged():
    def row(rate, seed, short, long):
        accuracy = {"1_4": short, "4_1": long}
        shape = {"method": "based", "state_bytes": 608, "width": 8, "feature_dim": 2}
        return {**shape, "rate": rate, "seed": seed, "accuracy": accuracy}

    rows = [row(1e-3, 1, 0.9, 0.1), row(1e-3, 2, 0.7, 0.3), row(2e-3, 1, 0.6, 0.6), row(2e-3, 2, 0.6, 0.5)]
    (line,) = plot.best(rows)
    assert line["seeds"] == 2 and line["spread"] == pytest.approx(0.05)
    assert [line[panel] for panel in plot.PANELS] == pytest.approx([0.6, 0.55, 0.05])


def test_an_empty_folder_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        plot.read(tmp_path)
