"""Training in two processes (gloo) equals training in one: data parallel, sharded, and with a changing number."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("hydra")

from safetensors.torch import load_file
from torch import nn
from train_runs import curve, trained

from jrt.config import LETTERS, Config
from jrt.mixers import MIXERS
from train import distributed

SMALL = ("model.pattern=CPS", "trainer.rows=2", "trainer.checkpoint_every=2", "trainer.validate_every=2")


def on_two(data: Path, output: Path, *overrides: str) -> list[int]:
    """Runs the debug experiment in two processes of this machine and returns their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in told.items()})
            code = 1
            try:
                trained(data, output, "trainer.devices=2", *overrides)
                code = 0
            except ValueError as error:
                sys.stderr.write(f"{error}\n")
                code = 2
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def figures(output: Path) -> np.ndarray:
    return np.array([[float(value or 0) for value in row] for row in curve(output)])


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    trained(text, output, *SMALL, "export=true")
    return output


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one(text, tmp_path, alone, strategy, monkeypatch):
    monkeypatch.setattr(distributed, "units", functools.partial(distributed.units, least=1))  # else all blocks are one
    assert on_two(text, tmp_path, *SMALL, f"trainer.strategy={strategy}", "export=true") == [0, 0]
    np.testing.assert_allclose(figures(tmp_path), figures(alone), rtol=3e-5)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, alone))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=2e-2, atol=1e-4)


class OwnMixer(nn.Module):
    """A mixer of a user, with a layer that `LanguageModel.init_weights` does not know."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.gain = nn.Parameter(nn.init.constant_(torch.empty(config.width), 0.5))


def test_a_mixer_of_ones_own_keeps_its_first_weights(monkeypatch):
    monkeypatch.setitem(LETTERS, "X", "mine")
    monkeypatch.setitem(MIXERS, "X", OwnMixer)
    model, _ = distributed.build(
        Config(pattern="CX", width=16, vocab_rows=32),
        False,
        distributed.World(0, 1, torch.device("cpu")),
        "ddp",
        seed=1,
    )
    mixer = model.blocks[1].mixer
    assert (mixer.norm.weight == 1).all() and (mixer.norm.bias == 0).all() and (mixer.gain == 0.5).all()


GRAPHS = """
import functools, sys, torch
from torch._dynamo.utils import counters
from jrt.config import LETTERS, Config
from jrt.model import LanguageModel
from jrt.training.loss import ModelWithLoss

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # no compiler of C++
model = LanguageModel(Config(pattern="C", width=1024, mlp_width=4096, vocab_rows=64))
assert 4 * sum(p.numel() for p in model.blocks.parameters()) > 25 << 20
whole = ModelWithLoss(model, recovers=False)
whole.compile_parts()
ids = torch.randint(64, (1, 8))
shared = torch.nn.parallel.DistributedDataParallel(whole)
shared(ids, ids, torch.zeros_like(ids, dtype=torch.bool), None, None, (8, 0)).sum().backward()
print(counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"])
"""


def test_data_parallelism_does_not_cut_the_graphs_of_blocks(tmp_path):
    """A block of this width has more weights than DistributedDataParallel sends at once. The three graphs: the block,
    the last norm, the loss."""
    command = [sys.executable, "-c", GRAPHS, str(tmp_path / "ranks")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["3", "3"], done.stderr


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_run_goes_on_with_another_number_of_devices(text, tmp_path, alone, strategy):
    settings = (*SMALL, f"trainer.strategy={strategy}")
    assert on_two(text, tmp_path, *settings, "trainer.max_steps=2") == [0, 0]
    trained(text, tmp_path, *settings, "trainer.max_steps=4")
    assert on_two(text, tmp_path, *settings) == [0, 0]
    np.testing.assert_allclose(figures(tmp_path), figures(alone), rtol=3e-5)


def test_an_error_ends_all_processes(text, tmp_path, capfd):
    assert on_two(text, tmp_path, "trainer.rows=3") == [2, 2]
    assert "choose trainer.global_batch" in capfd.readouterr().err


@pytest.mark.slow
def test_an_average_survives_sharding(text, tmp_path):
    settings = (*SMALL, "trainer.ema=0.9", "trainer.max_steps=2", "export=true")
    trained(text, tmp_path / "one", *settings)
    assert on_two(text, tmp_path / "two", *settings, "trainer.strategy=fsdp") == [0, 0]
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    # Where a gradient is near zero, rounding decides the sign of AdamW's step: a tenth of 2 x 1e-3 for the average.
    for name in ours:
        torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=2e-2, atol=2.5e-4)


@pytest.mark.slow
def test_the_command_starts_a_process_for_each_device(text, tmp_path, alone):
    import subprocess

    from train_runs import ROOT

    base = [sys.executable, str(ROOT / "train" / "run.py"), "experiment=debug", f"data.folder={text}", "export=false"]
    done = subprocess.run(
        [*base, f"output={tmp_path}", *SMALL, "trainer.devices=2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(figures(tmp_path), figures(alone), rtol=3e-5)
    wrong = [*base, f"output={tmp_path}/x", "data.length=48", "trainer.devices=2", "trainer.rows=2"]
    done = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "nothing is left to predict" in done.stdout + done.stderr


def test_blocks_are_gathered_in_groups():
    blocks = [nn.Linear(10, 10, bias=False) for _ in range(5)]
    groups = distributed.units(blocks, least=150)
    assert groups == [blocks[:2], blocks[2:4], blocks[4:]]
    assert distributed.units(blocks, least=1) == [[block] for block in blocks]
    assert distributed.units([]) == []
