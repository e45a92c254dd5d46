"""Generate what the documentation says of recipes, keys and commands from the recipes, the schema and the commands.

mkdocs calls `on_page_markdown` (`hooks` in mkdocs.yml), which puts it in place of a page's `{{ recipes }}`: nothing
that is generated is kept.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from mae_scale.cli.main import app
from mae_scale.config.listing import Header, header
from mae_scale.config.load import load_recipe, packaged_recipes, yaml_text
from mae_scale.config.schema import FREE_KEYS, FREE_SECTIONS, Recipe, keys_of

GROUPS = {
    "": "The demo",
    "pretrain": "Pre-training",
    "finetune": "End-to-end fine-tuning",
    "probe": "Linear probing",
    "partial": "Partial fine-tuning",
    "scratch": "Supervised from scratch",
    "detection": "Detection and instance segmentation",
    "segmentation": "Semantic segmentation",
    "paper": "The paper in small",
}
BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", "≥"), Lt: ("lt", "<"), Le: ("le", "≤")}


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown; a cell has one line, and no | but in code."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def code(text: str) -> str:
    """Return words set as code, within a line; nothing for nothing."""
    return f"`{text}`" if text else ""


def recipes() -> str:
    """Return the packaged recipes in groups: a table of what each is, then the command of each."""
    names: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in packaged_recipes():
        names[name.rpartition("/")[0]].append(name)
    return "\n\n".join(_group(title, names[group]) for group, title in GROUPS.items())


def _group(title: str, names: list[str]) -> str:
    rows, commands = [], []
    for name in names:
        recipe, about = load_recipe(name), header(name)
        told = [_after(word, about) for word in ("Expected", "Cost", "Memory")]
        rows.append([code(name), recipe.task, _model(recipe), *told])
        where, *lines = _command(about)
        commands.append("\n".join([f"{code(name)}{where}:", "", *(f"    {line}" for line in lines)]))
    columns = ["recipe", "task", "model", "expected", "cost", "memory"]
    return "\n\n".join([f"## {title}", table(columns, rows), *commands])


def _model(recipe: Recipe) -> str:
    model = recipe.model
    if recipe.task == "dvae":
        section = recipe.tokenisation
        return f"{section.words:,} words, width {section.width}, {model.image_size} px"
    if model.name is not None:
        size, patch = re.fullmatch(r"vit_(.).*_patch(\d+)", model.name).groups()
        return f"ViT-{size.upper()}/{patch}, {model.image_size} px"
    return f"width {model.width}, {model.depth} blocks, {model.image_size} px"


def _after(word: str, about: Header) -> str:
    return " ".join(line.strip() for line in about.said(word)).removeprefix(f"{word}: ")


def _command(about: Header) -> list[str]:
    """Return where a recipe's command is to be run, such as `, on each of 2 nodes`, and the command's lines."""
    first, *more = about.said("Command")
    where, begin = re.fullmatch(r"Command(, [^:]*)?: ?(.*)", first).groups()
    return [where or "", *textwrap.dedent("\n".join(filter(None, [begin, *more]))).splitlines()]


def configuration() -> str:
    """Return a table for each section of a recipe: key, type, default, what it decides."""
    top = {name: field for name, field in Recipe.model_fields.items() if not keys_of(name)}
    parts = ["## At the top", _keys("", top)]
    for name, field in Recipe.model_fields.items():
        if keys := keys_of(name):
            section = (get_args(field.annotation) or (field.annotation,))[0]
            parts += [f"## {name}", inspect.getdoc(section), _keys(f"{name}.", keys)]
    return "\n\n".join(parts)


def free_keys() -> str:
    """Return the sections and keys that may differ from one start of a run to the next."""
    return ", ".join(code(key) for key in [*(f"{section}*" for section in FREE_SECTIONS), *sorted(FREE_KEYS)])


def _keys(prefix: str, fields: dict[str, FieldInfo]) -> str:
    rows = [
        [code(prefix + name), type_of(field), code(_default(field)), field.description or ""]
        for name, field in fields.items()
    ]
    return table(["key", "type", "default", "what it decides"], rows)


def _default(field: FieldInfo) -> str:
    return yaml_text(list(field.default) if isinstance(field.default, tuple) else field.default)


def type_of(field: FieldInfo) -> str:
    """Return for people what a key can be: a kind of number and its bounds, or the values to choose from."""
    kinds = get_args(field.annotation) if _is_union(field.annotation) else (field.annotation,)
    bounds = [BOUNDS[type(bound)] + (bound,) for bound in field.metadata if type(bound) in BOUNDS]
    return ", ".join(
        [" or ".join(map(_kind, kinds)), *(f"{sign} {getattr(bound, name):g}" for name, sign, bound in bounds)]
    )


def _is_union(annotation: Any) -> bool:
    return bool(get_args(annotation)) and get_origin(annotation) not in (Literal, tuple)


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(code(str(choice)) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"[{', '.join(map(_kind, get_args(annotation)))}]"
    names = {int: "integer", float: "number", bool: "true, false", str: "text", Path: "path", type(None): "null"}
    names[...] = "..."  # of a list of any length
    return names[annotation]


def commands() -> str:
    """Return each command with its usage, help, arguments and options."""
    return "\n\n".join(_described(words, command) for words, command in command_tree())


def command_tree() -> Iterator[tuple[str, Any]]:
    """Yield (`mae-scale data pack`, its click command) for each command and each group of commands, in order."""

    def below(words: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield words, command
        for name, inner in getattr(command, "commands", {}).items():
            yield from below(f"{words} {name}", inner)

    yield from below("mae-scale", typer.main.get_command(app))


def _described(words: str, command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    told, _, example = inspect.cleandoc(command.help).partition("Example: ")
    parts = [f"{'##' if hasattr(command, 'commands') else '###'} {words}", told.strip()]
    if not hasattr(command, "commands"):
        needed = [_usage(each) for each in [*arguments, *options] if each.required or each in arguments]
        more = ["[options]"] if any(not each.required for each in options) else []
        parts.append(f"    {' '.join([words, *needed, *more])}")
    if arguments:
        rows = [[code(_name(each)), each.help or "", _default_of(each)] for each in arguments]
        parts.append(table(["argument", "what it is", "default"], rows))
    if options:
        rows = [[code(_name(each)), each.help or "", _default_of(each)] for each in options]
        parts.append(table(["option", "what it does", "default"], rows))
    if example:
        parts.append(f"Example: {' '.join(example.split())}")
    return "\n\n".join(parts)


def _name(parameter: Any) -> str:
    metavar = parameter.metavar or (parameter.name.upper() if parameter.param_type_name == "argument" else "")
    return metavar if parameter.param_type_name == "argument" else f"{parameter.opts[0]} {metavar}".strip()


def _usage(parameter: Any) -> str:
    name = _name(parameter) + (" ..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _default_of(parameter: Any) -> str:
    if parameter.required:
        return "needed"
    return "" if parameter.default is None or parameter.is_flag else code(str(parameter.default))


GENERATED = {"recipes": recipes, "configuration": configuration, "free_keys": free_keys, "commands": commands}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with what is generated in place of each `{{ name }}`."""
    return re.sub(r"\{\{ (\w+) \}\}", lambda found: GENERATED[found[1]](), markdown)
