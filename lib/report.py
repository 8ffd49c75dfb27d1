"""What people look at: static HTML pages beside the videos they show, and tables. No server, no
outside resource, no framework. tools/report.py decides what to show."""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lib.common import atomic

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h2{margin-top:2.5rem}
.clips{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1.5rem}
figure{margin:0}
video,img,svg{width:100%;image-rendering:pixelated}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem}
td,th{padding:.25rem .7rem;text-align:left;border-bottom:1px solid #ddd;white-space:nowrap}
.pair{display:flex;gap:1rem;cursor:pointer}
.pair[hidden]{display:none}
"""
COLOURS = ("#2a6f97", "#c8553d", "#588157", "#8338ec", "#6c757d")


def write_page(
    path: Path, title: str, sections: Sequence[tuple[str, str]], script: str = ""
) -> None:
    """A page of (heading, HTML) sections."""
    title, body = html.escape(title), ""
    for heading, content in sections:
        body += f"<h2>{html.escape(heading)}</h2>\n{content}\n"
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>\n{body}"
        + (f"<script>{script}</script>" if script else "")
        + "</html>\n"
    )
    with atomic(path) as tmp:
        tmp.write_text(page, encoding="utf-8")


def paragraph(words: str) -> str:
    """Text with `code` in backticks."""
    return "<p>" + re.sub("`(.*?)`", r"<code>\1</code>", html.escape(words)) + "</p>"


def clips(cards: Sequence[tuple[str, str, str, str]]) -> str:
    """(name, video file, plan picture file or "", words) as a grid of clips above their plans."""
    figures = []
    for card in cards:
        name, video, plan, words = map(html.escape, card)
        picture = f"<img src='{plan}' alt='plan of {name}'>" if plan else ""
        figures.append(
            f"<figure><video src='{video}' autoplay loop muted playsinline controls></video>"
            f"{picture}<figcaption><b>{name}</b> {words}</figcaption></figure>"
        )
    return f"<div class=clips>{''.join(figures)}</div>"


def table(rows: dict[str, dict[str, object]]) -> str:
    """A row per name; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = ["<tr><th>" + "".join(f"<th>{html.escape(c)}" for c in columns)]
    for name, row in rows.items():
        cells = [f"<td>{html.escape(str(row.get(c, '')))}" for c in columns]
        lines.append(f"<tr><th>{html.escape(name)}{''.join(cells)}")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def markdown(rows: dict[str, dict[str, object]], columns: Sequence[str] = ()) -> str:
    """The same for a terminal or a README."""
    columns = columns or list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(lines + [markdown_row(name, row, columns) for name, row in rows.items()])


def markdown_row(name: str, row: dict[str, object], columns: Sequence[str]) -> str:
    """One line of it; floats have three digits."""
    cells = [row.get(column, "") for column in columns]
    shown = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells]
    return f"| {name} | " + " | ".join(shown) + " |"


def write_json(rows: dict[str, dict[str, object]], path: str) -> None:
    """Write a table's numbers as a .json."""
    with atomic(path) as tmp:
        tmp.write_text(json.dumps(rows, indent=1, default=asdict))


def show(rows: dict[str, dict[str, object]], out: str = "") -> None:
    """Print a table; where `out` names a .json, write its numbers there, too."""
    print(markdown(rows))
    if out:
        write_json(rows, out)


def timeline(curves: dict[str, Sequence[float]], marked: Sequence[int] = ()) -> str:
    """Curves over 1, 2, 3 ..., as SVG. marked: where grey bands stand; a dashed line lies at 1."""
    width, left, low, high = 900, 50, 20, 190
    values = [v for curve in curves.values() for v in curve if v == v] + [1.0]
    bottom, top = min(values), max(values)
    count = max(map(len, curves.values()))

    def x(i: float) -> float:
        return left + (i - 0.5) / count * (width - left - 10)

    def y(v: float) -> float:
        return high - (v - bottom) / ((top - bottom) or 1) * (high - low)

    band = f"y={low} width={x(1) - x(0):.1f} height={high - low} fill=#eee"
    parts = [f"<rect x={x(i - 0.5):.1f} {band} />" for i in marked]
    parts.append(f"<path d='M{left} {y(1):.1f}H{width}' stroke=#999 stroke-dasharray=4 />")
    parts += [f"<text x=4 y={y(v) + 4:.1f} font-size=12>{v:.2f}</text>" for v in (bottom, top)]
    for i in range(1, 1 + count):
        place = f"x={x(i):.1f} y={high + 16} font-size=12 text-anchor=middle"
        parts.append(f"<text {place}>{i}</text>")
    for n, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[n % len(COLOURS)]
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(curve, 1) if v == v)
        parts.append(f"<polyline points='{points}' fill=none stroke='{colour}' stroke-width=2 />")
        place = f"x={left + 190 * n} y=14 font-size=13 fill='{colour}'"
        parts.append(f"<text {place}>{html.escape(name)}</text>")
    return f"<svg viewBox='0 0 {width} {high + 30}' role=img>{''.join(parts)}</svg>"


AB = """
const drawn = pairs.map((_, i) => [Math.random(), i, Math.random() < .5]);
const order = drawn.sort((a, b) => a[0] - b[0]);
const choices = [];
const [left, right, say] = ['left', 'right', 'say'].map(id => document.getElementById(id));

function show() {
  const n = choices.length, done = n >= order.length;
  document.querySelector('.pair').hidden = done;
  say.textContent = done ? summary() : `pair ${n + 1} of ${order.length}`;
  if (done) return;
  const [, i, swap] = order[n];
  left.src = swap ? pairs[i].b : pairs[i].a;
  right.src = swap ? pairs[i].a : pairs[i].b;
}

function pick(isLeft) {
  if (choices.length >= order.length) return;
  const [, i, swap] = order[choices.length], {fr_a, fr_b} = pairs[i];
  choices.push({pair: i, chosen: isLeft !== swap ? 'a' : 'b', fr_a, fr_b});
  show();
}

function share(test) {
  return choices.filter(test).length / (choices.length || 1);
}

function result() {
  return {names, choices, preference_a: share(c => c.chosen === 'a'),
          agreement_with_fr: share(c => (c.fr_a < c.fr_b) === (c.chosen === 'a'))};
}

function summary() {
  if (!choices.length) return 'nothing chosen yet';
  const r = result(), percent = x => (100 * x).toFixed(0) + ' %';
  return `${names[0]}: preferred in ${percent(r.preference_a)}; `
    + `agreement with FR ${percent(r.agreement_with_fr)} of ${choices.length} pairs`;
}

left.onclick = () => pick(true);
right.onclick = () => pick(false);
onkeydown = e => {
  if (e.key === 'ArrowLeft') pick(true);
  if (e.key === 'ArrowRight') pick(false);
};
document.getElementById('save').onclick = () => {
  const a = document.createElement('a'), text = JSON.stringify(result(), null, 1);
  a.href = URL.createObjectURL(new Blob([text], {type: 'application/json'}));
  a.download = 'choices.json';
  a.click();
  say.textContent = summary();
};
show();
"""


def write_ab(path: Path, names: tuple[str, str], pairs: Sequence[dict[str, str | float]]) -> None:
    """The A/B test of pairs {a, b: video files, fr_a, fr_b: their inter-block FR} (paper Table 9).

    Order and sides are drawn in the browser. Choices, preference for `names[0]` and agreement with
    the FR are exported as JSON."""
    video = "<video id={} autoplay loop muted playsinline></video>"
    body = (
        "<p>Which clip flickers less? Click it, or use the arrow keys. <span id=say></span></p>"
        f"<div class=pair>{video.format('left')}{video.format('right')}</div>"
        "<button id=save>Save choices as JSON</button>"
    )
    data = f"const pairs={json.dumps(list(pairs))}, names={json.dumps(names)};"
    data = data.replace("</", "<\\/")  # no clip's name ends the script
    write_page(path, "Which one flickers less?", [("", body)], data + AB)
