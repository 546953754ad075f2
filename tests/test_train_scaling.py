"""The scaling benchmark, with two processes on the CPU: its losses agree with those of one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from train_runs import ROOT


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


@pytest.mark.slow
def test_a_run_that_changes_its_devices(tmp_path):
    (row,) = scaled(tmp_path / "resume.json", "--resume", "--strategies", "fsdp")
    assert row["gpus_until_step"] == {"2": 2, "4": 1, "6": 2} and row["losses_agree"]
    assert len(row["losses"]) == 6
