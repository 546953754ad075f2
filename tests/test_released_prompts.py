"""Masks, generation and log-likelihoods of released-format checkpoints against the slow reference model, row by row.

The text that the release reads for each row is written out here (docs/released.md), not computed by the package.
"""

import pytest
import torch
from released_reference import (
    ATTENTION,
    BASE,
    BASED,
    assert_close,
    kind_of,
    mixer_of,
    random_weights,
    reference,
    with_,
    write,
)
from torch import Tensor

import jrt
from jrt import Quirks
from jrt.evaluate.likelihood import log_likelihoods

ENCODER, TOKENS, NEW = 16, 250, 5
CONFIGS = {
    "jrt": BASE,
    "jrt, use_mask false": with_(BASE, alt_mixer__use_mask=False),
    "jrt, scale_dim": with_(BASE, alt_mixer__scale_dim=2, mixer__kernel_size=4),
    "based": BASED,
    "attention": ATTENTION,
}
RULES = ("none", "pad", "repeat", "iterate")


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    config = CONFIGS[request.param]
    weights = random_weights(config, hidden=64)
    weights["transformer.embeddings.word_embeddings.weight"][TOKENS:] *= 3  # rows without a token that often win
    return write(tmp_path_factory.mktemp("released") / "model", config, weights), config, weights


def has_encoder(config: dict) -> bool:
    return any(kind_of(mixer_of(config, layer)) == "PrefixLinear" for layer in range(config["n_layer"]))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, TOKENS, shape, generator=torch.Generator().manual_seed(seed))


def filled(row: list[int], rule: str) -> tuple[list[int], Tensor | None]:
    """A short prompt as the rule fills it, and the attn_mask that goes with it."""
    missing = ENCODER - len(row)
    if missing <= 0 or rule in ("none", "iterate"):
        return row, None
    if rule == "pad":
        return [220] * missing + row, torch.arange(ENCODER) >= missing
    endless = row * ENCODER
    return endless[-ENCODER:], None


def continued(config: dict, weights: dict, row: list[int], rule: str, rows: int, doubled: bool) -> tuple[list, Tensor]:
    """The greedy tokens of one row out of the first `rows` ids, and the logits that chose them."""
    ids, keep = filled(row, rule)
    prompt, found, scores = len(ids), [], []
    for _ in range(NEW):
        read = len(ids) if rule == "iterate" else prompt
        logits = reference(config, weights, torch.tensor(ids), keep, read, doubled)[-1]
        scores.append(logits)
        found.append(int(logits[:rows].argmax()))
        ids = [*ids, found[-1]]
    return found, torch.stack(scores)


@pytest.mark.parametrize("compat", [None, "released"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("width", [9, ENCODER, 21])
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_generation(checkpoint, compat, masked, width, rule):
    """Rows below, at and above the encoder's length in one batch, with padding as a mask tells it, or not at all."""
    folder, config, weights = checkpoint
    model, ids = jrt.load(folder, compat=compat), tokens(4, width)
    if not model.core.has("P") and rule != "none":
        with pytest.raises(ValueError, match="no prefix encoder"):
            model.generate(ids, max_new_tokens=NEW, do_sample=False, short_prompt=rule)
        return
    pads = [0, 1, width - 1, max(0, width - ENCODER)]
    mask = torch.stack([torch.arange(width) >= count for count in pads]).long()
    out = model.generate(
        ids,
        attention_mask=mask if masked else None,
        max_new_tokens=NEW,
        do_sample=False,
        short_prompt=rule,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences[:, :width], ids)
    rows = 256 if compat else TOKENS
    for index, row in enumerate(ids.tolist()):
        own = row[pads[index] :] if masked and compat is None else row
        new, logits = continued(config, weights, own, rule, rows, doubled=compat is not None)
        assert out.sequences[index, -NEW:].tolist() == new
        assert_close(torch.stack(out.logits)[:, index], logits)


MASKS = {
    "left": torch.arange(12) >= 5,
    "right": torch.arange(12) < 7,
    "holes": torch.arange(12) % 3 != 1,
    "nothing kept": torch.zeros(12, dtype=torch.bool),
    "all kept": torch.ones(12, dtype=torch.bool),
}


@pytest.mark.parametrize("kind", ["bool", "float", "additive", "one row for all"])
@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_the_release_s_masks(checkpoint, mask, kind):
    folder, config, weights = checkpoint
    keep, ids = MASKS[mask], tokens(2, 12)
    given = torch.stack([keep, ~keep])
    if kind == "float":
        given = given.float() * 0.5
    elif kind == "additive":
        given = torch.zeros(2, 1, 12, 12).masked_fill(~given[:, None, None, :], torch.finfo(torch.float32).min)
    elif kind == "one row for all":
        given = keep[None]
    out = jrt.load(folder, compat="released")(ids, attention_mask=given).logits
    for row, own in enumerate((keep, keep if kind == "one row for all" else ~keep)):
        assert_close(out[row], reference(config, weights, ids[row], own))


@pytest.mark.parametrize(("length", "columns"), [(12, 20), (20, 20), (20, 30), (1, 1), (1, 4)])
@torch.no_grad()
def test_masks_that_the_release_does_not_look_at(checkpoint, length, columns):
    folder, config, weights = checkpoint
    ids, mask = tokens(2, length), torch.zeros(2, columns)
    out = jrt.load(folder, compat="released")(ids, attention_mask=mask).logits
    for row in range(2):
        assert_close(out[row], reference(config, weights, ids[row]))


def test_a_mask_that_fits_no_text_is_refused(checkpoint):
    model = jrt.load(checkpoint[0], compat="released")
    for shape in ((2, 5), (3, 12), (2, 12, 12)):
        with pytest.raises(ValueError, match="attention_mask has shape"):
            model(tokens(2, 12), attention_mask=torch.ones(shape))


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_blank_padding_alone_generates_as_forward_reads(checkpoint, rule):
    """Without the quirk that drops a batch's mask, the prompt is what the release's forward makes of ids and mask."""
    folder, config, weights = checkpoint
    if not has_encoder(config):
        rule = "none"
    model = jrt.load(folder, compat=Quirks(blank_padding=True))
    ids, keep = tokens(1, 12).expand(2, -1), torch.stack([torch.arange(12) >= 4, torch.arange(12) >= 0])
    out = model.generate(
        ids,
        attention_mask=keep.long(),
        max_new_tokens=3,
        do_sample=False,
        short_prompt=rule,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for row in range(2):
        own = ids[row, keep[row]].tolist()
        read, blank = (ids[row].tolist(), keep[row]) if rule in ("none", "iterate") else filled(own, rule)
        expected = reference(config, weights, torch.tensor(read), blank)[-1]
        assert_close(out.logits[0][row], expected)


PAIRS = [(3, 1), (3, 4), (9, 7), (9, 8), (14, 3), (20, 4), (1, 2)]


@pytest.mark.parametrize("batch_size", [1, 4])
@torch.no_grad()
def test_log_likelihoods_as_released(checkpoint, batch_size):
    """The whole pair is padded and all but its last token read at once: the encoder sees most of what is scored."""
    folder, config, weights = checkpoint
    pairs = [(tokens(a, seed=a).tolist(), tokens(b, seed=b + 50).tolist()) for a, b in PAIRS]
    found = log_likelihoods(jrt.load(folder, compat="released"), pairs, batch_size)
    prefix = has_encoder(config)
    for (context, continuation), scored in zip(pairs, found, strict=True):
        ids, keep = filled(context + continuation, "pad" if prefix else "none")
        logits = reference(config, weights, torch.tensor(ids[:-1]), None if keep is None else keep[:-1])
        check_score(scored, logits, continuation)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_log_likelihoods_show_the_encoder_the_context_only(checkpoint, rule, batch_size):
    folder, config, weights = checkpoint
    pairs = [(tokens(a, seed=a).tolist(), tokens(b, seed=b + 50).tolist()) for a, b in PAIRS]
    found = log_likelihoods(jrt.load(folder, short_prompt=rule), pairs, batch_size)
    prefix = has_encoder(config)
    for (context, continuation), scored in zip(pairs, found, strict=True):
        ids, keep = filled(context, rule if prefix else "none")
        rows = []
        for end in range(len(continuation)):
            so_far = ids + continuation[:end]
            read = len(so_far) if rule == "iterate" else len(ids)
            rows.append(reference(config, weights, torch.tensor(so_far), keep, read)[-1])
        check_score(scored, torch.stack(rows), continuation)


def check_score(scored, logits: Tensor, continuation: list[int]) -> None:
    own = logits[-len(continuation) :].log_softmax(-1)
    expected = own[torch.arange(len(continuation)), torch.tensor(continuation)].sum()
    assert scored.log_likelihood == pytest.approx(float(expected), rel=1e-4)
    assert scored.is_greedy == (own.argmax(-1).tolist() == continuation)
