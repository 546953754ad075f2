"""The training path: every configuration composes and instantiates, a run resumes bit for bit, and its export loads."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

hydra = pytest.importorskip("hydra")
pytest.importorskip("pytorch_lightning")

from hydra.utils import instantiate  # noqa: E402
from jrt_recall import reference_pages  # noqa: E402
from jrt_recall.tokenizers import shipped_tokenizer  # noqa: E402

from jrt.objective import mask_prefix, prefix_loss  # noqa: E402
from train.data import FlatText, Steps  # noqa: E402
from train.module import Schedule, Training, parameter_groups, right_answers, weighted_loss  # noqa: E402
from train.run import train  # noqa: E402
from train.tokenizer import encode  # noqa: E402

CONFIGS = ROOT / "train" / "configs"
EXPERIMENTS = sorted(
    str(path.relative_to(CONFIGS / "experiment").with_suffix(""))
    for path in (CONFIGS / "experiment").rglob("*.yaml")
    if not path.name.startswith("common")
)


def composed(*overrides: str):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("config", list(overrides))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = [page.text for page in reference_pages.library_pages()[::8]]
    tokens = encode(texts, shipped_tokenizer())
    for name in ("train", "validation"):
        tokens.tofile(folder / f"{name}.bin")
    return folder


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_instantiates(experiment, tmp_path):
    config = composed(
        f"experiment={experiment}", f"output={tmp_path}", "trainer.accelerator=cpu", "trainer.precision=32-true"
    )
    with torch.device("meta"):
        task = instantiate(config.task)
    assert task.model.config.has("P") == bool(config.data.get("masks_prefix") or config.data.get("prefix"))
    groups = parameter_groups(task.model, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(task.model.parameters()))
    instantiate(config.data)
    for callback in config.callbacks.values():
        instantiate(callback)
    assert instantiate(config.trainer, logger=instantiate(config.logger)).max_steps == config.steps


def test_the_baselines_read_what_the_release_read():
    config = composed("experiment=baselines/jrt-360m-30b")
    per_step = config.data.rows * config.trainer.accumulate_grad_batches
    assert (per_step, config.data.length, config.data.prefix, config.data.mask_token) == (256, 2048, 1024, 50263)
    schedule = instantiate(config.task.schedule)
    assert schedule.rate(0) == pytest.approx(1e-6)
    assert schedule.rate(600) == pytest.approx(8e-4)
    assert schedule.rate(60_000) == pytest.approx(8e-5)


def trained(corpus: Path, output: Path, *overrides: str) -> dict:
    train(composed("experiment=debug", f"output={output}", f"data.folder={corpus}", *overrides))
    return torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_one_that_never_stopped(corpus, tmp_path, workers):
    whole = trained(corpus, tmp_path / "whole", "export=false", f"data.workers={workers}")
    cut = ("export=false", f"data.workers={workers}", "task.schedule.steps=6")
    trained(corpus, tmp_path / "cut", *cut, "trainer.max_steps=3")
    resumed = trained(corpus, tmp_path / "cut", *cut, "resume=true")
    assert resumed["global_step"] == whole["global_step"] == 6
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    assert whole["read"]["tokens"] == resumed["read"]["tokens"] == 6 * 4 * 128


def test_an_export_loads_and_says_where_it_comes_from(corpus, tmp_path):
    import jrt

    trained(corpus, tmp_path)
    folder = tmp_path / "model"
    model, tokenizer = jrt.load(str(folder)), jrt.load_tokenizer(str(folder))
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    stored = model.state_dict()["model.norm.weight"]
    assert torch.equal(stored, last["model.norm.weight"].bfloat16().float())
    ids = tokenizer("read(", return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
    card = (folder / "README.md").read_text(encoding="utf-8")
    record = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert record["steps"] == 6 and record["tokens"] == 3072
    for said in ("library_name: transformers", "seed 1111", "python train/run.py"):
        assert said in card
    assert str(tmp_path) not in card


def test_a_folder_with_a_run_is_not_overwritten_and_nothing_is_not_resumed(corpus, tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        trained(corpus, tmp_path, "resume=true")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(ValueError, match="resume=true"):
        trained(corpus, tmp_path)


def test_a_missing_corpus_and_an_unknown_preset_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"train/corpus\.py"):
        train(composed("experiment=debug", f"output={tmp_path}", f"data.folder={tmp_path}/none"))
    with pytest.raises(ValueError, match="mini-jrt"):
        Training("no-such-model", Schedule(steps=1), False)


def test_flat_text_gives_the_released_objective(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 90, 4000).astype(np.uint16)
    path = tmp_path / "train.bin"
    tokens.tofile(path)
    length, prefix, mask = 64, 32, 99
    batch = FlatText(path, length=length, rows=5, seed=0, prefix=prefix, mask_token=mask).batch(2)
    hidden = batch["input_ids"] == mask
    assert hidden[:, :prefix].any() and not hidden[:, prefix:].any()
    logits = torch.randn(5, length, 100, generator=torch.Generator().manual_seed(0))
    masked_labels = batch["targets"].masked_fill(~hidden, -100)
    next_labels = batch["targets"].clone()
    next_labels[:, :prefix] = -100
    ours = weighted_loss(logits, batch["targets"], batch["weights"])
    torch.testing.assert_close(ours, prefix_loss(logits, masked_labels, next_labels))
    inputs, _ = mask_prefix(batch["input_ids"], batch["prefix_length"], mask, 1.0, torch.Generator())
    assert (inputs[:, :prefix] == mask).all()


def test_flat_text_reads_every_sequence_once_an_epoch(tmp_path):
    path = tmp_path / "train.bin"
    np.arange(641, dtype=np.uint16).tofile(path)
    source = FlatText(path, length=64, rows=5, seed=0, prefix=0, mask_token=9)
    first_epoch = torch.cat([source.batch(step)["input_ids"][:, 0] for step in (0, 1)])
    assert sorted(first_epoch.tolist()) == list(range(0, 640, 64))


def test_devices_and_workers_share_the_batches_without_overlap():
    class Numbers:
        def batch(self, step):
            return {"step": torch.tensor(step)}

    def first(rank, world, start, workers):
        loader = torch.utils.data.DataLoader(
            Steps(Numbers(), start * world + rank, world), batch_size=None, num_workers=workers
        )
        iterator = iter(loader)
        return [int(next(iterator)["step"]) for _ in range(4)]

    assert first(0, 1, 3, 0) == first(0, 1, 3, 2) == [3, 4, 5, 6]
    assert sorted(first(0, 2, 1, 0) + first(1, 2, 1, 0)) == list(range(2, 10))


def test_right_answers_counts_answers_whose_every_token_is_likeliest():
    targets = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    answers = torch.tensor([[1, 1, 0, 2], [0, 1, 1, 1]])
    logits = torch.nn.functional.one_hot(targets, 6).float()
    assert right_answers(logits, answers, targets).tolist() == [3, 3]
    logits[0, 1] = logits[0, 1].roll(1)
    logits[0, 2] = logits[0, 2].roll(1)  # no answer
    assert right_answers(logits, answers, targets).tolist() == [2, 3]
