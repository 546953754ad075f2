"""Bootstrap intervals of jrt_recall."""

import numpy as np
import pytest
from jrt_recall.scoring import bootstrap, paired_difference


def test_interval_agrees_with_the_normal_one_for_many_items():
    scores = np.random.default_rng(0).random(2000) < 0.3
    mean, low, high = bootstrap(scores)
    half = 1.96 * np.sqrt(mean * (1 - mean) / 2000)
    assert mean == scores.mean()
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.002)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        _, low, high = bootstrap(generator.random(100) < 0.4, resamples=1000)
        hits += low <= 0.4 <= high
    assert 178 <= hits <= 200


def test_intervals_are_seeded():
    scores = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1]
    assert bootstrap(scores, seed=3) == bootstrap(scores, seed=3)
    assert bootstrap(scores, seed=3).mean == bootstrap(scores, seed=4).mean == 0.6


def test_blocks_do_not_change_a_result(monkeypatch):
    scores = np.arange(10) % 3
    whole = bootstrap(scores, resamples=999)
    monkeypatch.setattr("jrt_recall.scoring._BLOCK", 50)
    assert bootstrap(scores, resamples=999) == whole


def test_a_paired_difference_is_narrower_than_two_intervals_suggest():
    generator = np.random.default_rng(2)
    once = (generator.random(400) < 0.5).astype(float)
    twice = np.maximum(once, generator.random(400) < 0.1)
    paired = paired_difference(once, twice)
    assert paired.mean == pytest.approx((twice - once).mean())
    assert paired.low > 0
    assert paired.high - paired.low < (bootstrap(once).high - bootstrap(once).low) / 1.5


def test_one_item_and_equal_scores_have_no_width():
    assert bootstrap([1.0]) == (1.0, 1.0, 1.0)
    assert paired_difference([1, 0], [1, 0]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("scores", [[], [float("nan")], [[1, 0]]])
def test_bad_scores_are_refused(scores):
    with pytest.raises(ValueError, match="score"):
        bootstrap(scores)


def test_unequal_lengths_and_levels_are_refused():
    with pytest.raises(ValueError, match="same items"):
        paired_difference([1], [1, 0])
    with pytest.raises(ValueError, match="level"):
        bootstrap([1], level=95)
