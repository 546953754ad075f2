"""Reads weight files that may be hostile: first names, shapes and dtypes, then one tensor at a time.

No code in a file is executed (`weights_only`). The caller compares the shapes with the configuration before tensors
take memory. Tensors that stay on the CPU in their own dtype are memory-mapped, not copied.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from jrt.system.breaks import BREAKS, first_line
from jrt.system.files import read_object

# The first of these that exists, as one file or as shards, is read; transformers has the same order.
CHOICE = ("model.safetensors", "pytorch_model.bin")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
FLOATING = tuple(dtype for dtype in DTYPES.values() if dtype.is_floating_point)
LEGACY_PICKLES = 5  # pickles in a file of torch < 1.6: magic number, version, system, the object, keys of its storages


# The errors that unpickling, unzipping and parsing raise on corrupted files.
UNREADABLE = (*BREAKS, NameError, zipfile.BadZipFile, struct.error)
LONGEST_MESSAGE = 1000


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit its configuration; the message says which file and why.

    Names and values from a file can stand in the message, so it is cut and made one printable line."""

    def __init__(self, message: str) -> None:
        line = "".join(letter if letter.isprintable() else " " for letter in message[: LONGEST_MESSAGE + 1])
        super().__init__(line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]}...")


@contextmanager
def as_checkpoint_error(what: str) -> Iterator[None]:
    """Inside the context, the errors that corrupted files raise become CheckpointErrors: "{what} ({why})"."""
    try:
        yield
    except CheckpointError:
        raise
    except UNREADABLE as error:
        # torch's own text for a pickle that it refuses proposes to run the file's code.
        why = "expected named tensors only" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise CheckpointError(f"{what} ({why})") from error


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, as the file describes it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def entries(folder: Path) -> dict[str, Entry]:
    """All tensors of a folder: `model.safetensors` or `pytorch_model.bin`, or the shards that an index lists.

    Raises CheckpointError for no weights, a missing shard, and a file that is truncated, corrupted or no weight file."""
    found: dict[str, Entry] = {}
    for file in files(folder):
        with as_checkpoint_error(f"{file.name} is truncated, corrupted or no weight file"):
            own = _safetensors_entries(file) if file.suffix == ".safetensors" else _torch_entries(file)
        for name, entry in own.items():
            if name in found:
                raise CheckpointError(f"{name} stands in two files: {found[name].file.name} and {file.name}")
            found[name] = entry
    return found


class Reader:
    """Reads tensors that `entries` described, one after another.

    Tensors that stay on the CPU in their own dtype are views of the mapped file. Others are copies, and reading them
    loads parts of the file into memory. So the file is reopened after every REOPEN_BYTES, which releases that memory.
    """

    REOPEN_BYTES = 128 << 20

    def __init__(self, device: str | torch.device, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._file: Path | None = None
        self._content: Any = None
        self._touched = 0

    def read(self, entry: Entry) -> Tensor:
        """One tensor on the device in the dtype asked for (None: its own).

        Raises CheckpointError if it is not floating point, cannot be read, or holds NaN or infinity."""
        tensor = self._mapped(entry)
        if tensor.device.type != "cpu" or tensor.shape != entry.shape or tensor.dtype != entry.dtype:
            raise CheckpointError(f"{entry.file.name}: {entry.name} is not the tensor that the file describes")
        low, high = torch.aminmax(tensor) if tensor.numel() else (torch.zeros(()), torch.zeros(()))
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise CheckpointError(f"{entry.file.name}: {entry.name} holds NaN or infinite values")
        if self.device.type == "cpu" and self.dtype in (None, entry.dtype):
            return tensor
        self._touched += tensor.nbytes
        return tensor.to(device=self.device, dtype=self.dtype or entry.dtype, copy=True)

    def equal(self, one: Entry, other: Entry) -> bool:
        """Whether two tensors hold the same values, compared in the file; raises CheckpointError as `read`."""
        return torch.equal(self._mapped(one), self._mapped(other))

    def _mapped(self, entry: Entry) -> Tensor:
        if entry.dtype not in FLOATING:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
            raise CheckpointError(f"{entry.file.name}: {entry.name} is {entry.dtype}; expected one of {expected}")
        with as_checkpoint_error(f"{entry.file.name}: {entry.name} cannot be read"):
            if self._file != entry.file or self._touched > self.REOPEN_BYTES:
                self._content, self._file, self._touched = _opened(entry.file), entry.file, 0
            is_safetensors = entry.file.suffix == ".safetensors"
            tensor = self._content.get_tensor(entry.name) if is_safetensors else self._content[entry.name]
        return tensor


def read_json(file: Path) -> dict:
    """As `jrt.system.files.read_object`, with a CheckpointError for a file that cannot be read."""
    try:
        return read_object(file)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _opened(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return safe_open(file, framework="pt")
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    return _state_dict(content, file)


def files(folder: Path) -> list[Path]:
    """The weight files of a folder, chosen as transformers chooses; raises CheckpointError as `entries`."""
    for name in CHOICE:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return _shards(index)
    raise CheckpointError(
        f"{folder} holds no weights: expected one of {', '.join(CHOICE)}, or an .index.json of shards"
    )


def _shards(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index.name} is no index of shards: expected a weight_map from tensors to file names")
    names = sorted(set(places.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index.name} names files outside the folder: {outside[0]}")
    missing = [name for name in names if not os.path.isfile(index.parent / name)]  # False also for impossible names
    if missing:
        raise CheckpointError(f"{index.name} lists shards that are not there: {', '.join(missing)}")
    return [index.parent / name for name in names]


def _safetensors_entries(file: Path) -> dict[str, Entry]:
    with safe_open(file, framework="pt") as opened:
        found = {}
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            part = opened.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise CheckpointError(f"{file.name}: {name} is {part.get_dtype()}; expected one of {', '.join(DTYPES)}")
            found[name] = Entry(file, name, tuple(part.get_shape()), DTYPES[part.get_dtype()])
        return found


def _torch_entries(file: Path) -> dict[str, Entry]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise CheckpointError(f"{file.name} is compressed: expected a file that torch.save wrote")
            if sum(member.file_size for member in archive.infolist()) > file.stat().st_size:
                raise CheckpointError(f"{file.name} is truncated or corrupted: it declares more than it holds")
            for member in archive.namelist():
                if member.endswith("data.pkl"):
                    with archive.open(member) as stream:
                        _check_pickles(stream, 1, file)
        with FakeTensorMode():
            content = torch.load(file, map_location="cpu", weights_only=True)
    else:  # written by torch < 1.6: the file can only be read whole
        with open(file, "rb") as stream:
            _check_pickles(stream, LEGACY_PICKLES, file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    found = {}
    for name, tensor in _state_dict(content, file).items():
        if not isinstance(name, str) or not torch.is_tensor(tensor):
            raise CheckpointError(f"{file.name}: {name!r} is a {type(tensor).__name__}; expected named tensors only")
        if tensor.layout != torch.strided:
            raise CheckpointError(f"{file.name}: {name} is a sparse tensor; expected dense tensors only")
        stored = min(tensor.untyped_storage().nbytes(), file.stat().st_size)
        if tensor.numel() * tensor.itemsize > stored:
            shape = tuple(tensor.shape)
            raise CheckpointError(
                f"{file.name}: {name} has shape {shape} but {stored} stored bytes: an expanded tensor"
            )
        found[name] = Entry(file, name, tuple(tensor.shape), tensor.dtype)
    return found


def _check_pickles(stream: IO[bytes], count: int, file: Path) -> None:
    """Raises CheckpointError for a pickled bytearray: `weights_only` permits it, and it can ask for any amount of
    memory."""
    for _ in range(count):
        for operation, argument, _ in pickletools.genops(stream):
            if operation.name == "GLOBAL" and str(argument).endswith(" bytearray"):
                raise CheckpointError(f"{file.name} holds a bytearray; expected named tensors only")


def _state_dict(content: object, file: Path) -> dict:
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.name} holds a {type(content).__name__}; expected a dict of named tensors")
    return content
