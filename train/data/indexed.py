"""The .idx file beside a .bin file of tokens, as GPT-NeoX and Megatron write it.

    magic "MMIDIDX\\0\\0", version (uint64 1), dtype code (uint8), number of sequences N (uint64), number of boundaries M
    (uint64)
    N x int32 tokens of each sequence, N x int64 byte offset of each, M x int64 first sequence of each document, and N at
    the end

Here every document is one sequence.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


@dataclass(frozen=True)
class Index:
    """The content of an .idx file: the type of the token ids, and where documents end in the .bin file."""

    dtype: np.dtype
    ends: np.ndarray  # (documents,) int64: tokens up to the end of each document

    @property
    def documents(self) -> int:
        return len(self.ends)

    def sizes(self) -> np.ndarray:
        """(documents,) int64 tokens of each document."""
        return np.diff(self.ends, prepend=0)


def read_index(path: Path) -> Index:
    """Reads an .idx file. Raises ValueError if it is missing, cut short, or of another kind."""
    if not path.is_file():
        raise ValueError(f"no index at {path}: expected the .idx file that was written with the .bin file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{path} is no index of GPT-NeoX or Megatron: expected it to start with {MAGIC[:7]!r}")
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise ValueError(
            f"{path} has version {version} and dtype code {code}; expected version 1 and one of {sorted(DTYPES)}"
        )
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if size != expected:
        raise ValueError(f"{path} has {size} bytes, but {sequences} documents need {expected}: the file is damaged")
    sizes = np.fromfile(path, np.int32, sequences, offset=HEADER.size)
    firsts = np.fromfile(path, np.int64, boundaries, offset=HEADER.size + 12 * sequences)
    ends = np.cumsum(sizes, dtype=np.int64)
    in_order = not boundaries or (firsts[0] == 0 and firsts[-1] == sequences and (np.diff(firsts) >= 0).all())
    if (sizes < 0).any() or not in_order:
        raise ValueError(f"{path} contradicts itself about where documents end: the file is damaged")
    if boundaries > 1:  # a document may be several sequences, or none
        ends = np.append(0, ends)[firsts[1:]]
    return Index(np.dtype(DTYPES[code]), ends)


def write_index(path: Path, sizes: np.ndarray, dtype: np.dtype) -> None:
    """Writes the index of a .bin file whose documents have these (documents,) sizes in tokens."""
    code = next(code for code, kind in DTYPES.items() if np.dtype(kind) == dtype)
    offsets = (np.cumsum(sizes, dtype=np.int64) - sizes) * dtype.itemsize
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(sizes), len(sizes) + 1))
        sizes.astype(np.int32).tofile(file)
        offsets.tofile(file)
        np.arange(len(sizes) + 1, dtype=np.int64).tofile(file)
