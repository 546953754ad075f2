"""Commands that are killed or interrupted: no process of theirs is left, and the user reads one line."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from train_runs import ROOT, curve

from jrt.system.processes import end_with


def test_a_process_ends_with_the_one_that_started_it():
    """The pipe ends when the last process that could write to it has ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            end_with(os.getppid())
            os.write(writing, b"started")
            time.sleep(60)
        time.sleep(60)
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 7) == b"started"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert select.select([reading], [], [], 30)[0], "the process is still at work"
    assert os.read(reading, 1) == b""
    os.close(reading)


def started(script: str, *arguments: str) -> subprocess.Popen:
    """A command in a process group of its own. Its output is one pipe, which ends with the last of its processes."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train" / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, lines: int = 0) -> None:
    while not path.is_file() or (lines and len(path.read_text().splitlines()) < lines):
        time.sleep(0.05)


@pytest.mark.slow
def test_preparing_is_killed_and_interrupted(tmp_path):
    source, out = tmp_path / "text.jsonl", tmp_path / "out"
    with source.open("w") as file:
        for i in range(80_000):
            file.write(json.dumps({"text": f"page {i}: " + "some words and other words here; " * 20}) + "\n")
    command = ("prepare.py", str(source), str(out), "--workers", "2")
    killed = started(*command)
    wait_for(out / "progress.json")
    killed.kill()
    killed.communicate(timeout=30)
    before = (out / "progress.json").read_text()
    interrupted = started(*command)
    while (out / "progress.json").read_text() == before:
        time.sleep(0.05)
    os.killpg(interrupted.pid, signal.SIGINT)
    said, _ = interrupted.communicate(timeout=30)
    assert interrupted.returncode == 130 and "the same command goes on" in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_training_in_two_processes_ends_with_the_command(text, tmp_path, ending):
    small = ["experiment=debug", f"data.folder={text}", "export=false", "trainer.devices=2", "model.pattern=C"]
    run = started("run.py", *small, f"output={tmp_path}", "steps=100000", "trainer.checkpoint_every=5")
    wait_for(tmp_path / "metrics.csv", lines=9)
    run.send_signal(ending)
    said, _ = run.communicate(timeout=30)
    assert run.returncode == (-9 if ending == signal.SIGKILL else 128 + ending)
    assert "SignalException" not in said  # a device may still tell that it lost the other
    assert (tmp_path / "checkpoints" / "last.ckpt").read_text() == "step-0000005\n" and len(curve(tmp_path)) >= 8


@pytest.mark.slow
def test_an_interrupted_run_says_one_line(text, tmp_path):
    small = ["experiment=debug", f"data.folder={text}", "export=false", "model.pattern=C", "steps=100000"]
    run = started("run.py", *small, f"output={tmp_path}")
    wait_for(tmp_path / "metrics.csv", lines=4)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=30)
    assert run.returncode == 130 and "Traceback" not in said
    assert said.splitlines()[-1].endswith("stopped: the same command goes on from the newest checkpoint")
