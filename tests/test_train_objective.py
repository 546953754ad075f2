"""The objective (paper equation 5): which tokens are hidden, which labels count, and the released code's numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file

import jrt
import jrt.model
from jrt.training.loss import ModelWithLoss, loss_of, room_for, summed_cross_entropy
from jrt.training.objective import IGNORED, Objective, Targets, greedy_answers, prefix_of
from train.optimizer import Schedule, parameter_groups

MASK = 99


def ids(rows: int = 6, length: int = 32) -> torch.Tensor:
    return torch.randint(0, 90, (rows, length + 1), generator=torch.Generator().manual_seed(3))


def prefixes(rows: int = 6, prefix: int = 16) -> torch.Tensor:
    return torch.full((rows,), prefix)


def drawn(objective: Objective, tokens: torch.Tensor, **more) -> Targets:
    return objective(tokens, prefixes(len(tokens)), torch.Generator().manual_seed(0), **more)


def test_hidden_tokens_lie_in_the_prefix_and_are_recovered_at_their_own_place():
    tokens = ids()
    targets = drawn(Objective("jrt", MASK), tokens)
    hidden = targets.input_ids == MASK
    assert hidden[:, :16].any() and not hidden[:, 16:].any()
    assert torch.equal(targets.labels[hidden], tokens[:, :-1][hidden])
    assert torch.equal(targets.masked, hidden)
    assert torch.equal(
        targets.labels[:, 16:], tokens[:, 17:]
    )  # the released code never predicts the token after the prefix
    assert (targets.labels[:, :16][~hidden[:, :16]] == IGNORED).all()
    assert targets.totals().tolist() == [6 * 16, hidden.sum()]


def test_the_first_token_after_the_prefix_counts_where_it_is_asked_for():
    tokens = ids()
    targets = drawn(Objective("jrt", MASK, predicts_first=True, masked_share=0.9), tokens)
    assert torch.equal(targets.labels[:, 15], tokens[:, 16])
    assert (targets.input_ids[:, 15] != MASK).all()


def test_share_rows_and_prefix_lm():
    tokens = ids(200)
    half = drawn(Objective("jrt", MASK, masked_share=1.0, masked_rows=0.5), tokens).masked.any(1)
    assert 0.35 < half.float().mean() < 0.65
    for objective in (Objective("jrt", MASK, masked_share=0.0), Objective("prefix-lm", MASK)):
        targets = drawn(objective, tokens)
        assert not targets.masked.any() and torch.equal(targets.input_ids, tokens[:, :-1])
    causal = Objective("causal", MASK)(tokens, None, torch.Generator())
    assert torch.equal(causal.labels, tokens[:, 1:])


def test_a_batch_hides_the_same_tokens_however_it_is_split():
    tokens, objective = ids(8), Objective("jrt", MASK, masked_rows=0.7)
    whole = drawn(objective, tokens)
    parts = [drawn(objective, tokens[start : start + 2], first_row=start, all_rows=8) for start in (0, 2, 4, 6)]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)


def test_weights_and_totals():
    tokens = ids()
    weights = torch.rand(6, 32)
    targets = drawn(Objective("jrt", MASK), tokens, weights=weights)
    torch.testing.assert_close(targets.totals()[0], weights[:, 16:].sum())


def test_prefix_follows_from_the_model():
    known = jrt.presets()
    assert prefix_of(known["jrt-360m"], "jrt", 2048) == 1024
    assert prefix_of(known["attention-360m"], "causal", 2048) == 0
    assert prefix_of(known["attention-360m"], "prefix-lm", 2048, 512) == 512
    for name, kind, length, prefix, told in (
        ("jrt-360m", "causal", 2048, None, "encoder"),
        ("jrt-360m", "jrt", 1024, None, "nothing is left"),
        ("jrt-360m", "jrt", 4096, 2000, "at most 1024"),
        ("attention-360m", "jrt", 2048, None, "give prefix_length"),
        ("attention-360m", "causal", 2048, 5, "no prefix"),
        ("attention-360m", "masked", 2048, None, "causal, prefix-lm, jrt"),
    ):
        with pytest.raises(ValueError, match=told):
            prefix_of(known[name], kind, length, prefix)


@pytest.fixture(scope="module")
def released(shared):
    folder = shared / "golden"
    tensors = load_file(folder / "train_loss.safetensors")
    told = json.loads((folder / "train_loss.json").read_text())
    return jrt.load(folder / "jrt_main").model, tensors, told


def golden_targets(tensors: dict, told: dict, kind: str) -> Targets:
    """The released batch through `Objective.targets`, its hidden places given."""
    prefix, mask = told["enc_length"], told["hf_mask_token_id"]
    inputs, labels = tensors[f"{kind}.input_ids"], tensors[f"{kind}.labels"]
    hidden = inputs == mask
    own = torch.where(hidden, labels, inputs)
    following = torch.cat([own, labels[:, -1:]], 1)
    objective = Objective("jrt", mask, ignored_token=0)
    return objective.targets(following, prefixes(len(inputs), prefix), hidden)


def losses(model, targets: Targets, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and (2,) means of its parts."""
    rows, length = targets.input_ids.shape
    module = ModelWithLoss(model, recovers=True)
    room = room_for(objective, rows, length, int(targets.prefix_length[0]) if targets.prefix_length is not None else 0)
    sums = module(targets.input_ids, targets.labels, targets.masked, targets.prefix_length, targets.weights, room)[:2]
    return loss_of(sums, targets.totals(), objective), sums / targets.totals().clamp(min=1)


def test_loss_and_gradients_of_the_released_code(released):
    model, tensors, told = released
    targets = golden_targets(tensors, told, "mixed")
    objective = Objective("jrt", told["hf_mask_token_id"], ignored_token=0)
    model.zero_grad()
    loss, parts = losses(model, targets, objective)
    parts = parts.detach()
    assert float(loss.detach()) == pytest.approx(told["mixed"]["total_loss"], rel=1e-4)
    assert float(parts[0]) == pytest.approx(told["mixed"]["nwp_loss"], rel=1e-4)
    assert 0.25 * float(parts[1]) == pytest.approx(told["mixed"]["mlm_loss"], rel=1e-4)
    loss.backward()
    norm = model.norm.weight.grad
    torch.testing.assert_close(norm, tensors["grad.transformer.ln_f.weight"], rtol=1e-3, atol=1e-4)
    norms = sorted(float(p.grad.norm()) for p in model.parameters())
    assert norms == pytest.approx(sorted(told["grad_norms"].values()), rel=1e-3)


def test_the_released_path_without_shards(released):
    model, tensors, told = released
    prefix, mask = told["enc_length"], told["hf_mask_token_id"]
    tokens = torch.cat([tensors["plain.input_ids"], tensors["plain.labels"][:, -1:]], 1)
    hidden = tensors["hf.masked_input_ids"] == mask
    objective = Objective("jrt", mask, ignored_token=0)
    targets = objective.targets(tokens, prefixes(len(tokens), prefix), hidden)
    assert torch.equal(targets.input_ids, tensors["hf.masked_input_ids"])
    loss, parts = losses(model, targets, objective)
    assert float(loss.detach()) == pytest.approx(told["hf_mixed"]["total_loss"], rel=1e-4)
    assert 0.25 * float(parts[1].detach()) == pytest.approx(told["hf_mixed"]["mlm_loss"], rel=1e-4)


def test_the_loss_without_its_masked_part_and_the_plain_one(released):
    model, tensors, told = released
    prefix, mask = told["enc_length"], told["hf_mask_token_id"]
    continual = golden_targets(tensors, told, "mixed")
    continual.labels[continual.masked] = IGNORED
    assert float(losses(model, continual, Objective("jrt", mask))[1][0]) == pytest.approx(
        told["mixed"]["nwp_loss"], rel=1e-4
    )
    inputs, labels = tensors["plain.input_ids"], tensors["plain.labels"]
    tokens = torch.cat([inputs, labels[:, -1:]], 1)
    everywhere = Objective("causal", mask).targets(tokens, None, None)
    loss, _ = losses(model, Targets(*vars(everywhere).values()), Objective("causal", mask))
    assert float(loss) == pytest.approx(told["default"], rel=1e-4)
    after = Objective("prefix-lm", mask).targets(tokens, prefixes(len(tokens), prefix), None)
    assert float(losses(model, after, Objective("prefix-lm", mask))[0]) == pytest.approx(told["continual"], rel=1e-4)


def test_the_token_that_the_release_never_scores():
    tokens = ids().clamp(min=1)
    tokens[0, 3] = 0
    hidden = torch.zeros(6, 32, dtype=torch.bool)
    hidden[0, 3:5] = True
    targets = Objective("jrt", MASK, ignored_token=0).targets(tokens, prefixes(), hidden)
    assert targets.input_ids[0, 3] == MASK and targets.labels[0, 3] == IGNORED
    assert targets.labels[0, 4] == tokens[0, 4]


@pytest.mark.parametrize("weighted", [False, True])
def test_a_loss_in_pieces_is_the_loss(weighted, monkeypatch):
    monkeypatch.setattr("jrt.training.loss.CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((50, 8), (30, 8)))
    labels = torch.randint(0, 30, (50,), generator=generator)
    labels[::3] = IGNORED
    weights = torch.rand(50, generator=generator) if weighted else None
    plain = torch.nn.functional.cross_entropy((hidden @ head.T).float(), labels, reduction="none")
    expected = (plain * (1 if weights is None else weights)).sum()
    gradients = []
    for compute in (lambda h, w: summed_cross_entropy(h, w, labels, weights), None):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if compute is None:
            each = torch.nn.functional.cross_entropy((h @ w.T).float(), labels, reduction="none")
            total = (each * (1 if weights is None else weights)).sum()
        else:
            total = compute(h, w)
        torch.testing.assert_close(total, expected)
        total.backward()
        gradients.append((h.grad, w.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_room_holds_every_place_that_counts():
    tokens = ids(64, 64)
    for objective in (
        Objective("jrt", MASK),
        Objective("jrt", MASK, predicts_first=True),
        Objective("prefix-lm", MASK),
    ):
        following, masked = room_for(objective, 64, 64, 32)
        targets = objective(tokens, prefixes(64, 32), torch.Generator().manual_seed(1))
        totals = targets.totals()
        assert following == totals[0]
        assert totals[1] <= masked < 64 * 32


def test_schedule_of_the_release(shared):
    for case in json.loads((shared / "golden" / "lr_schedule.json").read_text()):
        spec = case["spec"]
        steps = spec["warmup_t"] + spec["t_initial"]
        schedule = Schedule(steps, spec["lr"], spec["lr_min"], spec["warmup_lr_init"], spec["warmup_t"])
        for step, rate in case["lr_at_step"].items():
            assert schedule.rate(int(step)) == pytest.approx(rate, rel=1e-9)


NAMES = (
    ("transformer.embeddings.word_embeddings", "embedding"),
    ("backbone.embedding", "embedding"),
    ("transformer.ln_f", "norm"),
    ("backbone.norm_f", "norm"),
    ("transformer.layers", "blocks"),
    ("backbone.layers", "blocks"),
    (".norm.weight", ".norm1.weight"),
    ("conv.conv", "conv"),
)


def here(name: str) -> str:
    """The name here of a released parameter."""
    for released_name, own in NAMES:
        name = name.replace(released_name, own)
    return name


@pytest.mark.parametrize(
    ("family", "folder"), [("jrt", "jrt_main"), ("based", "based_decay_legacy"), ("attn", "attn"), ("mamba", "mamba")]
)
def test_weight_decay_of_the_release(family, folder, shared):
    told = json.loads((shared / "golden" / "param_groups.json").read_text())[family]
    model = jrt.load(shared / "golden" / folder).model
    names = {id(p): name for name, p in model.named_parameters()}
    for group in parameter_groups(model, 0.1, "released"):
        # A group of the release that names no decay has the optimiser's default, which is 0.1 too.
        same = [g for g in told if (0.1 if g["weight_decay"] is None else g["weight_decay"]) == group["weight_decay"]]
        expected = {here(name) for g in same for name in g["params"]}
        assert {names[id(p)] for p in group["params"]} == expected


def test_only_matrices_decay_by_default():
    model = jrt.model.LanguageModel(jrt.presets()["debug"])
    decayed, others = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {"blocks.1.mixer.proj_q.weight", "blocks.0.mlp.fc1.weight"} <= {names[id(p)] for p in decayed["params"]}
    assert {"embedding.weight", "blocks.0.norm1.weight", "blocks.0.mixer.conv.weight", "blocks.5.mixer.A_log"} <= {
        names[id(p)] for p in others["params"]
    }
    assert others["weight_decay"] == 0.0 and decayed["weight_decay"] == 0.1


def test_right_answers_are_those_whose_every_token_is_likeliest():
    targets = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    answers = torch.tensor([[1, 1, 0, 2], [0, 1, 1, 1]])
    likeliest = targets.clone()
    assert [int(n) for n in greedy_answers(likeliest, targets, answers)] == [3, 3]
    likeliest[0, 1] = 5
    likeliest[0, 2] = 5  # no answer
    assert [int(n) for n in greedy_answers(likeliest, targets, answers)] == [2, 3]
    assert [int(n) for n in greedy_answers(likeliest, targets, torch.zeros_like(answers))] == [0, 0]
