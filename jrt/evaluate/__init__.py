"""Recall evaluation: which share of the answers that stand in its context does a model find.

`plan` makes a request definite, `run` answers it into a folder, `tables` and `report` make text, figures and pages of what the
folder holds. Importing `jrt.evaluate.harness` registers our models with lm-eval as `--model jrt`.
"""

from jrt.evaluate.folder import Cell, read_run
from jrt.evaluate.models import ModelSpec, OpenModel, open_model
from jrt.evaluate.run import Outcome, Plan, Request, plan, run
from jrt.evaluate.workers import LocalPool

__all__ = [
    "Cell",
    "LocalPool",
    "ModelSpec",
    "OpenModel",
    "Outcome",
    "Plan",
    "Request",
    "open_model",
    "plan",
    "read_run",
    "run",
]
