"""Human-readable recipes: the list of them, and one in full with the source of each value."""

import re
import textwrap
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mae_scale.config.load import (
    find_recipe,
    layers,
    load_recipe,
    merged,
    packaged_recipes,
    parse_override,
    put,
    yaml_text,
)

DEFAULT, COMMAND_LINE = "default", "command line"
VALUE_COLUMNS = 44
"""Where the comments of `annotated` begin, unless a value is longer."""


@dataclass(frozen=True)
class Header:
    """The comment that a recipe's file begins with."""

    lines: list[str]

    @property
    def title(self) -> str:
        """The first sentence, to its colon or full stop: what the recipe trains."""
        about = " ".join(self.lines[: self._begin("Expected")])
        return re.split(r"[:.](?: |$)", about, maxsplit=1)[0]

    @property
    def expected(self) -> str:
        """The expected result; empty when the header has none."""
        return " ".join(line.strip() for line in self.said("Expected"))

    def said(self, word: str) -> list[str]:
        """Return the lines of the part that begins with a word, such as Cost; none when the header has no such part."""
        rest = self.lines[self._begin(word) :]
        more = next((k for k, line in enumerate(rest[1:], 1) if re.match(r"[A-Z][a-z]+[:,]", line)), len(rest))
        return rest[:more]

    def _begin(self, word: str) -> int:
        starts = (f"{word}:", f"{word},")
        return next((k for k, line in enumerate(self.lines) if line.startswith(starts)), len(self.lines))


def header(name_or_path: str) -> Header:
    """Return the header of a packaged recipe or a file. Raises UsageError when it cannot be found."""
    lines = []
    for line in find_recipe(name_or_path).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return Header(lines)


def listing(columns: int) -> str:
    """Return the packaged recipes in groups: name, what each trains, and the expected result."""

    def entry(name: str) -> str:
        about = header(name)
        parts = [
            textwrap.wrap(text, columns - 4, break_on_hyphens=False) for text in (about.title, about.expected) if text
        ]
        return "\n".join([name, *(f"    {line}" for lines in parts for line in lines)])

    groups = groupby(packaged_recipes(), key=lambda name: name.rpartition("/")[0])
    return "\n\n".join("\n".join(map(entry, names)) for _, names in groups)


def annotated(name_or_path: str, overrides: list[str]) -> str:
    """Return a recipe as YAML with every value, and as comments its header and where each value comes from.

    Raises UsageError as load_recipe does.
    """
    recipe = load_recipe(name_or_path, overrides)
    sources: dict[str, Any] = {}
    for name, content in layers(name_or_path):
        sources = merged(sources, _labelled(content, name))
    for override in overrides:
        key, value = parse_override(override)
        put(sources, key, _labelled(value, COMMAND_LINE))
    lines = [f"# {line}".rstrip() for line in header(name_or_path).lines]
    return "\n".join([*lines, *_lines(recipe.model_dump(mode="json"), sources, indent="")])


def _labelled(value: Any, label: str) -> Any:
    """Return the same tree of sections, with the label for each value."""
    return {key: _labelled(v, label) for key, v in value.items()} if isinstance(value, dict) else label


def _lines(values: dict[str, Any], sources: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in values.items():
        source = sources.get(key, DEFAULT)
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, {} if isinstance(source, str) else source, indent + "  ")]
        else:
            text = f"{indent}{key}: {yaml_text(value)}"
            lines.append(f"{text:<{VALUE_COLUMNS}}  # {source}")
    return lines
