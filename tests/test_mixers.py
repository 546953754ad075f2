"""Mixers: adding a new one, and how many columns the prefix encoder reads."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from jrt import Config, JRTConfig, JRTForCausalLM, presets
from jrt.config import LETTERS
from jrt.mixers import MIXERS, TokenBatch, register
from jrt.model import LanguageModel

ENCODER = 16


class RunningMean(nn.Module):
    """The mean of the row's own tokens up to now; its state is their sum (B, E) and their count (B, 1)."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, batch: TokenBatch, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple]:
        u = self.proj(x)  # (B, T, E)
        own = torch.ones_like(u[..., :1]) if batch.mask is None else batch.mask[..., None].to(u.dtype)
        sums, counts = (u * own).cumsum(1), own.cumsum(1)
        if state is not None:
            sums, counts = sums + state[0][:, None], counts + state[1][:, None]
        return sums / counts.clamp(min=1), (sums[:, -1], counts[:, -1])


@pytest.fixture
def letter() -> Iterator[str]:
    register("R", "running mean", RunningMean)
    yield "R"
    del LETTERS["R"], MIXERS["R"]


def model_of(pattern: str) -> JRTForCausalLM:
    torch.manual_seed(0)
    config = dataclasses.replace(presets()["debug"], pattern=pattern, vocab_rows=97, enc_length=ENCODER)
    return JRTForCausalLM(JRTConfig(architecture=config.to_dict())).double()


def test_a_mixer_is_a_class_and_one_line(letter):
    model = model_of(f"C{letter}P{letter}").train()
    ids = torch.randint(0, 97, (2, 40))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(2):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert model.model.blocks[1].mixer.proj.weight.grad.abs().sum() > 0
        optimizer.step()
    assert losses[1] < losses[0]


@torch.no_grad()
def test_a_mixer_of_ones_own_decodes_and_is_saved(letter, tmp_path):
    model = model_of(f"C{letter}P{letter}").eval()
    ids = torch.randint(0, 97, (2, 24))
    whole = model(ids, prefix_length=torch.tensor([ENCODER, ENCODER])).logits
    out = model(ids[:, :20], use_cache=True)
    pieces = [out.logits]
    for column in range(20, 24):
        pieces.append(model(ids[:, column : column + 1], past_key_values=out.past_key_values).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    mask = (torch.arange(24) >= torch.tensor([[0], [7]])).long()
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[1, 7:], model(ids[1:, 7:]).logits[0])
    model.save_pretrained(tmp_path)
    assert torch.equal(JRTForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("taken", ["C", "", "CP"])
def test_a_letter_is_one_and_free(taken):
    with pytest.raises(ValueError, match="expected one character"):
        register(taken, "mine", RunningMean)


def encoder_columns(model: nn.Module) -> list[int]:
    """Columns that each call of an encoder projection is given, appended as the model runs."""
    seen: list[int] = []
    for name, module in model.named_modules():
        if name.endswith(("proj_k_enc", "proj_v_enc")):
            module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    return seen


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lengths", [None, [16, 16], [3, 0]])
@pytest.mark.parametrize("columns", [9, 16, 50])
@torch.no_grad()
def test_the_encoder_is_given_no_more_columns_than_it_may_read(columns, lengths, padded):
    model = model_of("CPSP").eval()
    seen = encoder_columns(model)
    mask = (torch.arange(columns) >= torch.tensor([[0], [columns - 5]])).long() if padded else None
    own = torch.tensor([columns, 5 if padded else columns])
    prefix = None if lengths is None else torch.minimum(torch.tensor(lengths), own)
    model(torch.randint(0, 97, (2, columns)), attention_mask=mask, prefix_length=prefix)
    assert seen == 4 * [min(columns, ENCODER)]


@torch.no_grad()
def test_the_encoder_reads_nothing_once_a_text_has_begun():
    model = model_of("CPSP").eval()
    seen = encoder_columns(model)
    out = model.generate(torch.randint(0, 97, (2, 50)), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert seen == 4 * [ENCODER]
    model(out.sequences[:, -1:], past_key_values=out.past_key_values)
    assert len(seen) == 4


@torch.no_grad()
def test_a_prefix_is_read_wherever_padding_puts_it():
    """Each row against the state of its own prefix alone; rows end at, before and behind the encoder's columns."""
    model = model_of("P").eval()
    starts, prefix = torch.tensor([0, 20, 45]), torch.tensor([16, 7, 5])
    ids = torch.randint(0, 97, (3, 50), generator=torch.Generator().manual_seed(3))
    batched = model(ids, attention_mask=(torch.arange(50) >= starts[:, None]).long(), prefix_length=prefix).logits
    for row, start in enumerate(starts.tolist()):
        alone = model(ids[row : row + 1, start:], prefix_length=prefix[row : row + 1]).logits[0]
        torch.testing.assert_close(batched[row, start:], alone)
        changed = ids[row : row + 1, start:].clone()
        changed[0, prefix[row] - 1] = (changed[0, prefix[row] - 1] + 1) % 97
        assert not torch.allclose(model(changed, prefix_length=prefix[row : row + 1]).logits[0, 0], alone[0])


def test_a_prefix_longer_than_the_encoder_is_refused():
    with pytest.raises(ValueError, match=r"prefix_length is 17; expected at most 16.*enc_length"):
        model_of("P")(torch.zeros(2, 40, dtype=torch.long), prefix_length=torch.tensor([3, 17]))


@torch.no_grad()
def test_no_branch_of_the_model_depends_on_what_a_tensor_holds():
    """The whole model is one graph, from ids and prefix lengths to logits."""
    model = LanguageModel(dataclasses.replace(presets()["debug"], pattern="CPSLA", vocab_rows=97, enc_length=ENCODER))
    model.init_weights()
    ids, prefix = torch.randint(0, 97, (2, 20)), torch.tensor([5, 9])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids, prefix), model(ids, prefix))


@pytest.mark.parametrize("name", ["mini-jrt", "mini-based", "mini-mamba", "mini-attention"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_state_keeps_nothing_else_of_its_text_in_memory(name, padded):
    """A view of the last inputs would keep those of the whole text alive, as long as the cache."""
    model = LanguageModel(presets()[name])
    ids = torch.randint(0, 97, (2, 512))
    mask = torch.arange(512) >= torch.tensor([[0], [5]]) if padded else None
    with torch.no_grad():
        _, state = model.read(ids, attention_mask=mask)
    tensors = [x for layer in state.layers for x in ((layer,) if torch.is_tensor(layer) else layer)]
    assert sum(x.untyped_storage().nbytes() for x in tensors) == state.nbytes()
