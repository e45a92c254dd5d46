"""What a shell completes on TAB: names of recipes, keys of overrides and their values."""

from pathlib import Path
from typing import Literal, get_args, get_origin

import typer


def complete_recipe(incomplete: str) -> list[str]:
    """Return the packaged recipes that begin so; none leaves it to the shell, which completes files."""
    from mae_scale.config.load import packaged_recipes

    return [name for name in packaged_recipes() if name.startswith(incomplete)]


def complete_override(context: typer.Context, incomplete: str) -> list[str]:
    """Return what an override can go on with.

    A key is completed together with a value, so that the shell sees two ways to go on and adds no space after `=`.
    bash takes `=` for the end of a word: after it the value alone is completed.
    """
    from mae_scale.config.schema import keys

    key, sign, _ = incomplete.partition("=")
    before = _key_before(context)
    if sign:
        found = [f"{key}={value}" for value in _values(key)]
    elif before:
        found = _values(before)
    else:
        known = [key for key in keys() if key.startswith(incomplete)]
        found = [f"{key}=" for key in known]
        if len(known) == 1:
            found += [f"{known[0]}={value}" for value in _values(known[0]) or ["null"]]
    return [text for text in found if text.startswith(incomplete)]


def complete_chain(context: typer.Context, incomplete: str) -> list[str]:
    """Return what a word of `submit` can go on with: a recipe, or an override."""
    recipes = [] if _key_before(context) else complete_recipe(incomplete)
    return recipes + complete_override(context, incomplete)


def _key_before(context: typer.Context) -> str | None:
    """Return the key whose value is being written as a word of its own, as bash cuts the line; else None."""
    from mae_scale.config.schema import keys

    given = context.params.get("overrides") or context.params.get("recipes") or []
    words = [word for word in given if word != "="]
    return words[-1] if words and words[-1] in keys() else None


def _values(key: str) -> list[str]:
    """Return the values to choose from, else the default; none for paths, which the shell completes."""
    from mae_scale.config.load import yaml_text
    from mae_scale.config.schema import keys

    field = keys().get(key)
    if field is None:
        return []
    kinds = [field.annotation, *get_args(field.annotation)]
    if Path in kinds:
        return []
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if bool in kinds:
        choices += ["true", "false"]
    if type(None) in kinds or not choices:
        choices.append(yaml_text(field.default).replace(" ", ""))
    return list(dict.fromkeys(choices))
