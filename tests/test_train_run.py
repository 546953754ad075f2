"""Training runs: every configuration is built and trained for a step; wrong settings are refused; exports load."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("hydra")

from hydra.core.override_parser.types import ValueType
from hydra.utils import instantiate
from omegaconf import OmegaConf
from train_runs import CONFIGS, ROOT, composed, curve, trained

import jrt
from jrt.model import LanguageModel
from jrt.training.loss import ModelWithLoss, loss_of, room_for
from train.data.batches import RecallData
from train.loop import Trainer
from train.optimizer import MovingAverage
from train.run import model_of, objective_of, train

EXPERIMENTS = sorted(
    str(path.relative_to(CONFIGS / "experiment").with_suffix(""))
    for path in (CONFIGS / "experiment").rglob("*.yaml")
    if not path.name.startswith("common")
)
BASELINES = [name for name in EXPERIMENTS if name.startswith("baselines/")]


class Windows:
    """Stands for data of a configuration's length, without files."""

    tells_prefix = False

    def __init__(self, length: int, tells_prefix: bool) -> None:
        self.length, self.tells_prefix = length, tells_prefix

    def tokenizer(self) -> None:
        return None


NARROW = {"width": 64, "mlp_width": 64, "vocab_rows": 128, "heads": 4, "linear_heads": 4, "rotary_dim": 8}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_built_and_steps_once(experiment, tmp_path):
    config = composed(f"experiment={experiment}", f"output={tmp_path}")
    full = model_of(config)
    with torch.device("meta"):
        assert sum(p.numel() for p in LanguageModel(full).parameters()) > 0
    data = Windows(config.data.get("length") or 64, "recipe" in config.data)
    objective, _ = objective_of(config, full, data)
    assert objective.kind == ("jrt" if full.has("P") else "causal")
    trainer, schedule = instantiate(config.trainer), instantiate(config.task.schedule)
    assert trainer.max_steps == schedule.steps == config.steps
    if trainer.global_batch:
        rows = trainer.rows or trainer.global_batch  # null: all in one pass
        assert trainer.passes(trainer.global_batch) * rows * trainer.devices == trainer.global_batch

    windows = {"window": 8} if isinstance(full.window, int) else {"window": (8,) * len(full.window)}
    encoder = {"enc_length": 8} if full.has("P") else {}
    narrow = dataclasses.replace(full, **NARROW, **windows, **encoder)
    objective = dataclasses.replace(objective, mask_token=127)
    model = LanguageModel(narrow)
    model.init_weights(torch.Generator().manual_seed(0))
    module = ModelWithLoss(model, objective.kind == "jrt")
    ids = torch.randint(0, 120, (2, 17), generator=torch.Generator().manual_seed(0))
    targets = objective(ids, torch.tensor([8, 8]) if encoder else None, torch.Generator())
    room = room_for(objective, 2, 16, 8 if encoder else 0)
    optimizer = schedule.optimizer(model, fused=False)
    losses = []
    for _ in range(2):
        sums = module(targets.input_ids, targets.labels, targets.masked, targets.prefix_length, None, room)[:2]
        loss = loss_of(sums, targets.totals(), objective)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("group", ["data", "logger", "model", "task", "trainer"])
def test_every_configuration_is_composed(group):
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        config = composed("experiment=debug", f"{group}={path.stem}")
        assert OmegaConf.is_config(config) and (not config[group] or OmegaConf.to_container(config[group]) is not None)


def test_the_baselines_read_what_the_release_read():
    config = composed("experiment=baselines/jrt-360m-30b", "trainer.devices=8")
    trainer = instantiate(config.trainer)
    assert (trainer.global_batch, config.data.length) == (256, 2048)
    assert trainer.passes(256) * trainer.rows * 8 == 256
    objective, prefix = objective_of(config, model_of(config), Windows(2048, False))
    assert (prefix, objective.mask_token, objective.masked_share, objective.masked_weight) == (1024, 50263, 0.15, 0.25)
    assert objective.ignored_token == 0
    schedule = instantiate(config.task.schedule)
    assert (schedule.rate(600), schedule.rate(60_000)) == pytest.approx((8e-4, 8e-5))
    assert schedule.decayed == "released"


@pytest.mark.parametrize("experiment", ["debug", "laptop"])
def test_the_small_experiments_run_on_several_devices(experiment):
    trainer = instantiate(composed(f"experiment={experiment}").trainer)
    assert all(dataclasses.replace(trainer, devices=count).passes(trainer.global_batch) == 1 for count in (1, 2, 4))


@pytest.mark.parametrize("experiment", BASELINES)
def test_every_baseline_has_256_rows_a_step_on_any_number_of_devices(experiment):
    trainer = instantiate(composed(f"experiment={experiment}").trainer)
    for devices in (1, 2, 4, 8, 16):
        more = dataclasses.replace(trainer, devices=devices)
        assert more.passes(more.global_batch) * more.rows * devices == 256


def test_a_batch_that_cannot_be_split_is_refused():
    for settings in (dict(devices=3), dict(rows=7), dict(devices=8, rows=64)):
        with pytest.raises(ValueError, match=r"choose trainer\.global_batch"):
            Trainer(max_steps=1, global_batch=256, **settings).passes(256)


def test_a_model_by_its_fields():
    config = composed("experiment=debug", "model.pattern=CPSCC", "model.width=64")
    model = model_of(config)
    assert (model.pattern, model.width, model.mlp_width) == ("CPSCC", 64, jrt.presets()["debug"].mlp_width)
    bare = ["preset=null", "model.pattern=AC", "model.width=32", "model.vocab_rows=64", "model.heads=2"]
    assert model_of(composed("experiment=debug", *bare)).pattern == "AC"
    assert set(composed("experiment=debug").model) == {field.name for field in dataclasses.fields(jrt.Config)}
    with pytest.raises(ValueError, match="mini-jrt"):
        model_of(composed("experiment=debug", "preset=no-such-model"))
    with pytest.raises(ValueError, match="pattern"):
        model_of(composed("experiment=debug", "model.pattern=XYZ"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["task.objective.kind=causal"], "prefix encoder"),
        (["task.objective.kind=mlm"], "causal, prefix-lm, jrt"),
        (["task.objective.mask_token=7"], "word of the data's tokenizer"),
        (["model.enc_length=128"], "nothing is left"),
        (["model.vocab_rows=100"], "4096 entries"),
        (["model.pattern=A", "task.objective.kind=jrt"], "give prefix_length"),
        (["trainer.rows=3"], r"choose trainer\.global_batch"),
        (["trainer.precision=fp8"], "bf16-mixed"),
        (["trainer.accelerator=tpu"], "auto, cpu or gpu"),
        (["trainer.strategy=zero"], "ddp, fsdp"),
        (["trainer.devices=2", "trainer.rows=2"], "1 processes run"),
        (["task.schedule.decayed=all"], "matrices, released"),
        (["data.length=100000"], "a window needs"),
        (["data.validation_windows=0"], "at least 1"),
        (["trainer.global_batch=100000", "trainer.rows=100000"], "a batch needs 100000"),
        (["trainer.ema=1.5"], "between 0 and 1"),
        (["trainer.rows=-2"], r"trainer\.rows is -2: expected a whole number of at least 1"),
        (["trainer.global_batch=0"], r"trainer\.global_batch is 0"),
        (["trainer.log_every=x"], r"trainer\.log_every is x"),
        (["trainer.probe_every=-1"], r"trainer\.probe_every is -1"),
        (["data.length=-4"], r"data\.length is -4"),
        (["data.validation_rows=0"], r"data\.validation_rows is 0"),
        (["task.schedule.peak=-1"], r"schedule\.peak is -1"),
        (["task.schedule.warmup=-1"], r"schedule\.warmup is -1"),
        (["task.objective.masked_weight=-1"], "masked_weight is -1"),
        (["task.objective.ignored_token=-4"], "ignored_token is -4"),
        (["task.schedule.steps=0"], r"schedule\.steps is 0"),
        (["task.schedule.warmup=7"], r"schedule\.warmup is 7, but the schedule ends after 6 steps"),
        (["steps=1", "trainer.max_steps=9"], r"schedule\.warmup is 2, but the schedule ends after 1 steps"),
        (["task.schedule.peak=5e-5"], r"schedule\.floor is .*, above schedule\.peak, which is 5e-05"),
        (["+task.schedule.start=1"], r"schedule\.start is 1, above schedule\.peak"),
        (
            ["trainer.checkpoint_every=0", "trainer.keep_best=1"],
            r"keep_best is 1, but .*checkpoint_every=0 writes none",
        ),
        (["trainer.checkpoint_every=0", "trainer.keep_every=2"], r"keep_every is 2, but"),
        (["trainer.checkpoint_every=4", "trainer.keep_every=6"], r"keep_every is 6: expected a multiple"),
        (
            ["data=text", "data.length=128", "data.workers=0", "data.neox_windows=50"],
            r"data\.neox_windows is for data\.order=neox",
        ),
        (["task.objective.prefix_length=-3"], "prefix_length is -3"),
        (["seed=1.5"], "seed is 1.5"),
        (["accept=code"], r"a list such as \[code\]"),
        (["accept=null"], r"a list such as \[code\]"),
        (["accept=5"], r"a list such as \[code\]"),
        (["task.schedule.clip=0"], r"schedule\.clip is 0: expected a number above 0"),
        (["logger=wandb"], "wandb"),
        (["logger=tensorboard"], "tensorboard"),
    ],
)
def test_wrong_settings_are_one_line(text, tmp_path, overrides, told, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ValueError, match=told) as error:
        trained(text, tmp_path, *overrides)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "checkpoints").exists()


def test_ids_beyond_the_vocabulary_are_named(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        rng.integers(0, 60_000, 4000).astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    with pytest.raises(ValueError, match=r"step 0: token id \d+ is outside"):
        trained(tmp_path, tmp_path / "out")
    (tmp_path / "manifest.json").write_text('{"dtype": "int32"}')
    for split in ("train", "validation"):
        rng.integers(-5, 0, 4000).astype(np.int32).tofile(tmp_path / f"{split}.bin")
    with pytest.raises(ValueError, match=r"step 0: token id -\d is outside"):
        trained(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        ("[]", "no object"),
        ('{"dtype": "float32"}', "dtype is 'float32', expected one of"),
        ('{"dtype": ["uint16"]}', "dtype is"),
        ('{"tokenizer": null}', "'tokenizer'"),
        ('{"splits": [1]}', "'splits'"),
        ('{"splits": {"train": 1}}', r"'splits\.train'"),
    ],
)
def test_a_foreign_manifest_is_named(tmp_path, manifest, told):
    (tmp_path / "manifest.json").write_text(manifest)
    for split in ("train", "validation"):
        np.zeros(4000, np.uint16).tofile(tmp_path / f"{split}.bin")
    with pytest.raises(ValueError, match=told) as error:
        trained(tmp_path, tmp_path / "out")
    assert "prepare the text again" in str(error.value)


@pytest.mark.parametrize("content", ["{", None])
def test_a_damaged_tokenizer_is_named(text, tmp_path, content):
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    if content is not None:
        (folder / "tokenizer" / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer holds no tokenizer that can be read"):
        trained(folder, tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, str(ROOT / "train" / "run.py"), "experiment=debug", "trainer.max_steps=1"]
    command += [f"data.folder={tmp_path / 'text'}", f"output={tmp_path / 'file' / 'run'}"]
    done = subprocess.run(
        [*command, f"hydra.run.dir={tmp_path / 'hydra'}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr, done.stderr
    assert "Not a directory" in done.stdout + done.stderr


@pytest.mark.parametrize("pattern", ["jrt", "prefix-lm"])
def test_any_pattern_takes_any_objective(text, tmp_path, pattern):
    overrides = [f"task.objective.kind={pattern}", "task.objective.prefix_length=32", "model.pattern=CSA"]
    metrics = trained(text, tmp_path, *overrides, "trainer.max_steps=1")
    assert ("train/masked" in metrics) == (pattern == "jrt")


def test_passes_do_not_change_what_is_learnt(text, tmp_path):
    curves = []
    for rows in (4, 1):
        trained(text, tmp_path / str(rows), f"trainer.rows={rows}", "model.pattern=CPS", "trainer.max_steps=3")
        curves.append([[float(value or 0) for value in row] for row in curve(tmp_path / str(rows))])
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-5)


def test_activation_checkpointing_changes_nothing(text, tmp_path):
    trained(text, tmp_path / "plain", "trainer.max_steps=2")
    trained(text, tmp_path / "checkpointed", "trainer.max_steps=2", "trainer.activation_checkpointing=true")
    assert curve(tmp_path / "plain") == curve(tmp_path / "checkpointed")


def test_the_loss_falls(text, tmp_path):
    trained(
        text, tmp_path, "model.pattern=CPSCL", "task.schedule.steps=40", "trainer.max_steps=40", "trainer.log_every=1"
    )
    losses = [float(row[1]) for row in curve(tmp_path)]
    assert len(losses) == 40 and losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("letter", list("CPLSAM"))
def test_each_kind_of_layer_is_one_graph(letter):
    """The whole block is traced without a break; the compiler's own back end is left out, which takes minutes."""
    config = model_of(composed("experiment=debug", f"model.pattern={letter}"))
    model = LanguageModel(config)
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(0, 1000, (2, 64), generator=torch.Generator().manual_seed(0))
    prefix = torch.tensor([32, 32]) if letter == "P" else None
    plain = model.read(ids, prefix_length=prefix)[0]
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True, backend="aot_eager")
    compiled = model.read(ids, prefix_length=prefix)[0]
    torch.testing.assert_close(compiled, plain)
    compiled.sum().backward()
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(text, tmp_path):
    trained(text, tmp_path / "plain", "model.pattern=CS", "trainer.max_steps=2")
    trained(text, tmp_path / "compiled", "model.pattern=CS", "trainer.max_steps=2", "trainer.compile=true")
    one, other = ([[float(v or 0) for v in row] for row in curve(tmp_path / name)] for name in ("plain", "compiled"))
    np.testing.assert_allclose(one, other, rtol=1e-4)


def test_an_export_loads_and_says_where_it_comes_from(text, tmp_path):
    train(composed("experiment=debug", f"output={tmp_path}", f"data.folder={text}"))
    folder = tmp_path / "model"
    model, tokenizer = jrt.load(str(folder)), jrt.load_tokenizer(str(folder))
    assert (text / "tokenizer" / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    ids = tokenizer("read(", return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
    card = (folder / "README.md").read_text(encoding="utf-8")
    record = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert record["steps"] == 6 and record["tokens"] == 6 * 4 * 128
    told = json.loads((text / "manifest.json").read_text())["splits"]["train"]
    assert record["corpus"]["splits"]["train"] == told
    for said in ("library_name: transformers", "seed 1111", "python train/run.py", f"{told['tokens']:,} tokens"):
        assert said in card
    assert str(tmp_path) not in card
    assert (tmp_path / "loss.png").is_file() and len(curve(tmp_path)) == 6


def test_a_moving_average_is_what_is_exported(text, tmp_path):
    trained(text, tmp_path / "averaged", "trainer.max_steps=3", "export=true", "trainer.ema=0.9")
    trained(text, tmp_path / "plain", "trainer.max_steps=3", "export=true")
    averaged, plain = (
        jrt.load(str(tmp_path / name / "model")).model.embedding.weight for name in ("averaged", "plain")
    )
    assert not torch.equal(averaged, plain)


def test_a_moving_average_by_hand():
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    average = MovingAverage([parameter], 0.75)
    parameter.data.fill_(5.0)
    average.update()
    assert average.values[0].item() == 2.0
    average.exchange()
    assert (parameter.item(), average.values[0].item()) == (2.0, 5.0)


def test_recall_sequences_train_and_are_asked(text, tmp_path):
    """The minis' path, small."""
    from jrt_recall import reference_pages
    from jrt_recall.tokenizers import shipped_tokenizer

    from train.tokenizer import encode

    tokens = encode([page.text for page in reference_pages.library_pages()[::8]], shipped_tokenizer())
    for split in ("train", "validation"):
        tokens.tofile(tmp_path / f"{split}.bin")
    overrides = ["experiment=mini/jrt", "trainer=cpu", "preset=debug", "trainer.max_steps=1", "export=false"]
    recipe = ["data.recipe.shapes=[[128, 4, 1.0]]", "data.recipe.shortest_window=24", "data.recipe.longest_window=80"]
    recipe = [f"+{item}" for item in recipe]
    small = [
        *recipe,
        "data.workers=0",
        "data.validation_batches=2",
        f"data.folder={tmp_path}",
        f"output={tmp_path}/out",
    ]
    small.append("model.enc_length=128")
    metrics = train(composed(*overrides, *small))
    assert 0 <= metrics["validation/right"] <= 1 and metrics["train/masked"] > 0
    with pytest.raises(ValueError, match=r"raise model\.enc_length"):
        train(composed(*overrides, *small[:-1], "model.enc_length=64", f"output={tmp_path}/other"))
    data = RecallData(str(tmp_path), instantiate(composed(*overrides, *small).data.recipe, _convert_="all"), 1, 2, 0)
    whole, part = data.part(1, 4, 0, 4), data.part(1, 4, 2, 2)
    assert torch.equal(whole["ids"][2:], part["ids"])


def test_data_that_tells_its_prefix_takes_no_other():
    data = Windows(64, tells_prefix=True)
    for overrides, told in (
        (["task.objective.prefix_length=16"], "prefix_length is 16, but this data says how long each row's prefix is"),
        (["task.objective.kind=causal"], "which the objective 'causal' leaves without a prefix"),
        (["task.objective.kind=both"], "objective 'both': expected one of"),
    ):
        config = composed("experiment=mini/jrt", *overrides)
        with pytest.raises(ValueError, match=told):
            objective_of(config, model_of(config), data)
    config = composed("experiment=mini/attention", "task.objective.prefix_length=16")
    with pytest.raises(ValueError, match="prefix_length is 16, but this data says"):
        objective_of(config, model_of(config), data)


def test_recall_is_probed_while_training(text, tmp_path):
    metrics = trained(text, tmp_path, "model.pattern=C", "trainer.max_steps=2", "trainer.probe_every=2")
    assert 0 <= metrics["recall/score"] <= 100


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub_trains_and_goes_on(tmp_path, streaming, monkeypatch):
    """A folder that `datasets` loads stands for a name on the hub."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    for split, count in (("train", 60), ("validation", 8)):
        rows = [json.dumps({"text": f"open door {i} of {split}, then close it. " * 20}) + "\n" for i in range(count)]
        (source / f"{split}.jsonl").write_text("".join(rows))
    folder = Path(sys.modules["jrt_recall"].__file__).parent / "assets"
    overrides = ["experiment=debug", "data=hub", f"data.path={source}", f"data.tokenizer={folder}", "data.length=128"]
    overrides += [f"data.streaming={streaming}", "data.validation_windows=4", "export=false", "model.pattern=CPS"]
    train(composed(*overrides, f"output={tmp_path}/whole"))
    train(composed(*overrides, f"output={tmp_path}/cut", "trainer.max_steps=3"))
    train(composed(*overrides, f"output={tmp_path}/cut"))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


@pytest.mark.parametrize("launcher", ["joblib", "submitit_slurm"])
def test_sweeps_go_through_hydras_launchers(launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    config = composed("experiment=ablations/table12/linear", f"hydra/launcher={launcher}", hydra_too=True)
    assert launcher.split("_")[0] in config.hydra.launcher._target_.lower()
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    groups = [name for name in EXPERIMENTS if name.startswith("ablations/table11/")]
    override = OverridesParser.create().parse_overrides([f"experiment={','.join(groups)}"])
    jobs = BasicSweeper.split_arguments(override, max_batch_size=None)[0]
    assert sorted(job[0] for job in jobs) == [f"experiment={name}" for name in groups]


def readme_commands() -> list[str]:
    """The commands of train/README.md that start train/run.py, each in one line."""
    text = (ROOT / "train" / "README.md").read_text().replace("\\\n", " ")
    found = re.findall(r"train/run\.py ([^`\n#]+)", text)
    return [command for command in found if "NAME" not in command]


@pytest.mark.parametrize("command", readme_commands())
def test_the_commands_of_the_readme_have_jobs_that_compose(command):
    """Hydra starts no job, and says so in passing, where a sweep's pattern matches nothing."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = shlex.split(command.replace('"$SLURM_NNODES"', "2"))
    for launcher in re.findall(r"hydra/launcher=([a-z]+)", command):
        pytest.importorskip(f"hydra_plugins.hydra_{launcher}_launcher")
    overrides = OverridesParser.create().parse_overrides([word for word in words if "=" in word])
    assert not any(override.is_sweep_override() for override in overrides) or words[0] == "-m"
    assert not any(override.value_type == ValueType.GLOB_CHOICE_SWEEP for override in overrides)
    jobs = BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
    assert len(jobs) == (3 if words[0] == "-m" else 1)
    for job in jobs:
        assert composed(*job).name


def run_command(
    *overrides: str, environment: dict | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train" / "run.py"), *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd)


def test_the_papers_command_shows_the_papers_batch():
    shown = run_command("experiment=baselines/jrt-1b-50b", "trainer.devices=8", "--cfg", "job", "--resolve")
    assert shown.returncode == 0, shown.stderr
    config = OmegaConf.create(shown.stdout)
    assert config.trainer.global_batch == 256 and config.trainer.devices == 8 and config.trainer.max_steps == 100_000


def test_debug_runs_on_a_fresh_clone_without_a_home(tmp_path):
    """The command writes where Hydra does, makes its own data, and needs no HOME."""
    import os

    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | {"JRT_HOME": str(tmp_path)}
    done = run_command(
        "experiment=debug",
        f"hydra.run.dir={tmp_path}/run",
        "trainer.max_steps=2",
        environment=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert {"metrics.csv", "model", "data", "checkpoints", "training.json"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    told = json.loads((tmp_path / "run" / "training.json").read_text())["command"]
    assert told == "python train/run.py experiment=debug hydra.run.dir=PATH trainer.max_steps=2"
