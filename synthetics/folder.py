"""The folder of a sweep: `results.json` has the results of finished runs, `unfinished/` the other runs' checkpoints."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from jrt.system.files import write_json
from jrt.system.provenance import commit, device_name, versions
from synthetics.runs import Run

VERSIONS = ("python", "torch", "triton")
BEGUN = ("unfinished", "results.json.partial")  # what a folder holds whose sweep was killed at its very beginning


class Folder:
    """The results of one sweep. A file is replaced in one step, so it is never half written."""

    def __init__(self, path: Path, sweep: str, runs: Sequence[Run], resume: bool) -> None:
        """Opens the folder, or makes it.

        Raises:
            ValueError: the sweep is empty or has one run twice, a run of it cannot be built, the folder belongs to
                another sweep or holds other files, or it has results of this sweep and `resume` is false.
        """
        check(sweep, runs)
        self.path, self.file, self.sweep = path, path / "results.json", sweep
        self.fingerprint = hashlib.sha256("\n".join(map(repr, runs)).encode()).hexdigest()
        self.rows: dict[str, dict] = {}
        if self.file.exists():
            self._open(resume)
        elif path.exists() and (not path.is_dir() or any(each.name not in BEGUN for each in path.iterdir())):
            raise ValueError(f"{path} is not a sweep's folder: expected an empty or a new one")
        self.origin = provenance()
        (path / "unfinished").mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            self._write()

    def _open(self, resume: bool) -> None:
        report = read(self.path)
        if (report["sweep"], report["fingerprint"]) != (self.sweep, self.fingerprint):
            same = "an older version of it" if report["sweep"] == self.sweep else report["sweep"]
            raise ValueError(
                f"{self.path} is the folder of another sweep ({same}): give {self.sweep} a folder of its own"
            )
        if report["rows"] and not resume:
            raise ValueError(
                f"{self.path} has {len(report['rows'])} results of this sweep: add --resume to go on with it"
            )
        self.rows = {row["run"]: row for row in report["rows"]}

    def is_done(self, group: Sequence[Run]) -> bool:
        return all(run.name in self.rows for run in group)

    def add(self, rows: Sequence[dict]) -> None:
        """Adds results to the folder, each with device, versions, commit and date."""
        self.rows |= {row["run"]: {**row, **self.origin} for row in rows}
        self._write()

    def checkpoint(self, group: Sequence[Run]) -> Path:
        """The file of a group that is in training."""
        return self.path / "unfinished" / f"{group[0].shape.name}.pt"

    def _write(self) -> None:
        report = {"sweep": self.sweep, "fingerprint": self.fingerprint, "rows": list(self.rows.values())}
        write_json(self.file, report)


def check(sweep: str, runs: Sequence[Run]) -> None:
    """Raises ValueError if a sweep is empty, has a run twice, or has a run that cannot be built."""
    if not runs:
        raise ValueError(f"{sweep} is an empty sweep: expected at least one run")
    for run in runs:
        run.check()
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"{sweep} has one run twice: {next(name for name in names if names.count(name) > 1)}")


def read(path: Path) -> dict:
    """Returns the content of results.json in a sweep's folder. Raises ValueError if there is none."""
    try:
        report = json.loads((path / "results.json").read_text(encoding="utf-8"))
        found = isinstance(report, dict) and {"sweep", "fingerprint", "rows"} <= set(report)
        found = found and isinstance(report["rows"], list) and all(map(_is_row, report["rows"]))
    except FileNotFoundError as error:
        raise ValueError(f"{path} holds no results: expected the folder of python -m synthetics") from error
    except ValueError:
        found = False
    if not found:
        raise ValueError(f"{path / 'results.json'} was not written by python -m synthetics")
    return report


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and {"run", "method", "task", "accuracy"} <= set(row)


def provenance() -> dict:
    """Device, versions, commit and date: what a stored figure depends on."""
    return {
        "device": device_name(),
        "versions": {name: each for name, each in versions().items() if name in VERSIONS},
        "commit": commit(Path(__file__).parent),
        "date": datetime.date.today().isoformat(),
    }
