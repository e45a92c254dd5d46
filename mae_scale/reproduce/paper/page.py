"""The findings' table, as data, as Markdown, and as lines for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mae_scale.reproduce.paper.findings import SPEED, Finding, Values
from mae_scale.reproduce.paper.verdict import LEVEL, Verdict, decide

NAMES = {
    "finetune": "fine-tuned",
    "probe": "probed",
    "partial-0.5": "last MLP",
    "partial-1": "1 block",
    "partial-2": "2 blocks",
    "finetune-4x": "4 x the labels",
    "finetune-16x": "16 x the labels",
    SPEED: "images/s",
}


@dataclass(frozen=True)
class Found:
    """A finding with its values here: those of each arm, {measure: a value per seed}, and a verdict per claim."""

    finding: Finding
    arms: tuple[dict[str, list[float]], ...]
    verdicts: tuple[Verdict, ...]


def look_up(values: Sequence[Values], findings: Sequence[Finding]) -> list[Found]:
    """Return the findings with the values of each seed."""
    return [
        Found(
            one,
            tuple({m: [value(arm.pretraining, m) for value in values] for m in one.measures} for arm in one.arms),
            tuple(decide([claim.difference(value) for value in values]) for claim in one.claims),
        )
        for one in findings
    ]


def as_json(found: Sequence[Found], about: dict[str, Any]) -> dict[str, Any]:
    """Return everything that the page shows."""
    return {
        **about,
        "findings": [
            {
                "title": one.finding.title,
                "arms": [
                    {"label": arm.label, "run": arm.pretraining, "paper": dict(arm.paper), "values": values}
                    for arm, values in zip(one.finding.arms, one.arms, strict=True)
                ],
                "claims": [
                    {
                        "claim": claim.text,
                        "paper": claim.paper,
                        "differences": list(verdict.differences),
                        "mean": verdict.mean,
                        "margin": verdict.margin,
                        "unit": claim.unit,
                        "verdict": verdict.word,
                    }
                    for claim, verdict in zip(one.finding.claims, one.verdicts, strict=True)
                ],
            }
            for one in found
        ],
    }


def summary(found: Sequence[Found]) -> list[tuple[str, str, str, str, str]]:
    """Return a row per claim: finding, claim, the paper's numbers, the difference here, the verdict."""
    return [
        (one.finding.title, claim.text, claim.paper, difference(verdict, claim.unit), verdict.word)
        for one in found
        for claim, verdict in zip(one.finding.claims, one.verdicts, strict=True)
    ]


def difference(verdict: Verdict, unit: str) -> str:
    """Return a difference with the margin that it has to exceed."""
    margin = "" if verdict.margin is None else f" ± {verdict.margin:.1f}"
    return f"{verdict.mean:+.1f}{margin} {unit}"


def markdown(found: Sequence[Found], about: Sequence[str]) -> str:
    """Return the page: what was run, the claims, then each finding with its arms."""
    rule = (
        "A claim's difference is taken within each seed. It is decided where their mean exceeds the margin "
        f"t({LEVEL:g}, n - 1) x sd / sqrt(n): *same direction* above 0, *not* below; else *not decided*."
    )
    lines = ["# The paper's findings in small", "", *about, "", rule, ""]
    lines += _table(("finding", "claim", "paper", "difference here", "verdict"), summary(found))
    for one in found:
        lines += ["", f"## {one.finding.title}", "", *_arms(one)]
    return "\n".join(lines) + "\n"


def _arms(one: Found) -> list[str]:
    measures = one.finding.measures
    head = ["", *(f"{NAMES[m]}{'' if m == SPEED else ', %'}" for m in measures), "paper"]
    rows = []
    for arm, values in zip(one.finding.arms, one.arms, strict=True):
        paper = ", ".join(f"{NAMES[m]} {arm.paper[m]:g}" for m in measures if m in arm.paper)
        rows.append((arm.label, *(_mean(values[m]) for m in measures), paper))
    return _table(head, rows)


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
