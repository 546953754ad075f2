"""A run that is stopped anywhere and resumed equals one that never stopped. A run that cannot be resumed says why."""

import dataclasses
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("hydra")

from train_runs import curve, trained

from jrt.system.locks import only_writer
from train.run import code_version

EVERY_TWO = ("trainer.checkpoint_every=2", "trainer.max_steps=6", "model.pattern=CPS")


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> list:
    output = tmp_path_factory.mktemp("whole")
    trained(text, output, *EVERY_TWO)
    return curve(output)


def killed_at(place: str, count: int, run) -> None:
    """Runs in a child process that kills itself at the `count`-th call of a function of the training code."""
    child = os.fork()
    if child == 0:
        import train.checkpoints
        import train.loop

        owner, name = {"step": (train.loop.Loop, "_step"), "seal": (train.checkpoints, "_seal")}[place]
        function, calls = getattr(owner, name), 0

        def deadly(*arguments):
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        setattr(owner, name, deadly)
        run()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("step", 4),
        ("seal", 2),
        pytest.param("step", 1, marks=SLOW),
        pytest.param("step", 6, marks=SLOW),
        pytest.param("seal", 1, marks=SLOW),
        pytest.param("seal", 3, marks=SLOW),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(text, tmp_path, whole, place, count):
    killed_at(place, count, lambda: trained(text, tmp_path, *EVERY_TWO))
    trained(text, tmp_path, *EVERY_TWO)
    assert curve(tmp_path) == whole
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_finished_run_that_is_started_again_changes_nothing(text, tmp_path, whole):
    trained(text, tmp_path, *EVERY_TWO)
    metrics = trained(text, tmp_path, *EVERY_TWO)
    assert curve(tmp_path) == whole and metrics["train/loss"] == float(whole[-1][1])


def test_readers_in_other_processes_go_on_too(text, tmp_path, whole):
    trained(text, tmp_path, *EVERY_TWO, "trainer.max_steps=3", "trainer.checkpoint_every=3", "data.workers=2")
    trained(text, tmp_path, *EVERY_TWO, "data.workers=1")
    assert [row[:4] for row in curve(tmp_path)] == [row[:4] for row in whole]


@pytest.fixture(scope="module")
def stopped(text, tmp_path_factory) -> Path:
    """A run that stopped after step 4, with checkpoints of steps 2 and 4."""
    output = tmp_path_factory.mktemp("stopped")
    trained(text, output, *EVERY_TWO, "trainer.max_steps=4")
    return output


@pytest.fixture
def run(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "__0_0.distcp").write_bytes((folder / "__0_0.distcp").read_bytes()[:2000]),
        lambda folder: (folder / "__0_0.distcp").write_bytes(bytes((folder / "__0_0.distcp").stat().st_size)),
        lambda folder: (folder / ".metadata").unlink(),
        lambda folder: (folder / "run.json").write_text("{"),
        lambda folder: (folder / "run.json").unlink(),
    ],
    ids=["cut", "zeros", "missing", "facts cut", "no facts"],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(text, run, whole, damage, caplog):
    damage(run / "checkpoints" / "step-0000004")
    trained(text, run, *EVERY_TWO)
    assert curve(run) == whole
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("step-0000004 is damaged" in message for message in warned)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=7", "seed"),
        ("task.schedule.peak=1.0", "rate"),
        ("preset=mini-jrt", "preset and model"),
        ("model.width=64", "model"),
        ("task.objective.masked_share=0.3", "objective"),
        ("data.length=96", "data"),
        ("trainer.global_batch=8", "batch"),
        ("steps=9", "rate"),
    ],
)
def test_another_run_is_named_before_a_step_is_taken(text, run, override, named):
    before = sorted(run.rglob("*"))
    with pytest.raises(ValueError, match=f"begun with another {named} ") as error:
        trained(text, run, *EVERY_TWO, override)
    assert "\n" not in str(error.value)
    assert sorted(run.rglob("*")) == before


def test_other_code_is_named_and_can_be_accepted(text, run, monkeypatch):
    monkeypatch.setattr("train.run.code_version", lambda: "another")
    with pytest.raises(ValueError, match="another code") as error:
        trained(text, run, *EVERY_TWO)
    assert code_version() in str(error.value)
    assert trained(text, run, *EVERY_TWO, "accept=[code]")["train/loss"] > 0
    with pytest.raises(ValueError, match="expected names out of"):
        trained(text, run, *EVERY_TWO, "accept=[everything]")


def test_accepted_settings_of_adamw_are_the_new_ones(text, run, monkeypatch):
    """A checkpoint holds the settings that AdamW had when it was written."""
    from train.loop import Loop

    seen, fit = [], Loop.fit
    monkeypatch.setattr(Loop, "fit", lambda self, loggers: seen.append(self.training.optimizer) or fit(self, loggers))
    changed = ("task.schedule.weight_decay=0.5", "+task.schedule.betas=[0.8,0.9]", "+task.schedule.eps=1e-6")
    trained(text, run, *EVERY_TWO, "accept=[rate]", *changed)
    settings = [(group["weight_decay"], tuple(group["betas"]), group["eps"]) for group in seen[0].param_groups]
    assert settings == [(0.5, (0.8, 0.9), 1e-6), (0.0, (0.8, 0.9), 1e-6)]
    assert all(value["step"] == 6 for value in seen[0].state.values())  # the moments went on


def test_an_average_can_begin_on_the_way(text, run, caplog):
    with pytest.raises(ValueError, match=r"accept=\[ema\]"):
        trained(text, run, *EVERY_TWO, "trainer.max_steps=8", "trainer.ema=0.9")
    caplog.set_level("INFO")
    trained(text, run, *EVERY_TWO, "trainer.max_steps=8", "trainer.ema=0.9", "accept=[ema]")
    assert "has no moving average: it begins at the weights of step 4" in caplog.text
    caplog.clear()
    trained(text, run, *EVERY_TWO, "trainer.max_steps=10", "trainer.ema=0.9", "accept=[ema]")
    assert "has no moving average" not in caplog.text
    trained(text, run, *EVERY_TWO, "trainer.max_steps=12", "accept=[ema]")  # and end


def test_a_folder_has_one_run_at_a_time(text, run, monkeypatch):
    monkeypatch.setattr("train.run.PATIENCE", 0.2)
    before = (run / "metrics.csv").read_bytes()
    with only_writer(run, 0), pytest.raises(ValueError, match="another process is writing to"):
        trained(text, run, *EVERY_TWO, "trainer.max_steps=8")
    assert (run / "metrics.csv").read_bytes() == before


def test_a_folder_with_a_run_can_be_refused(text, run):
    with pytest.raises(ValueError, match="holds a run already"):
        trained(text, run, *EVERY_TWO, "resume=false")


def test_kept_checkpoints(text, tmp_path):
    keep = ("trainer.checkpoint_every=1", "trainer.validate_every=1", "trainer.keep_last=1")
    best = ("trainer.keep_best=1", "trainer.keep_every=4")
    trained(text, tmp_path, "model.pattern=C", "trainer.max_steps=6", *keep, *best)
    losses = {int(row[0]): float(row[5]) for row in curve(tmp_path)}
    expected = {4, 6, min(losses, key=losses.__getitem__)}
    assert {int(p.name[5:]) for p in (tmp_path / "checkpoints").glob("step-*")} == expected


def test_the_best_checkpoint_is_chosen_by_its_own_loss(text, tmp_path):
    """Checkpoints are written more often than the run is validated."""
    settings = ("trainer.checkpoint_every=2", "trainer.validate_every=5", "trainer.keep_best=3")
    trained(text, tmp_path, "model.pattern=C", "trainer.max_steps=6", *settings)
    losses = {int(row[0]): float(row[5]) for row in curve(tmp_path) if row[5]}
    assert set(losses) == {2, 4, 5, 6}
    for step in (2, 4, 6):
        facts = json.loads((tmp_path / "checkpoints" / f"step-{step:07d}" / "run.json").read_text())
        assert facts["validation_loss"] == losses[step]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(text, tmp_path):
    settings = ("trainer.log_every=6", "trainer.checkpoint_every=2", "trainer.validate_every=6")
    with pytest.raises(ValueError, match=r"loss of step \d is (nan|inf)") as error:
        trained(text, tmp_path, "model.pattern=C", "task.schedule.peak=1e30", "task.schedule.clip=1e30", *settings)
    assert "the batch is in" in str(error.value)
    saved = list(tmp_path.glob("not-finite-step-*.pt"))
    assert len(saved) == 1 and torch.load(saved[0])["ids"].shape == (4, 129)
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        assert int(folder.name[5:]) <= int(saved[0].name.split("-")[3])


def test_a_full_disk_leaves_the_checkpoints_that_are_there(text, run, whole):
    """The limit on a file's size stands for a disk that is full."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(ValueError, match=r"step 6 could not be written .* step 4 is whole") as error:
            trained(text, run, *EVERY_TWO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step-0000002", "step-0000004"]
    assert (run / "checkpoints" / "last.ckpt").read_text() == "step-0000004\n"
    trained(text, run, *EVERY_TWO)
    # It was validated where it stopped, too: the last column differs there.
    assert [row[:5] for row in curve(run)] == [row[:5] for row in whole]


def test_checkpoints_that_are_all_damaged_are_told_and_left_alone(text, run):
    """A run that began again would delete its own checkpoints: those of later steps are newer by their numbers."""
    for folder in (run / "checkpoints").glob("step-*"):
        (folder / ".metadata").unlink()
    before = sorted(run.rglob("*"))
    for more in ((), ("resume=false",)):
        with pytest.raises(ValueError, match=r"all checkpoints in .* are damaged: remove this folder"):
            trained(text, run, *EVERY_TWO, *more)
    assert sorted(run.rglob("*")) == before


def test_an_older_damaged_checkpoint_is_not_the_best_one(text, run):
    (run / "checkpoints" / "step-0000002" / "run.json").write_text("{")
    trained(text, run, *EVERY_TWO, "trainer.keep_best=1", "trainer.keep_last=1")
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == ["step-0000006"]


@pytest.mark.parametrize("change", [{"tokens": 9}, {"step": 5}, {"files": {}}, {"identity": {}}])
def test_a_changed_record_of_a_checkpoint_is_noticed(text, run, whole, change, caplog):
    record = run / "checkpoints" / "step-0000004" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    trained(text, run, *EVERY_TWO)
    assert curve(run) == whole
    assert "run.json is not what was written" in caplog.text


def test_a_gradient_that_is_not_finite_is_told_before_anything_is_saved(text, tmp_path, monkeypatch):
    """The loss of that step is finite; the weights after it are not."""
    clip, calls = torch.nn.utils.clip_grad_norm_, 0

    def broken(parameters, *arguments):
        nonlocal calls
        calls, parameters = calls + 1, list(parameters)
        if calls == 3:
            parameters[0].grad.view(-1)[0] = float("nan")
        return clip(parameters, *arguments)

    monkeypatch.setattr("train.loop.nn.utils.clip_grad_norm_", broken)
    every = ("trainer.checkpoint_every=1", "trainer.log_every=1", "model.pattern=C", "trainer.keep_last=1")
    with pytest.raises(ValueError, match="the gradient norm of step 2 is nan"):
        trained(text, tmp_path, *every)
    assert torch.load(tmp_path / "not-finite-step-2-rank-0.pt")["ids"].shape == (4, 129)
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-0000002"]
    assert trained(text, tmp_path, *every)["train/loss"] > 0  # from the checkpoint before it


def test_a_validation_loss_that_is_not_finite_stops_the_run(text, tmp_path, monkeypatch):
    monkeypatch.setattr("train.loop.Loop.validate", lambda self: {"validation/loss": float("nan")})
    with pytest.raises(ValueError, match="the validation loss after step 2 is nan"):
        trained(text, tmp_path, "model.pattern=C", "trainer.checkpoint_every=3")
    assert not (tmp_path / "checkpoints").exists()


def test_a_table_of_something_else_is_left_alone(text, tmp_path):
    (tmp_path / "metrics.csv").write_text("name,score\na,1\n")
    with pytest.raises(ValueError, match=r"metrics\.csv is not the metrics\.csv of a run"):
        trained(text, tmp_path, *EVERY_TWO)
    assert (tmp_path / "metrics.csv").read_text() == "name,score\na,1\n"


def test_a_full_disk_leaves_no_half_of_a_model(text, tmp_path):
    trained(text, tmp_path, *EVERY_TWO, "export=true")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(ValueError, match="the model could not be written") as error:
            trained(text, tmp_path, *EVERY_TWO, "export=true")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert not (tmp_path / ".model.partial").exists()


def test_a_step_without_a_token_to_predict_stops_the_run(text, tmp_path, monkeypatch):
    from jrt.training.objective import IGNORED, Objective

    targets = Objective.targets

    def nothing(self, *arguments):
        found = targets(self, *arguments)
        return dataclasses.replace(found, labels=found.labels.new_full(found.labels.shape, IGNORED))

    monkeypatch.setattr(Objective, "targets", nothing)
    with pytest.raises(ValueError, match="step 0 has no token to predict"):
        trained(text, tmp_path, "model.pattern=C")
    assert not (tmp_path / "checkpoints").exists()
