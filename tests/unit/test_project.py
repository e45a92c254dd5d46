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
