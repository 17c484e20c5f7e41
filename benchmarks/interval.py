"""How often a 95 % interval of the difference in loss misses the truth, by simulation.

    python benchmarks/interval.py [--draws 20000]

Rows of several kinds of lengths and differences are drawn again and again. For each number of rows it prints the share
of draws, in percent, whose interval does not hold the true ratio: of the interval that evaluate.py gives, of the usual
linearised t interval, and of a bootstrap's percentiles. 5 is the promise.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from score_utils import ratio_interval, t_quantile

ROWS = (5, 10, 20, 50, 500)
GAIN = -0.2  # nats a token, the true difference

# Tokens of an answer
LENGTHS = {
    "even": lambda draw, shape: np.full(shape, 60.0),
    "uniform": lambda draw, shape: draw.integers(10, 200, shape).astype(float),
    "lognormal": lambda draw, shape: np.maximum(1, np.round(np.exp(draw.normal(4, 0.6, shape)))),
    "very uneven": lambda draw, shape: np.maximum(1, np.round(np.exp(draw.normal(4, 1, shape)))),
    "two lengths": lambda draw, shape: np.where(draw.random(shape) < 0.8, 20.0, 200.0),
}

# Sums of differences over the tokens of each row
DIFFERENCES = {
    "tokens": lambda draw, tokens: GAIN * tokens + 0.7 * np.sqrt(tokens) * draw.standard_normal(tokens.shape),
    "rows": lambda draw, tokens: tokens * (GAIN + 0.3 * draw.standard_normal(tokens.shape)),
    "both": lambda draw, tokens: (
        tokens * (GAIN + 0.15 * draw.standard_normal(tokens.shape))
        + 0.5 * np.sqrt(tokens) * draw.standard_normal(tokens.shape)
    ),
    "heavy tails": lambda draw, tokens: tokens * (GAIN + 0.2 * draw.standard_t(5, tokens.shape)),
    "skewed": lambda draw, tokens: tokens * GAIN / 4 * draw.gamma(4, 1, tokens.shape),
}


def draw_rows(draw, lengths, differences, shape):
    """(differences in negative log-likelihood, tokens), both of this shape: draws x rows."""
    tokens = LENGTHS[lengths](draw, shape)
    return DIFFERENCES[differences](draw, tokens), tokens


def error(low, high, truth=GAIN):
    """The share of intervals that do not hold the truth."""
    return float(np.mean((low > truth) | (high < truth)))


def linearised_interval(amounts, sizes):
    """The textbook's interval of a ratio: t with one degree of freedom less than there are rows."""
    rows, total = amounts.shape[-1], sizes.sum(-1)
    ratio = amounts.sum(-1) / total
    squares = ((amounts - ratio[:, None] * sizes) ** 2).sum(-1)
    reach = t_quantile(rows - 1) * np.sqrt(squares * rows / (rows - 1)) / total
    return ratio, ratio - reach, ratio + reach


def bootstrap_interval(draw, amounts, sizes, resamples=400):
    """The percentiles of the ratio over rows that are drawn again with replacement."""
    rows = amounts.shape[-1]
    ratios = np.empty((resamples, len(amounts)))
    for number in range(resamples):
        chosen = draw.integers(0, rows, amounts.shape)
        again, tokens = np.take_along_axis(amounts, chosen, -1), np.take_along_axis(sizes, chosen, -1)
        ratios[number] = again.sum(-1) / tokens.sum(-1)
    return amounts.sum(-1) / sizes.sum(-1), *np.quantile(ratios, (0.025, 0.975), axis=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20_000, help="a tenth of them for the bootstrap and for 500 rows")
    draws = parser.parse_args().draws
    print("| lengths | differences | method |" + "".join(f" {rows} rows |" for rows in ROWS))
    print("|---|---|---|" + "---|" * len(ROWS))
    for lengths in LENGTHS:
        for differences in DIFFERENCES:
            found = {"evaluate.py": [], "linearised t": [], "bootstrap": []}
            for rows in ROWS:
                draw = np.random.default_rng(0)
                amounts, sizes = draw_rows(draw, lengths, differences, (draws if rows < 500 else draws // 10, rows))
                few = slice(draws // 10 if rows < 500 else draws // 40)
                found["evaluate.py"].append(error(*ratio_interval(amounts, sizes)[1:]))
                found["linearised t"].append(error(*linearised_interval(amounts, sizes)[1:]))
                found["bootstrap"].append(error(*bootstrap_interval(draw, amounts[few], sizes[few])[1:]))
            for method, errors in found.items():
                print(f"| {lengths} | {differences} | {method} |" + "".join(f" {100 * e:.1f} |" for e in errors))


if __name__ == "__main__":
    main()
