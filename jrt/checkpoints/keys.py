"""Tables from the tensor names of other releases to those of this package, and the functions that apply them.

A row holds a regular expression for the whole name in the file, and the name in this package. The first matching row
counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from jrt.checkpoints.files import CheckpointError

Table = tuple[tuple[str, str], ...]

# The released JRT, Based and attention checkpoints, after a leading "model." is cut.
GPT: Table = (
    (r"transformer\.embeddings\.word_embeddings\.weight", "embedding.weight"),
    (r"transformer\.layers\.(\d+)\.(norm[12])\.weight", r"blocks.\1.\2.weight"),
    (r"transformer\.layers\.(\d+)\.mlp\.(fc[123])\.(weight|bias)", r"blocks.\1.mlp.\2.\3"),
    (r"transformer\.layers\.(\d+)\.mixer\.conv1?\.conv1?\.(weight|bias)", r"blocks.\1.mixer.conv.\2"),
    (r"transformer\.layers\.(\d+)\.mixer\.(in_proj|out_proj|Wqkv)\.(weight|bias)", r"blocks.\1.mixer.\2.\3"),
    (r"transformer\.layers\.(\d+)\.mixer\.(proj_[qkv]|proj_[kv]_enc|decay_proj)\.weight", r"blocks.\1.mixer.\2.weight"),
    (r"transformer\.ln_f\.weight", "norm.weight"),
    (r"transformer\.decay\.decay", "log_decay"),
    (r"lm_head\.weight", "head.weight"),
)

# The released mamba-*, and state-spaces/mamba-* in both layouts.
MAMBA: Table = (
    (r"backbone\.embeddings?\.weight", "embedding.weight"),
    (r"backbone\.layers\.(\d+)\.norm\.weight", r"blocks.\1.norm1.weight"),
    (r"backbone\.layers\.(\d+)\.mixer\.(A_log|D)", r"blocks.\1.mixer.\2"),
    (r"backbone\.layers\.(\d+)\.mixer\.(in_proj|x_proj|out_proj)\.weight", r"blocks.\1.mixer.\2.weight"),
    (r"backbone\.layers\.(\d+)\.mixer\.(conv1d|dt_proj)\.(weight|bias)", r"blocks.\1.mixer.\2.\3"),
    (r"backbone\.norm_f\.weight", "norm.weight"),
    (r"lm_head\.weight", "head.weight"),
)

# Folders that this package wrote.
OWN: Table = ((r"model\.(.+)", r"\1"),)

# Tensors that are no weights: counters of the trainer, and tables that follow from the configuration.
NOT_WEIGHTS = (r".*metrics.*", r".+\.rotary_emb\.(inv_freq|scale)", r".+\.feature_map\..+")


def renamed(names: Iterable[str], table: Table) -> tuple[dict[str, str], list[str]]:
    """{name in this package: name in the file}, and the names that match no row of the table. NOT_WEIGHTS are in neither.

    Raises CheckpointError if two tensors of the file have the same name in this package."""
    cut = {name: name if table is OWN else name.removeprefix("model.") for name in names}
    moved = _moved_norms(set(cut.values()))
    found: dict[str, str] = {}
    unknown = []
    for name, plain in cut.items():
        modern = moved.get(plain, plain)
        if any(re.fullmatch(pattern, modern) for pattern in NOT_WEIGHTS):
            continue
        matches = ((re.fullmatch(pattern, modern), replacement) for pattern, replacement in table)
        here = next((match.expand(replacement) for match, replacement in matches if match), None)
        if here is None:
            unknown.append(name)
        elif here in found:
            raise CheckpointError(f"the tensors {found[here]} and {name} are both {modern}")
        else:
            found[here] = name
    return found, unknown


def _moved_norms(names: set[str]) -> dict[str, str]:
    """{name: name in the released layout} of the norms of an older layout, in which they belong to the layer before.

    There `ln_0` stands before the first layer, and a layer's two norms stand after its mixer and after its MLP. In the
    released layout each norm stands before the mixer or MLP that reads it, and the last one is `ln_f`.
    """
    if "transformer.ln_0.weight" not in names:
        return {}
    moved = {"transformer.ln_0.weight": "transformer.layers.0.norm1.weight"}
    for name in names:
        if match := re.fullmatch(r"transformer\.layers\.(\d{1,9})\.norm([12])\.weight", name):
            layer, number = int(match[1]), int(match[2])
            after = f"transformer.layers.{layer + number - 1}.norm{3 - number}.weight"
            moved[name] = after if after in names else "transformer.ln_f.weight"
    return moved
