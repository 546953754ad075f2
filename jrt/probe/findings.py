"""What a probe of a model found, and how the model has to be run because of it."""

import dataclasses
import math
from dataclasses import dataclass

CHECKS = {
    "decode": "decoding with a cache equals reading again",
    "no cache": "decoding without a cache equals reading again",
    "padding alone": "a padded row equals the row unpadded",
    "padding": "a padded row beside a longer one equals the row alone",
    "neighbours": "a row beside another of its length equals the row alone",
    "two calls": "a prompt read in two calls equals one call",
    "state copy": "a copied state goes on as its original did",
    "single tokens": "a prompt read token by token equals one call",
    "shared state": "states of a padded batch's rows are repeated and gone on from",
}
"""What each check says."""


@dataclass(frozen=True)
class Check:
    """One comparison. deviation: of logits from those of the row alone, as a share of the largest logit; infinite where a
    logit is NaN or the model raised an error; None: not tried.

    where: the token at which it is largest; reason: the model's error, or why the check was not tried."""

    name: str
    deviation: float | None
    bound: float
    where: str = ""
    reason: str = ""

    @property
    def holds(self) -> bool | None:
        return None if self.deviation is None else self.deviation <= self.bound


@dataclass(frozen=True)
class RunMode:
    """How a model may be run: by default in every way.

    cache: decode with a cache; batches: several rows at once; padding: rows of unequal length among them; sharing: a common
    beginning read once, its state copied to the rows that go on from it; one_token: prompts of a single token."""

    cache: bool = True
    batches: bool = True
    padding: bool = True
    sharing: bool = True
    one_token: bool = True

    def sentences(self) -> list[str]:
        """What is done otherwise than usual, for people. Empty: nothing is."""
        said = []
        if not self.cache:
            said.append("decoded without a cache: with one, its answers differ from those of reading again")
        if not self.batches:
            said.append("asked one prompt at a time: the rows of a batch change each other's answers")
        elif not self.padding:
            said.append("asked in batches of equal lengths: padding changes its answers")
        if not self.sharing:
            said.append("every prompt read from its start: going on from a copied state changes its answers")
        if not self.one_token:
            said.append("prompts of one token are not asked: it reads them on top of what it read before")
        return said


@dataclass(frozen=True)
class Findings:
    """What a probe found. dtype: of the weights; passes: calls of `forward`."""

    checks: tuple[Check, ...]
    dtype: str
    passes: int

    def holds(self, name: str) -> bool:
        """False for a check that failed or was not tried."""
        return any(check.name == name and check.holds for check in self.checks)

    @property
    def mode(self) -> RunMode:
        """How the model has to be run so that its answers are those of one prompt at a time."""
        batches = self.holds("neighbours")
        padding = batches and self.holds("padding")
        sharing = padding and all(map(self.holds, ("decode", "two calls", "state copy", "shared state")))
        one_token = not any(check.name == "single tokens" and check.holds is False for check in self.checks)
        return RunMode(self.holds("decode"), batches, padding, sharing, one_token)

    def to_dict(self) -> dict:
        """Plain values for JSON; an infinite deviation is None with its reason beside it."""
        return {
            "dtype": self.dtype,
            "passes": self.passes,
            "checks": [
                dataclasses.asdict(check)
                | {"holds": check.holds, "deviation": None if check.deviation == math.inf else check.deviation}
                for check in self.checks
            ],
            "mode": dataclasses.asdict(self.mode),
        }
