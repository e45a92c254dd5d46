"""`mae-scale report`: one HTML page about runs that needs no network: tables, curves, pictures, events, environment."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mae_scale.reports.page_content import Page, Picture
from mae_scale.reports.page_curves import chart_data, points_per_curve, script_json
from mae_scale.reports.page_tables import (
    environment_table,
    events_section,
    notes_list,
    recipes_section,
    runs_table,
    text,
)

FILES = Path(__file__).parent / "page_files"


def render(page: Page) -> bytes:
    """Return the page as HTML in UTF-8: everything it shows lies in it."""
    points = points_per_curve(page.runs)
    data = chart_data(page.runs, points)
    longest = max((len(curve.values) for run in page.runs for curve in run.curves.values()), default=0)
    parts = {
        "title": text(page.title),
        "about": text(_about(page)),
        "notes": notes_list([*page.notes, *(f"{run.name}: {note}" for run in page.runs for note in run.notes)]),
        "runs": runs_table(page.runs),
        "figures": _pictures("Figures", "figures", page.figures),
        "curves": _curves(data, points if longest > points else None),
        "reconstructions": _pictures("Reconstructions", "reconstructions", page.reconstructions),
        "events": events_section(page.runs),
        "recipes": recipes_section(page.runs),
        "environment": environment_table(page.runs),
        "data": script_json(data),
        "library_style": _file("uPlot.min.css"),
        "style": _file("page.css"),
        "library": _file("uPlot.iife.min.js"),
        "script": _file("page.js"),
    }
    return _filled(_file("page.html"), parts).encode("utf-8", errors="replace")


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """Put the parts in place of `{{ name }}`, once: what a part holds is not looked at."""
    before, *rest = template.split("{{ ")
    filled = [before]
    for piece in rest:
        name, _, after = piece.partition(" }}")
        filled += [parts[name], after]
    return "".join(filled)


def _file(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8").strip()


def _about(page: Page) -> str:
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(page.made_at))
    count = f"{len(page.runs):,} run{'s' if len(page.runs) != 1 else ''}"
    return f"{count} of {page.source}; made {made} by mae-scale {page.version}"


def _curves(data: Mapping[str, Sequence[Mapping[str, object]]], points: int | None) -> str:
    """Return the section that the script fills with charts. points: those of a curve, where curves are thinned."""
    if not data["groups"]:
        return '<section id="curves"><h2>Curves</h2><p class="muted">No run has logged a step yet.</p></section>'
    thin = (
        f" A curve has at most {points} points: the mean of each interval, of gradient norm and waiting the largest."
        if points
        else ""
    )
    return (
        '<section id="curves"><h2>Curves</h2>'
        '<p class="muted">By epoch. Drag across a chart to zoom all charts of its kind; double-click, or Reset zoom, '
        f"goes back. Click a name to show or hide a run.{thin}</p>"
        '<noscript><p class="note">The charts need JavaScript; the tables do not.</p></noscript>'
        '<div id="groups"></div></section>'
    )


def _pictures(title: str, name: str, pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    shown = "".join(
        f'<figure><figcaption>{text(one.title)}</figcaption><img src="data:{one.media_type};base64,'
        f'{base64.b64encode(one.content).decode()}" width="{one.size[0]}" height="{one.size[1]}" '
        f'alt="{text(one.alt)}"></figure>'
        for one in pictures
    )
    return f'<section id="{name}"><h2>{title}</h2><div class="pictures">{shown}</div></section>'
