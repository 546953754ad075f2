"""Runs tests of Triton kernels without a GPU, in Triton's interpreter.

The interpreter has to be asked for before triton is imported, so these tests run in a process of their own.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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
