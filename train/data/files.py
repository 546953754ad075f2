"""Reads parts of large files: token ids, and a short hash that tells files apart without reading all of them."""

import hashlib
from pathlib import Path

import numpy as np

SAMPLES, SIZE = 64, 4096  # parts of a file that are read, and bytes of each


def sampled_sha256(path: Path) -> str:
    """A hash of a file's size and of SAMPLES parts of it, evenly spaced from its first byte to its last.

    Files up to SAMPLES x SIZE bytes are read whole."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= SAMPLES * SIZE:
            digest.update(file.read())
        else:
            for number in range(SAMPLES):
                file.seek((size - SIZE) * number // (SAMPLES - 1))
                digest.update(file.read(SIZE))
    return digest.hexdigest()


def read_ids(path: Path, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    """Ids [start, stop) of a file of token ids.

    They are read rather than mapped into memory: where the pages of a file are far apart, that can be many times faster,
    and a file that is cut while it is in use is an error, not the end of the process.

    Raises ValueError if the file ends before."""
    found = np.fromfile(path, dtype, stop - start, offset=start * dtype.itemsize)
    if len(found) < stop - start:
        raise ValueError(f"{path} has no ids {start} to {stop}: it was cut after it was opened")
    return found
