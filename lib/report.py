"""What people look at: static HTML pages beside the videos they show, and tables. No server, no
outside resource, no framework.

tools/report.py decides what to show; this file only writes it down. index.html has the clips of
every order with their plans, the table, and curves along time; ab.html shows random pairs and lets
the viewer pick the one with less flicker (paper Table 9).
"""

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path

from lib.common import atomic

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
body{color:#222;background:#fff}
h1{font-size:1.5rem}
h2{font-size:1.2rem;margin-top:2.5rem}
.clips{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1.5rem}
figure{margin:0}
figcaption{font-size:.9rem}
video,img{width:100%;image-rendering:pixelated;background:#eee}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem}
td,th{padding:.25rem .7rem;text-align:left;border-bottom:1px solid #ddd;white-space:nowrap}
svg{width:100%;height:auto}
code{background:#f3f3f3;padding:.1rem .3rem}
.pair{display:flex;gap:1rem}
.pair video{cursor:pointer}
button{font:inherit;padding:.4rem 1rem;margin:.5rem .5rem 0 0}
"""
COLOURS = ("#2a6f97", "#c8553d", "#588157", "#8338ec", "#6c757d")


def write_page(
    path: Path, title: str, sections: Sequence[tuple[str, str]], script: str = ""
) -> None:
    """A page of (heading, HTML) sections."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>\n{content}\n" for heading, content in sections)
    title = html.escape(title)
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>\n{body}"
    )
    if script:
        page += f"<script>{script}</script>"
    with atomic(path) as tmp:
        tmp.write_text(page + "</html>\n", encoding="utf-8")


def paragraph(words: str) -> str:
    """Text with `code` in backticks."""
    parts = html.escape(words).split("`")
    return (
        "<p>" + "".join(f"<code>{p}</code>" if n % 2 else p for n, p in enumerate(parts)) + "</p>"
    )


def clips(cards: Sequence[tuple[str, str, str, str]]) -> str:
    """(name, video file, plan picture file or "", words) as a grid."""
    return f"<div class=clips>{''.join(card(*c) for c in cards)}</div>"


def card(name: str, video: str, plan: str, words: str) -> str:
    """One clip with its plan."""
    name, video, plan, words = (html.escape(x) for x in (name, video, plan, words))
    picture = f"<img src='{plan}' alt='plan of {name}'>" if plan else ""
    return (
        f"<figure><video src='{video}' autoplay loop muted playsinline controls></video>{picture}"
        f"<figcaption><b>{name}</b> {words}</figcaption></figure>"
    )


def table(rows: dict[str, dict[str, object]]) -> str:
    """A row per name; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    head = "".join(f"<th>{html.escape(c)}" for c in columns)
    body = "".join(
        f"<tr><th>{html.escape(name)}"
        + "".join(f"<td>{html.escape(str(row.get(c, '')))}" for c in columns)
        for name, row in rows.items()
    )
    return f"<div class=wide><table><tr><th>{head}{body}</table></div>"


def markdown(rows: dict[str, dict[str, object]], columns: Sequence[str] = ()) -> str:
    """The same for a terminal or a README."""
    columns = columns or list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(lines + [markdown_row(name, row, columns) for name, row in rows.items()])


def markdown_row(name: str, row: dict[str, object], columns: Sequence[str]) -> str:
    """One line of it."""
    return f"| {name} | " + " | ".join(str(row.get(c, "")) for c in columns) + " |"


def write_json(rows: dict[str, dict[str, object]], path: str) -> None:
    """Write a table's numbers as a .json."""
    plain = {
        name: {k: asdict(x) if is_dataclass(x) else x for k, x in row.items()}
        for name, row in rows.items()
    }
    with atomic(path) as tmp:
        tmp.write_text(json.dumps(plain, indent=1))


def show(rows: dict[str, dict[str, object]], out: str = "") -> None:
    """Print a table; where `out` names a .json, write its numbers there, too."""
    print(markdown(rows))
    if out:
        write_json(rows, out)


def timeline(
    curves: dict[str, Sequence[float]],
    marked: Sequence[int] = (),
    start: int = 0,
    height: int = 220,
    rule: float | None = 1.0,
) -> str:
    """Curves over a common integer axis that begins at `start`, as SVG.

    marked: where grey bands stand;  rule: where a dashed line lies, None for none"""
    width, left, low, high = 900, 50, 20, height - 30
    values = [v for curve in curves.values() for v in curve if v == v]
    values += [] if rule is None else [rule]
    bottom, top = min(values), max(values)
    count = max(map(len, curves.values()))

    def x(i: float) -> float:
        return left + (i - start + 0.5) / count * (width - left - 10)

    def y(v: float) -> float:
        return high - (v - bottom) / ((top - bottom) or 1) * (high - low)

    band = f"y={low} width={x(1) - x(0):.1f} height={high - low} fill=#eee"
    parts = [f"<rect x={x(i - 0.5):.1f} {band} />" for i in marked]
    if rule is not None:
        parts.append(f"<path d='M{left} {y(rule):.1f}H{width}' stroke=#999 stroke-dasharray=4 />")
    parts += [f"<text x=4 y={y(v) + 4:.1f} font-size=12>{v:.2f}</text>" for v in (bottom, top)]
    for i in range(start, start + count):
        place = f"x={x(i):.1f} y={high + 16} font-size=12 text-anchor=middle"
        parts.append(f"<text {place}>{i}</text>")
    for n, (name, curve) in enumerate(curves.items()):
        points = " ".join(f"{x(start + i):.1f},{y(v):.1f}" for i, v in enumerate(curve) if v == v)
        line = f"fill=none stroke='{COLOURS[n % len(COLOURS)]}' stroke-width=2"
        place = f"x={left + 190 * n} y=14 font-size=13 fill='{COLOURS[n % len(COLOURS)]}'"
        parts.append(f"<polyline points='{points}' {line} />")
        parts.append(f"<text {place}>{html.escape(name)}</text>")
    return f"<svg viewBox='0 0 {width} {height}' role=img>{''.join(parts)}</svg>"


AB = """
const drawn = pairs.map((p, i) => [Math.random(), i, Math.random() < .5]);
const order = drawn.sort((a, b) => a[0] - b[0]);
const choices = [];
const [left, right, say] = ['left', 'right', 'say'].map(id => document.getElementById(id));

function show() {
  const n = choices.length;
  if (n >= order.length) { document.querySelector('.pair').hidden = true; finish(); return; }
  const [, i, swap] = order[n], p = pairs[i];
  left.src = swap ? p.b : p.a;
  right.src = swap ? p.a : p.b;
  say.textContent = `pair ${n + 1} of ${order.length}`;
}

function pick(l) {
  if (choices.length >= order.length) return;
  const [, i, swap] = order[choices.length];
  choices.push({pair: i, chosen: l !== swap ? 'a' : 'b', fr_a: pairs[i].fr_a, fr_b: pairs[i].fr_b});
  show();
}

function result() {
  const n = choices.length || 1, agrees = c => (c.fr_a < c.fr_b) === (c.chosen === 'a');
  return {names, choices, preference_a: choices.filter(c => c.chosen === 'a').length / n,
          agreement_with_fr: choices.filter(agrees).length / n};
}

function finish() {
  const r = result(), percent = share => (100 * share).toFixed(0) + ' %';
  say.textContent = !choices.length ? 'nothing chosen yet'
    : `${names[0]}: preferred in ${percent(r.preference_a)}; `
      + `agreement with FR ${percent(r.agreement_with_fr)} of ${choices.length} pairs`;
}

left.onclick = () => pick(true);
right.onclick = () => pick(false);
onkeydown = e => {
  if (e.key === 'ArrowLeft') pick(true);
  if (e.key === 'ArrowRight') pick(false);
};
document.getElementById('save').onclick = () => {
  const a = document.createElement('a');
  const text = JSON.stringify(result(), null, 1);
  a.href = URL.createObjectURL(new Blob([text], {type: 'application/json'}));
  a.download = 'choices.json';
  a.click();
  finish();
};
show();
"""


def write_ab(path: Path, names: tuple[str, str], pairs: Sequence[dict[str, str | float]]) -> None:
    """The A/B test of pairs {a, b: video files, fr_a, fr_b: their inter-block FR}.

    Order and sides are drawn in the browser. Choices, preference for `names[0]` and agreement with
    the FR are exported as JSON."""
    videos = "".join(
        f"<video id={side} autoplay loop muted playsinline></video>" for side in ("left", "right")
    )
    body = (
        "<p>Which clip flickers less? Click it, or use the arrow keys. <span id=say></span></p>"
        f"<div class=pair>{videos}</div><button id=save>Save choices as JSON</button>"
    )
    data = f"const pairs={json.dumps(list(pairs))}, names={json.dumps(names)};"
    data = data.replace("</", "<\\/")  # no clip's name ends the script
    write_page(path, "Which one flickers less?", [("", body)], data + AB)
