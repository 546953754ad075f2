"""Sweeps of the user's own: settings of a wrong kind, several tasks, sizes of one order, damaged and killed sweeps."""

import json
import logging
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from synthetics import __main__ as command
from synthetics import folder, plot, sweeps
from synthetics.data import fingerprints, generator
from synthetics.mqar import MQAR, draw_pairs
from synthetics.runs import METHODS, Method, Run
from synthetics.set_disjointness import SetDisjointness, draw_pair
from synthetics.summary import PANELS, panels_of, summarize
from synthetics.tasks import TASKS
from synthetics.training import train
from synthetics.workers import train_all

CPU = torch.device("cpu")
LISTS = SetDisjointness("lists", 32, ((1, 4), (4, 1)), 64, ((1, 4), (4, 1)), 16)
PAIRS = MQAR("pairs", 64, (2,), 64, (2, 3), 16)
RUN = Run(METHODS["causal"], LISTS, 8, 2, 1e-3, 1, epochs=1)

WRONG_RUNS = {
    "epochs": (0, 1.5, True, "2"),  # 1.5 epochs never end
    "batch": (0, 2.5),
    "width": (0, -8, 8.0),
    "feature_dim": (0, 2.5),
    "window": (0, -1),
    "seed": (-1, 1.5, True, 1 << 70),
    "rate": (0, -1.0, float("nan"), float("inf"), True, "x"),
}
WRONG_TASKS = [
    (replace(LISTS, train=()), "lists, train: expected at least one size"),
    (replace(LISTS, test=()), "lists, test: expected at least one size"),
    (replace(LISTS, train=((1, 4), (1, 4))), "lists, train: expected at least one size, and each size once"),
    (replace(PAIRS, test=(2, 2)), "pairs, test: expected at least one size, and each size once"),
    (replace(LISTS, train=((1, 4, 2),)), r"lists: \(1, 4, 2\) is no pair of lengths"),
    (replace(LISTS, train=((1.0, 4),)), r"length of a list is 1\.0"),
    (replace(PAIRS, train=(2.5,)), r"number of pairs is 2\.5"),
    (replace(PAIRS, columns=1.5), r"columns for each pair is 1\.5"),
    (replace(LISTS, train_examples=0), "train_examples of lists is 0"),
    (replace(PAIRS, test_examples=-4), "test_examples of pairs is -4"),
    (replace(LISTS, vocab_size=1 << 25), "vocab_size of lists is 33554432: expected a whole number from 5 to"),
    (replace(LISTS, vocab_size=32.0), r"vocab_size of lists is 32\.0"),
    (replace(LISTS, vocab_size=10, train=((1, 1),), test=((1, 1),)), "1_1: there are 6 different examples"),
    (replace(PAIRS, vocab_size=12, train=(1,), test=(1,), train_examples=200), "1: there are 144 different examples"),
    (replace(LISTS, name="a/b"), "names of methods and tasks are names of files"),
]


@pytest.mark.parametrize("name", WRONG_RUNS)
def test_runs_of_a_wrong_kind_are_refused_before_anything_is_written(name, tmp_path):
    for value in WRONG_RUNS[name]:
        with pytest.raises(ValueError, match=f"{name} of a run is ") as error:
            folder.Folder(tmp_path / "out", "mine", [replace(RUN, **{name: value})], resume=False)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("task", "message"), WRONG_TASKS, ids=[message[:40] for _, message in WRONG_TASKS])
def test_tasks_that_cannot_be_drawn_are_refused_before_anything_is_written(task, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        folder.Folder(tmp_path / "out", "mine", [replace(RUN, task=task)], resume=False)
    assert not list(tmp_path.iterdir())


def test_the_number_of_different_examples_is_right():
    """All that there are, drawn many times over."""
    lists = draw_pair(12, 8000, (1, 2), generator(1))
    assert len(set(fingerprints(lists).tolist())) == 8 * 7 * 2
    with pytest.raises(ValueError, match="1_2: there are 112 different examples"):
        SetDisjointness("lists", 12, ((1, 2),), 113, ((1, 2),), 4).check()
    SetDisjointness("lists", 12, ((1, 2),), 113, ((2, 1),), 4).check()  # what is not tested may be seen whole
    pairs = draw_pairs(12, 20_000, 1, 2, generator(2))
    assert len(set(fingerprints(pairs).tolist())) == 144  # 2 keys, 6 values, 2 columns, and 6 values beside the key
    with pytest.raises(ValueError, match="1: there are 144 different examples"):
        MQAR("pairs", 12, (1,), 145, (1,), 4).check()


@pytest.mark.parametrize("task", [SetDisjointness("lists", 12, ((1, 2),), 110, ((1, 2),), 40), LISTS, PAIRS])
def test_no_test_example_is_a_training_example(task):
    """Also where there are hardly more examples than are trained on."""
    split = task.draw(4)
    seen = {examples.name: set(fingerprints(examples).tolist()) for examples in split.train}
    for examples in split.test:
        assert not seen.get(examples.name, set()) & set(fingerprints(examples).tolist())


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_examples_of_every_task_can_be_drawn(task):
    """As many training examples as a sweep has, and few test examples of few sizes, to save time."""
    split = replace(task, train=task.train[:3], test=task.train[:3], test_examples=50).draw(1)
    assert [len(each) for each in split.train] == [task.train_examples] * len(split.train)


def test_a_folder_of_a_sweep_that_was_killed_at_once_is_empty(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "results.json.partial").write_text("{")
    assert folder.Folder(tmp_path, "mine", [RUN], resume=True).rows == {}


def test_results_on_a_cpu_name_the_cpu_beside_a_gpu(tmp_path, monkeypatch):
    names = {"cpu": "a processor", "cuda": "a GPU"}
    monkeypatch.setattr(folder, "device_name", names.__getitem__)
    monkeypatch.setitem(sweeps.SWEEPS, "debug", [RUN])
    assert command.main(["debug", "--out", str(tmp_path), "--device", "cpu", "--workers", "1"]) == 0
    assert [row["device"] for row in folder.read(tmp_path)["rows"]] == ["a processor"]


def test_ray_is_asked_for_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("synthetics.workers.importlib.util.find_spec", lambda name: None)
    assert command.main(["debug", "--out", str(tmp_path / "out"), "--device", "cpu", "--ray"]) == 2
    assert "ray is not installed" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command.main(["debug", "--out", str(tmp_path / "file" / "out"), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("test", "panels"),
    [
        (((1, 4), (2, 6)), {"mean", PANELS[0]}),
        (((4, 1),), {"mean", PANELS[1]}),
        (((4, 4),), {"mean"}),
        (((1, 4), (4, 1), (4, 4)), {"mean", *PANELS}),
    ],
)
def test_lists_of_one_order_are_drawn_too(test, panels, tmp_path, monkeypatch):
    monkeypatch.setitem(sweeps.SWEEPS, "debug", [replace(RUN, task=replace(LISTS, test=test))])
    assert command.main(["debug", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert set(panels_of(dict.fromkeys((f"{a}_{b}" for a, b in test), 0.5))) == panels
    assert (tmp_path / "out" / "order.png").exists() == (set(PANELS) <= panels)
    assert (tmp_path / "out" / "lengths.png").exists()


def test_tasks_and_lengths_of_training_are_not_seeds_of_each_other(tmp_path, monkeypatch, capsys):
    other = replace(LISTS, name="longer", test=((1, 4), (6, 2)))
    runs = [RUN, replace(RUN, task=other), replace(RUN, task=PAIRS), replace(RUN, epochs=2)]
    monkeypatch.setitem(sweeps.SWEEPS, "debug", runs)
    assert command.main(["debug", "--out", str(tmp_path / "out"), "--device", "cpu", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    for task in ("lists", "longer", "pairs"):
        assert f"\n{task}\n" in printed and (tmp_path / "out" / f"frontier-{task}.svg").exists()
        assert (tmp_path / "out" / f"summary-{task}.csv").exists()
    rows = [row for row in folder.read(tmp_path / "out")["rows"] if row["task"] == "lists"]
    lines = summarize(rows)
    assert [(line.name, line.seeds) for line in lines] == [
        ("causal, 1 epochs, batch 128", 1),
        ("causal, 2 epochs, batch 128", 1),
    ]


@pytest.mark.parametrize("content", ["3", "null", '{"sweep": 1, "fingerprint": 2, "rows": 3}', "\udcff"])
def test_a_folder_with_a_damaged_table_is_told(tmp_path, content):
    (tmp_path / "results.json").write_text(content, errors="surrogateescape")
    for reads in (lambda: plot.draw_all(tmp_path), lambda: folder.Folder(tmp_path, "debug", sweeps.debug, True)):
        with pytest.raises(ValueError, match=r"was not written by python -m synthetics"):
            reads()
    whole = row_of(RUN)
    for row in ({"run": "x"}, {**whole, "accuracy": {}}, {**whole, "accuracy": {"1_4": None}}, [*whole]):
        (tmp_path / "results.json").write_text(json.dumps({"sweep": "debug", "fingerprint": "x", "rows": [row]}))
        with pytest.raises(ValueError, match=r"was not written by python -m synthetics"):
            plot.draw_all(tmp_path)


def test_a_file_is_no_folder_to_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path / "results.json")])
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        plot.main()
    assert "results.json holds no results: expected the folder of python -m synthetics" in capsys.readouterr().err


def row_of(run: Run) -> dict:
    """A row of results with what tables and figures need."""
    row = dict.fromkeys(folder.NEEDED, 1)
    return {**row, "run": run.name, "method": run.method.name, "task": run.task.name, "accuracy": {"1_4": 0.5}}


class Fatal:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple:
        return os._exit, (9,)


def test_a_killed_worker_is_one_line(tmp_path, monkeypatch):
    fast = multiprocessing.get_context("fork")
    monkeypatch.setattr("synthetics.workers.get_context", lambda method: fast)
    with pytest.raises(ValueError, match="one of 2 worker processes was killed, perhaps for lack of memory"):
        list(train_all([(Fatal(), tmp_path)], "cpu", 2, None, use_ray=False))


def at_work(pipe: int) -> None:
    os.write(pipe, b"at work")
    time.sleep(60)


class Long:
    """A group that the worker never finishes."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def __reduce__(self) -> tuple:
        return at_work, (self.pipe,)


def test_workers_end_with_a_killed_sweep(tmp_path, monkeypatch):
    """Otherwise they go on beside the resumed sweep and write the same checkpoints."""
    fast = multiprocessing.get_context("fork")
    monkeypatch.setattr("synthetics.workers.get_context", lambda method: fast)
    reading, writing = os.pipe()
    sweep = os.fork()
    if sweep == 0:
        list(train_all([(Long(writing), tmp_path)], "cpu", 2, None, use_ray=False))
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 7) == b"at work"
    os.kill(sweep, signal.SIGKILL)
    os.waitpid(sweep, 0)
    assert select.select([reading], [], [], 30)[0], "the worker is still at work"
    assert os.read(reading, 1) == b""  # the pipe ends when no process is left that could write
    os.close(reading)


def test_two_processes_keep_each_others_results(tmp_path):
    runs = [RUN, replace(RUN, width=16)]
    one, other = (folder.Folder(tmp_path, "mine", runs, resume=False) for _ in range(2))
    one.add([row_of(runs[0])])
    other.add([row_of(runs[1])])
    assert [row["run"] for row in folder.read(tmp_path)["rows"]] == [run.name for run in runs]


def test_a_checkpoint_goes_when_the_results_of_its_group_are_written(tmp_path):
    runs = [RUN, replace(RUN, seed=2), replace(RUN, width=16)]
    mine = folder.Folder(tmp_path, "mine", runs, resume=False)
    done, other = mine.checkpoint(runs[:2]), mine.checkpoint(runs[2:])
    for file in (done, other):
        file.write_text("")
    mine.add([row_of(runs[0])])
    assert done.exists()
    mine.add([row_of(runs[1])])
    assert not done.exists() and other.exists()


def test_checkpoints_without_results_are_not_taken_for_those_of_a_new_sweep(tmp_path):
    """Their models may have had other rates."""
    mine = folder.Folder(tmp_path, "mine", [RUN], resume=False)
    mine.checkpoint([RUN]).write_text("")
    mine.file.unlink()
    with pytest.raises(ValueError, match="is not a sweep's folder: expected an empty or a new one"):
        folder.Folder(tmp_path, "mine", [RUN], resume=True)


DAMAGES = {
    "cut": lambda content: content[:400],
    "empty": lambda content: b"",
    "other": lambda content: b"x" * 900,
    "one bit of a weight": lambda content: content[:9000] + bytes([content[9000] ^ 1]) + content[9001:],
    "a pickle of other bytes": lambda content: content.replace(b"epochs_done", b"epochs_\x80one"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_of_a_group_is_told_and_left_out(tmp_path, damage, caplog):
    runs = [replace(RUN, epochs=2, seed=seed) for seed in (1, 2)]
    whole = train(runs, CPU, None, None)
    path = tmp_path / "group.pt"
    assert train(runs, CPU, path, time.monotonic() - 1) is None
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        again = train(runs, CPU, path, None)
    assert "group.pt is damaged" in caplog.text
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in whole]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_as_if_nothing_had_happened(tmp_path):
    """kill -9 of the process at some moment, several times over."""
    start = "import sys; from synthetics import sweeps, __main__ as command; from dataclasses import replace\n"
    start += "sweeps.SWEEPS['debug'] = [replace(run, epochs=6) for run in sweeps.debug]\n"
    start += "sys.exit(command.main(sys.argv[1:]))"
    root = Path(__file__).resolve().parents[1]

    def begun(out: Path) -> subprocess.Popen:
        arguments = ["debug", "--out", str(out), "--device", "cpu", "--workers", "1", "--resume"]
        return subprocess.Popen([sys.executable, "-c", start, *arguments], cwd=root, stdout=subprocess.PIPE)

    assert begun(tmp_path / "whole").wait() == 0
    for seen in (1, 2, 3):
        process = begun(tmp_path / "cut")
        unfinished = tmp_path / "cut" / "unfinished"
        before, deadline = None, time.monotonic() + 60
        changes = 0
        while changes < seen and process.poll() is None and time.monotonic() < deadline:
            now = [(p.name, p.stat().st_mtime_ns) for p in unfinished.glob("*.pt")] if unfinished.exists() else None
            changes, before = changes + (now != before), now
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert begun(tmp_path / "cut").wait() == 0

    def results(out: Path) -> dict:
        rows = folder.read(out)["rows"]
        return {row["run"]: (row["accuracy"], row["epochs_read"]) for row in rows}

    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    assert not list((tmp_path / "cut" / "unfinished").iterdir())


def test_own_methods_are_runs_like_others(tmp_path, monkeypatch):
    runs = [replace(RUN, method=Method("sliding then linear", "SL", "other-order"), seed=seed) for seed in (1, 2)]
    monkeypatch.setitem(sweeps.SWEEPS, "debug", runs)
    assert command.main(["debug", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert {row["reads"] for row in folder.read(tmp_path / "out")["rows"]} == {"other-order"}


def test_several_workers_begin_with_the_longest_groups(tmp_path, monkeypatch):
    runs = [replace(RUN, width=8), replace(RUN, width=32), replace(RUN, width=16), replace(RUN, width=16, seed=2)]
    runs.append(replace(RUN, width=24, method=METHODS["twice"]))
    monkeypatch.setitem(sweeps.SWEEPS, "mine", runs)
    seen: list[list[int]] = []

    def watch(work, *arguments):
        seen.append([group[0].width for group, _ in work])
        return iter(())

    monkeypatch.setattr(command, "train_all", watch)
    for workers in ("2", "1"):
        command.main(["mine", "--out", str(tmp_path / workers), "--device", "cpu", "--workers", workers])
    assert seen == [[24, 32, 16, 8], [8, 32, 16, 24]]


@pytest.mark.parametrize("name", ["figure2", "figure2_small"])
def test_stored_results_are_of_the_sweep_as_it_is(name, tmp_path):
    shutil.copytree(Path(__file__).resolve().parent.parent / "synthetics" / "results" / name, tmp_path / name)
    opened = folder.Folder(tmp_path / name, name, sweeps.SWEEPS[name], resume=True)
    known = {run.name for run in sweeps.SWEEPS[name]}
    assert opened.rows and set(opened.rows) <= known
