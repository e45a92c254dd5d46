"""A run of MoCo v3 whose updates are too large for a moment says so (section 4 of its paper: instability)."""

import os

import pytest

from tests.faults.harness import Training
from tests.tiny import events, losses

TOO_LARGE = ("tests/faults/too_large_steps.py",)
FIRST, LAST = 110, 113
TINY = [
    "model.name=null",
    "model.image_size=32",
    "model.patch_size=8",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "moco.hidden=64",
    "moco.dim=32",
    "data.global_batch=48",
    "data.flip=0",
    "data.crop_scale=0.5",
    "data.threads=1",
    "engine.precision=null",
    "schedule.epochs=6",
    "schedule.warmup_epochs=1",
    "schedule.stop_after_steps=125",
    "optim.base_lr=1e-2",
    "tracking.log_every_steps=1",
]


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "told"), [(200, True), (1, False)])
def test_a_spike_of_the_loss_is_reported_and_a_sound_run_is_not(factor, told, digits, tmp_path):
    out = tmp_path / "run"
    words = ["pretrain", "pretrain/moco_v3_vit_base", "--tracking-uri", "off", f"data.root={digits}/train", *TINY]
    environment = {"STEPS": f"{FIRST}:{LAST}", "FACTOR": str(factor), "PYTHONPATH": os.getcwd()}
    with Training(out, *words, program=TOO_LARGE, **environment) as training:
        assert training.wait() == 0, training.text()
    found = [(step, reason) for event, step, reason in events(out) if event == "warning"]
    spikes = [(step, reason) for step, reason in found if "training has become unstable" in reason]
    assert bool(spikes) == told, found
    if told:
        ((step, _),) = spikes
        assert FIRST + 3 <= step <= LAST + 5
        assert training.text().count("training has become unstable") == 1
        assert max(losses(out)[step] for step in range(FIRST + 2, LAST + 2)) > 1.1 * losses(out)[FIRST]
