"""Runs: a run is one model with its task, learning rate and seed. A sweep is a list of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from jrt.config import Config
from jrt.model import LanguageModel
from jrt.training.settings import check_kind, check_seed, check_whole
from synthetics.data import Task
from synthetics.readings import READINGS, READS_TWICE, Reading

HEADS = 2  # paper appendix B.1
BUILT_IN = "CLPASM"  # letters of jrt's own mixers
TOGETHER = 16  # models with feature sizes up to this one are trained in one stack


@dataclass(frozen=True)
class Method:
    """Which layers a model has, and how it reads. Letters of `pattern` are those of `jrt.mixers.MIXERS`."""

    name: str
    pattern: str
    reads: str = "once"  # of READINGS

    def __post_init__(self) -> None:
        if self.reads not in READINGS:
            raise ValueError(f"{self.name} reads {self.reads!r}: expected one of {', '.join(READINGS)}")

    @property
    def reading(self) -> Reading:
        return READINGS[self.reads]


METHODS = {
    method.name: method
    for method in (
        Method("causal", "CLCL"),
        Method("twice", "CLCL", "twice"),
        Method("both-orders", "CLCL", "both-orders"),
        Method("question-first", "CLCL", "question-first"),
        Method("prefix", "CPCP"),
        Method("prefix-twice", "CPCP", "twice"),
        Method("causal-deep", "CLCLCL"),
        Method("prefix-deep", "CPCPCP"),
        Method("twice-deep", "CLCLCL", "twice"),
        Method("based", "CLCS"),
        Method("window", "CSCS"),
        Method("attention", "CACA"),
        Method("mamba", "MM"),
    )
}


@dataclass(frozen=True)
class Run:
    """One model to train."""

    method: Method
    task: Task
    width: int
    feature_dim: int  # of linear attention
    rate: float  # peak learning rate
    seed: int  # of weights and data
    epochs: int = 12
    batch: int = 128
    window: int = 8  # of sliding-window attention

    @property
    def name(self) -> str:
        """The run's name in results, different for different runs of a sweep."""
        sizes = f"w{self.width}-f{self.feature_dim}-s{self.window}"
        return f"{self.method.name}-{self.task.name}-{sizes}-e{self.epochs}-b{self.batch}-{self.rate:g}-{self.seed}"

    @property
    def config(self) -> Config:
        """The model's configuration. Raises ValueError for sizes that cannot be built."""
        pattern = self.method.pattern
        return Config(
            pattern=pattern,
            width=self.width,
            vocab_rows=self.task.vocab_size,
            heads=HEADS,
            linear_heads=HEADS,
            feature_dim=self.feature_dim,
            window=self.window,
            rotary_dim=self.width // HEADS // 2 * 2 if set("AS") & set(pattern) else 0,
            conv_expand=1,
            # The whole text is the prefix; no reading has more than two contexts and two questions.
            enc_length=2 * self.task.longest if "P" in pattern else 0,
        )

    @property
    def work(self) -> int:
        """A number that grows with the time of training. It only orders runs."""
        contexts = 2 if self.method.reads in READS_TWICE else 1
        return self.epochs * contexts * self.task.longest * self.width

    @property
    def shape(self) -> Run:
        """A key that is equal for runs that can be trained in one stack: they differ in rate, seed and feature size
        only.

        All feature sizes up to TOGETHER share a stack, because the tensor cores need at least 16 columns anyway. A
        mixer of your own may have weights of other shapes for each feature size, so there each size has its stack.
        """
        joined = set(self.method.pattern) <= set(BUILT_IN)
        features = max(self.feature_dim, TOGETHER) if joined else self.feature_dim
        return replace(self, rate=1.0, seed=0, feature_dim=features)

    def check(self) -> None:
        """Raises ValueError if the run cannot be trained. Nothing is drawn or trained here."""
        for name in ("width", "feature_dim", "epochs", "batch", "window"):
            check_whole(f"{name} of a run", getattr(self, name), 1)
        check_seed("seed of a run", self.seed)
        check_kind("rate of a run", self.rate, float)
        if self.rate <= 0:
            raise ValueError(f"rate of a run is {self.rate}: expected a positive learning rate")
        if "/" in self.name:
            raise ValueError(f"{self.name}: names of methods and tasks are names of files, so they have no /")
        self.task.check()
        config = self.config
        assert config.vocab_rows == self.task.vocab_size

    def model(self) -> LanguageModel:
        """Returns the model with its initial weights, which depend on the seed alone."""
        model = LanguageModel(self.config)
        model.init_weights(torch.Generator().manual_seed(self.seed))
        return model

    def state_bytes(self, tokens: int) -> int:
        """Returns the bytes of the model's state after so many tokens, measured on a real state.

        Neither weights nor the tokens' ids change the size, so the model reads zeros.
        """
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        with torch.no_grad():
            _, state = self.model().read(ids)
        return state.nbytes()


def groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups the runs by shape. Groups are in the order in which their shapes first occur."""
    found: dict[Run, list[Run]] = {}
    for run in runs:
        found.setdefault(run.shape, []).append(run)
    return list(found.values())
