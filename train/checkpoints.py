"""Checkpoints of a run: one folder step-0000123 for each, which is either complete or absent.

A folder holds one part for each process, in the format of torch's distributed checkpoints, so that a run can be resumed
on another number of devices. Its file run.json has the step, the settings of the run, and size and checksum of each
file. Beside the folders, last.ckpt has the name of the newest one, for scripts; a run that is resumed looks at the
folders themselves.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from jrt.system.files import write_text
from train.distributed import World
from train.optimizer import MovingAverage

log = logging.getLogger(__name__)
FACTS = "run.json"
LAST = "last.ckpt"  # as PyTorch Lightning calls its newest checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. `facts` is the content of its run.json."""

    folder: Path
    step: int  # steps that were done
    facts: dict


@dataclass
class Training:
    """The tensors that a checkpoint holds: model, optimiser and moving average of the weights."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None = None

    def state(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer}
        if self.average is not None:
            state["average"] = {str(i): value for i, value in enumerate(self.average.values)}
        return state


class Checkpoints:
    """The checkpoints of one run's folder.

    Args:
        folder: where the checkpoints are.
        place: this process.
        keep_last: how many of the newest are kept.
        keep_best: how many with the lowest validation loss are kept.
        keep_every: checkpoints at multiples of this many steps are never deleted; 0: none.
    """

    def __init__(self, folder: Path, place: World, keep_last: int = 2, keep_best: int = 0, keep_every: int = 0) -> None:
        self.folder, self.place = folder, place
        self.keep_last, self.keep_best, self.keep_every = max(1, keep_last), keep_best, keep_every

    def save(self, training: Training, step: int, facts: dict) -> None:
        """Writes a checkpoint under a temporary name, then renames its folder. Deletes checkpoints that are not kept.

        Args:
            training: the tensors to save.
            step: steps that were done.
            facts: what run.json holds besides step and checksums.

        Raises:
            ValueError: it could not be written, for example because the disk is full. Earlier checkpoints are
                unchanged.
        """
        final = self.folder / f"step-{step:07d}"
        partial = self.folder / f".{final.name}.partial"
        if self.place.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
        self.place.wait()
        problem = None
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*single process.*")
                dcp.save(training.state(), checkpoint_id=partial)
            if self.place.is_first:
                _seal(partial, facts | {"step": step})
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                write_text(self.folder / LAST, final.name + "\n")
                _sync(self.folder)
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = _first_reason(error)
        if problem := self.place.same(problem):
            if self.place.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            found = self._steps()
            rest = f"that of step {found[-1]} is whole" if found else "there is no earlier one"
            raise ValueError(f"the checkpoint of step {step} could not be written to {self.folder} ({problem}); {rest}")
        if self.place.is_first:
            self._clear_away()
        self.place.wait()

    def latest(self) -> Checkpoint | None:
        """Returns the newest complete checkpoint, or None if there are no checkpoints.

        A damaged one is skipped with a warning.

        Raises:
            ValueError: there are checkpoints, and all are damaged.
        """
        found, steps = None, []
        if self.place.is_first:
            steps = self._steps()
            for step in reversed(steps):
                try:
                    found = Checkpoint(self._folder(step), step, _verified(self._folder(step)))
                    break
                except ValueError as error:
                    log.warning("%s is damaged (%s) and left out", self._folder(step), error)
        found, steps = self.place.same((found, steps))
        if found is None and steps:
            raise ValueError(
                f"all checkpoints in {self.folder} are damaged: remove this folder to start again, or choose another output"
            )
        return found

    def load(self, checkpoint: Checkpoint, training: Training) -> None:
        """Loads model, optimiser and moving average from a checkpoint, which may have another number of processes.

        An average that the checkpoint does not have (accept=[ema]) begins at the loaded weights.

        Raises:
            ValueError: the checkpoint does not fit the model.
        """
        state = training.state()
        try:
            known = dcp.FileSystemReader(checkpoint.folder).read_metadata().state_dict_metadata
            if not any(name.startswith("average.") for name in known):
                state.pop("average", None)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*single process.*")
                dcp.load(state, checkpoint_id=checkpoint.folder)
        except (CheckpointException, RuntimeError, KeyError) as error:
            raise ValueError(f"{checkpoint.folder} does not fit this model: {_first_reason(error)}") from error
        groups = training.optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        set_state_dict(
            training.model, training.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        for group, own in zip(training.optimizer.param_groups, settings, strict=True):
            group.update(own)  # AdamW's settings are this run's, which may have other ones (accept=[rate])
        if training.average is not None:
            if "average" not in state:
                log.info(
                    "%s has no moving average: it begins at the weights of step %d", checkpoint.folder, checkpoint.step
                )
                training.average.restart()
                return
            for i, value in enumerate(training.average.values):
                value.copy_(state["average"][str(i)])

    def remove_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps. `latest` has found them damaged."""
        if self.place.is_first:
            for later in self._steps():
                if later > step:
                    shutil.rmtree(self._folder(later))
        self.place.wait()

    def _steps(self) -> list[int]:
        names = (path.name.removeprefix("step-") for path in self.folder.glob("step-*") if path.is_dir())
        return sorted(int(name) for name in names if name.isdigit())

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def _clear_away(self) -> None:
        steps = self._steps()
        kept = set(steps[-self.keep_last :])
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        if self.keep_best:
            losses = {step: loss for step in steps if math.isfinite(loss := self._loss(step))}
            kept |= set(sorted(losses, key=losses.__getitem__)[: self.keep_best])
        for step in set(steps) - kept:
            shutil.rmtree(self._folder(step))
        for leftover in self.folder.glob(".step-*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _loss(self, step: int) -> float:
        """The validation loss of a checkpoint; infinite if it was not measured, is no number, or cannot be read."""
        try:
            loss = _facts(self._folder(step)).get("validation_loss")
        except ValueError:
            return math.inf
        return loss if isinstance(loss, float) and math.isfinite(loss) else math.inf


def _seal(folder: Path, facts: dict) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "crc32": _checksum(path)}
        for path in sorted(folder.iterdir())
        if path.name != FACTS
    }
    facts = json.loads(json.dumps(facts | {"files": files}))  # as it will be read, for the checksum
    with (folder / FACTS).open("w", encoding="utf-8") as file:
        json.dump(facts | {"crc32": _checksum_of(facts)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)


def _facts(folder: Path) -> dict:
    """Returns the content of a checkpoint's run.json. Raises ValueError if it is not what was written."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        told = facts.pop("crc32")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{FACTS} cannot be read: {error}") from error
    if _checksum_of(facts) != told:
        raise ValueError(f"{FACTS} is not what was written")
    return facts


def _checksum_of(facts: dict) -> int:
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _verified(folder: Path) -> dict:
    facts = _facts(folder)
    for name, told in facts["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != told["bytes"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes of {told['bytes']}")
        if _checksum(path) != told["crc32"]:
            raise ValueError(f"{name} is not what was written")
    return facts


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            value = zlib.crc32(piece, value)
    return value


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_reason(error: BaseException) -> str:
    """The first line of the message of the error that caused this one."""
    if isinstance(error, CheckpointException) and error.failures:
        failure = next(iter(error.failures.values()))
        error = failure[0] if isinstance(failure, tuple) else failure
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
