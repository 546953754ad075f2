"""A run as one HTML file that needs nothing else: tables, figures, and items to read with the found answer marked.

All text that came from a dataset or a model is escaped. `page(...)` gives the file's text.
"""

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from itertools import zip_longest

from jrt.evaluate.plots import Drawn
from jrt.evaluate.tables import HEADER, comparison_row, counts_line, notes, protocols_of, result_row

SHOWN_ITEMS = 100
_STYLE = """
:root{color-scheme:light dark;--text:#1b1f24;--soft:#57606a;--line:#d8dee4;--field:#f6f8fa;--bar:#9ec5e8;--right:#116329;--wrong:#a40e26}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--soft:#9aa4af;--line:#373e47;--field:#161b22;--bar:#2f5d87;--right:#6fdd8b;--wrong:#ff9492}
body{background:#0d1117}}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:var(--text)}
h2{margin:2.2rem 0 .3rem}.note{color:var(--soft);margin:.2rem 0}.wide{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
thead th{color:var(--soft);font-weight:600}th:first-child,td.name{text-align:left}tbody.group{border-top:2px solid var(--line)}
td.text,th.text{text-align:left;white-space:pre-wrap;min-width:16rem;overflow-wrap:anywhere}
.bar{display:inline-block;position:relative;width:9rem;height:.8rem;margin-right:.6rem;background:var(--field);vertical-align:middle}
.bar i{position:absolute;inset:0 auto 0 0;background:var(--bar)}.bar b{position:absolute;top:45%;height:2px;background:var(--text)}
.bar+span{display:inline-block;min-width:2.6rem}.clear td:nth-child(n+3){font-weight:600}
.names th:nth-child(2),#items th{text-align:left}figure{margin:1rem 0;overflow-x:auto;background:#fff;border-radius:6px}
figure svg{display:block;max-width:100%;height:auto}@media(max-width:42rem){figure svg{max-width:none}}
.figures{display:flex;flex-wrap:wrap;gap:0 2rem}.figures>div{min-width:0;max-width:100%}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--field);padding:.7rem;max-height:20rem;overflow:auto;font-size:13px}
mark{background:#ffe28a;color:#1b1f24}.right{color:var(--right)}.wrong{color:var(--wrong)}
details{border:1px solid var(--line);border-radius:6px;margin:.4rem 0;padding:.4rem .7rem}summary{cursor:pointer;overflow-wrap:anywhere}
summary small{color:var(--soft)}select,input{font:inherit;margin:.2rem .6rem .2rem 0}
"""
_SCRIPT = """
const items=[...document.querySelectorAll('#items>details')],text=document.getElementById('text'),kind=document.getElementById('kind');
function choose(){let shown=0;items.forEach(d=>{d.hidden=(kind.value&&!d.dataset.kinds.split(' ').includes(kind.value))||
!d.textContent.toLowerCase().includes(text.value.toLowerCase());shown+=!d.hidden});document.getElementById('shown').textContent=shown+' shown'}
text.addEventListener('input',choose);kind.addEventListener('change',choose);choose();
items.forEach(d=>d.addEventListener('toggle',()=>{const p=d.querySelector('pre'),m=p.querySelector('mark');
if(m)p.scrollTop=m.offsetTop-p.offsetTop-p.clientHeight/2}));
"""


def page(
    title: str,
    records: Sequence[dict],
    comparisons: Sequence[dict],
    predictions: Sequence[dict],
    manifest: dict,
    figures: Iterable[Drawn],
    extra: str = "",
    items: int = SHOWN_ITEMS,
) -> str:
    """The report's text. extra: HTML that goes between the results and the figures (published tables)."""
    parts = [f"<h1>{escape(title)}</h1>", _results(records, manifest), extra]
    drawn = "".join(f"<div><h2>{escape(f.heading)}</h2><figure>{f.svg}</figure></div>" for f in figures)
    parts.append(f"<div class=figures>{drawn}</div>")
    if comparisons:
        parts.append(_differences(comparisons))
    parts += [_browser(predictions, items), _manifest(manifest)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}<script>{_SCRIPT}</script></body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; all cells are escaped."""
    body = "".join(f"<tr><td class=name>{'<td>'.join(map(escape, row))}" for row in rows)
    return _table(header, f"<tbody>{body}</tbody>")


def _table(header: Sequence[str], bodies: str, names: bool = False) -> str:
    """names: the second column holds names as well."""
    head = "<th>".join(map(escape, header))
    kind = " class=names" if names else ""
    return f"<div class=wide><table{kind}><thead><tr><th>{head}</tr></thead>{bodies}</table></div>"


def _results(records: Sequence[dict], manifest: dict) -> str:
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        groups.setdefault((record["task"], record["protocol"]), []).append(record)
    described = {protocol.name: protocol.describe() for protocol in protocols_of(manifest)}
    parts = []
    for (task, protocol), members in groups.items():
        words = described[protocol]
        parts.append(f"<h2>{escape(task)}</h2><p class=note>{escape(words)}<br>{escape(counts_line(members[0]))}</p>")
        parts.append(_table(HEADER, "".join(_model_rows(found) for found in _by_model(members)), names=True))
        parts += [f"<p class=note>{escape(note)}</p>" for note in notes(members)]
    return "".join(parts)


def _by_model(records: Sequence[dict]) -> list[list[dict]]:
    found: dict[str, list[dict]] = {}
    for record in records:
        found.setdefault(record["model"], []).append(record)
    return list(found.values())


def _model_rows(records: Sequence[dict]) -> str:
    """The rows of one model: its name once, accuracy also as a bar with its interval."""
    rows = []
    for number, record in enumerate(records):
        name, strategy, accuracy, *rest = map(escape, result_row(record))
        low, score, high = (f"{100 * record[key]:.1f}%" for key in ("low", "score", "high"))
        bar = (
            f"<span class=bar><i style='width:{score}'></i><b style='left:{low};right:calc(100% - {high})'></b></span>"
        )
        shown = "" if number and name == escape(result_row(records[number - 1])[0]) else name
        rows.append(
            f"<tr><td class=name>{shown}<td class=name>{strategy}<td>{bar}<span>{accuracy}</span><td>{'<td>'.join(rest)}"
        )
    return f"<tbody class=group>{''.join(rows)}</tbody>"


def _differences(comparisons: Sequence[dict]) -> str:
    """Strategies of one model in sight, models against each other folded."""
    header = ("task, protocol", "what", "points", "95% interval", "items")

    def rows(between: str) -> str:
        found = []
        for one in comparisons:
            if one["between"] == between:
                clear = " class=clear" if one["low"] > 0 or one["high"] < 0 else ""
                cells = [*map(escape, comparison_row(one))]
                found.append(f"<tr{clear}><td class=name>{cells[0]}<td class=name>{'<td>'.join(cells[1:])}")
        return "".join(found)

    parts = [
        "<h2>Paired differences</h2><p class=note>Over the same items; bold where the interval leaves zero out.</p>"
    ]
    if strategies := rows("strategy"):
        parts.append(_table(header, f"<tbody>{strategies}</tbody>", names=True))
    if models := rows("model"):
        body = _table(header, f"<tbody>{models}</tbody>", names=True)
        parts.append(f"<details><summary>model against model</summary>{body}</details>")
    return "".join(parts)


def _browser(predictions: Sequence[dict], count: int) -> str:
    """Items with all answers: of each task in turn one, those first on which cells disagree."""
    tasks: dict[str, dict[tuple[str, str], list[dict]]] = {}
    for row in predictions:
        tasks.setdefault(row["task"], {}).setdefault((row["protocol"], row["id"]), []).append(row)
    total = sum(map(len, tasks.values()))
    sorted_ = [sorted(items.values(), key=lambda rows: len({r["score"] for r in rows}) < 2) for items in tasks.values()]
    chosen = [rows for turn in zip_longest(*sorted_) for rows in turn if rows is not None][:count]
    options = "".join(
        f"<option value='{escape(kind)}'>{escape(kind)}</option>" for kind in (*tasks, "differ", "right", "wrong")
    )
    return (
        f"<h2>Items to read</h2><p class=note>{len(chosen)} of {total} items; of each task those first on which answers "
        "differ in rightness. The answer is marked where it stands.</p>"
        f"<p><select id=kind><option value=''>all</option>{options}</select><input id=text placeholder='search'>"
        f"<span id=shown class=note></span></p><div id=items>{''.join(map(_item, chosen))}</div>"
    )


def _item(rows: list[dict]) -> str:
    first = rows[0]
    scores = {row["score"] for row in rows}
    kinds = " ".join([first["task"], "differ" if len(scores) > 1 else ("right" if scores == {1} else "wrong")])
    context, question = split_question(first["prompt"])
    lines = "".join(
        f"<tr><td class=name>{escape(row['model'])}<td class=name>{escape(row['strategy'])}"
        f"<td class='text {'right' if row['score'] else 'wrong'}'>{marked(row['prediction'].strip(), row['answers']) or '(nothing)'}"
        for row in rows
    )
    table = _table(("model", "strategy", "went on with"), f"<tbody>{lines}</tbody>", names=True)
    return (
        f"<details data-kinds='{escape(kinds)}'><summary>{escape(first['id'])} <small>{escape(first['protocol'])}, "
        f"{sum(row['score'] for row in rows)} of {len(rows)} right</small></summary><pre>{marked(context, first['answers'])}</pre>"
        f"<p><b>Question</b> {escape(question)}<br><b>Answer</b> {escape(' | '.join(dict.fromkeys(first['answers'])))}</p>"
        f"{table}</details>"
    )


def split_question(prompt: str) -> tuple[str, str]:
    """Context and question of a prompt read once: its last line where that is short, else what follows its last full stop."""
    context, line_end, last = prompt.rpartition("\n")
    if last == "Answer:":  # the passages' form, where the question has a line of its own
        context, line_end, asked = context.rpartition("\n")
        last = f"{asked} {last}"
    if line_end and len(last) <= 300:
        return context, last
    context, stop, last = prompt.rpartition(". ")
    return (context + stop, last) if stop else ("", prompt)


def marked(text: str, answers: Sequence[str]) -> str:
    """`text` escaped, with the first answer that stands in it marked at each of its places."""
    for answer in answers:
        pieces = re.split(f"({re.escape(answer)})", text, flags=re.IGNORECASE) if answer else [text]
        if len(pieces) > 1:
            return "".join(f"<mark>{escape(p)}</mark>" if number % 2 else escape(p) for number, p in enumerate(pieces))
    return escape(text)


def _manifest(manifest: dict) -> str:
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    return f"<h2>How it was made</h2><details><summary>manifest</summary><pre>{escape(text)}</pre></details>"
