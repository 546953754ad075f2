"""What the original release computes that this project, by default, does not.

The published numbers were measured with these quirks, so each can be switched on alone to measure its effect on a
score. Nothing else in the package asks which release a model came from. Only the standard library is imported.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Quirks:
    """Each field is one quirk of the release; all False is the correct computation (docs/released.md has the story)."""

    blank_padding: bool = False
    """Padding keys are zeroed before the feature map, and phi(0) = [1, 0, ...]: a pad still adds its value.
    Convolution and window read pads as tokens. The mask is dropped when it is longer than the encoder."""

    double_add: bool = False
    """Based's one-token step adds the token's contribution to S twice, to z once."""

    decay_in_steps: bool = False
    """Based's one-token steps use a decay, or a decay projection, that stands alone in the configuration; its parallel
    form uses the two only together."""

    half_states: bool = False
    """Linear-attention states are rounded to the compute dtype after each call; none in fp32."""

    padded_rows: bool = False
    """Greedy decoding may choose embedding rows that no token has."""

    ignore_batch_padding: bool = False
    """`generate` reads the pads that make a batch rectangular as tokens."""

    ignore_end_token: bool = False
    """`generate` never stops before `max_new_tokens`."""

    leak_continuation: bool = False
    """Log-likelihoods show the prefix encoder the continuation that is being scored."""

    @classmethod
    def released(cls) -> Quirks:
        """All of them: `compat="released"`."""
        return cls(**{field.name: True for field in dataclasses.fields(cls)})

    @classmethod
    def of(cls, compat: str | Quirks | None) -> Quirks:
        """The quirks that `jrt.load(compat=...)` names; raises ValueError for a name that is not known."""
        if isinstance(compat, Quirks):
            return compat
        if compat is None:
            return cls()
        if compat == "released":
            return cls.released()
        raise ValueError(f"compat={compat!r}: expected None (correct), 'released' or a jrt.Quirks")

    @classmethod
    def from_dict(cls, fields: dict) -> Quirks:
        """The quirks that a configuration holds; raises ValueError for a name that is not known."""
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) - known:
            raise ValueError(f"quirks {fields!r}: expected a dict with names out of {', '.join(sorted(known))}")
        return cls(**fields)

    def active(self) -> tuple[str, ...]:
        """Names of the quirks that are on."""
        return tuple(field.name for field in dataclasses.fields(self) if getattr(self, field.name))
