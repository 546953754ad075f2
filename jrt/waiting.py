"""How long OpenMP's threads spin while they wait for each other.

By default they spin for milliseconds. Where another program wants the processor, each parallel loop then waits for a thread
that is not running while its sibling burns the time that it would need. A thread that spins for some microseconds and then
sleeps costs an idle machine nothing, and leaves a busy one its processor.
"""

import os

SETTINGS = {
    "GOMP_SPINCOUNT": "10000",  # GNU's library, which torch's packages for Linux bring: rounds, here some 20 microseconds
    "KMP_BLOCKTIME": "1",  # LLVM's and Intel's: milliseconds, of 200
}


def wait_briefly() -> None:
    """Sets what the environment leaves open. It has to come before torch is imported."""
    if "OMP_WAIT_POLICY" in os.environ:
        return
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
