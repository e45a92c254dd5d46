"""What stands about the project in several places says the same."""

import re
from pathlib import Path

import pytest
import yaml

import mae_scale

ROOT = Path(mae_scale.__file__).parents[1]


def test_the_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mae_scale.__version__


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_what_a_file_links_to_is_there(name):
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", (ROOT / name).read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_git_checks_before_a_commit_what_make_lint_checks():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repo["repo"] == "local"
    lint = re.search(r"^lint: setup\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1]
    expected = [re.sub(r" \.$", "", line.strip().replace("$(BIN)", ".venv/bin")) for line in lint.splitlines()]
    assert [hook["entry"] for hook in repo["hooks"]] == expected
