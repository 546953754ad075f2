"""`jrt doctor MODEL`: the probe (`jrt.probe`), and checks of saving, loading and half precision."""

import dataclasses
import functools
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
class Examination(Findings):
    """The findings of a probe, with the checks of LOADED after its own, and the model's name."""

    model: str

    def text(self) -> str:
        """The table that `jrt doctor MODEL` prints, and how `jrt eval` runs the model."""
        said = CHECKS | LOADED
        width = max(len(said[check.name]) for check in self.checks)
        lines = [f"{self.model}, {self.dtype}; deviation: share of the largest logit, from the row read alone"]
        for check in self.checks:
            deviation = (
                f"{check.deviation:.1e}" if check.deviation is not None and math.isfinite(check.deviation) else "-"
            )
            where = check.reason or ("" if check.holds else f"{check.where}, at most {check.bound:.1e} is rounding")
            cells = (said[check.name].ljust(width), ANSWERS[check.holds].ljust(3), deviation.ljust(7), where)
            lines.append("  ".join(cells).rstrip())
        sentences = self.mode.sentences() or ["as any other model"]
        return "\n".join([*lines, *(f"jrt eval runs it: {sentence}" for sentence in sentences)])

    def to_dict(self) -> dict:
        return {"model": self.model, "sound": self.is_sound} | super().to_dict()


def examine(model: PreTrainedModel, name: str, pad_token_id: int = 0) -> Examination:
    """Runs all checks on a causal language model. It is saved to a temporary folder, which is removed afterwards.

    name: for the report. pad_token_id: as in `jrt.probe.probe`."""
    found = probe(model, pad_token_id)
    return Examination(found.checks + tuple(_loaded(model, pad_token_id)), found.dtype, found.passes, name)


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
            yield Check.failed("save and load", 0.0, one_line(error))
            return
        trials = {name: functools.partial(_narrow, model, folder, name, pad_token_id) for name in LOADED}
        trials["save and load"] = functools.partial(_same_again, model, folder)
        for name, trial in trials.items():
            try:
                yield trial()
            except BREAKS as error:
                yield Check.failed(name, 0.0, one_line(error))


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
    loaded: Any = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    again, notes = loaded
    truth, logits = read_row(model), read_row(again.to(model.device).eval())
    strangers = [key for kind in ("missing_keys", "unexpected_keys") for key in notes.get(kind, ())]
    if strangers:
        return Check.failed("save and load", 0.0, f"weights that the file lacks or has too many: {strangers[:3]}")
    return Check("save and load", float((logits - truth).abs().max() / largest_logit(truth)), 1e-6)


def _narrow(model: PreTrainedModel, folder: str, dtype: str, pad_token_id: int) -> Check:
    """Checks the saved model in the dtype with this name."""
    narrow: Any = type(model).from_pretrained(folder, dtype=dtype)
    narrow = narrow.to(model.device).eval()
    decoded = next(check for check in probe(narrow, pad_token_id).checks if check.name == "decode")
    return dataclasses.replace(decoded, name=dtype)
