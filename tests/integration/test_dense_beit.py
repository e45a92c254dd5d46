"""Detection and segmentation from a BEiT, from the command line: begun, resumed on other ranks, measured, refused."""

import json

import pytest

from tests.dense import MODEL, STEPS, TASKS, annotated, arguments, scenes_in
from tests.integration.ranks import fully_sharded_configs
from tests.tiny import losses

pytestmark = pytest.mark.timeout(900)

BEIT = ["model.encoder=beit", "model.layer_scale=0.1"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scenes_in(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, scenes, mae_scale):
    """A BEiT on the grid of 4 x 4 patches, in pre-training of pixels."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    more = ["schedule.epochs=3", "schedule.warmup_epochs=1", "data.global_batch=10", f"data.root={scenes}/train/images"]
    done = mae_scale(
        "pretrain", "pretrain/beit_demo", "--out", out, "--tracking-uri", "off", *MODEL, *more,
        "model.target=normalised_pixels",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def train(scenes, pretrained, mae_scale):
    def run(task, out, *more, nproc=1):
        done = mae_scale(
            "finetune", *arguments(task, scenes, *BEIT, *more), "--weights", pretrained, "--out", out, "--nproc", nproc
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.mark.parametrize("task", [pytest.param("detection", marks=pytest.mark.slow), "segmentation"])
def test_a_run_begins_from_it_goes_on_fully_sharded_and_is_measured(task, train, scenes, mae_scale, tmp_path):
    """Detection has windows of 2 x 2 patches beside blocks of the whole image; segmentation only these."""
    zero_3 = fully_sharded_configs(tmp_path)["zero3"]
    said = train(task, tmp_path / "whole").stdout
    # 4 blocks of 16, and the embedding of patches
    assert "66 tensors from" in said
    assert "unused: cls_token, mask_token, norm (2), lm_head (2)" in said
    train(task, tmp_path / "run", "schedule.stop_after_steps=3", f"engine.config={zero_3}", nproc=2)
    train(task, tmp_path / "run", "engine.activation_checkpointing=all")
    whole, moved = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert len(whole) == STEPS
    assert whole == pytest.approx(moved, abs=1e-5 if task == "segmentation" else 0.2)
    done = mae_scale(
        "evaluate", tmp_path / "whole" / "recipe.yaml", "--weights", tmp_path / "whole", *annotated(task, scenes),
        "--json", tmp_path / "found.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(
        (tmp_path / "whole" / "evaluation.json").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_compiled_blocks_have_the_same_losses(task, train, tmp_path):
    train(task, tmp_path / "eager", "schedule.stop_after_steps=4")
    train(task, tmp_path / "compiled", "schedule.stop_after_steps=4", "engine.compile=true")
    found, expected = losses(tmp_path / "compiled"), losses(tmp_path / "eager")
    assert found == pytest.approx(expected, abs=1e-5 if task == "segmentation" else 0.2)


def test_a_recipe_for_the_other_encoder_says_what_to_set(scenes, pretrained, mae_scale, tmp_path):
    done = mae_scale("finetune", *arguments("segmentation", scenes), "--weights", pretrained, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {pretrained}/checkpoints/step_")
    assert "these are weights of a BEiT, and the recipe has model.encoder=vit: set model.encoder=beit" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
