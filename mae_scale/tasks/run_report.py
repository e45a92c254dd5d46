"""`mae-scale report`: gather the runs in folders, or of an MLflow experiment, with their pictures, for one page."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

import mae_scale
from data_pipeline.errors import UsageError
from mae_scale.passwords import without_password
from mae_scale.reports.page_content import Page, Picture
from mae_scale.tasks.run_folders import FoundRun, find_runs, read_run
from mae_scale.tasks.tracked_runs import runs_of_experiment

MOST_RUNS = 2000
PICTURE_BYTES = 1_200_000
"""Limit of all pictures together, before base64 makes a third more of them."""
MOST_RECONSTRUCTIONS, MOST_FIGURES = 12, 8
WIDTH, WIDTH_OF_MANY, FEW = 900, 640, 4
MEASURED_POINT = re.compile(r"(ranks|nodes)_\d+")
"""Name of a point's folder, as `mae-scale scaling run` and slurm/scaling.sbatch give it."""


def page_of_folders(folders: Sequence[Path]) -> Page:
    """Return the page of the runs in folders. Raises UsageError when there is none, or too many of them."""
    found = find_runs(folders)
    if len(found) > MOST_RUNS:
        raise UsageError(
            f"{len(found):,} runs are too many for one page, which takes {MOST_RUNS:,}; give fewer folders at once"
        )
    notes: list[str] = []
    space = PICTURE_BYTES
    figures = list(_fitting(_figures(folders, notes), space, MOST_FIGURES))
    space -= sum(len(one.content) for one in figures)
    drawn = [(run, path) for run in found if (path := _newest_reconstruction(run.folder)) is not None]
    width = WIDTH if len(drawn) <= FEW else WIDTH_OF_MANY
    pictures = list(_fitting(_reconstructions(drawn, width, notes), space, MOST_RECONSTRUCTIONS))
    if len(pictures) < len(drawn):
        notes.append(
            f"reconstructions of {len(pictures)} of {len(drawn):,} runs are shown, so that the page stays small"
        )
    return Page(
        title=", ".join(folder.resolve().name for folder in folders[:3]) + (", ..." if len(folders) > 3 else ""),
        source=", ".join(map(str, folders[:3])) + (f" and {len(folders) - 3:,} more" if len(folders) > 3 else ""),
        version=mae_scale.__version__,
        runs=[read_run(run) for run in found],
        figures=figures,
        reconstructions=pictures,
        notes=notes,
    )


def page_of_experiment(name: str, uri: str) -> Page:
    """Return the page of the runs of an MLflow experiment. Raises UsageError when it cannot be read or has no run."""
    runs, notes = runs_of_experiment(uri, name, most=MOST_RUNS)
    source = f"experiment {name} of MLflow ({without_password(uri)})"
    return Page(title=name, source=source, version=mae_scale.__version__, runs=runs, notes=notes)


def _fitting(pictures: Iterable[Picture], space: int, most: int) -> Iterator[Picture]:
    """Yield the first pictures, as many as there is space for."""
    for number, picture in enumerate(pictures):
        space -= len(picture.content)
        if space < 0 or number == most:
            return
        yield picture


def _newest_reconstruction(folder: Path) -> Path | None:
    steps = sorted((folder / "figures" / "reconstructions").glob("step_*.png"))
    newest = steps[-1] if steps else folder / "figures" / "reconstructions.png"
    return newest if newest.is_file() else None


def _reconstructions(drawn: Iterable[tuple[FoundRun, Path]], width: int, notes: list[str]) -> Iterator[Picture]:
    for run, path in drawn:
        step = re.fullmatch(r"step_(\d+)", path.stem)
        title = f"{run.name}, step {int(step[1]):,}" if step else run.name
        alt = f"Validation images of {run.name}: original, with removed patches, and reconstructed"
        picture = _picture(path, title, alt, width, notes)
        if picture is not None:
            yield picture


def _figures(folders: Sequence[Path], notes: list[str]) -> Iterator[Picture]:
    """Yield the figures that lie beside runs, and throughput against ranks where the runs have measured it."""
    for folder in folders:
        for path in sorted(folder.glob("*.png")):
            picture = _picture(path, path.name, f"Figure {path.name} of {folder.resolve().name}", WIDTH, notes)
            if picture is not None:
                yield picture
        if any(MEASURED_POINT.fullmatch(path.parent.name) for path in folder.glob("*/events.jsonl")):
            with tempfile.TemporaryDirectory(prefix="mae-scale-") as temporary:
                path = Path(temporary) / "throughput.png"
                if _drew_throughput(folder, path, notes):
                    title = "Throughput against ranks"
                    alt = f"Images per second, efficiency and time per step against ranks, of {folder.resolve().name}"
                    picture = _picture(path, title, alt, WIDTH, notes)
                    if picture is not None:
                        yield picture


def _drew_throughput(folder: Path, path: Path, notes: list[str]) -> bool:
    from mae_scale.tasks.throughput import draw
    from mae_scale.tasks.throughput_points import read_points

    try:
        draw(read_points(folder, {}), path, title=folder.resolve().name)
    except (UsageError, KeyError, ValueError, TypeError) as error:
        notes.append(f"throughput of {folder} is not drawn: {error}")
        return False
    return True


def _picture(path: Path, title: str, alt: str, width: int, notes: list[str]) -> Picture | None:
    """Return a PNG, made smaller where it is wider than `width`; None and a note when it cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            shown = Image.new("RGB", image.size, "white")
            rgba = image.convert("RGBA")
            shown.paste(rgba, mask=rgba.getchannel("A"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        notes.append(f"{path} cannot be read as a picture, and is left out")
        return None
    if shown.width > width:
        shown = shown.resize((width, max(1, round(shown.height * width / shown.width))), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    shown.save(content, "WEBP", quality=80, method=4)
    return Picture(title, content.getvalue(), "image/webp", shown.size, alt)
