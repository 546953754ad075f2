"""Which lists: the paper's sizes, sizes for a laptop, and a few for tests. Pairs are (first list, second list)."""

from synthetics.data import Task

TASKS = {
    # original_spec section 9, in the release's order, which the seeds follow
    "paper": Task(
        vocab_size=2048,
        train=(
            *((4, 16), (16, 4), (8, 32), (32, 8), (64, 16), (16, 64)),
            *((4, 128), (128, 4), (16, 256), (256, 16), (4, 256), (256, 4)),
        ),
        train_examples=20_000,
        test=(
            *((1, 32), (32, 1), (4, 32), (32, 4), (4, 128), (128, 4), (16, 256), (256, 16), (4, 256), (256, 4)),
            *((16, 512), (512, 16), (4, 512), (512, 4), (8, 768), (768, 8), (16, 768), (768, 16), (4, 768), (768, 4)),
        ),
        test_examples=1_000,
    ),
    "laptop": Task(
        vocab_size=64,
        train=((1, 4), (4, 1), (2, 8), (8, 2), (2, 16), (16, 2), (4, 16), (16, 4)),
        train_examples=8_000,
        test=((1, 8), (8, 1), (2, 16), (16, 2), (4, 16), (16, 4), (2, 24), (24, 2), (4, 24), (24, 4)),
        test_examples=500,
    ),
    "debug": Task(
        vocab_size=32,
        train=((1, 4), (4, 1)),
        train_examples=512,
        test=((1, 4), (4, 1), (2, 6), (6, 2)),
        test_examples=64,
    ),
}
