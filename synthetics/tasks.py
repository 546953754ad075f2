"""Tasks by name: the paper's sizes, sizes for a laptop, and a few for tests.

A pair holds the lengths of the first and of the second list."""

from dataclasses import replace
from itertools import product

from synthetics.data import Task
from synthetics.mqar import MQAR
from synthetics.set_disjointness import SetDisjointness

# The release's sizes (paper appendix B.1 and its code). Some test pairs are three times as long as all training pairs.
PAPER = SetDisjointness(
    name="paper",
    vocab_size=2048,
    train=(
        *((4, 16), (16, 4), (8, 32), (32, 8), (64, 16), (16, 64)),
        *((4, 128), (128, 4), (16, 256), (256, 16), (4, 256), (256, 4)),
    ),
    train_examples=20_000,
    test=(
        *((1, 32), (32, 1), (4, 32), (32, 4), (4, 128), (128, 4), (16, 256), (256, 16), (4, 256), (256, 4)),
        *((16, 512), (512, 16), (4, 512), (512, 4), (8, 768), (768, 8)),
        *((16, 768), (768, 16), (4, 768), (768, 4)),
    ),
    test_examples=1_000,
)
UNEVEN_PAIRS = ((1, 16), (16, 1), (2, 16), (16, 2), (2, 24), (24, 2))
LAPTOP_PAIRS = ((1, 4), (4, 1), (2, 8), (8, 2), (3, 12), (12, 3))

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        PAPER,
        replace(PAPER, name="paper-separator-last", separator_last=True),
        # Trains on all pairs of the test as well; half of the examples each, so that an epoch is only twice as long.
        replace(
            PAPER, name="paper-long", train=tuple(dict.fromkeys((*PAPER.train, *PAPER.test))), train_examples=10_000
        ),
        SetDisjointness(
            name="grid",
            vocab_size=256,
            # Without (1, 1): only 252 examples of it exist, and all would be trained on.
            train=tuple(pair for pair in product((1, 4, 16, 64), repeat=2) if pair != (1, 1)),
            train_examples=8_000,
            test=tuple(product((1, 2, 4, 8, 16, 32, 64, 96), repeat=2)),
            test_examples=250,
        ),
        SetDisjointness(
            name="uneven",
            vocab_size=128,
            train=UNEVEN_PAIRS,
            train_examples=4_000,
            test=UNEVEN_PAIRS,
            test_examples=1_000,
        ),
        SetDisjointness(
            name="laptop",
            vocab_size=32,
            train=LAPTOP_PAIRS,
            train_examples=2_000,
            test=tuple(product((1, 2, 3, 4, 8, 12), repeat=2)),
            test_examples=100,
        ),
        SetDisjointness(
            name="debug",
            vocab_size=32,
            train=((1, 4), (4, 1)),
            train_examples=512,
            test=((1, 4), (4, 1), (2, 6), (6, 2)),
            test_examples=64,
        ),
        MQAR(
            name="mqar",
            vocab_size=1024,
            train=(4, 8, 16, 32, 64),
            train_examples=20_000,
            test=(4, 8, 16, 32, 64, 96),
            test_examples=500,
        ),
        MQAR(name="mqar-debug", vocab_size=64, train=(2, 4), train_examples=256, test=(2, 4, 6), test_examples=32),
    )
}
