"""Turns the errors that other projects' code raises on bad input into one line for the user."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

BREAKS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,  # NotImplementedError and RecursionError among them
    TypeError,
    ValueError,
    SafetensorError,
    StrictDataclassError,
    pickle.PickleError,
)
LONGEST_LINE = 500


@contextmanager
def as_value_error(what: str) -> Iterator[None]:
    """Inside the context, errors of BREAKS become `ValueError("{what}: {the error's first line}")`."""
    try:
        yield
    except BREAKS as error:
        raise ValueError(f"{what}: {first_line(error)}") from error
    except Exception as error:
        if type(error) is Exception:  # the tokenizers package raises this class itself
            raise ValueError(f"{what}: {first_line(error)}") from error
        raise


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to LONGEST_LINE letters; the name of its class if it has no message."""
    return str(error).strip().splitlines()[0][:LONGEST_LINE] if str(error).strip() else type(error).__name__


def one_line(error: BaseException) -> str:
    """An error's class and message on one line, cut to 200 letters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
