"""Quirks: the places where the original release's code computes something else than the paper says.

By default, this project computes what the paper says. The published numbers were measured with the quirks, so each can
be switched on alone to measure its effect on a score. Only the standard library is imported.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Quirks:
    """Each field switches one quirk on; with all False a model computes what the paper says (details:
    docs/released.md)."""

    blank_padding: bool = False
    """The keys of padding are zeroed before the feature map phi, and phi(0) = [1, 0, ...]: so padding still adds its
    values to the state. Convolution and window attention read padding as tokens. A mask longer than the encoder is
    ignored."""

    double_add: bool = False
    """Based's one-token step adds the token twice to the numerator state S, and once to the denominator state z."""

    decay_in_steps: bool = False
    """If a configuration has only one of decay and decay projection, Based's one-token steps use it all the same. The
    parallel form uses them for outputs only if the configuration has both."""

    half_states: bool = False
    """States of linear attention are rounded to the compute dtype after each call; in fp32 this changes nothing."""

    padded_rows: bool = False
    """Decoding may choose the embedding's padding rows, which stand for no token."""

    ignore_batch_padding: bool = False
    """`generate` reads the padding of shorter rows in a batch as tokens."""

    ignore_end_token: bool = False
    """`generate` ignores the end token and always writes `max_new_tokens` tokens."""

    leak_continuation: bool = False
    """For log-likelihoods, the prefix encoder reads the continuation that is scored, all but its last token."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not bool:
                raise ValueError(f"the quirk {name} is {value!r}; expected true or false")

    @classmethod
    def released(cls) -> Quirks:
        """All quirks switched on: `compat="released"`."""
        return cls(**{field.name: True for field in dataclasses.fields(cls)})

    @classmethod
    def of(cls, compat: str | Quirks | None) -> Quirks:
        """The quirks for the argument `compat` of `jrt.load`; raises ValueError for an unknown name."""
        if isinstance(compat, Quirks):
            return compat
        if compat is None:
            return cls()
        if compat == "released":
            return cls.released()
        raise ValueError(f"compat={compat!r}: expected None (correct), 'released' or a jrt.Quirks")

    @classmethod
    def from_dict(cls, fields: dict) -> Quirks:
        """The quirks from a configuration's dict; raises ValueError for an unknown name."""
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) - known:
            raise ValueError(f"quirks {fields!r}: expected a dict with names out of {', '.join(sorted(known))}")
        return cls(**fields)

    def active(self) -> tuple[str, ...]:
        """Names of the quirks that are switched on."""
        return tuple(field.name for field in dataclasses.fields(self) if getattr(self, field.name))
