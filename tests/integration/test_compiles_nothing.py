"""The first start of a run on a machine."""

import pytest

from tests.tiny import arguments


@pytest.mark.slow
@pytest.mark.parametrize("engine", [["engine.zero_stage=2"], ["engine.zero_stage=3", "engine.offload=true"]])
def test_a_first_start_on_a_cpu_compiles_nothing(engine, mae_scale, digits, tmp_path):
    recipe = arguments(digits, "tracking.uri=off", "schedule.stop_after_steps=1", *engine)
    (tmp_path / "built").mkdir()
    done = mae_scale(
        *("pretrain", "demo", "--nproc", 2, "--out", tmp_path / "run", *recipe),
        cold=True,
        TORCH_EXTENSIONS_DIR=str(tmp_path / "built"),
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "built").iterdir()) == []
