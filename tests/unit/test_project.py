"""What stands about the project in several places says the same."""

from pathlib import Path

import yaml

import mae_scale

ROOT = Path(mae_scale.__file__).parents[1]


def test_the_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mae_scale.__version__
