"""The results of benchmarks/speed.py or of benchmarks/replies.py as a bar chart in SVG."""

import json
from html import escape
from pathlib import Path

COLORS = {"ours": "#2563eb", "reference": "#cbd5e1", "trl": "#d97706", "unsloth": "#16a34a"}
COLORS |= dict.fromkeys(("tutorial", "generate"), "#94a3b8")
WIDTH, LABELS, BAR, ROW, HEADING = 900, 110, 420, 24, 40  # pixels; BAR is the longest bar


def draw(results, chart):
    """Write a horizontal bar of tokens/s for each result, grouped by workload; of repeated runs the last counts."""
    lines = [json.loads(line) for line in Path(results).read_text(encoding="utf-8").splitlines() if line.strip()]
    groups = {}
    for line in lines:
        groups.setdefault(line.get("configuration") or (line["model"], line["rows"]), {})[line["program"]] = line
    speeds = [line["tokens_per_second"] for line in lines if "failed" not in line]
    if not speeds:
        raise SystemExit(f"{results} holds no measurement to draw")
    parts, top = [], 0
    for name, group in groups.items():
        parts.append(text(10, top + 28, title(name, group), "font-weight='bold'"))
        top += HEADING
        for line in sorted(group.values(), key=lambda line: -line.get("tokens_per_second", 0)):
            parts += bar(line, top, BAR / max(speeds))
            top += ROW
    measured = next(line for line in reversed(lines) if "failed" not in line)
    for line in footer(measured):
        parts.append(text(10, top + 28, line, "fill='#64748b'"))
        top += ROW
    size = f"width='{WIDTH}' height='{top + HEADING}' viewBox='0 0 {WIDTH} {top + HEADING}'"
    body = "\n".join([f"<rect width='{WIDTH}' height='{top + HEADING}' fill='white'/>", *parts])
    svg = f"<svg xmlns='http://www.w3.org/2000/svg' {size} font-family='sans-serif' font-size='13'>\n{body}\n</svg>\n"
    Path(chart).write_text(svg, encoding="utf-8")
    print(f"{chart}: {len(speeds)} measurements")


def title(name, group):
    measured = next((line for line in group.values() if "failed" not in line), None)
    if measured is None:
        return str(name)
    if "model" in measured:
        model = {"4bit": "4-bit model with its adapter", "16bit": "16-bit model, as merged"}[measured["model"]]
        return f"replies of the {model}, {measured['rows']} at once"
    rows = "rows of natural length" if measured["rows"] == "natural" else f"rows of {measured['longest']:,} tokens"
    checkpointing = "with" if measured["checkpointing"] else "no"
    step = f"{measured['rows_a_step']} a step" if measured["rows_a_step"] < 48 else "8,192 tokens a step"
    return f"{rows}, {step}, {checkpointing} gradient checkpointing, dropout {measured['dropout']:g}"


def bar(line, top, scale):
    """The elements of one result: its program, its bar, its figures, or why there are none."""
    label = text(LABELS, top + 16, line["program"], "text-anchor='end'")
    if "failed" in line:
        return [label, text(LABELS + 10, top + 16, line["failed"][:90], "fill='#64748b' font-style='italic'")]
    width = line["tokens_per_second"] * scale
    memory = line.get("peak_reserved_gib", line.get("peak_gib"))
    figures = f"{line['tokens_per_second']:,.0f} tokens/s, {memory:.1f} GiB"
    color = COLORS[line["program"].partition("-")[0]]
    return [
        label,
        f"<rect x='{LABELS + 10}' y='{top + 2}' width='{width:.1f}' height='{ROW - 6}' fill='{color}'/>",
        text(LABELS + 16 + width, top + 16, figures),
    ]


def footer(line):
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
    return f"{line['device']}, {line['date']}", versions


def text(x, y, content, style=""):
    return f"<text x='{x:.1f}' y='{y}' {style}>{escape(content)}</text>"
