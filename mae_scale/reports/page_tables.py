"""The tables of a page: runs, events, recipes, environment. All text from outside is escaped here, by `text`."""

from __future__ import annotations

import html
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from mae_scale.human_units import duration
from mae_scale.passwords import redacted
from mae_scale.reports.page_content import Event, PageRun

LONGEST_TEXT, SHORT_REASON = 600, 40
OPEN_RUNS = 3
"""Events of up to so many runs are shown unfolded."""
MOST_RUNS_WITH_EVENTS, MOST_EVENTS = 100, 60
MOST_COLUMNS, MOST_COMPARED = 12, 200
ORDINARY = ("start", "end")
NUMERIC = ' class="n"'
PLURAL = {"skipped_step": "skipped steps"}
VALUES = {
    "train/loss": ("train loss", "{:.4f}"),
    "val/loss": ("val loss", "{:.4f}"),
    "val/top1": ("top-1, %", "{:.2f}"),
    "val/knn_top1": ("k-NN, %", "{:.2f}"),
    "val/box_ap": ("box AP, %", "{:.1f}"),
    "val/mask_ap": ("mask AP, %", "{:.1f}"),
    "val/mean_iou": ("mean IoU, %", "{:.2f}"),
    "perf/images_per_second": ("images/s", "{:,.1f}"),
}

Cell = tuple[str, float | str | None]
"""HTML, and the value to sort by; None: as nothing."""


def text(value: object) -> str:
    """Return text for HTML, also inside an attribute: escaped, without passwords, and cut where it is very long."""
    said = redacted(str(value))
    return html.escape(said if len(said) <= LONGEST_TEXT else f"{said[:LONGEST_TEXT]}…", quote=True)


def notes_list(notes: Sequence[str]) -> str:
    """Return what is wrong with the files of runs; nothing for no notes."""
    if not notes:
        return ""
    shown = "".join(f"<li>{text(note)}</li>" for note in notes[:20])
    more = f"<li>and {len(notes) - 20:,} more</li>" if len(notes) > 20 else ""
    return f'<aside class="note" aria-label="Notes"><ul>{shown}{more}</ul></aside>'


def runs_table(runs: Sequence[PageRun]) -> str:
    """Return a row per run, sorted by a click on a column's name; a column that no run fills is left out."""
    columns: dict[str, Callable[[PageRun], Cell]] = {
        "kind": lambda run: (text(run.kind), run.kind or None),
        "encoder": lambda run: (text(run.encoder), run.encoder or None),
        "seed": lambda run: _number(run.seed, "{:d}"),
        "epochs": _epochs,
        "state": _state,
        **{title: _value_column(name, form) for name, (title, form) in VALUES.items()},
        "ms/step (planned)": lambda run: _beside_plan(run, "perf/step_time_s", "plan/step_time_s", 1000),
        "GiB (planned)": lambda run: _beside_plan(run, "memory/peak_gib", "plan/memory_gib", 1),
        "duration": lambda run: ("" if run.duration_s is None else duration(run.duration_s), run.duration_s),
    }
    cells = {title: [cell(run) for run in runs] for title, cell in columns.items()}
    filled = {title: column for title, column in cells.items() if any(value is not None for _, value in column)}
    numeric = {title for title, column in filled.items() if any(isinstance(value, float | int) for _, value in column)}
    head = "".join(_head(title, sortable=True, numeric=title in numeric) for title in ("run", *filled))
    rows = "".join(
        f'<tr><th scope="row">{text(run.name)}</th>' + "".join(_cell(filled[title][row]) for title in filled) + "</tr>"
        for row, run in enumerate(runs)
    )
    return _table(head, rows, "Runs", "sortable")


def _value_column(name: str, form: str) -> Callable[[PageRun], Cell]:
    return lambda run: _number(run.values.get(name), form)


def _beside_plan(run: PageRun, name: str, planned: str, unit: float) -> Cell:
    took, plan = run.values.get(name), run.values.get(planned)
    return ("", None) if took is None or plan is None else (f"{unit * took:,.1f} ({unit * plan:,.1f})", took)


def _number(value: float | None, form: str) -> Cell:
    return ("", None) if value is None else (form.format(value), float(value))


def _epochs(run: PageRun) -> Cell:
    if run.epochs_done is None:
        return (f"0 of {run.epochs}" if run.epochs is not None else "", 0.0 if run.epochs is not None else None)
    return f"{run.epochs_done:.4g}" + (f" of {run.epochs}" if run.epochs is not None else ""), run.epochs_done


def _state(run: PageRun) -> Cell:
    mark = f'<span class="state {run.state.replace(" ", "-")}">{text(run.state)}</span>'
    if not run.reason:
        return mark, run.state
    long = " long" if len(run.reason) > SHORT_REASON else ""
    return f'{mark} <span class="why{long}">{text(_cut(run.reason))}</span>', run.state


def _cut(reason: str, most: int = 160) -> str:
    return reason if len(reason) <= most else f"{reason[:most]}…"


def _cell(cell: Cell) -> str:
    shown, value = cell
    numeric = isinstance(value, float | int)
    return f'<td{NUMERIC if numeric else ""} data-v="{"" if value is None else text(value)}">{shown}</td>'


def _head(title: str, *, sortable: bool = False, numeric: bool = False) -> str:
    inner = f'<button type="button">{text(title)}</button>' if sortable else text(title)
    return f'<th scope="col"{NUMERIC if numeric else ""}>{inner}</th>'


def _table(head: str, rows: str, label: str, kind: str = "") -> str:
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(label)}"><table class="{kind}">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def events_section(runs: Sequence[PageRun]) -> str:
    """Return the events of runs, folded when there are many; of very many runs only those with unusual events."""
    some = [run for run in runs if run.events]
    if not some:
        return ""
    many = len(some) > MOST_RUNS_WITH_EVENTS
    if many:
        some = [run for run in some if any(event.kind not in ORDINARY for event in run.events)]
    shown = some[:MOST_RUNS_WITH_EVENTS]
    about = ""
    if many:
        about = f'<p class="muted">{len(shown):,} of {len(some):,} runs with other events than starts and ends.</p>'
    parts = "".join(_events(run, unfolded=len(some) <= OPEN_RUNS) for run in shown)
    return f'<section id="events"><h2>Events</h2>{about}{parts}</section>'


def _events(run: PageRun, *, unfolded: bool) -> str:
    counts = Counter(event.kind for event in run.events)
    said = ", ".join(f"{count} {_plural(kind, count)}" for kind, count in counts.items())
    shown = run.events[-MOST_EVENTS:]
    rows = "".join(_event_row(event) for event in shown)
    left = len(run.events) - len(shown)
    more = f'<p class="muted">and {left:,} earlier ones in events.jsonl</p>' if left else ""
    head = "".join(map(_head, ("time (UTC)", "step", "event", "what")))
    table = _table(head, rows, f"Events of {run.name}", "wide")
    return (
        f"<details{' open' if unfolded else ''}><summary><b>{text(run.name)}</b> "
        f'<span class="muted">{text(said)}</span></summary>{table}{more}</details>'
    )


def _event_row(event: Event) -> str:
    when = "" if event.time is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event.time))
    mark = "" if event.kind in ORDINARY else ' class="unusual"'
    kind = event.kind.replace("_", " ")
    return (
        f'<tr{mark}><td class="t">{when}</td><td class="n">{event.step:,}</td><td>{text(kind)}</td>'
        f'<td class="words">{text(event.words)}</td></tr>'
    )


def _plural(kind: str, count: int) -> str:
    if count == 1 or kind == "killed":
        return kind.replace("_", " ")
    return PLURAL.get(kind, f"{kind}s")


def recipes_section(runs: Sequence[PageRun]) -> str:
    """Return, for each kind of training, the keys in which its runs differ, and the values that all of them have."""
    kinds: dict[str, list[PageRun]] = defaultdict(list)
    for run in runs:
        if run.recipe:
            kinds[run.kind].append(run)
    if not kinds:
        return ""
    parts = []
    for kind, members in kinds.items():
        keys = dict.fromkeys(key for run in members for key in run.recipe)
        differing = [key for key in keys if len({run.recipe.get(key) for run in members}) > 1]
        title = f"<h3>{text(kind)}</h3>" if len(kinds) > 1 else ""
        parts.append(
            title + _differences(members, differing) + _common(members, [k for k in keys if k not in differing])
        )
    return f'<section id="recipes"><h2>Recipes</h2>{"".join(parts)}</section>'


def _differences(runs: Sequence[PageRun], keys: Sequence[str]) -> str:
    if len(runs) == 1:
        return ""
    if not keys:
        return f'<p class="muted">All {len(runs)} runs have the same recipe.</p>'
    shown, hidden = keys[:MOST_COLUMNS], keys[MOST_COLUMNS:]
    numeric = {key for key in shown if all(isinstance(_sort_value(run.recipe.get(key, "")), float) for run in runs)}
    head = "".join(_head(key, sortable=True, numeric=key in numeric) for key in ("run", *shown))
    rows = "".join(
        f'<tr><th scope="row">{text(run.name)}</th>'
        + "".join(_cell((text(value), _sort_value(value))) for value in (run.recipe.get(key, "") for key in shown))
        + "</tr>"
        for run in runs[:MOST_COMPARED]
    )
    more = f'<p class="muted">They also differ in {text(", ".join(hidden))}.</p>' if hidden else ""
    if len(runs) > MOST_COMPARED:
        more += f'<p class="muted">The first {MOST_COMPARED} of {len(runs):,} runs.</p>'
    return _table(head, rows, "Keys in which the recipes differ", "sortable") + more


def _sort_value(value: str) -> float | str | None:
    try:
        return float(value)
    except ValueError:
        return value or None


def _common(runs: Sequence[PageRun], keys: Iterable[str]) -> str:
    rows = "".join(f'<tr><th scope="row">{text(key)}</th><td>{text(runs[0].recipe[key])}</td></tr>' for key in keys)
    whose = "The recipe" if len(runs) == 1 else f"The same in all {len(runs):,} runs"
    table = _table(_head("key") + _head("value"), rows, whose, "facts")
    return f"<details><summary>{whose}</summary>{table}</details>"


def environment_table(runs: Sequence[PageRun]) -> str:
    """Return a column per environment of a newest start, runs with the same one together."""
    alike: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for run in runs:
        if run.environment:
            alike[tuple(run.environment.items())].append(run.name)
    if not alike:
        return ""
    found = [(dict(facts), names) for facts, names in alike.items()]
    found.sort(key=lambda one: -len(one[1]))
    shown = found[:MOST_COLUMNS]
    head = _head("fact") + "".join(_head(_names(names, len(runs))) for _, names in shown)
    keys = dict.fromkeys(key for facts, _ in shown for key in facts)
    rows = "".join(
        f'<tr><th scope="row">{text(key)}</th>'
        + "".join(f"<td>{text(facts.get(key, ''))}</td>" for facts, _ in shown)
        + "</tr>"
        for key in keys
    )
    more = f'<p class="muted">and {len(found) - len(shown):,} other environments</p>' if len(found) > len(shown) else ""
    table = _table(head, rows, "Environment", "facts")
    return f'<section id="environment"><h2>Environment</h2>{table}{more}</section>'


def _names(names: Sequence[str], runs: int) -> str:
    if len(names) == runs:
        return "all runs" if runs > 1 else names[0]
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
