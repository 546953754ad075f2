"""Runs tests of Triton kernels without a GPU, in Triton's interpreter.

The interpreter has to be asked for before triton is imported, so these tests run in a process of their own.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def quicken() -> None:
    """Leaves out what takes half of the interpreter's time and tests nothing of the kernels.

    Each integer operation is done twice, to find overflow, which compiled kernels do not do either. And each call of a
    device function looks through the whole language for what is still to be replaced; here the first call in a module
    does."""
    from triton.runtime import interpreter

    builder, modules = interpreter.interpreter_builder, set()
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    def call(self, *args: object, **kwargs: object) -> object:
        if self.fn.__module__ not in modules:
            interpreter._patch_lang(self.fn)
            modules.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def require_triton() -> None:
    """Skips the test where triton is not installed, which is an error in CI."""
    if importlib.util.find_spec("triton") is None:
        assert os.environ.get("CI") != "true", "triton is missing: install the extra 'dev'"
        pytest.skip("triton is not installed")


def pass_in_the_interpreter(tests: str, *options: str) -> None:
    """Fails unless these tests (a file, or FILE::NAME) pass there; options: more arguments of pytest."""
    require_triton()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, tests],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
