"""`mae-scale demo --transfer` in small: every way runs, and its figures are the commands' own."""

import json

import pytest
from PIL import Image

from mae_scale.reproduce.digits_transfer import run_transfer

TINY = ["model.width=32", "model.depth=4", "model.heads=2", "schedule.epochs=2", "schedule.warmup_epochs=1"]
TINY += ["model.decoder_width=16", "model.decoder_depth=1", "model.decoder_heads=2", "tracking.uri=off"]
KEYS = ["scratch", "linear_probe", "knn", "partial_0.5", "partial_1", "partial_2", "finetune", "finetune_double"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_way_of_transfer_runs_and_a_second_call_gives_the_same(tmp_path):
    out = tmp_path / "demo"
    found = run_transfer(out, seeds=(0,), overrides=tuple(TINY))
    assert list(found) == KEYS
    for name in KEYS:
        assert found[name].keys() == {"mean", "std", "seeds"}
        own = json.loads((out / "transfer" / f"{name}-seed0.json").read_text())
        assert found[name]["mean"] == own["top1"]
        assert own["images"] == 355
    with Image.open(out / "figures" / "partial_finetuning.png") as picture:
        assert min(picture.size) > 300
    assert run_transfer(out, seeds=(0,), overrides=tuple(TINY)) == found
