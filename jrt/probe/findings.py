"""The results of probing a model, and the ways of running it that follow from them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

CHECKS = {
    "decode": "decoding with a cache equals reading again",
    "no cache": "decoding without a cache equals reading again",
    "padding alone": "a padded row equals the row unpadded",
    "padding": "a padded row beside a longer one equals the row alone",
    "neighbours": "a row beside others of its length equals the row alone",
    "two calls": "a prompt read in two calls equals one call",
    "state copy": "a copied state goes on as its original did",
    "single tokens": "a prompt read token by token equals one call",
    "shared state": "states of a padded batch's rows are repeated and gone on from",
}
"""The statement that each check tests. "Reading again" is one call on the whole row without a cache."""


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Args:
        name: a key of CHECKS.
        deviation: largest difference to the logits of the row read alone, divided by the largest logit; infinite if a
            logit is NaN or the model raised an error; None if the check was not tried.
        bound: the largest deviation that rounding explains.
        where: the token with the largest deviation.
        reason: the model's error, or why the check was not tried.
    """

    name: str
    deviation: float | None
    bound: float
    where: str = ""
    reason: str = ""

    @property
    def holds(self) -> bool | None:
        return None if self.deviation is None else self.deviation <= self.bound

    @classmethod
    def failed(cls, name: str, bound: float, reason: str) -> Check:
        """The result where the model raised an error, or gave something that is no logits."""
        return cls(name, math.inf, bound, reason=reason)


@dataclass(frozen=True)
class RunMode:
    """The ways in which a model can be run without changing its answers; by default all of them.

    Args:
        cache: decoding with a cache.
        batches: several rows at once.
        padding: rows of unequal length in a batch.
        sharing: a common beginning of several rows is read once, and the state after it is copied to each of them.
        one_token: prompts of a single token.
        causal: the model reads as a causal language model does, so its logits in one call are those of decoding. No
            way of running a model helps if this is false.
    """

    cache: bool = True
    batches: bool = True
    padding: bool = True
    sharing: bool = True
    one_token: bool = True
    causal: bool = True

    def sentences(self) -> list[str]:
        """Sentences for the user on what is wrong with the model and what it is not run with; empty if all holds."""
        said = []
        if not self.causal:
            said.append(
                "not a causal language model: even without a cache, decoding gives other logits than reading in one call"
            )
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
    """All results of a probe. dtype: of the weights; passes: calls of `forward` that were made."""

    checks: tuple[Check, ...]
    dtype: str
    passes: int

    @property
    def is_sound(self) -> bool:
        """Whether no check failed. Checks that were not tried do not count."""
        return not any(check.holds is False for check in self.checks)

    def holds(self, name: str) -> bool:
        """Whether a check was tried and held."""
        return any(check.name == name and check.holds for check in self.checks)

    @property
    def mode(self) -> RunMode:
        """The ways of running the model that leave its answers as they are for one prompt at a time."""
        batches = self.holds("neighbours")
        padding = batches and self.holds("padding alone") and self.holds("padding")
        sharing = padding and all(map(self.holds, ("decode", "two calls", "state copy", "shared state")))
        one_token = not any(check.name == "single tokens" and check.holds is False for check in self.checks)
        causal = not any(
            check.name == "no cache" and check.holds is False and not check.reason for check in self.checks
        )
        return RunMode(self.holds("decode"), batches, padding, sharing, one_token, causal)

    def to_dict(self) -> dict:
        """Plain values for JSON. JSON has no infinity, so an infinite deviation becomes None; `holds` is then False."""
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
