"""Tables: results as text (`results`), and the paper's tables (`published`) with measured values beside the published
ones (`layouts`, `super_glue`). `mixtures` marks cells that were not measured alike, `side_by_side` compares
two cells."""
