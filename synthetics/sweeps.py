"""Sweeps: lists of runs. Run one with ``python -m synthetics NAME --out DIR``, or build your own list.

Each model is trained at several learning rates, of which the best is reported, and with several seeds, which give the
confidence interval.
"""

from __future__ import annotations

from itertools import product

from synthetics.runs import METHODS, Run
from synthetics.tasks import TASKS

RATES = (1e-4, 5e-4, 8e-4)  # paper appendix B.1
SEEDS = (1, 2, 3)
FEATURES = (4, 8, 16, 24)

# The paper's figure 2 (360 models), and reading twice at two of its widths (72 models). The two methods of a size are
# next to each other, and the largest and the smallest width come first, so that an unfinished sweep already makes a
# figure.
figure2 = [
    Run(METHODS[method], TASKS["paper"], width, features, rate, seed)
    for width, features, method, rate, seed in product(
        (128, 36, 96, 48, 64), FEATURES, ("prefix", "causal"), RATES, SEEDS
    )
] + [
    Run(METHODS["twice"], TASKS["paper"], width, features, rate, seed)
    for width, features, rate, seed in product((96, 48), FEATURES, RATES, SEEDS)
]

# Why prefix reading of `figure2` stays below 99%: the largest width again, with other rates, more training, twice the
# width, two more layers, the separator elsewhere, and training lists as long as those of the test.
figure2_causes = [
    Run(METHODS[method + more], TASKS[task], width, features, rate, seed, epochs=epochs)
    for more, task, width, epochs, sizes, rates in (
        ("", "paper", 128, 48, (8,), (8e-4, 2e-3)),
        ("", "paper-long", 128, 12, (8, 16), (8e-4, 2e-3)),
        ("", "paper", 256, 12, (8,), (8e-4, 2e-3)),
        ("", "paper", 128, 12, (8,), (8e-4, 2e-3, 4e-3)),
        ("-deep", "paper", 128, 12, (8,), (8e-4, 2e-3)),
        ("", "paper-separator-last", 128, 12, (8,), (8e-4, 2e-3)),
    )
    for features, method, rate, seed in product(sizes, ("prefix", "causal"), rates, SEEDS)
]

# Two layers of attention must compare every token with every other. With a third, a model can find out first which list
# a token is in, and keep the short list only. So two more layers, at states that are too small for the long list.
depth = [
    Run(METHODS[method], TASKS[task], width, features, rate, seed, epochs=epochs, batch=batch)
    for task, methods, width, epochs, batch, rates in (
        ("paper", ("prefix-deep", "causal-deep"), 128, 48, 128, (5e-4, 1e-3)),
        ("paper-long", ("prefix-deep", "causal-deep"), 128, 24, 128, (5e-4, 1e-3)),
        (
            *("uneven", ("prefix-deep", "causal-deep", "twice-deep", "prefix", "causal", "twice")),
            *(32, 40, 64, (1e-3, 3e-3)),
        ),
    )
    for method, features, rate, seed in product(methods, (4, 8) if width > 32 else (2, 4), rates, SEEDS)
]

# The same question in five minutes on two cores.
figure2_small = [
    Run(METHODS[method], TASKS["laptop"], width, features, rate=5e-3, seed=seed, epochs=10, batch=64)
    for (width, features), method, seed in product(((16, 2), (32, 4)), ("causal", "twice", "prefix"), SEEDS)
]

# Accuracy of each mixer against the bytes of its state.
mqar_frontier = [
    Run(METHODS[method], TASKS["mqar"], width, features, rate, seed, window=window)
    for method, sizes in {
        "causal": [(width, features, 8) for width, features in product((32, 64, 128), (4, 8, 16))],
        "prefix": [(width, features, 8) for width, features in product((32, 64, 128), (4, 8, 16))],
        "twice": [(width, features, 8) for width, features in product((32, 64, 128), (4, 8, 16))],
        "based": [(64, features, window) for features, window in product((4, 8, 16), (8, 32))],
        "window": [(64, 4, window) for window in (4, 8, 16, 32, 64, 128)],
        "attention": [(width, 4, 8) for width in (32, 64, 128)],
        "mamba": [(width, 4, 8) for width in (32, 64, 128)],
    }.items()
    for (width, features, window), rate, seed in product(sizes, (5e-4, 1e-3, 3e-3), SEEDS)
]

# Six ways to read, and deeper models, at one small and one large state; drawn as a heat map over both list lengths.
reading_order = [
    Run(METHODS[method], TASKS["grid"], width, features, rate, seed)
    for method, (width, features), rate, seed in product(
        (
            *("causal", "twice", "both-orders", "question-first", "prefix", "prefix-twice"),
            *("causal-deep", "prefix-deep"),
        ),
        ((32, 4), (64, 8)),
        (5e-4, 1e-3, 3e-3),
        SEEDS,
    )
]

# The same lists at eight state sizes, from very small to large enough.
state_size = [
    Run(METHODS[method], TASKS["grid"], width, features, rate, seed)
    for method, (width, features), rate, seed in product(
        ("causal", "twice", "prefix"),
        ((16, 2), (16, 4), (32, 4), (32, 8), (64, 8), (64, 16), (128, 16), (128, 24)),
        (5e-4, 1e-3, 3e-3),
        SEEDS,
    )
]

# For tests: seconds.
debug = [
    Run(METHODS[method], TASKS["debug"], 8, 2, rate, seed, epochs=1)
    for method, rate, seed in product(("causal", "twice", "prefix"), (5e-3, 1e-2), (1, 2))
]
mqar_debug = [
    Run(METHODS[method], TASKS["mqar-debug"], 8, 2, 5e-3, seed, epochs=1)
    for method, seed in product(("causal", "prefix", "based", "window", "attention", "mamba"), (1, 2))
]

SWEEPS: dict[str, list[Run]] = {
    "figure2": figure2,
    "figure2_causes": figure2_causes,
    "depth": depth,
    "figure2_small": figure2_small,
    "mqar_frontier": mqar_frontier,
    "reading_order": reading_order,
    "state_size": state_size,
    "debug": debug,
    "mqar_debug": mqar_debug,
}
