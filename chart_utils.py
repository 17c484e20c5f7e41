"""Charts as SVG, with axes, ticks and labels. Their colours come from the page around them, by the shapes' classes."""

import math
from collections import namedtuple

from markupsafe import Markup, escape

# style: the class of a line, "base" or "tuned"; points: [(x, y)], in the order of x; dots: whether each point is marked
Curve = namedtuple("Curve", "style points dots")
Frame = namedtuple("Frame", "width height left right top bottom")  # of a chart, and its margins, in CSS pixels
WIDE, NARROW = Frame(720, 280, 48, 12, 12, 44), Frame(340, 240, 44, 8, 12, 44)
MOST_POINTS = 300  # of a line; more are averaged
INTERVAL = Frame(160, 26, 6, 6, 0, 0)


def draw_curves(curves, x_label, y_label, marked_x=None):
    """Lines over common axes, as two drawings of which the page shows the one that fits its width.

    marked_x: where a vertical line stands.
    """
    curves = [curve._replace(points=thin(curve.points)) for curve in curves if curve.points]
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]

    def draw(frame):
        x_ticks = [tick for tick in nice_ticks(0, max(xs), frame.width // 90) if tick <= max(xs)]
        y_ticks = nice_ticks(min(ys), max(ys), 5)
        x_place, y_place = places(frame, (0, max(xs)), (y_ticks[0], y_ticks[-1]))
        parts = [draw_axes(frame, x_place, y_place, x_ticks, y_ticks, x_label, y_label)]
        if marked_x is not None:
            x = x_place(marked_x)
            parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{frame.top}" y2="{frame.height - frame.bottom}"/>')
        for curve in curves:
            points = [(x_place(x), y_place(y)) for x, y in curve.points]
            line = " ".join(f"{x},{y}" for x, y in points)
            parts.append(f'<polyline class="line {curve.style}" points="{line}"/>')
            if curve.dots:
                parts += [f'<circle class="dot {curve.style}" cx="{x}" cy="{y}" r="3"/>' for x, y in points]
        return parts

    return both_sizes(draw)


def draw_bars(counts, up_to, x_label, y_label):
    """A histogram of counts in equal steps from 0 to up_to."""

    def draw(frame):
        frame = frame._replace(height=200)
        x_ticks = [tick for tick in nice_ticks(0, up_to, frame.width // 90) if tick <= up_to]
        y_ticks = nice_ticks(0, max(*counts, 1), 4, whole=True)
        x_place, y_place = places(frame, (0, up_to), (0, y_ticks[-1]))
        parts = [draw_axes(frame, x_place, y_place, x_ticks, y_ticks, x_label, y_label)]
        step = up_to / len(counts)
        for number, count in enumerate(counts):
            left, right, top = x_place(number * step), x_place((number + 1) * step), y_place(count)
            box = f'x="{left + 0.5:.1f}" width="{right - left - 1:.1f}" y="{top}" height="{y_place(0) - top:.1f}"'
            parts.append(f'<rect class="bar" {box}/>')
        return parts

    return both_sizes(draw, height=200)


def draw_interval(low, mean, high, direction, reach=None):
    """A point and its interval on a line whose middle is no difference. direction -1 turns it round.

    reach: the largest value that the line must hold; None: that of this interval.
    """
    low, mean, high = sorted(direction * value for value in (low, mean, high))
    reach = 1.1 * (reach or max(abs(low), abs(high)) or 1)
    x_place, _ = places(INTERVAL, (-reach, reach), (0, 1))
    middle, y = x_place(0), INTERVAL.height / 2
    sure = "tuned" if low > 0 or high < 0 else "base"
    return svg(
        INTERVAL,
        [
            f'<line class="zero" x1="{middle}" x2="{middle}" y1="0" y2="{INTERVAL.height}"/>',
            f'<line class="line {sure}" x1="{x_place(low)}" x2="{x_place(high)}" y1="{y}" y2="{y}"/>',
            f'<circle class="dot {sure}" cx="{x_place(mean)}" cy="{y}" r="3.5"/>',
        ],
        "interval",
    )


# ---- Parts -----------------------------------------------------------------------------------------------------------
def both_sizes(draw, height=None):
    """The drawing of draw(frame) in both sizes; the page shows one of them."""
    frames = {"wide": WIDE, "narrow": NARROW}
    if height:
        frames = {name: frame._replace(height=height) for name, frame in frames.items()}
    return Markup("").join(svg(frame, draw(frame), name) for name, frame in frames.items())


def svg(frame, parts, style):
    """Hidden from screen readers: what a chart says stands in words beside it."""
    opening = f'<svg class="chart {style}" viewBox="0 0 {frame.width} {frame.height}" aria-hidden="true">'
    return Markup(opening + "".join(parts) + "</svg>")


def places(frame, x_range, y_range):
    """Two functions that give the place of a value in a frame, in pixels."""

    def scale(low, high, start, end):
        return lambda value: round(start + (value - low) / ((high - low) or 1) * (end - start), 1)

    across = scale(*x_range, frame.left, frame.width - frame.right)
    return across, scale(*y_range, frame.height - frame.bottom, frame.top)


def draw_axes(frame, x_place, y_place, x_ticks, y_ticks, x_label, y_label):
    bottom, right = frame.height - frame.bottom, frame.width - frame.right
    parts = []
    for tick in y_ticks:
        y = y_place(tick)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{frame.left - 8}" y="{y + 4}" text-anchor="end">{show_tick(tick, y_ticks)}</text>')
    for tick in x_ticks:
        x = x_place(tick)
        anchor = "end" if x > right - 12 else "middle"
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="{anchor}">{show_tick(tick, x_ticks)}</text>')
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle, height = (frame.left + right) / 2, (frame.top + bottom) / 2
    parts.append(
        f'<text class="name" x="{middle}" y="{frame.height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    turned = f'transform="translate(11 {height}) rotate(-90)"'
    parts.append(f'<text class="name" {turned} text-anchor="middle">{escape(y_label)}</text>')
    return "".join(parts)


def nice_ticks(low, high, most, whole=False):
    """About `most` round values, a step of 1, 2 or 5 times a power of ten apart, that enclose low to high."""
    span = (high - low) or abs(high) or 1
    rough = span / max(most, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    step = max(step, 1) if whole else step
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def show_tick(tick, ticks):
    """With as many digits behind the point as the step between ticks needs, thousands apart."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else 1
    return f"{tick:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def thin(points):
    """At most MOST_POINTS points: neighbours are averaged. The first and the last stay."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil((len(points) - 2) / (MOST_POINTS - 2))
    groups = [points[start : min(start + size, len(points) - 1)] for start in range(1, len(points) - 1, size)]
    means = [tuple(round(sum(values) / len(values), 6) for values in zip(*group, strict=True)) for group in groups]
    return [points[0], *means, points[-1]]
