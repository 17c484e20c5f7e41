"""length_utils: the lengths of recorded passes are as good as trying all of them would find."""

import math
import time
from itertools import chain, combinations, combinations_with_replacement

import numpy as np
import pytest

from engine_passes import PASS_TOKENS, cost_of, recorded_tokens
from length_utils import best_lengths, cut_steps, filled_tokens, lengths_for_passes, lengths_for_steps


def test_passes_are_filled_up_to_few_lengths_where_recording_costs_much():
    steps = np.array([1280, 1792, 2304, 2816] * 5)

    def chosen(price):
        return lengths_for_steps(steps, longest_row=512, longest_pass=2048, price=price)

    assert filled_tokens(steps, chosen(0)) == steps.sum() + 30 * PASS_TOKENS  # nothing is filled up
    assert len(chosen(0)) > len(chosen(2000)) > len(chosen(1e5)) == 1


def cheapest_by_trying(tokens, lengths):
    """Of all passes of these lengths that together hold so many tokens, the cost of the cheapest."""
    most = math.ceil(tokens / min(lengths))
    every = chain.from_iterable(combinations_with_replacement(lengths, count) for count in range(1, most + 1))
    return min(cost_of(some) for some in every if sum(some) >= tokens)


def test_steps_are_filled_up_to_the_cheapest_passes_of_given_lengths():
    for lengths in ((512,), (384, 1024), (640, 896, 1024)):
        steps = np.arange(100, 3000, 190)
        assert filled_tokens(steps, lengths) == sum(cheapest_by_trying(step, lengths) for step in steps.tolist())


def test_hardly_any_other_lengths_of_pass_would_be_fewer_tokens():
    draw = np.random.default_rng(3)
    for price in (0, 300, 2000, 20_000):
        steps = draw.normal(1500, 250, 30).astype(int)
        candidates = range(128, 1152, 128)
        every = [some for count in range(1, 9) for some in combinations(candidates, count) if some[-1] >= 500]
        fewest = min(filled_tokens(steps, some) + price * len(some) for some in every)
        chosen = lengths_for_steps(steps, longest_row=500, longest_pass=1024, price=price)
        assert chosen[-1] >= 500
        assert filled_tokens(steps, chosen) + price * len(chosen) <= 1.01 * fewest


def test_no_other_lengths_would_be_fewer_tokens_for_passes_that_are_cut_already():
    draw = np.random.default_rng(3)
    for price in (0, 300, 2000, 20_000):
        passes = draw.integers(1, 2000, 30)
        candidates = sorted({int(-(-size // 128) * 128) for size in passes})

        def tokens(lengths, passes=passes, price=price):
            return sum(min(length for length in lengths if length >= size) for size in passes) + price * len(lengths)

        every = [
            (*some, candidates[-1]) for count in range(len(candidates)) for some in combinations(candidates[:-1], count)
        ]
        assert tokens(lengths_for_passes(passes, price)) == min(map(tokens, every))


@pytest.mark.parametrize("rows", [[1100] * 4, [700] * 16, [3000] * 8, [1500, 2500], [30, 200, 60, 500] * 4])
def test_the_better_of_both_proposals_is_taken_for_rows_that_leave_gaps_and_for_others(rows):
    steps = [rows] * 20

    def tokens(lengths):
        passes = cut_steps(steps, lengths[-1], lengths)
        return cost_of([recorded_tokens(size, lengths) for size in passes]) + 100 * len(lengths)

    passes, totals = np.array(cut_steps(steps, 4096)), np.array([sum(rows)] * 20)
    proposals = (
        lengths_for_passes(passes, price=100),
        lengths_for_steps(totals, max(rows), int(passes.max()), price=100),
    )
    found = best_lengths(steps, 4096, max(rows), price=100)
    assert tokens(found) <= min(map(tokens, proposals))
    assert found[-1] >= max(rows)


def test_lengths_are_chosen_in_no_time():
    draw, began = np.random.default_rng(0), time.perf_counter()
    lengths_for_steps(draw.integers(20, 32768, 16_000), longest_row=32768, longest_pass=32768, price=100)
    assert time.perf_counter() - began < 4  # 0.2 s where nothing else runs
