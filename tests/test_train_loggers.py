"""Where metrics go besides metrics.csv: one line if that cannot be, and one curve for a run in parts."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("hydra")

from train_runs import trained


class StandIn(ModuleType):
    """The part of wandb that is used, without its server."""

    Error = type("Error", (Exception,), {})

    def __init__(self, key: bool) -> None:
        super().__init__("wandb")
        self.key, self.begun, self.logged = key, [], []
        self.__spec__ = ModuleSpec("wandb", None)

    def login(self, *, prompt: bool = True) -> bool:
        assert not prompt, "nobody can answer"
        return self.key

    def init(self, **settings: object) -> SimpleNamespace:
        self.begun.append(settings)
        return SimpleNamespace(
            id=settings["id"] or f"run{len(self.begun)}",
            log=lambda values, step: self.logged.append((step, values)),
            finish=lambda: None,
        )


SMALL = ("model.pattern=C", "trainer.checkpoint_every=1", "logger=wandb")


def test_a_run_in_parts_is_one_curve(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := StandIn(key=True))
    for last in (2, 4):
        trained(text, tmp_path / "run", *SMALL, f"trainer.max_steps={last}")
    assert [settings["id"] for settings in wandb.begun] == [None, "run1"]
    assert [step for step, _ in wandb.logged] == [1, 2, 3, 4] and "train/loss" in wandb.logged[0][1]


@pytest.mark.parametrize("older", [False, True])
def test_no_key_is_one_line(text, tmp_path, monkeypatch, older):
    monkeypatch.setitem(sys.modules, "wandb", wandb := StandIn(key=False))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if older:
        wandb.login, wandb.api = (lambda relogin=None: True), SimpleNamespace(api_key=None)
    with pytest.raises(ValueError, match="logger=wandb: no key: run `wandb login`"):
        trained(text, tmp_path / "run", *SMALL)
    monkeypatch.setenv("WANDB_MODE", "offline")
    trained(text, tmp_path / "run", *SMALL, "trainer.max_steps=1")
    assert len(wandb.begun) == 1


def test_what_wandb_says_is_one_line(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := StandIn(key=True))

    def fails(**settings: object) -> None:
        raise wandb.Error("the server\n  does not answer")

    wandb.init = fails
    with pytest.raises(ValueError, match=r"^logger=wandb: the server does not answer$"):
        trained(text, tmp_path / "run", *SMALL)
