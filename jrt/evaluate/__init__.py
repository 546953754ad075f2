"""Recall evaluation: the share of questions that a model answers, when the answer stands in the prompt.

`plan` checks a request and loads its questions. `run` answers them and writes the results to a folder. `tables` and
`report` turn such a folder into text, figures and an HTML page. Importing `jrt.evaluate.harness` registers our models
with lm-eval as `--model jrt`.
"""

from jrt.evaluate.folder import Cell, Results, read_run
from jrt.evaluate.models import ModelSpec, OpenModel, open_model
from jrt.evaluate.run import Plan, Request, plan, run
from jrt.evaluate.workers import LocalPool

__all__ = [
    "Cell",
    "LocalPool",
    "ModelSpec",
    "OpenModel",
    "Plan",
    "Request",
    "Results",
    "open_model",
    "plan",
    "read_run",
    "run",
]
