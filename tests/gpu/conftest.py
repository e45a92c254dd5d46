"""These tests need one GPU; elsewhere they are skipped, and the summary says so."""

from pathlib import Path

import pytest
import torch

REASON = "no GPU is visible"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_terminal_summary(terminalreporter):
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if REASON in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(f"tests/gpu: {len(skipped)} tests skipped: {REASON}")


@pytest.fixture(autouse=True)
def _exact_float32():
    """Float32 products in float32, not TF32, and the same random numbers in every test."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
