"""Settings of a training run: a wrong kind is one line, and a run is gone on with only under the same settings."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hydra")

from train_runs import ROOT, composed, trained

from jrt.training.objective import Objective, prefix_of
from jrt.training.settings import check_fields, check_seed
from train.data.batches import HubData, TextData
from train.data.loader import loader
from train.loop import Trainer
from train.optimizer import Schedule
from train.run import train

ONE_STEP = ("trainer.max_steps=1", "model.pattern=CP", "trainer.checkpoint_every=1")
# For each kind of setting, what cannot be one. YAML knows no `no`: Hydra reads it as a word, which Python calls true.
WRONG = {
    bool: ["no", "off", "maybe", "1", "[true]"],
    int: ["true", "1.5", "x", "[1]", "nan"],
    float: ["true", "x", "[1]", "nan", "inf"],
}
SETTINGS = {
    bool: [
        *("trainer.compile", "trainer.activation_checkpointing", "task.objective.predicts_first"),
        *("export", "resume"),
    ],
    int: [
        *("trainer.max_steps", "trainer.devices", "trainer.global_batch", "trainer.rows", "trainer.keep_best"),
        *("task.objective.mask_token", "task.objective.ignored_token", "task.objective.prefix_length"),
        *("task.schedule.steps", "task.schedule.warmup", "seed", "score_items"),
        *("data.length", "data.seed", "data.validation_windows", "data.validation_rows", "data.workers"),
    ],
    float: [
        *("trainer.ema", "task.objective.masked_weight", "task.objective.masked_share", "task.objective.masked_rows"),
        *("task.schedule.peak", "task.schedule.weight_decay", "task.schedule.clip", "+task.schedule.eps"),
    ],
}


@pytest.mark.parametrize("kind", WRONG)
def test_settings_of_a_wrong_kind_are_refused(text, tmp_path, kind):
    for name in SETTINGS[kind]:
        for value in WRONG[kind]:
            with pytest.raises(ValueError, match=name.split(".")[-1]) as error:
                trained(text, tmp_path, *ONE_STEP, f"{name}={value}")
            assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["0.9", "[0.9]", "[0.9,true]"])
def test_betas_are_two_numbers(text, tmp_path, value):
    with pytest.raises(ValueError, match=r"schedule\.betas is .*: expected a list of a number and a number"):
        trained(text, tmp_path, *ONE_STEP, f"+task.schedule.betas={value}")
    assert not list(tmp_path.iterdir())


def test_fields_are_checked_by_their_types():
    @dataclasses.dataclass
    class Sizes:
        width: int | None = None
        pair: tuple[float, float] = (1, 2.5)
        name: str = "x"

    check_fields(Sizes(), "sizes")
    check_fields(Sizes(3, [1, 2]), "sizes")
    for wrong, told in (
        (Sizes(width=2.0), r"sizes\.width is 2\.0: expected a whole number or null"),
        (Sizes(pair=(1, "2")), r"sizes\.pair is \(1, '2'\): expected a list of a number and a number"),
        (Sizes(name=None), r"sizes\.name is None: expected a name"),
    ):
        with pytest.raises(ValueError, match=told):
            check_fields(wrong, "sizes")
    for seed in (-1, 1 << 63, True):
        with pytest.raises(ValueError, match="expected a whole number from 0 to"):
            check_seed("seed", seed)
    for made in (Trainer(max_steps=1), Schedule(100, betas=[0.9, 0.99]), Objective("jrt", 7)):
        check_fields(made, "default")


def test_an_objective_has_ids_of_the_model_and_a_prefix(text, tmp_path):
    for name in ("mask_token", "ignored_token"):
        with pytest.raises(ValueError, match=rf"objective\.{name} is 4096: expected an id below the model's 4096 rows"):
            trained(text, tmp_path, *ONE_STEP, f"task.objective.{name}=4096")
    with pytest.raises(ValueError, match="prefix_length is 0, but pattern 'CP' has a prefix encoder"):
        trained(text, tmp_path, *ONE_STEP, "task.objective.prefix_length=0")
    import jrt

    assert prefix_of(jrt.presets()["attention-360m"], "causal", 64, 0) == 0


def test_figures_are_asked_only_of_data_with_a_tokenizer(tmp_path):
    for split in ("train", "validation"):
        (np.arange(2000) % 4000).astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    with pytest.raises(ValueError, match="score_items asks questions, and the data does not say which tokenizer"):
        trained(tmp_path, tmp_path / "out", *ONE_STEP, "score_items=4", "export=true")


def test_another_order_or_text_is_named(text, tmp_path):
    """The length of the run decides GPT-NeoX's order; a file may be replaced by one of the same size."""
    folder = Path(shutil.copytree(text, tmp_path / "text"))
    neox = ("data=text", "data.length=128", "data.order=neox", "data.validation_windows=4", "data.workers=0")
    out, more = tmp_path / "out", ("trainer.max_steps=2", "model.pattern=C")
    trained(folder, out, *ONE_STEP, "model.pattern=C", *neox, "data.neox_windows=50")
    with pytest.raises(ValueError, match=r"another data .*neox_windows 50, now 60"):
        trained(folder, out, *ONE_STEP, *more, *neox, "data.neox_windows=60")
    with pytest.raises(ValueError, match=r"another seed \(seed: 1111, now \{'run': 1111, 'data': 5\}\)"):
        trained(folder, out, *ONE_STEP, *more, *neox, "data.neox_windows=50", "data.seed=5")
    content = bytearray((folder / "train.bin").read_bytes())
    content[2000] ^= 1
    (folder / "train.bin").write_bytes(content)
    with pytest.raises(ValueError, match="another data"):
        trained(folder, out, *ONE_STEP, *more, *neox, "data.neox_windows=50")


def dataset(folder: Path, train: list, validation: list) -> str:
    folder.mkdir()
    for split, texts in (("train", train), ("validation", validation)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder)


TEXTS = [f"open door {i}, then close it. " * 20 for i in range(60)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_says_what_is_wrong_with_it(tmp_path, streaming, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def opened(path: str, **settings) -> HubData:
        given = {"length": 128, "seed": 1, "tokenizer": "mini", "streaming": streaming} | settings
        return HubData(path, **given)

    good = dataset(tmp_path / "good", TEXTS, TEXTS[:8])
    assert opened(good).validation_batches == opened(good, validation_windows=9).validation_batches  # all there are
    for name, value in (("validation_windows", 0), ("validation_rows", 0), ("length", 0), ("seed", -1)):
        with pytest.raises(ValueError, match=rf"data\.{name} is {value}: expected a whole number"):
            opened(good, **{name: value})
    with pytest.raises(ValueError, match="no tokenizer 'nowhere/at all'"):
        opened(good, tokenizer="nowhere/at all")
    short = dataset(tmp_path / "short", TEXTS, ["a few words"])
    with pytest.raises(ValueError, match=r"holds less than one window of 128 tokens|a window needs 129"):
        opened(short)
    empty = dataset(tmp_path / "null", [*TEXTS[:3], None, *TEXTS], TEXTS[:8])
    with pytest.raises(ValueError, match="a document is a NoneType: expected text"):
        opened(empty).part(0, 60, 0, 60)
    with pytest.raises(ValueError, match=r"data\.streaming is no: expected true or false"):
        opened(good, streaming="no")


def test_an_error_in_a_reader_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = dataset(tmp_path / "few", TEXTS[:10], TEXTS[:8])
    batches = loader(HubData(path, 128, 1, "mini", streaming=True), 0, 9, 0, 1, 8)
    assert next(batches)["ids"].shape == (8, 129)
    with pytest.raises(ValueError, match=r"^step \d: the stream ended after \d+ windows of 128 tokens.*$") as error:
        list(batches)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_another_tokenizer_of_a_dataset_is_named(tmp_path, streaming, monkeypatch):
    from jrt_recall.tokenizers import shipped_tokenizer

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("one", "other"):
        shipped_tokenizer().save_pretrained(tmp_path / name)
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[1000:1002]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    path = dataset(tmp_path / "texts", TEXTS, TEXTS[:8])
    overrides = ["experiment=debug", "data=hub", f"data.path={path}", "data.length=128", f"data.streaming={streaming}"]
    overrides += [*ONE_STEP, "data.validation_windows=4", "export=false", f"output={tmp_path}/out"]
    train(composed(*overrides, f"data.tokenizer={tmp_path}/one"))
    with pytest.raises(ValueError, match=r"another data .*tokenizer"):
        train(composed(*overrides, f"data.tokenizer={tmp_path}/other", "trainer.max_steps=2"))


def test_a_folders_name_may_have_any_characters(text, tmp_path):
    folder = Path(shutil.copytree(text, tmp_path / "te[x]t*, {1}"))
    data = TextData(128, 1, folder=str(folder))
    assert data.windows == TextData(128, 1, folder=str(text)).windows


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 0, -1, True])
def test_weights_of_a_mixture_are_positive_numbers(text, weight):
    with pytest.raises(ValueError, match="the weight a positive number"):
        TextData(128, 1, mixture=[{"folder": str(text), "weight": weight}, {"folder": str(text), "weight": 1}])


@pytest.mark.parametrize("windows", [0, -5, 1.5, "x"])
def test_windows_of_the_released_order_are_a_whole_number(text, windows):
    with pytest.raises(ValueError, match=r"data\.neox_windows is"):
        TextData(128, 1, folder=str(text), order="neox", neox_windows=windows)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "train" / "run.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def test_the_command_without_an_experiment_is_one_line(tmp_path):
    done = command(f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 2 and "choose an experiment" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_an_empty_jrt_home_counts_as_none(tmp_path):
    done = command("experiment=slimpj/jrt", "trainer=cpu", f"hydra.run.dir={tmp_path}", HOME=str(tmp_path), JRT_HOME="")
    assert f"no train.bin in {tmp_path}/.cache/jrt/slimpajama-6b" in done.stdout + done.stderr


@pytest.mark.slow
def test_several_devices_get_what_the_command_got(text, tmp_path):
    """An experiment of the user's own folder, and an output whose name Hydra's grammar would take apart."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - debug\nname: mine\npreset: debug\ntrainer:\n  max_steps: 1\n"
    )
    out = tmp_path / "it's, [here] {1}=a"
    quoted = str(out).replace("'", "\\'")
    options = [f"data.folder={text}", "export=false", "trainer.devices=2", "trainer.rows=2", f"output='{quoted}'"]
    done = command(f"--config-dir={tmp_path}", "experiment=mine", *options)
    assert done.returncode == 0 and (out / "metrics.csv").is_file(), done.stderr
    wrong = command("experiment=debug", *options[:-1], f"output={tmp_path}/wrong", "data.length=100000")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stdout + wrong.stderr, wrong.stderr
    assert (wrong.stdout + wrong.stderr).count("a window needs 100001") == 1


@pytest.mark.slow
def test_each_run_of_a_sweep_has_its_own_folder(text, tmp_path):
    small = ["experiment=debug", f"data.folder={text}", "export=false", "trainer.max_steps=1", "model.pattern=C"]
    done = command("-m", *small, f"output={tmp_path}/sweep", "seed=1,2")
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / "sweep" / number / "metrics.csv").is_file() for number in "01")
