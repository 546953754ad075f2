"""Tables: results as text (`results`), and the paper's tables (`published`) with measured values beside the published
ones (`layouts`, `super_glue`). `mixtures` marks cells that were not measured alike, `side_by_side` compares
protocols."""

from jrt.evaluate.tables.layouts import layout_rows
from jrt.evaluate.tables.published import (
    SUPER_GLUE_SIZES,
    SUPER_GLUE_TABLES,
    TITLES,
    published_row,
    published_tables,
)
from jrt.evaluate.tables.results import aligned, comparisons_text, latex, protocols_of, results_text, size
from jrt.evaluate.tables.super_glue import super_glue_rows

__all__ = [
    "SUPER_GLUE_SIZES",
    "SUPER_GLUE_TABLES",
    "TITLES",
    "aligned",
    "comparisons_text",
    "latex",
    "layout_rows",
    "protocols_of",
    "published_row",
    "published_tables",
    "results_text",
    "size",
    "super_glue_rows",
]
