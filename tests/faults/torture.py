"""`make torture N=200`: kills a real two-rank training N times at random instants and compares the whole curve.

A kill takes one rank or everything at once, between steps, in the middle of a save, or while a checkpoint is being
read, and the next start may run under another engine: then the same pieces are read in another layout.
"""

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.samples import write_digits
from tests.faults.harness import Training, is_loading, is_saving, newest_whole_step
from tests.tiny import arguments, losses

# On two ranks these give the same curve to the last bit (a sum of two is the same in either order).
ENGINES = [
    ["engine.zero_stage=1"],
    ["engine.zero_stage=2"],
    ["engine.zero_stage=0"],
    ["engine.backend=fairscale", "engine.zero_stage=1"],
]
INSTANTS = ("at any time", "while saving", "while loading")
VICTIMS = ("a rank", "all")


@dataclass
class Report:
    """What the torture has seen."""

    kills: Counter = field(default_factory=Counter)
    starts: int = 0
    lost: int = 0
    """Starts that did not go on from the newest whole checkpoint."""
    steps: int = 0
    """Of the whole run."""
    mismatching: int = 0
    """Steps whose loss is not, bit for bit, the uninterrupted run's."""
    damaged: int = 0
    """Checkpoints set aside: none may be damaged by a kill."""
    intruders: int = 0
    """Second starts of the same command while the first was at work; each must be refused."""
    seconds: float = 0.0

    def table(self) -> str:
        rows = [(f"kills of {victim}, {instant}", count) for (victim, instant), count in sorted(self.kills.items())]
        rows += [
            ("kills", sum(self.kills.values())),
            ("resumes", self.starts - 1),
            ("second starts refused", self.intruders),
            ("steps compared", self.steps),
            ("steps lost beyond the last checkpoint", self.lost),
            ("mismatching losses", self.mismatching),
            ("checkpoints damaged", self.damaged),
            ("seconds", round(self.seconds)),
        ]
        return "\n".join(f"| {what:<40} | {count:>6} |" for what, count in [("", "count"), *rows])


def torture(folder: Path, digits: Path, kills: int, seed: int, say=lambda text: None) -> Report:
    """Kill a training `kills` times, let it end a few steps later, and compare it to one that was not killed."""
    rng, began, report = random.Random(seed), time.monotonic(), Report()
    recipe = ["pretrain", "demo", "--nproc", 2, "--tracking-uri", "off", *arguments(digits)]
    recipe += ["schedule.epochs=100000", "engine.collective_timeout_s=20"]
    hurried = ["checkpoint.every_steps=2", "checkpoint.keep=3"]
    out = folder / "killed"
    for number in range(1, kills + 1):
        with started(out, [*recipe, *hurried], rng, report, say) as training:
            if rng.random() < 0.2:
                intrude(training, [*recipe, *hurried])
                report.intruders += 1
            kind = kill_somehow(training, rng)
            report.kills[kind] += 1
        say(f"kill {number} of {kills}: {' '.join(kind)}; newest whole checkpoint: {newest_whole_step(out)}")
    last = f"schedule.stop_after_steps={newest_whole_step(out) + 4}"
    with started(out, [*recipe, *hurried, last], rng, report, say) as training:
        assert training.wait(120) == 0, training.text()
    with Training(folder / "whole", *recipe, last, "checkpoint.every_epochs=100000") as whole:
        assert whole.wait(1200) == 0, whole.text()
    a, b = losses(folder / "whole"), losses(out)
    report.mismatching = sum(a.get(step) != b.get(step) for step in a.keys() | b.keys())
    report.damaged = len(list((out / "checkpoints").glob("damaged_*")))
    report.steps, report.seconds = len(a), time.monotonic() - began
    return report


@contextlib.contextmanager
def started(out: Path, arguments: list, rng: random.Random, report: Report, say):
    """A start of the training, under some engine; afterwards it is held against the checkpoint it had to go on from."""
    expected = newest_whole_step(out)
    with Training(out, *arguments, *rng.choice(ENGINES)) as training:
        report.starts += 1
        yield training
        text = training.text()
    went_on = f"going on from step {expected}\n" if expected else "from the beginning\n"
    if "rank(s) on" in text and went_on not in text:
        report.lost += 1
        say(f"start {report.starts} did not go on from step {expected}:\n{text}")


def intrude(training: Training, arguments: list) -> None:
    """Start the same command beside a training that is at work: it must be refused, and leave it alone."""
    first = newest_whole_step(training.out)
    training.wait_until(lambda: newest_whole_step(training.out) > first)
    with Training(training.out, *arguments, log="second") as second:
        assert second.wait(60) == 2, second.text()
        assert " is in use by process " in second.text(), second.text()


def kill_somehow(training: Training, rng: random.Random) -> tuple[str, str]:
    """Kill a rank or all at an instant that comes soon; what was killed, and when."""
    victim, instant = rng.choice(VICTIMS), rng.choice(INSTANTS)
    ranks = training.wait_until(lambda: len(found := training.ranks()) == 2 and found)
    first = newest_whole_step(training.out)
    if instant == "while loading" and first:
        # Reading so small a checkpoint takes milliseconds: look without a pause.
        training.wait_until(lambda: any(map(is_loading, ranks.values())) or "rank(s) on" in training.text(), pause_s=0)
        instant = instant if any(map(is_loading, ranks.values())) else "at any time"
    elif instant == "while saving":
        training.wait_until(lambda: newest_whole_step(training.out) > first)
        training.wait_until(lambda: is_saving(training.out))
    else:
        instant = "at any time"
        if rng.random() < 0.8:
            training.wait_until(lambda: newest_whole_step(training.out) > first)
            time.sleep(rng.random() * 0.3)
        else:  # while it starts
            time.sleep(rng.random() * 8)
    if victim == "all":
        training.kill_all()
    else:
        rng.choice(list(ranks.values())).kill()
        assert training.wait(60) == 1, training.text()
    return victim, instant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mae-scale-torture-") as folder:
        write_digits(Path(folder) / "digits")
        report = torture(
            Path(folder), Path(folder) / "digits", options.kills, options.seed, lambda text: print(text, flush=True)
        )
    print(report.table())
    sys.exit(bool(report.lost or report.mismatching or report.damaged))


if __name__ == "__main__":
    main()
