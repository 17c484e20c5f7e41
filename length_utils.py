"""The lengths of recorded passes: few, since recording each takes time, and such that steps fill them well."""

import math
from functools import cache, lru_cache
from itertools import combinations_with_replacement

import numpy as np

from engine_passes import GRAPH_TOKENS, LAST_PASSES, PASS_TOKENS, cost_of, cut_step, recorded_tokens, tokens_of

MOST_CANDIDATES = 32  # among which lengths are searched
ENOUGH_GAIN = 0.9995  # of the tokens must be left, or less, for the search to go on


def best_lengths(steps, max_tokens, longest_row, price):
    """Lengths of passes, ascending, so that steps filled up by them, and `price` for each length, are few tokens.

    steps: the lengths of the rows of each, lists. max_tokens: what a pass may hold. The last length, which is what a
    pass holds from then on, holds the longest row. The search takes steps to fit into any passes that hold as much,
    which rows of one length do not; so the lengths that are best for usual passes are compared with what it finds.
    """
    passes = np.array([*cut_steps(steps, max_tokens), longest_row])
    totals = np.array([sum(step) for step in steps])
    proposals = lengths_for_steps(totals, longest_row, int(passes.max()), price), lengths_for_passes(passes, price)

    def tokens(lengths):
        filled = [recorded_tokens(size, lengths) for size in cut_steps(steps, lengths[-1], lengths)]
        return cost_of(filled) + price * len(lengths)

    return min(proposals, key=tokens)


def cut_steps(steps, max_tokens, lengths=()):
    """The tokens of all passes into which steps are cut. steps: the lengths of the rows of each, lists."""
    return [size for step in steps for size in tokens_of(cut_step(step, max_tokens, lengths), step)]


# ---- For passes that are cut already ---------------------------------------------------------------------------------
def lengths_for_passes(passes, price):
    """The best lengths, ascending, for passes of so many tokens, (passes,); the last one serves the longest."""
    candidates, counts = np.unique(-(-passes // GRAPH_TOKENS) * GRAPH_TOKENS, return_counts=True)
    up_to = np.concatenate([[0], counts.cumsum()])  # how many passes the first candidates serve
    fewest, chosen = [0.0], [()]
    for end, length in enumerate(candidates.tolist(), start=1):
        begin = int(np.argmin(fewest - up_to[:end] * length))
        fewest.append(fewest[begin] + int(up_to[end] - up_to[begin]) * length + price)
        chosen.append((*chosen[begin], length))
    return chosen[-1]


# ---- For steps that may be cut in many ways --------------------------------------------------------------------------
def lengths_for_steps(steps, longest_row, longest_pass, price):
    """Good lengths, ascending, for steps of so many tokens, (steps,), of which one holds the longest row.

    Lengths are added or exchanged for as long as that gains something worth the time.
    """
    spacing = GRAPH_TOKENS * math.ceil(longest_pass / (MOST_CANDIDATES * GRAPH_TOKENS))
    last = recorded_tokens(longest_pass)
    candidates = [*range(spacing, last, spacing), last]
    steps, times = np.unique(-(-steps // GRAPH_TOKENS) * GRAPH_TOKENS, return_counts=True)  # as lengths are

    @cache
    def tokens(lengths):
        return filled_tokens(steps, lengths, times) + price * len(lengths) if lengths[-1] >= longest_row else math.inf

    chosen = (last,)
    while True:
        others = [(*chosen, more) for more in candidates]
        others += [(*set(chosen) - {old}, new) for old in chosen for new in candidates]
        best = min((tuple(sorted(set(lengths))) for lengths in others), key=tokens)
        if tokens(best) >= ENOUGH_GAIN * tokens(chosen):
            return chosen
        chosen = best


def filled_tokens(steps, lengths, times=1):
    """The fewest tokens in all, PASS_TOKENS for each pass counted in, to which steps are filled up by such passes.

    steps: the tokens of each, (steps,), which are taken to fit into any passes that hold as much. times: how often each
    of them comes, (steps,) or a number.
    """
    sizes = np.array([0, *lengths])
    some = sizes[choices_of(len(sizes))]  # all combinations of LAST_PASSES passes, or fewer
    sums, costs = some.sum(1), some.sum(1) + PASS_TOKENS * (some > 0).sum(1)
    order = np.argsort(sums)
    fewest = np.minimum.accumulate(costs[order][::-1])[::-1]  # of those that hold as much, or more
    whole = np.maximum(0, -(-steps // sizes.max()) - LAST_PASSES)
    rest = fewest[np.searchsorted(sums[order], steps - whole * sizes.max())]
    return (times * (whole * (sizes.max() + PASS_TOKENS) + rest)).sum()


@lru_cache
def choices_of(count):
    """All ways to choose LAST_PASSES of so many things, in any order and repeatedly: indices, (ways, LAST_PASSES)."""
    return np.array(list(combinations_with_replacement(range(count), LAST_PASSES)))
