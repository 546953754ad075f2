"""Set disjointness: the released generator's examples, and what they must be."""

import json

import pytest
import torch
from safetensors.torch import load_file

from synthetics.data import IGNORED, disjoint_sets


def test_examples_are_the_released_ones(shared):
    cases = json.loads((shared / "golden" / "synthetic.json").read_text())["cases"]
    tensors = load_file(shared / "golden" / "synthetic.safetensors")
    for index, case in enumerate(cases):
        drawn = disjoint_sets(
            case["vocab_size"], case["num_examples"], case["short_length"], case["long_length"], case["seed"]
        )
        assert torch.equal(drawn.inputs, tensors[f"data{index}.inputs"])
        assert torch.equal(drawn.labels, tensors[f"data{index}.labels"])


@pytest.mark.parametrize(("first", "second"), [(4, 16), (16, 4), (1, 28)])
def test_exactly_one_token_is_shared(first, second):
    drawn = disjoint_sets(64, 50, first, second, seed=3)
    for row, label in zip(drawn.inputs.tolist(), drawn.labels, strict=True):
        shared = set(row[1 : 1 + first]) & set(row[2 + first : -1])
        assert shared == {label[-1].item()}
        assert (label[:-1] == IGNORED).all()


def test_lists_longer_than_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="expected 1 to"):
        disjoint_sets(16, 2, 9, 2, seed=0)
