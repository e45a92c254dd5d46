"""The DeepSpeed that is imported."""

from pathlib import Path

import pytest

from data_pipeline.errors import UsageError
from mae_scale.engines.deepspeed_build import OLDEST, import_deepspeed


def test_an_old_deepspeed_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("deepspeed.__version__", "0.18.9+abc123")
    with pytest.raises(UsageError, match=r"DeepSpeed 0\.18\.9\+abc123 is installed; 0\.19\.7 or newer is needed"):
        import_deepspeed()


def test_the_oldest_deepspeed_is_the_one_that_is_installed_with_the_package():
    setup = Path(__file__).resolve().parents[2] / "setup.py"
    assert f'"deepspeed>={".".join(map(str, OLDEST))}"' in setup.read_text()
