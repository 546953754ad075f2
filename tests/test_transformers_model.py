"""Behaviour that users of transformers expect: packed rows, losses with gradient accumulation, resized vocabularies."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from jrt import Config, JRTConfig, JRTForCausalLM

PATTERNS = ("CL", "MM", "AS", "CP")


def tiny(pattern: str, **fields) -> JRTForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "width": 32,
        "vocab_rows": 64,
        "heads": 2,
        "linear_heads": 2,
        "feature_dim": 8,
        "rotary_dim": 8,
        "window": 3,
    }
    core = Config(pattern=pattern, mlp_width=48, enc_length=4, **sizes | fields)
    model = JRTForCausalLM(JRTConfig(architecture=core.to_dict()))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def packed(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The usual descriptions of documents of these lengths in one row."""
    return {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).int(),
        "cu_seq_lens_k": torch.tensor([0, *lengths]).cumsum(0).int(),
        "seq_idx": torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None],
    }


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"])
def test_documents_of_a_packed_row_are_read_apart(pattern, name):
    model, lengths = tiny(pattern), (7, 1, 5)
    ids = torch.randint(0, 64, (1, sum(lengths)))
    together = model(ids, **{name: packed(lengths)[name]}, output_hidden_states=True)
    alone = [model(part) for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(together.logits, torch.cat([each.logits for each in alone], dim=1))
    assert together.hidden_states[-1].shape == (1, sum(lengths), 32)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_loss_of_a_packed_row_is_that_of_its_documents(pattern):
    model, lengths = tiny(pattern), (9, 6)
    ids = torch.randint(0, 64, (1, sum(lengths)))
    together = model(ids, labels=ids, num_items_in_batch=10, **packed(lengths)).loss
    alone = sum(model(part, labels=part, num_items_in_batch=10).loss for part in ids.split(lengths, dim=1))
    torch.testing.assert_close(together, alone)


def test_a_packed_row_leaves_no_cache_and_says_so():
    model, lengths = tiny("CA").eval(), (4, 3)
    ids = torch.randint(0, 64, (1, sum(lengths)))
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, use_cache=True, **packed(lengths))
    assert model(ids, **packed(lengths)).past_key_values is None


def test_positions_that_say_what_is_so_change_nothing():
    model, ids = tiny("CA").eval(), torch.randint(0, 64, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    plain = model(ids, attention_mask=mask)
    torch.testing.assert_close(model(ids, attention_mask=mask, position_ids=positions).logits, plain.logits)
    cache = plain.to_tuple()[1]
    step = model(ids[:, :1], past_key_values=cache, position_ids=torch.tensor([[4], [6]]))
    assert step.logits.shape == (2, 1, 64)


@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": torch.tensor([[5, 6, 7, 8, 9, 10]])},
        {"position_ids": torch.tensor([[0, 1, 2, 2, 3, 4]])},
        {"position_ids": torch.arange(4)[None]},
        {"cu_seq_lens_q": torch.tensor([0, 4])},
        {"cu_seq_lens_q": torch.tensor([0, 4, 3, 6])},
        {"seq_idx": torch.zeros(1, 5)},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]]), "cu_seq_lens_q": torch.tensor([0, 2, 6])},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]]), "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])},
        {"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]])},
        {"cu_seq_lens_q": torch.tensor([0, 6]), "cu_seq_lens_k": torch.tensor([0, 3, 6])},
        {"cu_seq_lens_k": torch.tensor([0, 3, 7])},
        {"max_length_q": 3},
        {"max_length_k": 3, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])},
        {"max_length_q": 2, "cu_seq_lens_q": torch.tensor([0, 3, 6])},
        {"token_type_ids": torch.zeros(1, 6)},
        {"is_causal": False},
        {"is_causal": 0},
        {"is_causal": "no"},
        {"output_attentions": True},
        {"atention_mask": torch.ones(1, 6)},
        {"head_mask": torch.ones(2)},
    ],
    ids="+".join,
)
def test_arguments_that_could_change_the_result_are_never_ignored(given):
    model, ids = tiny("CL"), torch.randint(0, 64, (1, 6))
    with pytest.raises(ValueError, match=r"expected|know|support"):
        model(ids, **given)


def test_arguments_without_a_value_or_of_no_effect_pass():
    model, ids = tiny("CL"), torch.randint(0, 64, (1, 6))
    plain = model(ids).logits
    same = model(ids, token_type_ids=None, output_attentions=False, is_causal=True, return_dict=True, max_length_q=6)
    torch.testing.assert_close(same.logits, plain)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_loss_and_gradient_do_not_depend_on_how_rows_are_split(pattern):
    model, ids = tiny(pattern).train(), torch.randint(0, 64, (4, 9))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, -100)
    items = int((labels != -100).sum())
    found = []
    for rows in (4, 2, 1):
        model.zero_grad()
        losses = [
            model(part, labels=wanted, num_items_in_batch=items).loss
            for part, wanted in zip(ids.split(rows), labels.split(rows), strict=True)
        ]
        sum(losses).backward()
        found.append((sum(losses).item(), model.model.embedding.weight.grad.clone()))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_is_used_saved_and_loaded(tied, tmp_path):
    model = tiny("CL", tied=tied)
    model.resize_token_embeddings(70, pad_to_multiple_of=16)
    assert model.config.vocab_size == model.core.vocab_rows == 80
    assert model.token_rows == model.config.vocab_tokens == 70
    ids = torch.tensor([[69, 3, 65]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (again.model.head.weight is again.model.embedding.weight) == tied
    torch.testing.assert_close(again.eval()(ids).logits, expected)
    assert again.generate(ids, max_new_tokens=3, do_sample=False).max() < 70


@pytest.mark.parametrize("pattern", PATTERNS)
def test_hidden_states_lead_to_the_logits_and_have_gradients(pattern):
    model, ids = tiny(pattern), torch.randint(0, 64, (2, 6))
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == len(pattern) + 1
    torch.testing.assert_close(model.model.head(output.hidden_states[-1]), output.logits)
    torch.testing.assert_close(output.logits, model(ids).logits)
    gradients = torch.autograd.grad(output.logits.sum(), output.hidden_states)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert model(ids).hidden_states is None


@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": [0, 1, 0]},
        {"position_ids": torch.arange(3.0)[None]},
        {"position_ids": torch.arange(3)[None, None]},
        {"position_ids": torch.tensor(3)},
        {"cu_seq_lens_q": [0, 1, 3]},
        {"cu_seq_lens_q": torch.tensor([], dtype=torch.int32)},
        {"cu_seq_lens_q": torch.tensor([0.0, 1.0, 3.0])},
        {"seq_idx": [[0, 0, 1]]},
    ],
)
def test_descriptions_of_documents_that_are_no_integers_are_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        tiny("CL")(torch.tensor([[5, 6, 7]]), **given)


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_a_batch_in_which_nothing_counts_has_the_loss_zero(items):
    ids = torch.tensor([[5, 6, 7]])
    loss = tiny("CL")(ids, labels=torch.full_like(ids, -100), num_items_in_batch=items).loss
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("tokens", [0, -1])
def test_a_vocabulary_without_tokens_is_refused_before_anything_changes(tokens):
    model = tiny("CL")
    with pytest.raises(ValueError, match="at least one token"):
        model.resize_token_embeddings(tokens)
    assert model.generate(torch.tensor([[5]]), max_new_tokens=2).shape == (1, 3)


@pytest.mark.parametrize("rows", [40, 80])
def test_another_embedding_changes_the_vocabulary_of_a_tied_model(rows, tmp_path):
    model, ids = tiny("CL", tied=True), torch.tensor([[5, rows - 1]])
    model.set_input_embeddings(torch.nn.Embedding(rows, 32))
    logits = model(ids, labels=ids).logits
    assert logits.shape == (1, 2, rows) and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
    model.resize_token_embeddings(None, pad_to_multiple_of=64)
    assert model.config.vocab_tokens == rows
    with pytest.raises(ValueError, match="table of weights, got Identity"):
        model.set_input_embeddings(torch.nn.Identity())
    with pytest.raises(ValueError, match="head without bias"):
        model.set_output_embeddings(torch.nn.Linear(32, rows))


@pytest.mark.parametrize("items", ["22", -1, float("nan"), True, torch.tensor([22, 22])])
def test_a_number_of_labels_that_is_none_is_refused(items):
    model, ids = tiny("CL"), torch.arange(3, 9)[None]
    with pytest.raises(ValueError, match="num_items_in_batch"):
        model(ids, labels=ids, num_items_in_batch=items)


@pytest.mark.parametrize("kept", [-3, True, 2.0, "2"])
def test_logits_to_keep_is_a_number_of_tokens(kept):
    with pytest.raises(ValueError, match="logits_to_keep"):
        tiny("CL")(torch.arange(3, 9)[None], logits_to_keep=kept)


def test_labels_of_places_that_are_not_consecutive_are_refused():
    ids, places = torch.arange(3, 9)[None], torch.tensor([1, 4])
    with pytest.raises(ValueError, match="consecutive"):
        tiny("CL")(ids, labels=ids[:, places], logits_to_keep=places)


@pytest.mark.parametrize("given", [{"new_num_tokens": 60.0}, {"new_num_tokens": "60"}, {"pad_to_multiple_of": 0}])
def test_sizes_of_a_vocabulary_are_whole_numbers(given):
    with pytest.raises(ValueError, match="expected a number above 0"):
        tiny("CL").resize_token_embeddings(**given)
