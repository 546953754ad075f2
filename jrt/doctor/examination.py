"""`jrt doctor MODEL`: the probe (`jrt.probe`), and checks of saving, loading and half precision."""

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from jrt.probe import CHECKS, Check, Findings, largest_logit, probe, read_row
from jrt.system.breaks import BREAKS, one_line

LOADED = {
    "save and load": "a model saved and loaded again gives the same logits",
    "bfloat16": "the model computes in bfloat16, and decoding equals reading again there",
    "float16": "the model computes in float16, and decoding equals reading again there",
}
"""The statements that the checks test which load the model again."""
ANSWERS = {True: "yes", False: "NO", None: "-"}


@dataclass(frozen=True)
class Examination:
    """All checks of a model. findings: the results of the probe; loaded: the checks of LOADED."""

    name: str
    findings: Findings
    loaded: tuple[Check, ...]

    @property
    def checks(self) -> tuple[Check, ...]:
        return self.findings.checks + self.loaded

    @property
    def is_sound(self) -> bool:
        """Whether no check failed. Checks that were not tried do not count."""
        return not any(check.holds is False for check in self.checks)

    def text(self) -> str:
        """The table that `jrt doctor MODEL` prints, and how `jrt eval` runs the model."""
        said = CHECKS | LOADED
        width = max(len(said[check.name]) for check in self.checks)
        lines = [f"{self.name}, {self.findings.dtype}; deviation: share of the largest logit, from the row read alone"]
        for check in self.checks:
            deviation = (
                f"{check.deviation:.1e}" if check.deviation is not None and math.isfinite(check.deviation) else "-"
            )
            where = check.reason or ("" if check.holds else f"{check.where}, at most {check.bound:.1e} is rounding")
            cells = (said[check.name].ljust(width), ANSWERS[check.holds].ljust(3), deviation.ljust(7), where)
            lines.append("  ".join(cells).rstrip())
        sentences = self.findings.mode.sentences() or ["as any other model"]
        return "\n".join([*lines, *(f"jrt eval runs it: {sentence}" for sentence in sentences)])

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        found = self.findings.to_dict()
        more = dataclasses.replace(self.findings, checks=self.loaded).to_dict()["checks"]
        return {"model": self.name, "sound": self.is_sound} | found | {"checks": found["checks"] + more}


def examine(model: PreTrainedModel, name: str, pad_token_id: int = 0) -> Examination:
    """Runs all checks on a causal language model. It is saved to a temporary folder, which is removed afterwards.

    name: for the report. pad_token_id: as in `jrt.probe.probe`."""
    return Examination(name, probe(model, pad_token_id), tuple(_loaded(model, pad_token_id)))


def _loaded(model: PreTrainedModel, pad_token_id: int) -> Iterator[Check]:
    needed = sum(parameter.nbytes for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder, _without_progress_bars():
        free = shutil.disk_usage(folder).free
        if free < 1.1 * needed:
            reason = f"not tried: it takes {needed / 2**30:.1f} GiB in {Path(folder).parent}, where {free / 2**30:.1f} are free"
            yield from (Check(check, None, 0.0, reason=reason) for check in LOADED)
            return
        try:
            model.save_pretrained(folder)
        except BREAKS as error:
            yield Check("save and load", math.inf, 0.0, reason=one_line(error))
            return
        yield _same_again(model, folder)
        for dtype in (torch.bfloat16, torch.float16):
            yield _in_dtype(model, folder, dtype, pad_token_id)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _same_again(model: PreTrainedModel, folder: str) -> Check:
    try:
        loaded: Any = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
        again, notes = loaded
        strangers = [key for kind in ("missing_keys", "unexpected_keys") for key in notes.get(kind, ())]
        truth, logits = read_row(model), read_row(again.to(model.device).eval())
    except BREAKS as error:
        return Check("save and load", math.inf, 0.0, reason=one_line(error))
    deviation = float((logits - truth).abs().max() / largest_logit(truth))
    if strangers:
        return Check(
            "save and load", math.inf, 0.0, reason=f"weights that the file lacks or has too many: {strangers[:3]}"
        )
    return Check("save and load", deviation, 1e-6)


def _in_dtype(model: PreTrainedModel, folder: str, dtype: torch.dtype, pad_token_id: int) -> Check:
    name = str(dtype).removeprefix("torch.")
    try:
        narrow: Any = type(model).from_pretrained(folder, dtype=dtype)
        narrow = narrow.to(model.device).eval()
    except BREAKS as error:
        return Check(name, math.inf, 0.0, reason=one_line(error))
    decoded = next(check for check in probe(narrow, pad_token_id).checks if check.name == "decode")
    return dataclasses.replace(decoded, name=name)
