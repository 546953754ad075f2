"""How fast training text is read: windows in random order out of a large file of tokens, and the loader as training uses
it.

    python train/measure_data.py FOLDER          # 30 x 10^9 tokens, in a sparse file that takes no room
    python train/measure_data.py FOLDER --tokens 1e9

A sparse file has no data on the disk: the system returns zeros. So the disk is not measured, only the order of the
windows, the calls of the system and the copy. `needed_windows_per_s` is how many windows one H100 reads when it trains
JRT-360M at the speed in `train_throughput.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # finds its package wherever it is started from

import numpy as np  # noqa: E402

from jrt.system.files import write_json  # noqa: E402
from jrt.system.provenance import commit, versions  # noqa: E402
from train.data.batches import TextData  # noqa: E402
from train.data.loader import loader  # noqa: E402
from train.data.order import Shuffled  # noqa: E402

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"

LENGTH, ROWS = 2048, 16  # T; rows of a batch


def sparse_text(folder: Path, tokens: int) -> None:
    """Token files of zeros: `tokens` to train on and a few to validate."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", tokens), ("validation", 10 * LENGTH + 1)):
        with (folder / f"{split}.bin").open("wb") as file:
            file.truncate(2 * count)
    (folder / "manifest.json").write_text(json.dumps({"dtype": "uint16"}), encoding="utf-8")


def speed_of(take: Callable[[int], object], count: int) -> float:
    """Calls of `take` per second of this thread's processor time, which other programs on the machine do not change."""
    start = time.thread_time()
    for i in range(count):
        take(i)
    return count / (time.thread_time() - start)


def tokens_needed() -> float | None:
    """Tokens per second that the fastest JRT-360M row of train_throughput.json reaches; None without that file."""
    path = RESULTS / "train_throughput.json"
    if not path.is_file():
        return None
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return max(row["tokens_per_s"] for row in rows if row["method"] == "jrt-360m")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the token files are made; they stay there")
    parser.add_argument("--tokens", type=float, default=30e9)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS / "train_data.json")
    options = parser.parse_args()
    tokens = int(options.tokens)
    sparse_text(options.folder, tokens)
    start = time.perf_counter()
    data = TextData(LENGTH, seed=0, folder=str(options.folder), workers=1)
    opened = time.perf_counter() - start
    assert isinstance(data.stream, Shuffled)
    shuffle = data.stream.shuffle
    order = speed_of(lambda i: shuffle(i * ROWS + np.arange(ROWS)), options.batches) * ROWS
    read = speed_of(lambda i: data.part(i, ROWS, 0, ROWS), options.batches) * ROWS
    # Other batches than before, whose pages are not in memory yet.
    batches = loader(data, options.batches, 2 * options.batches, 0, 1, ROWS)
    next(batches)  # starts the worker
    start = time.perf_counter()
    for _ in range(options.batches - 1):
        next(batches)
    loaded = (options.batches - 1) * ROWS / (time.perf_counter() - start)
    needed = tokens_needed()
    row = {
        "method": "TextData, order shuffle",
        "shape": {"tokens": tokens, "T": LENGTH, "rows": ROWS},
        "open_s": round(opened, 4),
        "order_windows_per_s": round(order, 1),
        "read_windows_per_s": round(read, 1),
        "loader_windows_per_s": round(loaded, 1),
        "needed_windows_per_s": None if needed is None else round(needed / LENGTH, 1),
        "memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),  # Linux counts KiB
    }
    report = {
        "benchmark": "train_data",
        "command": f"python train/measure_data.py FOLDER --tokens {options.tokens:g} --batches {options.batches}",
        "versions": versions(),
        "commit": commit(RESULTS.parent),
        "date": datetime.date.today().isoformat(),
        "clock": "order and read: processor time; loader: wall time with one worker",
        "rows": [row],
    }
    write_json(options.output, report)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
