"""The scaling benchmark, with two processes on the CPU: its losses agree with those of one process."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("hydra")

from train_runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import train_scaling
from train_scaling import Setting

from jrt.system.provenance import device_name


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
        ("ddp", 256, ["weak"]),
        ("ddp", 8, ["one pass", "strong"]),
        ("fsdp", 8, ["one pass", "strong"]),
        ("one device", 128, ["weak"]),
        ("one device", 4, ["one pass"]),
        ("one device", 8, ["strong"]),
    ]
    for row in rows:
        assert row["tokens_per_s"] > 0 and len(row["losses"]) == 6
    assert rows[0]["weak_efficiency"] > 0
    for row in rows[1:3]:
        assert row["losses_agree"] and row["one_pass_efficiency"] > 0 and row["strong_efficiency"] > 0
    assert rows[4]["losses"] != rows[5]["losses"]


@pytest.mark.slow
def test_a_run_that_changes_its_devices(tmp_path):
    (row,) = scaled(tmp_path / "resume.json", "--resume", "--strategies", "fsdp")
    assert row["gpus_until_step"] == {"2": 2, "4": 1, "6": 2} and row["losses_agree"]
    assert len(row["losses"]) == 6


def options(**fields: object) -> argparse.Namespace:
    known = {
        "presets": ["jrt-360m"],
        "gpus": [1, 2, 4],
        "strategies": ["ddp", "fsdp"],
        "scaling": ["one pass", "strong"],
    }
    return argparse.Namespace(
        **known
        | {"steps": 50, "every": 5, "length": 128, "alone": None, "cpu": True, "keep": False, "output": None}
        | fields
    )


def test_only_runs_whose_losses_are_compared_have_all_steps():
    found = train_scaling.settings(options())
    assert len(found) == 2 + 4 + 2
    assert {setting.batch: setting.steps for setting in found} == {
        16: train_scaling.SPEED_STEPS,
        32: train_scaling.SPEED_STEPS,
        64: 50,
    }
    one = train_scaling.settings(options(scaling=["one pass"]))
    assert [(setting.gpus, setting.batch) for setting in one] == [(4, 64), (4, 64), (1, 16), (2, 32), (2, 32)]
    assert {setting.steps for setting in one} == {train_scaling.SPEED_STEPS}


def test_the_recipes_batch_is_measured_on_the_largest_number_of_gpus():
    batch = yaml.safe_load((ROOT / "train/configs/experiment/baselines/common-360m-30b.yaml").read_text())["trainer"]
    assert batch["global_batch"] == train_scaling.RECIPE_BATCH
    found = train_scaling.settings(options(scaling=["weak"]))
    assert [(setting.strategy, setting.gpus, setting.batch, setting.rows) for setting in found] == [
        ("ddp", 4, 256, 16),
        ("ddp", 1, 64, 16),
        ("ddp", 2, 128, 16),
    ]
    assert {setting.steps for setting in found} == {train_scaling.RECIPE_STEPS}


def test_efficiency_is_measured_against_the_same_work_of_one_gpu():
    def row(gpus: int, batch: int, speed: float, *kinds: str) -> dict:
        shape = {"B": batch, "T": 128}
        return {
            "method": "m",
            "gpus": gpus,
            "shape": shape,
            "scaling": list(kinds),
            "tokens_per_s": speed,
            "losses": {"5": 9.0},
        }

    rows = [row(1, 16, 100.0, "one pass"), row(1, 64, 110.0, "weak", "strong")]
    rows += [row(4, 64, 360.0, "one pass", "strong"), row(4, 256, 418.0, "weak")]
    train_scaling.compare(rows)
    assert rows[2]["one_pass_efficiency"] == 0.9 and rows[2]["strong_efficiency"] == round(360 / 440, 4)
    assert rows[3]["weak_efficiency"] == 0.95 and "loss_difference" not in rows[3]
    assert rows[2]["losses_agree"]


def test_runs_that_the_file_has_are_kept(tmp_path):
    file = tmp_path / "scaling.json"
    chosen = options(keep=True, output=file, cpu=True)
    wanted = train_scaling.settings(chosen)
    assert train_scaling.kept(wanted, chosen) == ({}, [])  # no file yet
    rows = [setting.facts(128) | {"tokens_per_s": 1.0} for setting in wanted[:2]]
    rows.append(wanted[2].facts(128) | {"steps": 7})
    report = {"device": device_name("cpu"), "rows": rows}
    file.write_text(json.dumps(report))
    assert train_scaling.kept(wanted, chosen) == (dict(zip(wanted[:2], rows[:2], strict=True)), rows[2:])
    assert train_scaling.kept(wanted, options(output=file)) == ({}, [])  # not asked for
    file.write_text(json.dumps(report | {"device": "another"}))
    with pytest.raises(SystemExit, match="was measured on another, this is"):
        train_scaling.kept(wanted, chosen)
    file.write_text(json.dumps(report)[:-5])
    with pytest.raises(SystemExit, match="is not JSON"):
        train_scaling.kept(wanted, chosen)


def test_rows_of_other_runs_stay_in_the_file(tmp_path, monkeypatch):
    file = tmp_path / "scaling.json"
    chosen = options(presets=["debug"], gpus=[1], scaling=["strong"], steps=6, every=3, keep=True, output=file)
    file.write_text(json.dumps({"device": device_name("cpu"), "rows": [{"method": "other"}]}))
    failed = argparse.Namespace(problem="it failed")
    monkeypatch.setattr(train_scaling, "side_by_side", lambda *arguments: iter([failed]))
    assert list(train_scaling.scalings(tmp_path, [], chosen)) == [[{"method": "other"}]]


def test_a_file_that_has_all_runs_is_left_as_it_is(tmp_path):
    file = tmp_path / "scaling.json"
    chosen = options(presets=["debug"], gpus=[1], scaling=["strong"], steps=6, every=3)
    (setting,) = train_scaling.settings(chosen)
    own = setting.facts(128) | {"scaling": ["strong"], "tokens_per_s": 1.0, "losses": {"3": 9.0, "6": 8.0}}
    file.write_text(json.dumps({"device": device_name("cpu"), "rows": [{"method": "other"}, own]}))
    rows = scaled(file, "--gpus", "1", "--scaling", "strong", "--every", "3", "--keep")
    assert sorted(row["method"] for row in rows) == ["debug", "other"]


@pytest.mark.parametrize("gpus", [["0"], ["1", "3"]])
def test_numbers_of_gpus_that_cannot_share_the_batch_are_refused(gpus, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_scaling.py", "--cpu", "--gpus", *gpus])
    with pytest.raises(SystemExit):
        train_scaling.main()
    assert "for weak scaling divisors of 256" in capsys.readouterr().err


def test_losses_of_one_gpu_can_come_from_a_file(tmp_path):
    row = Setting("jrt-360m", "ddp", 1, 64, 50).facts(128) | {"losses": {"5": 9.0}}
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
