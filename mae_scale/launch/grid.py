"""The grid of `mae-scale sweep`: which runs `key=v1,v2` words ask for, their names and their overrides."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UsageError
from mae_scale.config.load import load_recipe

THEN_PREFIX = "then."
SHARED_SECTION = "engine."
SHARED_KEYS = (
    "seed",
    "data.root",
    "data.val_root",
    "data.cache",
    "data.cache_gib",
    "data.device",
    "data.threads",
    "data.exif_orientation",
    "model.name",
    "model.image_size",
    "model.patch_size",
    "model.width",
    "model.depth",
    "model.heads",
    "tracking.experiment",
    "tracking.uri",
)
"""Keys of the pre-training that hold for the transfer after it too."""
NAME_LENGTH = 150


@dataclass(frozen=True)
class Axis:
    """Keys that change together, and their values, as they are written on the command line."""

    keys: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class GridPoint:
    """One run of the grid: its name, and the value of each key that it does not share with all others."""

    name: str
    values: dict[str, str]
    overrides: tuple[str, ...]
    """All overrides of the run, those that are common to the grid first."""
    then_overrides: tuple[str, ...]
    """All overrides of the transfer that follows it."""


@dataclass(frozen=True)
class Grid:
    """All combinations of the axes' values, each under every seed."""

    axes: tuple[Axis, ...]
    common: tuple[str, ...]
    """Overrides with one value."""
    then: tuple[str, ...]
    """Overrides of the transfer alone."""
    seeds: tuple[int, ...]

    def points(self) -> Iterator[GridPoint]:
        """Yield the points; seeds change fastest."""
        rows_and_seeds = itertools.product(itertools.product(*(axis.values for axis in self.axes)), self.seeds)
        for rows, seed in rows_and_seeds:
            values = {
                key: value
                for axis, row in zip(self.axes, rows, strict=True)
                for key, value in zip(axis.keys, row, strict=True)
            }
            values["seed"] = str(seed)
            own = [f"{key}={value}" for key, value in values.items()]
            overrides = (*self.common, *own)
            shared = [word for word in overrides if _is_shared(word.partition("=")[0])]
            yield GridPoint(_name(values), values, overrides, (*shared, *self.then))


def read_grid(recipe: str, words: list[str], seeds: int) -> Grid:
    """Return the grid of the words `key=v1,v2`, `key:key=v1:w1,v2:w2`, `key=value` and `then.key=value`.

    seeds: number of seeds, counted from the recipe's. Values are separated by commas outside brackets and quotes.
    Raises UsageError for words that are no such thing, and for two points of one name.
    """
    axes, common, then = [], [], []
    for word in words:
        axis = _axis(word)
        if word.startswith(THEN_PREFIX):
            if len(axis.values) > 1:
                raise UsageError(f"'{word}': one value is expected, for the transfer is the same after every run")
            then.append(word.removeprefix(THEN_PREFIX))
        elif len(axis.values) > 1:
            axes.append(axis)
        else:
            common += [f"{key}={value}" for key, value in zip(axis.keys, axis.values[0], strict=True)]
    varied = [key for axis in axes for key in axis.keys]
    given = [*varied, *{word.partition("=")[0] for word in common}]  # of several single values the last counts
    twice = [key for key in varied if given.count(key) > 1]
    if twice:
        raise UsageError(f"{twice[0]} is given twice; give all of its values in one word, such as {twice[0]}=1,2")
    if any("seed" in axis.keys for axis in axes):
        raise UsageError("seed=...: give the number of seeds as --seeds N, and the first one as seed=K")
    first = load_recipe(recipe, [word for word in common if word.startswith("seed=")]).seed
    common = [word for word in common if not word.startswith("seed=")]
    grid = Grid(tuple(axes), tuple(common), tuple(then), tuple(range(first, first + seeds)))
    names = [point.name for point in grid.points()]
    same = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if same:
        raise UsageError(f"two runs of the grid would both be named {same}; shorten the values that differ")
    return grid


def split_values(text: str, separator: str = ",") -> list[str]:
    """Return the parts of a text between separators that stand outside brackets and quotes.

    Raises UsageError for an empty part, or a bracket or quote that is not closed.
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == separator and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if depth or quote:
        raise UsageError(f"'{text}': a bracket or a quote is not closed")
    if len(parts) > 1 and not all(part.strip() for part in parts):
        raise UsageError(f"'{text}': a value between two '{separator}' is missing")
    return [part.strip() for part in parts]


def _axis(word: str) -> Axis:
    """Return the keys and values of a word. Raises UsageError when it has no =, or another number of values."""
    names, sign, text = word.partition("=")
    if not sign or not names:
        raise UsageError(
            f"'{word}' is not part of a grid; expected section.key=value, or several values such as "
            "model.mask_ratio=0.6,0.75"
        )
    keys = tuple(names.split(":"))
    rows = tuple(tuple(split_values(part, ":")) if len(keys) > 1 else (part,) for part in split_values(text))
    for row in rows:
        if len(row) != len(keys):
            raise UsageError(
                f"'{word}': {':'.join(row)} has {len(row)} values for {len(keys)} keys; expected one for each, "
                "such as model.width:model.depth=64:2,128:4"
            )
    repeated = next((row for row in rows if rows.count(row) > 1), None)
    if repeated:
        raise UsageError(f"'{word}': {':'.join(repeated)} stands there twice")
    return Axis(keys, rows)


def _is_shared(key: str) -> bool:
    return key in SHARED_KEYS or key.startswith(SHARED_SECTION)


def _name(values: dict[str, str]) -> str:
    """Return a name for a folder, such as mask_ratio-0.75_seed-0."""
    parts = []
    for key, value in values.items():
        short = Path(value).name if "/" in value else value
        parts.append(f"{key.rpartition('.')[2]}-{re.sub('[^A-Za-z0-9.+-]+', '-', short).strip('-')}")
    return "_".join(parts)[:NAME_LENGTH]
