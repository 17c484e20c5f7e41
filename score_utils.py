"""Scores: how good answers are, how far two models' figures are apart, and how sure that is.

ratio_interval([-120.0, -80.5, -99.0], [60, 41, 52])     # -> about (-1.96, -2.02, -1.89) nats a token
"""

import json
import math
import re
from decimal import Decimal

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

from thought_utils import without_thought

# The customary names of a perplexity; it is below these limits
BANDS = ((10, "excellent"), (20, "good"), (30, "acceptable"), (math.inf, "needs improvement"))
FEWEST_ROWS = 10  # below it there is no verdict: the interval still holds, but a few odd rows would decide
TOO_FEW = "too few rows"

MOST = {"repetition": 1, "chrf": 100, "rouge_l": 1}  # what these figures of an answer can be, and so differ by
YES_OR_NO = ("ended", "exact_match", "accuracy")  # figures of an answer that are 0 or 1


def band(perplexity):
    """The customary name of a perplexity: below 10 excellent, 20 good, 30 acceptable, else needs improvement."""
    return next(name for limit, name in BANDS if perplexity < limit or limit == math.inf)


def verdict(rows, low, high):
    """What the interval of a difference in loss (tuned - base) over so many rows says of the tuned model."""
    if rows < FEWEST_ROWS:
        return TOO_FEW
    return "better" if high < 0 else "worse" if low > 0 else "no clear difference"


# Figures of answers that tell how good they are: 1 where more is better, -1 where less is
GOOD = {"accuracy": 1, "exact_match": 1, "chrf": 1, "rouge_l": 1, "ended": 1, "repetition": -1}


def speaks_against(verdict, difference):
    """The figures of answers whose whole interval says the opposite of a verdict on the loss, "better" or "worse"."""
    against = {"better": -1, "worse": 1}.get(verdict, 0)
    found = []
    for name, sign in GOOD.items():
        change = difference.get(name)
        if change and change["low"] is not None and min(against * sign * change[end] for end in ("low", "high")) > 0:
            found.append(name)
    return found


# ---- Intervals -------------------------------------------------------------------------------------------------------
def ratio_interval(amounts, sizes):
    """(sum of amounts / sum of sizes, low, high): the ratio over rows like these, and its 95 % interval.

    Rows lie along the last axis: amounts are differences in negative log-likelihood, for example, and sizes are tokens.
    The ratio is a mean of the rows weighted by their sizes, so that a few long rows can carry it. Three things keep its
    interval honest where rows are few and uneven (benchmarks/interval.py): a row's residual is enlarged by what the
    row itself pulled the ratio towards it (HC2), Student's t has the degrees of freedom that the weights leave (Bell
    and McCaffrey 2002; Imbens and Kolesar 2016), and of few rows the interval is wider by a share of 1 / rows**2, since
    t takes the differences to be symmetric. Of many rows of one size this is the usual t interval. NaN for a single
    row.
    """
    amounts, sizes = np.asarray(amounts, float), np.asarray(sizes, float)
    total = sizes.sum(-1, keepdims=True)
    ratio, weights = amounts.sum(-1, keepdims=True) / total, sizes / total
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = weights**2 / (1 - weights)
        error = np.sqrt((factors * (amounts / sizes - ratio) ** 2).sum(-1))
        reach = error * t_quantile(degrees_of_freedom(weights, factors)) * (1 + 1 / amounts.shape[-1] ** 2)
    ratio = ratio[..., 0]
    return ratio, ratio - reach, ratio + reach


def degrees_of_freedom(weights, factors):
    """Of the variance estimate sum(factors * residuals**2) of a mean with these weights: 2 mean**2 / variance.

    Both follow from the matrix G of that quadratic form, diag(f) - f w' - w f' + sum(f) w w', by its trace and that of
    its square, for rows of one variance. At least 1.
    """
    f, w, s = factors, weights, factors.sum(-1)
    ff, fw, ww = (f * f).sum(-1), (f * w).sum(-1), (w * w).sum(-1)
    trace = s - 2 * fw + s * ww
    square = ff - 4 * (f * f * w).sum(-1) + 2 * s * (f * w * w).sum(-1)
    square += 2 * fw**2 + 2 * ff * ww - 4 * s * fw * ww + (s * ww) ** 2
    return np.maximum(trace**2 / square, 1.0)


def t_quantile(degrees):
    """The 97.5 % quantile of Student's t distribution; the degrees of freedom may be fractions, from 1 up.

    Newton's method from the normal quantile, which is never above it; the distribution by Gauss-Legendre quadrature.
    """
    degrees = np.asarray(degrees, float)[..., None]
    nodes, shares = np.polynomial.legendre.leggauss(64)
    log_gamma = np.vectorize(math.lgamma)
    height = np.exp(log_gamma((degrees + 1) / 2) - log_gamma(degrees / 2)) / np.sqrt(degrees * math.pi)

    def density(x):
        return height * (1 + x * x / degrees) ** (-(degrees + 1) / 2)

    t = np.full(degrees.shape, 1.959964)
    for _ in range(12):
        inner = t / 2 * (shares * density(t / 2 * (nodes + 1))).sum(-1, keepdims=True)
        t = t + (0.475 - inner) / density(t)
    return t[..., 0]


def mean_interval(differences):
    """(mean, low, high): the mean of paired differences and its 95 % t interval."""
    return ratio_interval(differences, np.ones_like(differences, dtype=float))


def share_interval(base, tuned):
    """(difference, low, high) of two shares: base and tuned are 0 or 1 for each row (along the last axis).

    A t interval of five rows that all went from 0 to 1 would have no width. This is the adjusted Wald interval of
    Bonett and Price (2012), which adds one row of each kind of change.
    """
    base, tuned = np.asarray(base, float), np.asarray(tuned, float)
    rows = base.shape[-1]
    gained, lost = ((tuned > base).sum(-1) + 1) / (rows + 2), ((tuned < base).sum(-1) + 1) / (rows + 2)
    reach = 1.959964 * np.sqrt((gained + lost - (gained - lost) ** 2) / (rows + 2))
    return (tuned - base).mean(-1), np.maximum(gained - lost - reach, -1), np.minimum(gained - lost + reach, 1)


def as_figures(interval, name="mean"):
    """An interval for a JSON file: {"mean": ..., "low": ..., "high": ...}, None for what one row leaves unknown."""
    return {
        key: float(value) if np.isfinite(value) else None
        for key, value in zip((name, "low", "high"), interval, strict=True)
    }


# ---- Answers ---------------------------------------------------------------------------------------------------------
class Words:
    """Splits a text into words of any script, in lower case; characters of scripts without blanks count as words.

    rouge-score's own tokenizer knows a to z and digits only: of a Russian or Chinese text nothing would be left.
    """

    PATTERN = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\W_]+")

    def tokenize(self, text):
        return self.PATTERN.findall(text.lower())


WORDS, CHRF_SCORE = Words(), CHRF()
ROUGE = RougeScorer(["rougeL"], tokenizer=WORDS)


def score_answer(text, expected, check=None):
    """The figures of one answer against the expected one, as a dict:

    exact_match: 0 or 1; white space does not count. chrf: 0 to 100, characters in common (Popovic 2015, sacrebleu).
    rouge_l: 0 to 1, words in common in their order (F1, rouge-score). repetition: 0 to 1, the share of the answer's
    sequences of four words that stood in it before. accuracy: 0 or 1, where a check is given (a key of CHECKS).
    A thought before the answer counts for none of them.
    """
    text, expected = without_thought(text), without_thought(expected)
    figures = {
        "exact_match": int(text.split() == expected.split()),
        "chrf": CHRF_SCORE.sentence_score(text, [expected]).score,
        "rouge_l": ROUGE.score(expected, text)["rougeL"].fmeasure,
        "repetition": repetition(WORDS.tokenize(text)),
    }
    if check is not None:
        figures["accuracy"] = is_right(text, expected, check)
    return figures


def repetition(words):
    """The share of the sequences of four words that stood in the list before (Welleck et al. 2020, seq-rep-4)."""
    sequences = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0


def summarize_answers(answers, expected):
    """The figures of one model's answers together: means, and the length of all answers against that of the expected.

    answers: a dict each, {"text", "ended", "tokens"} and what score_answer gives.
    """
    figures = {"answers": len(answers)}
    for name in paired_names(answers):
        figures[summary_name(name)] = float(np.mean([answer[name] for answer in answers]))
    length, wanted = (
        sum(len(without_thought(text)) for text in texts)
        for texts in ((answer["text"] for answer in answers), expected)
    )
    return figures | {"length_ratio": length / max(wanted, 1)} if answers else figures


def compare_answers(base, tuned):
    """{figure: {"mean", "low", "high"}}: the differences tuned - base of paired answers, with 95 % intervals."""
    differences = {}
    for name in paired_names(base):
        before, after = ([answer[name] for answer in answers] for answers in (base, tuned))
        if name in YES_OR_NO:
            interval = share_interval(before, after)
        else:
            most = MOST.get(name, math.inf)
            interval = np.clip(mean_interval(np.subtract(after, before)), -most, most)
        differences[summary_name(name)] = as_figures(interval)
    return differences


def paired_names(answers):
    """The figures that each answer has; accuracy only where it was checked."""
    names = ("ended", "tokens", "repetition", "exact_match", "chrf", "rouge_l", "accuracy")
    return [name for name in names if answers and name in answers[0]]


def summary_name(name):
    return "mean_tokens" if name == "tokens" else name


# ---- Right or wrong --------------------------------------------------------------------------------------------------
# A check says what of an answer is compared. Each has a reader, which returns that or None: find_ where an expected
# answer is written in a way that leaves no doubt, and read_ for a model's, in which it is looked for.
CURRENCY = "$\u20ac\u00a3"
# A whole number: no part of a time, a date, a fraction or a version, and with commas between thousands only
NUMBER = (
    rf"(?<!\d)(?<!\d[.,:/])(?:(?<![\w)])[-\u2212])?[{CURRENCY}]?(?:(?<=[{CURRENCY}])[-\u2212])?"
    r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?(?![.,:/]?\d)"
)
MARKED_NUMBER = re.compile(rf"####\s*({NUMBER})|\\boxed\{{\s*({NUMBER})[\s\\%]*\}}")  # as GSM8K and MATH mark them
LAST_NUMBER = re.compile(rf"(?:^|[\s=:(*$])(?<!\d\s)(?<!\d,\s)({NUMBER})[\s%.)*\\{CURRENCY}]*$")
LETTER = r"[A-J]"
CHOICE = re.compile(rf"\W*(?:(?:answer|option|choice)\W+)?({LETTER}|yes|no|true|false)\W*", re.IGNORECASE)
# "the answer is B", and "is b)", but neither "the answer is a dog" nor "I think"
NAMED_CHOICE = re.compile(
    rf"\b(?i:answer|option|choice)\b(?: is)?:?[\s(*\[\"]*({LETTER}\b(?<!I(?= \w))|[a-j](?=[).:*\]\"]|\s*$))",
    re.MULTILINE,
)
LISTED_CHOICE = re.compile(rf"[(*]*({LETTER}(?=[).:*])|[a-j](?=\)))[).:*]+ +\S")
BEGUN_CHOICE = re.compile(r"(yes|no|true|false)\b(?=\W*$|[,.:;!])", re.IGNORECASE | re.MULTILINE)
FENCED = re.compile(r"```(?:json)?\n(.*)\n```", re.DOTALL)
CERTAIN_SHARE = 0.9  # of the expected answers must be of a kind for it to be taken without being asked for


def find_number(text):
    """The number that an expected answer is marked with or ends in, as a Decimal, or None."""
    found = MARKED_NUMBER.search(text) or LAST_NUMBER.search(text)
    return found and as_number(found[found.lastindex])


def read_number(text):
    """The first number after #### or in \\boxed{}, or else the last number of an answer."""
    found = MARKED_NUMBER.search(text)
    numbers = [found[found.lastindex]] if found else re.findall(NUMBER, text)
    return as_number(numbers[-1]) if numbers else None


def as_number(text):
    return Decimal(re.sub(f"[,{CURRENCY}]", "", text).replace("\u2212", "-"))


def find_choice(text):
    """The letter of a choice: alone, before the text that it stands for ("B) Paris"), or as in "the answer is B".

    Or yes, no, true or false: alone, or as the beginning of the answer ("Yes, since ...").
    """
    first, *_, last = text.strip().splitlines() * 2 or ["", ""]
    for found in (
        CHOICE.fullmatch(first),
        NAMED_CHOICE.search(text),
        LISTED_CHOICE.match(first),
        CHOICE.fullmatch(last),
        BEGUN_CHOICE.match(first),
    ):
        if found:
            return found[1].upper()
    return None


def find_json(text):
    """The JSON object or list that a text is, also in a block of code, or None."""
    fenced = FENCED.fullmatch(text.strip())
    try:
        value = JSON.decode(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


def read_json(text):
    """The first JSON object or list in an answer, be it in a block of code or between other words."""
    for found in re.finditer(r"[{\[]", text):
        try:
            return JSON.raw_decode(text, found.start())[0]
        except ValueError:
            continue
        except RecursionError:  # what is nested this deep is no answer, and trying each of its levels takes long
            break
    return None


def as_json_number(text):
    """A number that equals 1.0 where it is 1, and is not true, which equals 1 in Python."""
    return ("number", as_number(text))


JSON = json.JSONDecoder(parse_int=as_json_number, parse_float=as_json_number, parse_constant=str)


CHECKS = {
    "number": (
        find_number,
        read_number,
        "end in a number; compared is the one after #### or in \\boxed{}, or else the last",
    ),
    "choice": (find_choice, find_choice, "are a choice, by its letter or yes or no; compared is that"),
    "json": (find_json, read_json, "are JSON; compared are its values"),
}


def choose_check(setting, expected):
    """The key of CHECKS by which these answers are right or wrong, or None. `setting` is ANSWER_CHECK.

    "auto" takes the kind that nearly all of the expected answers are of.
    """
    if setting != "auto":
        return setting if setting in CHECKS else None
    name, share = commonest_kind(expected)
    return name if share >= CERTAIN_SHARE else None


def commonest_kind(expected):
    """(the key of CHECKS that most of these answers are of, their share)."""
    texts = [without_thought(text) for text in expected]
    shares = {
        name: sum(find(text) is not None for text in texts) / max(len(texts), 1)
        for name, (find, _, _) in CHECKS.items()
    }
    name = max(shares, key=shares.get)
    return name, shares[name]


def is_right(text, expected, check):
    """1 if an answer says what the expected one does, else 0; an expected one without it counts by exact match."""
    find, read, _ = CHECKS[check]
    wanted = find(expected)
    if wanted is None:
        wanted = read(expected)
    return int(text.split() == expected.split() if wanted is None else read(text) == wanted)
