"""Training on a GPU: each block compiles to one graph and equals eager code; resumed runs are equal bit for bit."""

import copy
import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("hydra")

from train_runs import ROOT, curve

from jrt.config import presets
from jrt.model import LanguageModel
from jrt.training.loss import ModelWithLoss, loss_of, room_for, summed_cross_entropy
from jrt.training.objective import IGNORED, Objective

LARGER = {"width": 128, "heads": 2, "linear_heads": 2, "feature_dim": 16, "rotary_dim": 32, "window": 20}


def loss_and_gradients(model: LanguageModel, ids: torch.Tensor, how: str) -> dict[str, torch.Tensor]:
    """`how`: compiled (bf16), eager (bf16) or exact (fp32)."""
    torch._dynamo.reset()
    model = copy.deepcopy(model)  # compiling changes it
    config = model.config
    objective = Objective("jrt" if config.has("P") else "causal", config.vocab_rows - 1)
    module = ModelWithLoss(model, config.has("P"))
    if how == "compiled":
        module.compile_parts(fullgraph=True)
    lengths = torch.full((len(ids),), config.enc_length, device=ids.device) if config.has("P") else None
    targets = objective(ids, lengths, torch.Generator(ids.device).manual_seed(0))
    room = room_for(objective, len(ids), ids.shape[1] - 1, config.enc_length if config.has("P") else 0)
    with torch.autocast("cuda", torch.bfloat16, enabled=how != "exact"):
        sums = module(targets.input_ids, targets.labels, targets.masked, lengths, None, room)[:2]
        loss = loss_of(sums, targets.totals(), objective)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["CPC", "CSA", "CL", "MM"])
@pytest.mark.parametrize("length", [256, 200])
def test_compiled_training_has_no_graph_break_and_computes_what_eager_code_does(pattern, length):
    """bf16 gradients, compiled, are at most twice as far from fp32 as eager ones."""
    torch.manual_seed(0)
    config = dataclasses.replace(presets()["debug"], pattern=pattern, mlp_width=256, **LARGER)
    model = LanguageModel(config).cuda()
    model.init_weights()
    ids = torch.randint(0, 4000, (4, length + 1), device="cuda")
    exact, eager, compiled = (loss_and_gradients(model, ids, how) for how in ("exact", "eager", "compiled"))
    for name, truth in exact.items():
        assert error(compiled[name], truth) <= 2 * error(eager[name], truth) + 1e-3, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("places", "rows"), [(1, 7), (300, 130), (1000, 5000)])
def test_the_loss_of_liger_is_at_most_twice_as_far_from_fp64_as_that_of_all_logits(dtype, places, rows):
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    inputs = [torch.randn(n, 64, device="cuda").to(dtype) for n in (places, rows)]
    labels = torch.randint(0, rows, (places,), device="cuda")
    labels[1::3] = IGNORED

    def loss_and_gradients_of(function, dtype):
        hidden, head = (x.to(dtype).requires_grad_() for x in inputs)
        loss = function(hidden, head)
        (3 * loss).backward()
        return loss.detach(), hidden.grad, head.grad

    def plain(hidden, head):
        logits = F.linear(hidden, head)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    truth, eager = loss_and_gradients_of(plain, torch.float64), loss_and_gradients_of(plain, dtype)
    found = loss_and_gradients_of(lambda hidden, head: summed_cross_entropy(hidden, head, labels), dtype)
    for right, rough, value in zip(truth, eager, found, strict=True):
        assert value.shape == right.shape and value.isfinite().all()
        assert error(value, right) <= 2 * error(rough, right) + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["CPS", "CLA", "M"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, pattern):
    fields = [f"model.{name}={value}" for name, value in (LARGER | {"pattern": pattern}).items()]
    command = [sys.executable, str(ROOT / "train" / "run.py"), "experiment=debug", "trainer=gpu", "steps=40", *fields]
    command += ["trainer.checkpoint_every=2", "trainer.log_every=1", "export=false", f"data.folder={tmp_path / 'text'}"]
    # torch.compile chooses kernels by timing. Another test must not replace its choice between the runs.
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}

    def finish(output: str) -> None:
        done = subprocess.run(
            [*command, f"output={tmp_path / output}"], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr

    finish("whole")
    killed = subprocess.Popen([*command, f"output={tmp_path / 'killed'}"], stdout=subprocess.DEVNULL, env=environment)
    checkpoints = tmp_path / "killed" / "checkpoints"
    while killed.poll() is None and not list(checkpoints.glob("step-*[68]")):
        time.sleep(0.005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    finish("killed")
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "whole")) == 40
