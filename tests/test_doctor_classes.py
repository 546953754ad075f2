"""The doctor on all recurrent and hybrid classes of transformers: it reports the wrong ones and no others."""

import sys

import pytest
import torch
from conftest import ROOT

from jrt.probe import probe

sys.path.insert(0, str(ROOT / "benchmarks"))
from tiny_models import CONTROLS, available, tiny_model

pytestmark = pytest.mark.slow
PAD, TEXT = 40, 24


def rows() -> torch.Tensor:
    return torch.randint(5, 256, (1, TEXT), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def reads_padding(model) -> bool:
    """Without the probe: whether the next token's logits change with padding, by a plain call of `generate`."""

    def logits(ids, mask):
        options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **options).logits[0]

    ids = rows()
    padded = torch.cat([torch.zeros(1, PAD, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, PAD, dtype=torch.long), torch.ones_like(ids)], dim=1)
    alone = logits(ids, torch.ones_like(ids))
    return bool((logits(padded, mask) - alone).abs().max() > 1e-4 * alone.abs().max())


@torch.no_grad()
def decodes_otherwise(model) -> bool:
    """Without the probe: whether greedy tokens' logits with a cache differ from those of reading all again."""
    ids = rows()
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=None, **options
    )
    found = torch.cat(output.logits)
    truth = model(input_ids=output.sequences, use_cache=False).logits[0, TEXT - 1 : -1]
    return bool((found - truth).abs().max() > 1e-4 * truth.abs().max())


@pytest.mark.parametrize("kind", available())
def test_padding_and_decoding_are_judged_as_plain_calls_judge_them(kind):
    model = tiny_model(kind)
    wrong_padding, wrong_decoding = reads_padding(model), decodes_otherwise(model)
    findings = probe(model)
    assert findings.holds("padding alone") != wrong_padding
    if wrong_decoding:
        assert not findings.holds("decode")
    assert not any(check.reason.startswith("TypeError") for check in findings.checks)
    if kind in CONTROLS:
        assert all(check.holds for check in findings.checks)


@pytest.mark.parametrize("kind", sorted(set(available()) & {"rwkv", "xlstm", "recurrent_gemma"}))
def test_classes_that_take_no_mask_are_found(kind):
    findings = probe(tiny_model(kind))
    assert not findings.mode.padding and not findings.mode.sharing
    assert findings.mode.batches == (kind != "rwkv")  # RWKV mixes the rows of a batch when it decodes


@pytest.mark.parametrize(
    "kind", sorted(set(available()) & {"bamba", "falcon_h1", "granitemoehybrid", "qwen3_next", "lfm2"})
)
def test_hybrids_share_what_prompts_begin_with(kind):
    assert probe(tiny_model(kind)).mode.sharing
