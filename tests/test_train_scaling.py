"""The scaling benchmark, with two processes on the CPU: its losses agree with those of one process."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from train_runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import train_scaling
from train_scaling import Setting


def scaled(output: Path, *options: str) -> list[dict]:
    small = ["--gpus", "1", "2", "--cpu", "--presets", "debug", "--steps", "6", "--every", "1", "--length", "128"]
    command = [sys.executable, str(ROOT / "benchmarks" / "train_scaling.py"), *small, "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text(encoding="utf-8"))["rows"]


@pytest.mark.slow
def test_scaling_on_two_processes(tmp_path):
    rows = scaled(tmp_path / "scaling.json")
    assert [(row["strategy"], row["shape"]["B"], row["scaling"]) for row in rows] == [
        ("one device", 4, ["weak"]),
        ("one device", 8, ["strong"]),
        ("ddp", 8, ["weak", "strong"]),
        ("fsdp", 8, ["weak", "strong"]),
    ]
    for row in rows:
        assert row["tokens_per_s"] > 0 and len(row["losses"]) == 6
    for row in rows[2:]:
        assert row["losses_agree"] and row["weak_efficiency"] > 0 and row["strong_efficiency"] > 0
    assert rows[0]["losses"] != rows[1]["losses"]
    assert [row["beside"] for row in rows] == [1, 1, 0, 0]


@pytest.mark.slow
def test_a_run_that_changes_its_devices(tmp_path):
    (row,) = scaled(tmp_path / "resume.json", "--resume", "--strategies", "fsdp")
    assert row["gpus_until_step"] == {"2": 2, "4": 1, "6": 2} and row["losses_agree"]
    assert len(row["losses"]) == 6


def options(**fields: object) -> argparse.Namespace:
    known = {"presets": ["jrt-360m"], "gpus": [1, 2, 4], "strategies": ["ddp", "fsdp"], "scaling": ["weak", "strong"]}
    return argparse.Namespace(**known | {"steps": 50, "every": 5, "length": 128, "alone": None, "cpu": True} | fields)


def test_only_runs_whose_losses_are_compared_have_all_steps():
    found = train_scaling.settings(options())
    assert len(found) == 2 + 4 + 2
    assert {setting.batch: setting.steps for setting in found} == {
        16: train_scaling.SPEED_STEPS,
        32: train_scaling.SPEED_STEPS,
        64: 50,
    }
    weak = train_scaling.settings(options(scaling=["weak"]))
    assert [(setting.gpus, setting.batch) for setting in weak] == [(1, 16), (2, 32), (2, 32), (4, 64), (4, 64)]
    assert {setting.steps for setting in weak} == {train_scaling.SPEED_STEPS}


def test_losses_of_one_gpu_can_come_from_a_file(tmp_path):
    row = {"method": "jrt-360m", "gpus": 1, "shape": {"B": 64, "T": 128}, "steps": 50, "losses": {"5": 9.0}}
    (tmp_path / "scaling.json").write_text(json.dumps({"rows": [{**row, "gpus": 4, "losses": {}}, row]}))
    chosen = options(alone=tmp_path / "scaling.json")
    assert train_scaling.losses_on_one_gpu("jrt-360m", tmp_path, tmp_path, chosen) == {"5": 9.0}
    with pytest.raises(SystemExit, match="has no run with"):
        train_scaling.losses_on_one_gpu("jrt-1.3b", tmp_path, tmp_path, chosen)


@pytest.mark.slow
def test_a_failing_run_leaves_the_others_alone(tmp_path, monkeypatch):
    train_scaling.make_text(tmp_path, 128, 1000)
    wanted = [Setting("no-such-size", "ddp", 1, 4, 4), Setting("debug", "ddp", 1, 4, 4)]
    monkeypatch.setattr(train_scaling, "settings", lambda chosen: wanted)
    failed: list[str] = []
    chosen = options(gpus=[1, 2], presets=["debug"], steps=4, every=1)
    *_, rows = train_scaling.scalings(tmp_path, failed, chosen)
    assert [row["method"] for row in rows] == ["debug"] and len(rows[0]["losses"]) == 4
    (problem,) = failed
    assert "no-such-size" in problem.splitlines()[0] and "exit code 2" in problem and "unknown preset" in problem


@pytest.mark.slow
def test_a_run_without_figures_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(train_scaling, "PATIENCE", 0.5)
    train_scaling.make_text(tmp_path, 128, 1000)
    chosen = options(gpus=[1], presets=["debug"], steps=10**6, every=10**6)
    (run,) = train_scaling.side_by_side([Setting("debug", "ddp", 1, 4, 10**6)], tmp_path, tmp_path, chosen)
    assert run.problem.endswith("no figures for 0.5 s") and run._processes[0].poll() == -9
    with pytest.raises(train_scaling.RunFailed, match="no figures"):
        train_scaling.losses_on_one_gpu("debug", tmp_path, tmp_path, chosen)
