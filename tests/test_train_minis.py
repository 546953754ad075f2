"""`train/minis.sh` with programs that stand in for the GPUs and for the training run."""

import os
import subprocess

from conftest import ROOT

GPUS = """#!/bin/sh
printf 'GPU 0\\nGPU 1\\nGPU 2\\nGPU 3\\n'
"""
RUN = """#!/bin/sh
echo "$CUDA_VISIBLE_DEVICES $*"
case "$*" in *mini/mamba*seed=2*) exit 1;; esac
"""


def trained(folder, seeds: str) -> tuple[int, dict[str, str]]:
    """Runs the script. Returns its exit status, and the first line that each run printed."""
    programs = folder / "programs"
    programs.mkdir()
    for name, text in (("nvidia-smi", GPUS), ("python3", RUN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    command = ["bash", str(ROOT / "train" / "minis.sh"), "corpus", str(folder / "out"), seeds, "steps=10"]
    done = subprocess.run(command, env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}, check=False)
    logs = (folder / "out").glob("mini-*/console.log")
    return done.returncode, {log.parent.name: log.read_text().splitlines()[0] for log in logs}


def test_each_gpu_gets_different_models_of_all_seeds(tmp_path):
    status, first = trained(tmp_path, "1 3")
    assert status == 0 and len(first) == 8
    name = "mini-jrt-3"
    output = tmp_path / "out" / name
    told = f"experiment=mini/jrt data.folder=corpus output={output} seed=3 steps=10"
    assert first[name] == f"0 train/run.py {told}"
    places = {run: line.split()[0] for run, line in first.items()}
    assert [places[f"mini-mamba-{seed}"] for seed in (1, 3)] == ["2", "3"]
    assert sorted(places.values()) == sorted("01230123")


def test_a_run_that_fails_is_told(tmp_path):
    status, first = trained(tmp_path, "1 2")
    assert status == 1 and len(first) == 8
