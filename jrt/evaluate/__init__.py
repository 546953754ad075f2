"""Recall evaluation: which share of the answers that stand in its context does a model find.

`plan` makes a request definite, `run` answers it into a folder, `results` and `report` make numbers, tables and pages of
what the folder holds. Importing `jrt.evaluate.harness` registers our models with lm-eval as `--model jrt`.
"""

from jrt.evaluate.folder import read_run
from jrt.evaluate.plan import Cell, Plan, Request, plan
from jrt.evaluate.pools import LocalPool
from jrt.evaluate.run import Outcome, run
from jrt.evaluate.subjects import ModelSpec, Subject, open_subject

__all__ = [
    "Cell",
    "LocalPool",
    "ModelSpec",
    "Outcome",
    "Plan",
    "Request",
    "Subject",
    "open_subject",
    "plan",
    "read_run",
    "run",
]
