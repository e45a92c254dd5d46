"""Load a recipe: a packaged name or a YAML file, with `section.key=value` overrides."""

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data_pipeline.errors import UsageError
from mae_scale.config.hints import contradiction, reason, subject
from mae_scale.config.old_names import with_new_names
from mae_scale.config.schema import Recipe, takes_text


def packaged_recipes() -> list[str]:
    """Return the names of the recipes that come with the package, such as `pretrain/vit_huge_1600ep`."""
    root = Path(str(resources.files("mae_scale.recipes")))
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))


def load_recipe(name_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Return the recipe of a packaged name or a YAML file, with `section.key=value` overrides.

    Raises UsageError for what cannot be found, read or understood, with the nearest known name or key.
    """
    tree: dict[str, Any] = {}
    for _, layer in layers(name_or_path):
        tree = merged(tree, layer)
    for override in overrides:
        put(tree, *parse_override(override))
    return _validated(tree, name_or_path)


def stored_recipe(tree: dict[str, Any], source: str) -> Recipe:
    """Return a recipe as a run has stored it, with this version of the schema or an older one.

    Raises UsageError when it is neither.
    """
    return _validated(with_new_names(tree), source)


def layers(name_or_path: str, seen: tuple[str, ...] = (), *, folder: Path = Path()) -> list[tuple[str, dict[str, Any]]]:
    """Return the files of a recipe as (name, content), the base that the others extend first.

    A path in `extends:` is relative to the file's own folder. Raises UsageError for what cannot be found or read.
    """
    path = find_recipe(name_or_path, folder).resolve()
    if str(path) in seen:
        raise UsageError(f"recipe {name_or_path}: `extends` goes round in a circle: {' -> '.join([*seen, str(path)])}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UsageError(f"recipe {path} cannot be read: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"recipe {path} holds {type(tree).__name__}, expected sections such as model: and data:")
    if _is_of_a_run(path):
        tree = with_new_names(tree)
    base = tree.pop("extends", None)
    if base is None:
        return [(name_or_path, tree)]
    try:
        below = layers(str(base), (*seen, str(path)), folder=path.parent)
    except UsageError as error:
        raise UsageError(f"recipe {name_or_path}, in `extends`: {error}") from None
    return [*below, (name_or_path, tree)]


def _is_of_a_run(path: Path) -> bool:
    """Return whether a file is the recipe.yaml that a start has written into its output folder."""
    return path.name == "recipe.yaml" and (path.parent / "index.npz").exists()


def find_recipe(name_or_path: str, folder: Path = Path()) -> Path:
    """Return the file of a packaged name, or of a path relative to `folder`.

    Raises UsageError, with the recipe of a run whose folder this is or the nearest name, when there is none.
    """
    packaged = Path(str(resources.files("mae_scale.recipes"))) / f"{name_or_path}.yaml"
    for path in (packaged, folder / name_or_path):
        if path.is_file():
            return path
    names = packaged_recipes()
    of_run = Path(name_or_path, "recipe.yaml")
    is_run = (folder / of_run).is_file()
    near = [str(of_run)] if is_run else difflib.get_close_matches(name_or_path, names, 1, 0.4)
    raise UsageError(
        f"recipe '{name_or_path}' is neither a file nor a packaged recipe"
        + (f"; did you mean '{near[0]}'?" if near else "")
        + f" (packaged: {', '.join(names)})"
    )


def merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's tree merged over that of the one it extends, section by section, key by key."""
    both = dict(base)
    for key, value in top.items():
        sections = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = merged(both[key], value) if sections else value
    return both


def parse_override(override: str) -> tuple[list[str], Any]:
    """Return the parts of the key and the value of `section.key=value`. Raises UsageError for any other form.

    The value is read as YAML; of a key that takes a path or a name it is the text itself, unless that is quoted: YAML
    would end `runs/a #2` at the blank, and make a number of the name 2024.
    """
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UsageError(f"'{override}' is not an override; expected section.key=value, such as data.global_batch=1024")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    if takes_text(key) and not isinstance(value, bool) and text not in ("", "null", "~") and text[0] not in "\"'":
        value = text
    return key.split("."), value


def yaml_text(value: Any) -> str:
    """Return a value as one line of YAML, which loads as the same value."""
    return yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()[1:-1]


def put(tree: dict[str, Any], key: list[str], value: Any) -> None:
    """Set a value in a tree of sections. Raises UsageError when a parent is not a section."""
    *sections, last = key
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UsageError(f"'{'.'.join(key)}={value}': '{section}' is not a section")
    tree[last] = value


def _validated(tree: dict[str, Any], source: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        # A union has one error a member; the key alone, the first two parts, is what the user wrote.
        problems: dict[str, list[str]] = {}
        for e in error.errors():
            key = ".".join(str(part) for part in e["loc"][:2])
            problems.setdefault(subject(key, e), []).append(reason(e))
        raise UsageError(
            f"recipe {source}: " + "; ".join(what + " or ".join(dict.fromkeys(why)) for what, why in problems.items())
        ) from None
    if recipe.schedule.warmup_epochs >= recipe.schedule.epochs:
        raise UsageError(
            f"recipe {source}: schedule.warmup_epochs={recipe.schedule.warmup_epochs} leaves nothing of "
            f"schedule.epochs={recipe.schedule.epochs}; expected fewer"
        )
    if problem := contradiction(recipe):
        raise UsageError(f"recipe {source}: {problem}")
    return recipe
