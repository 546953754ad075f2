"""Runs a sweep of recall tasks and draws it: ``python -m synthetics figure2_small --out DIR``."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from synthetics import plot
from synthetics.folder import Folder
from synthetics.runs import Run, groups
from synthetics.sweeps import SWEEPS
from synthetics.workers import check_device, check_ray, train_all


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    The code is 0 also if --minutes end before the sweep does; the printed line then says how to continue."""
    parser = argparse.ArgumentParser(prog="python -m synthetics", description=__doc__.partition("\n")[0])
    parser.add_argument("sweep", metavar="NAME", help=f"one of {', '.join(SWEEPS)}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="go on with a sweep that has results in DIR")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes, at the next epoch")
    parser.add_argument("--part", metavar="K/N", default="1/1", help="only the K-th of N parts of the sweep's groups")
    parser.add_argument("--workers", type=int, help="processes; default: one a GPU, or one a core")
    parser.add_argument("--ray", action="store_true", help="let Ray place the groups on its cluster")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except (ValueError, OSError) as error:
        print(f"synthetics: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("synthetics: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Runs a sweep. If it cannot run, raises ValueError before anything is written."""
    if options.sweep not in SWEEPS:
        raise ValueError(f"unknown sweep {options.sweep!r}: expected one of {', '.join(SWEEPS)}")
    if options.minutes is not None and not options.minutes > 0:
        raise ValueError(f"--minutes {options.minutes:g}: expected more than 0")
    runs = SWEEPS[options.sweep]
    part_of(groups(runs), options.part)
    units = torch.cuda.device_count() if options.device == "cuda" else torch.get_num_threads()
    workers = max(1, units) if options.workers is None else options.workers
    check_device(options.device, workers)
    check_ray(options.ray)
    folder = Folder(options.out, options.sweep, runs, options.resume)
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    missing = [group for group in part_of(groups(runs), options.part) if not folder.is_done(group)]
    if workers > 1:  # the longest group begins first, so that no worker is still busy with it when all others are done
        missing.sort(key=lambda group: sum(run.work for run in group), reverse=True)
    work = [(group, folder.checkpoint(group)) for group in missing]
    results = train_all(work, options.device, min(workers, max(1, len(work))), deadline, options.ray)
    for rows in tqdm(results, total=len(work), desc=options.sweep, unit="group", disable=not sys.stderr.isatty()):
        if rows is not None:
            folder.add(rows)
    minutes = sum(row["seconds"] for row in folder.rows.values()) / 60
    print(f"{len(folder.rows)} of {len(runs)} runs are done in {options.out}, in {minutes:.1f} minutes of the device")
    if folder.rows:
        print(plot.draw_all(options.out))
    if len(folder.rows) < len(runs):
        print(f"next: {following(options)}")
    return 0


def following(options: argparse.Namespace) -> str:
    """The command that goes on with the same part of the sweep."""
    words = [options.sweep, "--out", str(options.out), "--device", options.device, "--resume"]
    words += ["--part", options.part] if options.part != "1/1" else []
    words += ["--workers", str(options.workers)] if options.workers is not None else []
    return shlex.join(["python", "-m", "synthetics", *words, *(["--ray"] if options.ray else [])])


def part_of(items: Sequence[list[Run]], part: str) -> Sequence[list[Run]]:
    """Returns part K of N of the items, for `part` "K/N". Parts are consecutive and nearly equal in size.

    Raises ValueError for any other `part`."""
    numbers = part.split("/")
    if not (len(numbers) == 2 and all(each.isdecimal() for each in numbers)):
        raise ValueError(f"--part {part}: expected K/N, as in 1/3")
    which, parts = map(int, numbers)
    if not 1 <= which <= parts <= len(items):
        raise ValueError(f"--part {part}: expected 1 <= K <= N <= {len(items)}, which is the number of groups")
    return items[(which - 1) * len(items) // parts : which * len(items) // parts]


if __name__ == "__main__":
    raise SystemExit(main())
