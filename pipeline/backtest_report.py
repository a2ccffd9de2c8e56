"""A backtest as one self-contained HTML page: words first, then plots and tables; nothing is loaded from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from models.figures import Interval
from pipeline import backtest_plots as plots
from pipeline.backtest_peers import TITLES
from pipeline.backtest_result import PRIMARY, StreamResult
from pipeline.backtest_static import StaticResult
from pipeline.protocols import SHOTS

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
body {{ font: 15px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink) }}
body {{ background: var(--ground); margin: 0 }}
main {{ max-width: 900px; margin: 0 auto; padding: 32px 20px 64px }}
h1 {{ font-size: 26px; margin: 0 0 4px }} h2 {{ font-size: 18px; margin: 0 0 10px }}
.about {{ color: var(--soft); margin: 0 0 20px }}
section {{ background: var(--card); border: 1px solid var(--faint); border-radius: 10px }}
section {{ padding: 20px 24px; margin: 18px 0 }}
.headline {{ border-left: 5px solid var(--adapted) }} .headline p {{ margin: 6px 0 }}
.headline p:first-child {{ font-size: 18px }}
.tiles {{ display: flex; flex-wrap: wrap; gap: 12px; margin-top: 14px }}
.tile {{ flex: 1 1 150px; background: var(--ground); border-radius: 8px; padding: 10px 14px }}
.tile b {{ display: block; font-size: 22px }} .tile span {{ color: var(--soft); font-size: 13px }}
table {{ border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums }}
th {{ color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--quiet) }}
td {{ border-bottom: 1px solid var(--faint); white-space: nowrap }} th, td {{ text-align: right; padding: 5px 8px }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; min-width: 12em }}
tr.own td {{ font-weight: 600 }} td.better {{ color: var(--adapted) }} td.worse {{ color: var(--best) }}
svg {{ max-width: 100%; height: auto; display: block; margin: 0 auto }} .scroll {{ overflow-x: auto }}
.pair {{ display: flex; flex-wrap: wrap; gap: 20px; align-items: center }} .pair > * {{ flex: 1 1 300px }}
.note {{ color: var(--soft); font-size: 13.5px; margin: 8px 0 0 }} li {{ margin: 3px 0 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12.5px }} summary {{ cursor: pointer }}
</style></head><body><main>{body}</main></body></html>
"""
_GROUNDS = {"ground": ("#f6f7f9", "#12181f"), "card": ("#fff", "#1a222b"), "soft": ("#5b6875", "#9aa7b4")}


def write_report(result: StreamResult | StaticResult, folder: Path) -> Path:
    """Write report.html and report.json into a folder, and give the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    found = result.as_json()
    (folder / "report.json").write_text(json.dumps(found, indent=2, ensure_ascii=False, default=str) + "\n")
    body = _stream(result, found) if isinstance(result, StreamResult) else _static(result, found)
    page = folder / "report.html"
    title = f"innerloop backtest: {escape(str(found['data']))}"
    page.write_text(_PAGE.format(title=title, light=_variables(0), dark=_variables(1), body=body))
    return page


def _variables(theme: int) -> str:
    """The page's colours as variables of its style sheet: light (0) or dark (1)."""
    return " ".join(f"--{name}: {shades[theme]};" for name, shades in (plots.COLOURS | _GROUNDS).items())


def _stream(result: StreamResult, found: dict[str, Any]) -> str:
    about = (
        f"stream protocol, phase {found['phase']}: fitted on {found['fitted_events']:,} events, "
        f"{found['judged_events']:,} ranked before they were learnt, {found['users']:,} users, {found['items']:,} items"
    )
    return "".join(
        [
            _top(found, about),
            _headline(found, _tiles(result)),
            _section("What adaptation does as a user's history grows", _over_k(result)),
            _section("Where it earns, and where not", _segments(result)),
            _section("Against the peers, on the same events", _peers(result)),
            _section("Calibration and lists", _calibration(found) + _lists(found)),
            _section("What it costs", _cost(found)),
            _section("How this was measured", _method(found)),
        ]
    )


def _static(result: StaticResult, found: dict[str, Any]) -> str:
    about = f"static episodes, {found['query']} query: {found['cases']:,} users, {found['items']:,} items"
    names = [name for name in ("adapted", "start", *result.peers[:1])]
    colours = dict(zip(names, (plots.ADAPTED, plots.START, plots.BEST), strict=False))
    series = {TITLES[name]: ([result.at(name, shots)[0] for shots in SHOTS], colours[name]) for name in names}
    rows = [
        _row(TITLES[name], *(f"{result.at(name, k)[0].mean:.3f} / {result.at(name, k)[1].mean:.3f}" for k in SHOTS))
        + ("<td></td></tr>" if name == "adapted" else f"{_difference(result.ahead(name)[0])}</tr>")
        for name in result.names
    ]
    headers = ["nDCG@10 / Recall@10", *(f"K = {shots}" for shots in SHOTS), "adapted ahead, mean over K"]
    return "".join(
        [
            _top(found, about),
            _headline(found, ""),
            _section("After exactly K events", plots.lines_over_k([str(k) for k in SHOTS], series, "nDCG@10")),
            _section("Against the peers", _table(headers, rows)),
            _section("How this was measured", _method(found)),
        ]
    )


def _top(found: dict[str, Any], about: str) -> str:
    return f"<h1>Does adaptation pay on {escape(str(found['data']))}?</h1><p class='about'>{escape(about)}</p>"


def _headline(found: dict[str, Any], tiles: str) -> str:
    words = "".join(f"<p>{escape(sentence)}</p>" for sentence in found["headline"])
    return f"<section class='headline'>{words}{tiles}</section>"


def _tiles(result: StreamResult) -> str:
    gain, whole = result.ahead("start").metrics[PRIMARY], result.overall("adapted").metrics
    tiles = [
        (f"{whole[PRIMARY].mean:.3f}", "nDCG@10 of the next ten items"),
        (
            f"{gain.mean:+.4f}" if result.adapts else "off",
            "of it earned by adaptation" if result.adapts else "adaptation",
        ),
        (f"{whole['hit'].mean:.1%}", "of next items in the list of ten"),
    ]
    if result.peers:
        best = result.ahead(result.peers[0]).metrics[PRIMARY]
        tiles.append((f"{best.mean:+.4f}", f"against {TITLES[result.peers[0]]}"))
    shown = "".join(f"<div class='tile'><b>{value}</b><span>{escape(name)}</span></div>" for value, name in tiles)
    return f"<div class='tiles'>{shown}</div>"


def _over_k(result: StreamResult) -> str:
    rows = result.ahead_by_k(result.reference)
    labels = [row.label for row in rows]
    names = ["adapted", "start", *result.peers[:1]]
    colours = (plots.ADAPTED, plots.START, plots.BEST)
    series = {
        TITLES[name]: ([row.metrics[PRIMARY] for row in result.by_k(name)], colour)
        for name, colour in zip(names, colours, strict=False)
    }
    gains = plots.bars_with_intervals(
        [f"K = {row.label} ({row.num_users:,} users)" for row in rows],
        [row.metrics[PRIMARY] for row in rows],
        f"adapted minus {_short(result.reference)}, nDCG@10 of the next ten, with 95 % interval",
    )
    return plots.lines_over_k(labels, series, "nDCG@10 of the next ten") + gains


def _segments(result: StreamResult) -> str:
    found = result.segments()
    if not found:
        return "<p class='note'>No kind of event has enough users to be told apart.</p>"
    drawn = plots.bars_with_intervals(
        [f"{label} ({own.num_users:,})" for label, own, _ in found],
        [(own if result.adapts else best).metrics[PRIMARY] for _, own, best in found],
        f"adapted minus {_short(result.reference)}, nDCG@10 of the next ten",
    )
    rows = [
        _row(label, f"{own.num_users:,}")
        + "".join(_difference(compared.metrics[PRIMARY]) for compared in (own, best))
        + "</tr>"
        for label, own, best in found
    ]
    against = TITLES[result.peers[0]] if result.peers else "start"
    return drawn + _table(["events by", "users", "adapted − start", f"adapted − {against}"], rows)


def _peers(result: StreamResult) -> str:
    rows = []
    for name in ("adapted", "start", *result.peers):
        metrics = result.overall(name).metrics
        cells = (_interval(metrics[PRIMARY]), f"{metrics['ndcg'].mean:.4f}", f"{metrics['hit'].mean:.3f}")
        ahead = "<td></td>" if name == "adapted" else _difference(result.ahead(name).metrics[PRIMARY])
        rows.append(f"{_row(TITLES[name], *cells, own=name == 'adapted')}{ahead}</tr>")
    headers = ["unseen users, each counting once", "nDCG@10, next ten", "next item", "hit@10", "adapted ahead (paired)"]
    return _table(headers, rows)


def _calibration(found: dict[str, Any]) -> str:
    bins = found["calibration"]
    if not bins:
        return ""
    rows = [f"{_row(f'{score:.3f}', f'{hits:.3f}', f'{count:,}')}</tr>" for score, hits, count in bins]
    table = _table(["score served", "taken", "pairs"], rows)
    words = (
        "<p class='note'>A score says how likely the item is among the user's next ten; on the line it is right.</p>"
    )
    return f"<div class='pair'><div>{plots.calibration(bins)}</div><div>{table}{words}</div></div>"


def _lists(found: dict[str, Any]) -> str:
    rows = []
    for name, about in found["lists"].items():
        varied = f"{about['diversity']:.3f}" if "diversity" in about else "–"
        cells = (f"{about['coverage']:.1%}", f"{about['gini']:.3f}", f"{about['novelty_bits']:.2f}", varied)
        rows.append(f"{_row(TITLES[name], *cells, own=name == 'adapted')}</tr>")
    headers = ["lists of ten", "catalogue covered", "inequality (Gini)", "surprise, bits", "variety of texts"]
    return "<br>" + _table(headers, rows)


def _cost(found: dict[str, Any]) -> str:
    rows = []
    for name, cost in found["cost"].items():
        kept = f"{cost['user_bytes']:,}" if cost["user_bytes"] else "–"
        cells = (f"{cost['fit_seconds']:.1f} s", f"{1e6 * cost['event_seconds']:,.0f} µs", kept)
        rows.append(f"{_row(TITLES[name], *cells, own=name == 'adapted')}</tr>")
    words = (
        "CPU time on this machine: compare the rows, not other reports. An event is predicted, ranked for this report "
        "and learnt; innerloop's row also keeps the user's whole state and writes lists, as its worker does."
    )
    headers = ["", "fit and tuning, CPU", "per event, CPU", "bytes a user"]
    return _table(headers, rows) + f"<p class='note'>{words}</p>"


def _method(found: dict[str, Any]) -> str:
    said = [
        "Everything was fitted and chosen on events before the first event of the users to be judged.",
        "All items are ranked that the user has not had."
        if not found.get("repeats_listed")
        else "People take the same things again here, so all items are ranked, seen ones included.",
        "A user counts once; intervals are 95 % bootstraps over users, and differences are paired.",
        *found["notes"],
    ]
    chosen = {TITLES[name]: settings for name, settings in found["settings"].items()}
    chosen["meta-training"] = found["training"]
    lines = "\n".join(f"{name}: {json.dumps(settings, default=str)}" for name, settings in chosen.items())
    details = f"<details class='note'><summary>What was chosen</summary><pre>{escape(lines)}</pre></details>"
    return "<ul class='note'>" + "".join(f"<li>{escape(line)}</li>" for line in said) + f"</ul>{details}"


def _short(name: str) -> str:
    return "start" if name == "start" else TITLES[name]


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _table(headers: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    return f"<div class='scroll'><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _row(*cells: str, own: bool = False) -> str:
    """Begin a row; the caller closes it."""
    return f"<tr{' class=own' if own else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells)


def _interval(interval: Interval) -> str:
    return f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def _difference(interval: Interval) -> str:
    kind = "better" if interval.low > 0 else "worse" if interval.high < 0 else ""
    return f"<td class='{kind}'>{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]</td>"
