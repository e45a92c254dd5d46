"""The documentation's generated pages say all that there is: every recipe, key and command."""

import importlib.util
import re
from pathlib import Path

import pytest

from mae_scale.config.load import packaged_recipes
from mae_scale.config.schema import FREE_KEYS, keys
from mae_scale.tasks.registry import TASKS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(text: str) -> dict[str, list[str]]:
    """{first cell: the other cells} of all rows of the tables in a page; every row has as many cells as its header."""
    rows, columns = {}, 0
    for line, after in zip(text.splitlines(), [*text.splitlines()[1:], ""], strict=True):
        if line.startswith("|"):
            cells = [
                cell.strip() for cell in re.sub(r"`[^`]*`", lambda m: m[0].replace("|", "\0"), line).split("|")[1:-1]
            ]
            columns = len(cells) if after.startswith("| ---") else columns
            assert len(cells) == columns, line
            rows[cells[0].strip("`").replace("\0", "|")] = cells[1:]
    return rows


def test_every_recipe_is_there_with_its_task_cost_and_command(generate):
    page = generate.recipes()
    rows = rows_of(page)
    assert set(packaged_recipes()) <= rows.keys()
    for name in packaged_recipes():
        task, model, expected, cost, _ = rows[name]
        assert task in TASKS
        assert all([model, expected, cost]), name
        assert re.search(rf"^    .*(mae-scale|mae_scale) \w+ {name} ", page, re.M), name
    assert rows["pretrain/vit_huge_1600ep"][1] == "ViT-H/14, 224 px"
    assert rows["pretrain/vit_huge_1600ep"][2].startswith("fine-tuning top-1 86.9 (87.8 at 448 px)")
    assert "420 H100 hours" in rows["pretrain/vit_huge_1600ep"][3]


def test_every_key_is_there_with_a_type_a_default_and_what_it_decides(generate):
    rows = rows_of(generate.configuration())
    assert keys().keys() <= rows.keys()
    without = [key for key in keys() if not all(rows[key])]
    assert without == []
    assert rows["model.mask_ratio"][:2] == ["number, > 0, < 1", "`0.75`"]
    assert rows["data.crop_scale"][:2] == ["number or null, > 0, ≤ 1", "`null`"]
    assert rows["optim.betas"][:2] == ["[number, number]", "`[0.9, 0.95]`"]
    assert rows["engine.precision"][:2] == ["`fp32`, `bf16`, `fp16` or null", "`null`"]
    assert rows["engine.activation_checkpointing"][:2] == ["`none`, `all`, `offload` or integer", "`none`"]


def test_what_may_differ_between_starts_is_said(generate):
    said = generate.free_keys()
    assert {f"`{key}`" for key in FREE_KEYS} | {"`engine.*`"} <= set(said.split(", "))


def test_every_command_is_there_with_all_its_options(generate):
    page = generate.commands()
    for words, command in generate.command_tree():
        begin = re.search(rf"^##+ {words}$", page, re.M)
        assert begin, words
        part = re.split(r"^##", page[begin.end() :], maxsplit=1, flags=re.M)[0]
        rows = rows_of(part)
        assert command.help.split(".")[0].split("\n")[0] in part
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert any(row.split()[0] == parameter.opts[0] for row in rows), (words, parameter.opts)
            assert any(parameter.help == cells[0] for cells in rows.values()), (words, parameter.name)
    assert "mae-scale data pack" in dict(generate.command_tree())
    told, default = rows_of(page)["--nproc N"]
    assert told.startswith("Number of local ranks to start")
    assert default == "`1`"


def test_a_page_is_given_what_it_asks_for_and_nothing_else_is_touched(generate):
    page = generate.on_page_markdown("# Keys\n\n{{ free_keys }}\n\n`{section: value}`")
    assert page == f"# Keys\n\n{generate.free_keys()}\n\n`{{section: value}}`"
    asked = {name for path in DOCS.rglob("*.md") for name in re.findall(r"\{\{ (\w+) \}\}", path.read_text())}
    assert asked == generate.GENERATED.keys()


@pytest.mark.parametrize("example", ["task", "augmentation", "engine"])
def test_a_guide_shows_every_file_of_its_example(example):
    page = (DOCS / "extend" / f"{example}.md").read_text(encoding="utf-8")
    files = [
        path for path in (DOCS / "examples" / example).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    shown = [path.relative_to(DOCS.parent) for path in files if path.read_text(encoding="utf-8")]
    assert len(shown) >= 2
    assert [path for path in shown if f'\n--8<-- "{path}"\n' not in page] == []
