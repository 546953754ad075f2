"""The fields of a run's files and the types of their values, checked when the files are read back.

A file that was cut or edited is then reported in one line. A field that an older version did not write may be absent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Kinds = dict[str, type | tuple[type, ...]]

NUMBER, NAME = (int, float), (str, type(None))
CELL: Kinds = {"model": str, "task": str, "strategy": str, "protocol": str}
_COUNTS = ("n", "documents", "dropped", "invalid", "lost", "unreachable", "absent", "truncated", "nan")
RECORD: Kinds = {
    **CELL,
    **dict.fromkeys((*_COUNTS, "state_bytes", "version"), int),
    **dict.fromkeys(("score", "low", "high", "prompt_tokens", "seconds"), NUMBER),
    "beyond_training": bool,
    "source": str,
    "notes": list,
}
PREDICTION: Kinds = {
    **CELL,
    **dict.fromkeys(("id", "prompt", "prediction"), str),
    **dict.fromkeys(("prompt_tokens", "truncated", "new_tokens"), int),
    **dict.fromkeys(("score", "seconds"), NUMBER),
    **dict.fromkeys(("lost", "finite"), bool),
    "answers": list,
    "position": (int, float, type(None)),
}
MANIFEST: Kinds = {"identity": dict, "versions": dict, "models": dict, "failed": (list, dict)}
MODEL: Kinds = {"name": str, "dtype": str, "compat": NAME, "short_prompt": NAME}
PROTOCOL: Kinds = {"name": str, "version": int, "stop": list}
FAILED: Kinds = CELL | {"reason": str}


def check(place: str, value: Any, kinds: Kinds, needed: Iterable[str] = ()) -> None:
    """Raises ValueError that begins with `place` unless `value` is an object whose known fields have their kinds.

    needed: fields that may not be absent."""
    if not isinstance(value, dict):
        raise ValueError(f"{place} is damaged: expected an object, got {value!r:.40}")
    if missing := [name for name in needed if name not in value]:
        raise ValueError(f"{place} is damaged: {', '.join(missing)} absent")
    for name, kind in kinds.items():
        if name in value and not isinstance(value[name], kind):
            raise ValueError(f"{place} is damaged: {name} is {value[name]!r:.40}")


def check_each(place: str, values: Any, kinds: Kinds, needed: Iterable[str] = ()) -> None:
    """The same for each member of a list."""
    if not isinstance(values, list):
        raise ValueError(f"{place} is damaged: expected a list, got {values!r:.40}")
    for number, value in enumerate(values):
        check(f"{place}, entry {number}", value, kinds, needed)


def check_manifest(place: str, manifest: Any) -> None:
    """A run's manifest, as far as every reader needs it."""
    check(place, manifest, MANIFEST, ("identity",))
    check_each(f"{place}, models", manifest["identity"].get("models"), MODEL, ("name", "dtype"))


def check_finished(place: str, manifest: dict, records: list[dict]) -> None:
    """A finished run's manifest: it describes all models and protocols of the records."""
    identity = manifest["identity"]
    check_each(f"{place}, protocols", identity.get("protocols"), PROTOCOL, PROTOCOL)
    check_each(f"{place}, failed", list(manifest.get("failed", ())), FAILED, FAILED)
    models = {model["name"] for model in identity["models"]}
    protocols = {protocol["name"] for protocol in identity["protocols"]}
    for record in [*records, *manifest.get("failed", ())]:
        if record["model"] not in models or record["protocol"] not in protocols:
            raise ValueError(f"{place} is damaged: it lacks {record['model']} or {record['protocol']} of the results")
