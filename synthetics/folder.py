"""The folder of a sweep: `results.json` has the results of finished runs, `unfinished/` the other runs' checkpoints."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from jrt.system.files import write_json
from jrt.system.locks import only_writer
from jrt.system.provenance import commit, device_name, versions
from synthetics.runs import Run, groups

PATIENCE = 60.0  # seconds to wait until another process has added its results
VERSIONS = ("python", "torch", "triton")
NEEDED = {  # in a row of results, for tables and figures
    *("run", "method", "task", "width", "feature_dim", "window", "rate", "epochs", "batch"),
    *("state_bytes", "seconds", "accuracy"),
}


class Folder:
    """The results of one sweep. A file is replaced in one step, so it is never half written."""

    def __init__(self, path: Path, sweep: str, runs: Sequence[Run], resume: bool) -> None:
        """Opens the folder, or makes it.

        Raises:
            ValueError: the sweep is empty or has one run twice, a run of it cannot be built, the folder belongs to
                another sweep or holds other files, or it has results of this sweep and `resume` is false.
        """
        check(sweep, runs)
        self.path, self.file, self.sweep, self.groups = path, path / "results.json", sweep, groups(runs)
        self.fingerprint = hashlib.sha256("\n".join(map(repr, runs)).encode()).hexdigest()
        self.rows: dict[str, dict] = {}
        if self.file.exists():
            self._open(resume)
        elif path.exists() and not _has_just_begun(path):
            raise ValueError(f"{path} is not a sweep's folder: expected an empty or a new one")
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
        """Adds results to the folder and removes the checkpoints of finished groups.

        What another process has added meanwhile, such as another part of the sweep, stays."""
        with only_writer(self.path, PATIENCE):
            before = self.rows
            self._open(resume=True)
            self.rows = before | self.rows | {row["run"]: row for row in rows}
            self._write()
        for group in filter(self.is_done, self.groups):
            self.checkpoint(group).unlink(missing_ok=True)

    def checkpoint(self, group: Sequence[Run]) -> Path:
        """The file of a group that is in training."""
        return self.path / "unfinished" / f"{group[0].shape.name}.pt"

    def _write(self) -> None:
        report = {"sweep": self.sweep, "fingerprint": self.fingerprint, "rows": list(self.rows.values())}
        write_json(self.file, report)


def check(sweep: str, runs: Sequence[Run]) -> None:
    """Raises ValueError if a sweep is empty, has a run that cannot be built or a run twice, or if two of its methods or
    two of its tasks have one name."""
    if not runs:
        raise ValueError(f"{sweep} is an empty sweep: expected at least one run")
    for run in runs:
        run.check()
    for kind in ("method", "task"):
        named: dict[str, object] = {}
        for own in (getattr(run, kind) for run in runs):
            if named.setdefault(own.name, own) != own:
                raise ValueError(f"{sweep} has two {kind}s with the name {own.name}: expected a name for each")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"{sweep} has one run twice: {next(name for name in names if names.count(name) > 1)}")


def read(path: Path) -> dict:
    """Returns the content of results.json in a sweep's folder. Raises ValueError if there is none."""
    try:
        report = json.loads((path / "results.json").read_text(encoding="utf-8"))
        found = isinstance(report, dict) and {"sweep", "fingerprint", "rows"} <= set(report)
        found = found and isinstance(report["rows"], list) and all(map(_is_row, report["rows"]))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{path} holds no results: expected the folder of python -m synthetics") from error
    except ValueError:
        found = False
    if not found:
        raise ValueError(f"{path / 'results.json'} was not written by python -m synthetics")
    return report


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or not set(row) >= NEEDED:
        return False
    shares = row["accuracy"]
    return (
        isinstance(shares, dict) and len(shares) > 0 and all(isinstance(each, int | float) for each in shares.values())
    )


def _has_just_begun(path: Path) -> bool:
    """Whether the folder is empty, or its sweep was killed before results.json was written.

    Checkpoints come later, so a folder that has some is not new: they may be of a sweep with other settings."""
    names = {each.name for each in path.iterdir()} if path.is_dir() else {"a file"}
    return names <= {"unfinished", "results.json.partial"} and not any(path.glob("unfinished/*"))


def provenance(device: str) -> dict:
    """Device, versions, commit and date: what a stored figure depends on. device: "cpu" or "cuda"."""
    return {
        "device": device_name(device),
        "versions": {name: each for name, each in versions().items() if name in VERSIONS},
        "commit": commit(Path(__file__).parent),
        "date": datetime.date.today().isoformat(),
    }
