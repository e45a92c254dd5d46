"""`mae-scale demo --dense` in small: all runs are made, its figures are theirs, a second call changes nothing."""

import json

import pytest
from PIL import Image

from mae_scale.reproduce import scenes
from mae_scale.reproduce.scenes import MEASURES, run_dense

TINY = ["model.width=16", "model.heads=2", "schedule.epochs=2", "schedule.warmup_epochs=0.5", "tracking.uri=off"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_run_is_made_and_a_second_call_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "TRAIN", 80)
    monkeypatch.setattr(scenes, "VAL", 6)
    found = run_dense(tmp_path, seeds=(0,), overrides=tuple(TINY))
    assert found.keys() == {"box_ap", "mask_ap", "mean_iou"}
    for task, measures in MEASURES.items():
        for start in ("pretrained", "random"):
            folder = tmp_path / f"{task}-{start}-seed0"
            own = json.loads((folder / "evaluation.json").read_text())
            own = {"box_ap": own["box"]["AP"], "mask_ap": own["mask"]["AP"]} if task == "detection" else own
            for measure in measures:
                assert found[measure][start] == {"mean": own[measure], "std": 0.0, "seeds": [own[measure]]}
            assert Image.open(folder / "figures" / "predictions.png").size[0] > 500
    assert run_dense(tmp_path, seeds=(0,), overrides=tuple(TINY)) == found
