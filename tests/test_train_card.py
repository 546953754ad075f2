"""What the exported model's card and training.json say about a run is true, and names no folder of this machine."""

import json

import pytest
import torch

pytest.importorskip("hydra")

from train_runs import composed, trained

import jrt
from train.export import _without_path
from train.run import train


def test_the_command_keeps_names_and_loses_folders(tmp_path):
    mixture = "data.mixture=[{folder: /a/b, weight: 0.7}, {folder: c/d, weight: 0.3}]"
    for argument, told in (
        ("experiment=slimpj/jrt", "experiment=slimpj/jrt"),
        ("data.path=DKYoon/SlimPajama-6B", "data.path=DKYoon/SlimPajama-6B"),
        ("data.tokenizer=EleutherAI/gpt-neox-20b", "data.tokenizer=EleutherAI/gpt-neox-20b"),
        (f"data.path={tmp_path}", "data.path=PATH"),
        ("data.tokenizer=~/mine", "data.tokenizer=PATH"),
        ("data.folder=data/mine", "data.folder=PATH"),
        ("output=/a b/c", "output=PATH"),
        ("/nowhere/configs", "PATH"),
        (mixture, "data.mixture=[{folder: PATH, weight: 0.7}, {folder: PATH, weight: 0.3}]"),
    ):
        assert _without_path(argument) == told


def test_a_mixture_is_told_with_its_weights(text, tmp_path):
    mixture = f"[{{folder: {text}, weight: 0.7}}, {{folder: {text}, weight: 0.3}}]"
    overrides = ["data=text", "data.folder=null", f"data.mixture={mixture}", "data.length=128", "data.workers=0"]
    overrides += ["experiment=debug", f"output={tmp_path}", "model.pattern=C", "trainer.max_steps=1"]
    train(composed(*overrides, "data.validation_windows=4"))
    record = json.loads((tmp_path / "training.json").read_text())
    tokens = json.loads((text / "manifest.json").read_text())["splits"]["train"]["tokens"]
    assert [part["weight"] for part in record["corpus"]["mixture"]] == [0.7, 0.3]
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"weight 0.7: {tokens:,} tokens" in card and f"weight 0.3: {tokens:,} tokens" in card
    assert str(text) not in card + json.dumps(record)


def test_a_dataset_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "validation"):
        (source / f"{split}.jsonl").write_text(json.dumps({"text": "open the door. " * 400}) + "\n")
    overrides = ["experiment=debug", "data=hub", f"data.path={source}", "data.tokenizer=mini", "data.length=128"]
    overrides += [f"output={tmp_path}/run", "model.pattern=C", "trainer.max_steps=1", "name=2026", "preset=debug"]
    train(composed(*overrides))
    folder = tmp_path / "run" / "model"
    card = (folder / "README.md").read_text()
    assert "| data | a dataset of this machine (train_split train) |" in card and str(tmp_path) not in card
    assert jrt.load(str(folder)) and len(jrt.load_tokenizer(str(folder))) == 4096


def test_validation_figures_of_a_moving_average_are_its_own(text, tmp_path):
    metrics = trained(text, tmp_path, "model.pattern=C", "trainer.max_steps=3", "export=true", "trainer.ema=0.999")
    told = json.loads((tmp_path / "training.json").read_text())["metrics"]
    assert told["train/loss"] == metrics["train/loss"] and told["validation/loss"] != metrics["validation/loss"]
    fresh = trained(text, tmp_path / "fresh", "model.pattern=C", "trainer.max_steps=1", "+task.schedule.start=0.0")
    # An average this slow is nearly the initial weights, which a step at rate 0 leaves as they are.
    assert told["validation/loss"] == pytest.approx(fresh["validation/loss"], abs=1e-3)
    assert abs(metrics["validation/loss"] - fresh["validation/loss"]) > 5e-3
    assert torch.isfinite(jrt.load(str(tmp_path / "model")).model.embedding.weight).all()
