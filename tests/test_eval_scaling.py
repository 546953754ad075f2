"""The benchmark of evaluation on several workers, on the CPU: one worker is killed, and all runs agree."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray (pip install 'jrt[scale]')")
def test_two_workers_and_one_killed(tmp_path):
    output = tmp_path / "scaling.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "eval_scaling.py"), "--workers", "2", "--items", "24"]
    command += ["--model", "debug", "--window", "256", "--batch", "2", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    rows = found["rows"]
    assert [(row["method"], row["workers"], row["killed"]) for row in rows] == [
        ("this process", 1, False),
        ("ray", 2, False),
        ("ray", 2, True),
    ]
    assert all(row["equal"] and row["items"] <= 24 for row in rows)
    assert rows[0]["items"] == 22 and rows[0]["speedup"] == 1.0
    assert found["distinct_predictions"] > 1
