"""How a report looks: numbers as text, figures as SVG, sections as one HTML page or as Markdown.

`tables` builds the sections, `report` writes the pages. Nothing here knows what a run is.
"""

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

import jinja2
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

DASH = "–"
INK = "#010203"  # stands for the reader's text colour, light or dark
PAPER = "svg{color:#22262b}@media(prefers-color-scheme:dark){svg{color:#dcdfe3}}"
INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
STYLE = dict.fromkeys(INKED, INK) | {"svg.hashsalt": "nc_dist", "font.size": 10, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
# The palette of Okabe and Ito: told apart by colour-blind readers, visible on light and on dark paper.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8A8A8A")
MARKERS = "osD^v"


class Point(NamedTuple):
    """One variant under one method: `nc1` > 0, `accuracy` a fraction."""

    variant: str
    method: str
    nc1: float
    accuracy: float


class Table(NamedTuple):
    """Cells are text; a second line in a cell is secondary."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Panel(NamedTuple):
    """A figure: `image` is a data URI, `words` say the same as the image."""

    title: str
    image: str
    words: str
    notes: Sequence[str]


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, then tables, then figures."""

    title: str
    text: Sequence[str]
    tables: Sequence[Table] = ()
    panels: Sequence[Panel] = ()


# ---- numbers ----


def short(value: float) -> str:
    """Integers and hundreds in full, other numbers with three significant digits."""
    return f"{value:.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def same(values: Iterable[Any]) -> str:
    """The distinct known values, joined; a dash for none."""
    known = (short(value) if is_number(value) else str(value) for value in values if value is not None)
    return ", ".join(dict.fromkeys(known)) or DASH


def spread(values: Iterable[Any], form: Callable[[float], str] = short) -> str:
    """Mean, and with several values ± their sample standard deviation and number; a dash for none."""
    known = [float(value) for value in values if is_number(value)]
    if len(known) < 2:
        return form(known[0]) if known else DASH
    return f"{form(fmean(known))} ± {form(stdev(known)).lstrip('+')} (n = {len(known)})"


# ---- figures ----


def scatter(title: str, label: str, groups: Mapping[str, Sequence[Point]], notes: Sequence[str]) -> Panel:
    """Accuracy over NC1 (log), one colour and marker a group; groups without points keep their place."""
    shown = {name: points for name, points in groups.items() if points}
    columns = 2 if max(map(len, shown)) <= 16 else 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.2 + 0.2 * len(shown) / columns), layout="constrained")
        axes = figure.subplots()
        for name, points in shown.items():
            x, y = [point.nc1 for point in points], [100 * point.accuracy for point in points]
            colour, marker = _look(name, groups)
            axes.scatter(x, y, s=42, color=colour, marker=marker, alpha=0.9, label=name)
        axes.set(xscale="log", xlabel=label, ylabel="test accuracy, %")
        axes.margins(0.12)
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        figure.legend(loc="outside lower center", ncols=columns, fontsize=9)
        flat = [point for points in shown.values() for point in points]
        listed = (f"{p.variant}, {p.method}: NC1 {short(p.nc1)}, {percent(p.accuracy)} %" for p in flat)
        words = f"{title}: test accuracy over {label}. " + "; ".join(listed)
        return Panel(title, _image(figure), words, notes)


def bars(title: str, groups: Mapping[str, Sequence[float]]) -> Panel:
    """Mean accuracy of each group as a bar from zero, its members (variants) as dots."""
    shown = {name: values for name, values in groups.items() if values}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 0.9 + 0.38 * len(shown)), layout="constrained")
        axes = figure.subplots()
        for row, (name, values) in enumerate(shown.items()):
            axes.barh(row, 100 * fmean(values), height=0.6, color=_look(name, groups)[0], alpha=0.55)
            axes.scatter([100 * value for value in values], [row] * len(values), s=16, color=INK, zorder=3)
        axes.set(xlim=(0, 100), xlabel="test accuracy, %", yticks=range(len(shown)), yticklabels=shown)
        axes.invert_yaxis()
        means = (f"{name} {percent(fmean(values))} % (n = {len(values)})" for name, values in shown.items())
        words = f"{title}: mean test accuracy over n variants. " + "; ".join(means)
        return Panel(title, _image(figure), words, ())


def _look(name: str, groups: Mapping[str, object]) -> tuple[str, str]:
    """Colour and marker of a group; 7 and 5 share no factor, so that 35 groups differ."""
    index = list(groups).index(name)
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def _image(figure: Figure) -> str:
    """The figure as an SVG data URI that follows the reader's colour scheme."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().replace(INK, "currentColor").replace("</style>", PAPER + "</style>", 1)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


# ---- pages ----

HOW_TO_READ = (
    "NC1 compares the scatter of features within classes with the scatter of the class means: the smaller, "
    "the more collapsed. It depends on the width d, the number of classes K and the number of samples N, so "
    "these stand beside it, and only NC1 of equal d, K and N can be compared. Null is the NC1 of the same "
    "features under permuted labels: what pure noise would give.",
    "Correlations are of log NC1 and log-odds accuracy over variants, one point each, seeds averaged, and "
    "only from five variants on. They describe what was run and are not corrected for their number.",
    "The paper behind these quantities is arXiv 2212.12206. Its version 3 and its version 4 (TMLR 2024) make "
    "different claims, so each claim below carries its version. The two sections on collapse answer separate "
    "questions: they share no axis and no conclusion.",
    "Version 3 speaks of at least 70 % fewer tuned parameters than full fine-tuning, version 4 of at least "
    "90 %. The column “Trainable” is counted in the models run here and need not meet either bound.",
)
TOY = "Toy scale: small networks and small data. Nothing here supports or contradicts a claim about ImageNet."


def render_html(scale: str, facts: Mapping[str, int], sections: Sequence[Section]) -> str:
    """One page that loads nothing from elsewhere."""
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
    return page.render(scale=scale, toy=TOY, facts=facts, how=HOW_TO_READ, sections=sections, css=CSS)


def render_markdown(scale: str, facts: Mapping[str, int], sections: Sequence[Section]) -> str:
    """The same text and tables; figures are given in words."""
    parts = [f"# Transfer report ({scale})", ", ".join(f"{count} {name}" for name, count in facts.items())]
    parts += [TOY] * (scale == "toy scale") + ["## How to read this report", *HOW_TO_READ]
    for section in sections:
        parts += [f"## {section.title}", *section.text]
        for table in section.tables:
            lines = [table.header, ["---"] * len(table.header), *table.rows]
            parts += [f"**{table.caption}**", "\n".join(map(_markdown_row, lines))]
        for panel in section.panels:
            parts.append(f"Figure. {panel.words}" + "".join(f"\n- {note}" for note in panel.notes))
    return "\n\n".join(parts) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " · ") for cell in cells) + " |"


CSS = """
:root { color-scheme: light dark;
  --paper: #fcfcfb; --ink: #22262b; --soft: #5c636b; --line: #d9dcdf; --tint: #f1f2f3; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181b; --ink: #dcdfe3; --soft: #9aa2ab; --line: #333a41; --tint: #1e2327; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word;
  background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
p { max-width: 42rem; margin: .6rem 0; }
.scale { color: var(--soft); font-weight: 400; white-space: nowrap; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1.2rem 0; }
dl div { display: flex; flex-direction: column-reverse; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; line-height: 1.35; }
th, td { padding: .4rem .75rem; text-align: left; vertical-align: top; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
tbody tr { border-top: 1px solid var(--line); }
thead th { background: var(--tint); font-weight: 600; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--paper); }
td.long { white-space: normal; min-width: 18rem; }
small { color: var(--soft); }
.panels { display: grid; gap: 1.5rem; }
@media (min-width: 44rem) { .panels { grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); } }
figure { margin: 0; display: flex; flex-direction: column; }
figcaption { font-size: .87rem; color: var(--soft); }
img { width: 100%; height: auto; display: block; }
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Transfer report</title>
<style>{{ css | safe }}</style>
</head>
<body>
<header>
<h1>Transfer report <span class="scale">{{ scale }}</span></h1>
<dl>
{% for name, count in facts.items() %}
<div><dt>{{ name }}</dt><dd>{{ count }}</dd></div>
{% endfor %}
</dl>
{% if scale == "toy scale" %}
<p>{{ toy }}</p>
{% endif %}
</header>
<main>
<section>
<h2>How to read this report</h2>
{% for text in how %}
<p>{{ text }}</p>
{% endfor %}
</section>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% for text in section.text %}
<p>{{ text }}</p>
{% endfor %}
{% for table in section.tables %}
<h3>{{ table.caption }}</h3>
<div class="scroll" tabindex="0" role="region" aria-label="{{ table.caption }}">
<table>
<thead><tr>{% for cell in table.header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}{% set lines = cell.split("\\n", 1) %}
{% if loop.first %}<th scope="row">{% elif cell | length > 60 %}<td class="long">{% else %}<td>{% endif %}
{{ lines[0] -}}
{% if lines[1] %}<br><small>{{ lines[1] }}</small>{% endif %}
{% if loop.first %}</th>{% else %}</td>{% endif %}
{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endfor %}
{% if section.panels %}
<div class="panels">
{% for panel in section.panels %}
<figure>
<h3>{{ panel.title }}</h3>
<img src="{{ panel.image }}" alt="{{ panel.words }}">
<figcaption>{% for note in panel.notes %}{{ note }}<br>{% endfor %}</figcaption>
</figure>
{% endfor %}
</div>
{% endif %}
</section>
{% endfor %}
</main>
</body>
</html>
"""
