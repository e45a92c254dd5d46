"""Detection and segmentation from the command line: trained, resumed on other ranks, measured, with whatever engine."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file, save_file

from mae_scale.tracking.metrics_log import read_metrics
from tests.dense import MODEL, STEPS, TASKS, VAL, annotated, arguments, scenes_in
from tests.integration.ranks import fully_sharded_configs, quick
from tests.tiny import losses

pytestmark = pytest.mark.timeout(900)

ZERO_3, OSS = "engine.config={zero3}", ["engine.backend=fairscale", "engine.zero_stage=1"]
ENGINES = {
    "ZeRO 0 on 2": (2, ["engine.zero_stage=0"]),
    "ZeRO 2 on 3": (3, ["engine.zero_stage=2"]),
    "ZeRO 2 on 2, checkpointing": (2, ["engine.zero_stage=2", "engine.activation_checkpointing=all"]),
    "ZeRO 3 on 2": (2, [ZERO_3]),
    "ZeRO 3 on 3": (3, [ZERO_3]),
    "FairScale OSS on 2": (2, OSS),
    "compiled on 1": (1, ["engine.zero_stage=2", "engine.compile=true"]),
}
MOVES = {
    "ZeRO 2 on 3": (3, ["engine.zero_stage=2"]),
    "ZeRO 3 on 1": (1, [ZERO_3]),
    "FairScale OSS on 2": (2, OSS),
}
QUICK = [("detection", "ZeRO 3 on 2"), ("segmentation", "ZeRO 2 on 3")]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scenes_in(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, scenes, mae_scale) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    size = [*MODEL, "model.decoder_width=16", "model.decoder_depth=1", "model.decoder_heads=2"]
    more = ["schedule.epochs=3", "schedule.warmup_epochs=1", "data.global_batch=10", f"data.root={scenes}/train/images"]
    done = mae_scale("pretrain", "demo", "--out", out, "--tracking-uri", "off", *size, *more)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def train(scenes, pretrained, mae_scale, tmp_path_factory):
    """Train a task; its process. Engines' files by name in the overrides."""
    files = fully_sharded_configs(tmp_path_factory.mktemp("configs"))

    def run(task, out, *more, nproc=1, code=0):
        more = [word.format(**files) if "{" in str(word) else word for word in more]
        done = mae_scale(
            "finetune", *arguments(task, scenes), "--weights", pretrained, "--out", out, "--nproc", nproc, *more
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """{task: the folder of its run on one rank}."""
    folder = tmp_path_factory.mktemp("whole")
    for task in TASKS:
        (folder / task).mkdir()
        (folder / task / "log").write_text(train(task, folder / task / "run").stdout)
    return {task: folder / task / "run" for task in TASKS}


@pytest.fixture(scope="module")
def weights(whole, tmp_path_factory):
    """{task: what is evaluated}: of the detector, which has hardly learnt, weights that take much for an object."""
    state = load_file(whole["detection"] / "export" / "model.safetensors")
    state["roi_heads.box_predictor.head.cls_score.bias"][0] -= 4
    eager = tmp_path_factory.mktemp("eager") / "model.safetensors"
    save_file(state, eager, metadata={"format": "pt"})
    return {"detection": eager, "segmentation": whole["segmentation"]}


def differences(a: dict[int, float], b: dict[int, float]) -> list[float]:
    assert a.keys() == b.keys()
    return [abs(a[step] - b[step]) for step in a]


def assert_same(task: str, a: dict[int, float], b: dict[int, float]) -> None:
    """The same losses but for rounding, and in detection for what it decides: a proposal that is as good as another to
    seven digits may take its place, from where on the curves are only near each other."""
    found = differences(a, b)
    if task == "segmentation":
        assert max(found) < 1e-5
    else:
        assert max(found[:3]) < 1e-5
        assert max(found) < 0.2


@pytest.mark.parametrize("task", TASKS)
def test_a_run_starts_from_the_pretrained_encoder_and_leaves_weights_figures_and_what_it_measured(task, whole):
    out = whole[task]
    said = (out.parent / "log").read_text()
    assert "51 tensors from" in said
    assert "unused: cls_token, norm (2)" in said
    assert len(losses(out)) == STEPS
    assert Image.open(out / "figures" / "predictions.png").size[0] > 500
    found = json.loads((out / "evaluation.json").read_text())
    assert found["images"] == VAL
    last = read_metrics(out / "metrics.jsonl")[-1]
    if task == "detection":
        assert (last["val/box_ap"], last["val/mask_ap75"]) == (found["box"]["AP"], found["mask"]["AP75"])
        assert f"box AP {found['box']['AP']:.1f}, mask AP {found['mask']['AP']:.1f}; weights in" in said
    else:
        assert [last[f"val/{name}"] for name in ("mean_iou", "pixel_accuracy")] == [
            found["mean_iou"],
            found["pixel_accuracy"],
        ]
        assert len(found["per_class"]) == 11
        assert f"mean IoU {found['mean_iou']:.2f} %; weights in" in said
    names = load_file(out / "export" / "model.safetensors").keys()
    assert {"encoder.pos_embed", "encoder.blocks.0.attn.rel_pos_h"} <= names


def test_the_first_forward_is_that_of_the_pretrained_encoder(whole, pretrained):
    """Positions and blocks are the pre-training's; relative positions begin at zero (tests/unit/test_dense.py)."""
    start = load_file(pretrained / "export" / "model.safetensors")
    from mae_scale.config.load import load_recipe
    from mae_scale.models.build import build_detector
    from mae_scale.models.weights.dense import load_dense

    model = build_detector(load_recipe(str(whole["detection"] / "recipe.yaml")), 10)
    load_dense(model, start)
    assert torch.equal(model.encoder.pos_embed, start["pos_embed"][0, 1:])
    assert torch.equal(model.encoder.blocks[2].attn.qkv.weight, start["blocks.2.attn.qkv.weight"])
    assert not any(block.attn.rel_pos_h.any() or block.attn.rel_pos_w.any() for block in model.encoder.blocks)


def test_detections_are_cocos_results_and_pycocotools_measures_the_same(weights, whole, scenes, mae_scale, tmp_path):
    done = mae_scale(
        "evaluate", whole["detection"] / "recipe.yaml", "--weights", weights["detection"],
        *annotated("detection", scenes), "--predictions", tmp_path / "found.json", "--json", tmp_path / "numbers.json",
        "--figure", tmp_path / "seen.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "seen.png").size[0] > 500
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert f"box AP {found['box']['AP']:.1f}, mask AP {found['mask']['AP']:.1f}, of {VAL} images" in done.stdout
    results = json.loads((tmp_path / "found.json").read_text())
    assert len(results) == found["detections"] > 100
    assert [one["image_id"] for one in results] == sorted(one["image_id"] for one in results)
    truth = COCO(str(scenes / "val" / "instances.json"))
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        peer = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), kind)
        peer.evaluate()
        peer.accumulate()
        peer.summarize()
        expected = {key: value for key, value in zip(found[name], peer.stats * 100, strict=True) if value >= 0}
        assert {key: found[name][key] for key in expected} == pytest.approx(expected, abs=1e-9)
        assert all(value is None for key, value in found[name].items() if key not in expected)


@pytest.mark.parametrize("mode", ["sliding", "whole"])
def test_predicted_label_maps_have_the_intersection_over_union_that_is_reported(
    mode, whole, scenes, mae_scale, tmp_path
):
    from torchmetrics.classification import MulticlassJaccardIndex

    done = mae_scale(
        "evaluate", "segmentation/demo", "--weights", whole["segmentation"], *MODEL, "segmentation.channels=8",
        "segmentation.auxiliary_channels=4", "segmentation.pretraining_size=32", *annotated("segmentation", scenes),
        f"segmentation.evaluation={mode}", "--predictions", tmp_path / "maps", "--json", tmp_path / "found.json",
        "--figure", tmp_path / "seen.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"({mode}): mean IoU {found['mean_iou']:.2f} %" in done.stdout
    index = MulticlassJaccardIndex(11, average="none", ignore_index=255)
    for number in range(VAL):
        name = f"{number:06d}.png"
        predicted, labels = (
            np.array(Image.open(folder / name)) for folder in (tmp_path / "maps", scenes / "val" / "labels")
        )
        assert predicted.shape == labels.shape
        index.update(*(torch.from_numpy(one.astype(np.int64) - 1)[None] for one in (predicted, labels)))
    expected = [100 * value for value in index.compute().tolist()]
    known = [(one["iou"], value) for one, value in zip(found["per_class"], expected, strict=True) if one["iou"]]
    assert known
    assert [a for a, _ in known] == pytest.approx([b for _, b in known], abs=1e-3)
    if mode == "sliding":
        assert found == json.loads((whole["segmentation"] / "evaluation.json").read_text())


@pytest.mark.parametrize("task", TASKS)
def test_an_evaluation_is_the_same_on_one_two_and_three_ranks(task, weights, whole, scenes, mae_scale, tmp_path):
    found = []
    for ranks in (1, 2, 3):
        answer = tmp_path / f"{ranks}.json"
        done = mae_scale(
            "evaluate", whole[task] / "recipe.yaml", "--weights", weights[task], *annotated(task, scenes),
            "--nproc", ranks, "--json", answer,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads(answer.read_text()))
    assert found[0] == found[1] == found[2]
    assert found[0].get("detections", 1) > 0
    if task == "segmentation":
        assert found[0] == json.loads((whole[task] / "evaluation.json").read_text())


@pytest.mark.parametrize(("task", "engine"), quick([(task, engine) for task in TASKS for engine in ENGINES], QUICK))
def test_losses_are_those_of_one_rank_on_any_ranks_and_engine(task, engine, whole, train, tmp_path):
    ranks, overrides = ENGINES[engine]
    train(task, tmp_path / "run", *overrides, nproc=ranks)
    assert_same(task, losses(tmp_path / "run"), losses(whole[task]))


def test_losses_do_not_depend_on_the_micro_batch(whole, train, tmp_path):
    train("detection", tmp_path / "run", "engine.micro_batch=1", nproc=2)
    assert_same("detection", losses(tmp_path / "run"), losses(whole["detection"]))


@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_is_resumed_is_bit_for_bit_the_uninterrupted_one(task, whole, train, tmp_path):
    train(task, tmp_path / "run", "schedule.stop_after_steps=3")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    train(task, tmp_path / "moved")
    assert losses(tmp_path / "moved") == losses(whole[task])
    ours, theirs = (load_file(out / "export" / "model.safetensors") for out in (tmp_path / "moved", whole[task]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("task", "move"), quick([(task, move) for task in TASKS for move in MOVES], QUICK))
def test_a_run_goes_on_on_other_ranks_and_engines(task, move, whole, train, tmp_path):
    ranks, overrides = MOVES[move]
    train(task, tmp_path / "run", "schedule.stop_after_steps=3", nproc=2)
    train(task, tmp_path / "run", *overrides, nproc=ranks)
    assert_same(task, losses(tmp_path / "run"), losses(whole[task]))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_bf16_follows_float32(task, whole, train, tmp_path):
    train(task, tmp_path / "run", "engine.precision=bf16", "engine.zero_stage=2", nproc=2)
    assert 0 < max(differences(losses(tmp_path / "run"), losses(whole[task]))) < 0.3


def test_annotations_are_read_once_and_kept(whole, train, scenes, tmp_path):
    """A run goes on without COCO's JSON; of another JSON it says so, where its own copy is lost."""
    out, other = tmp_path / "run", tmp_path / "other.json"
    train("detection", out, "schedule.stop_after_steps=3")
    train("detection", out, "detection.annotations=gone.json", "schedule.stop_after_steps=4")
    (out / "objects.npz").write_bytes(b"damaged")
    refused = train("detection", out, "detection.annotations=null", code=2)
    assert "detection.annotations is not set; add detection.annotations=" in refused.stderr
    about = json.loads((scenes / "train" / "instances.json").read_text())
    about["annotations"][0]["bbox"][2] -= 1
    other.write_text(json.dumps(about))
    refused = train("detection", out, f"detection.annotations={other}", code=2)
    assert "holds other objects than the run in" in refused.stderr
    train("detection", out)
    assert losses(out) == losses(whole["detection"])


def test_other_classes_are_refused(whole, train, scenes, tmp_path):
    train("segmentation", tmp_path / "run", "schedule.stop_after_steps=3")
    (tmp_path / "names.txt").write_text("a\nb\n")
    refused = train("segmentation", tmp_path / "run", f"segmentation.class_names={tmp_path}/names.txt", code=2)
    assert "are other classes than the run in" in refused.stderr
    train("segmentation", tmp_path / "run", "segmentation.class_names=null")
    assert losses(tmp_path / "run") == losses(whole["segmentation"])


def test_a_detector_is_exported_in_vitdets_layout_and_read_from_it(whole, scenes, mae_scale, tmp_path):
    done = mae_scale("export", whole["detection"], tmp_path / "vitdet.pth", "--format", "vitdet")
    assert done.returncode == 0, done.stderr
    given = torch.load(tmp_path / "vitdet.pth", weights_only=True)["model"]
    assert {"backbone.net.blocks.0.attn.rel_pos_h", "roi_heads.box_predictor.cls_score.weight"} <= given.keys()
    again = tmp_path / "again"
    done = mae_scale(
        "finetune", *arguments("detection", scenes), "--weights", tmp_path / "vitdet.pth", "--out", again,
        "schedule.stop_after_steps=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"tensors from {tmp_path}/vitdet.pth" in done.stdout
    assert "fresh" not in done.stdout
    # The first step is at learning rate 0: these are the weights that it has started from.
    done = mae_scale("export", again, tmp_path / "again.pth", "--format", "vitdet")
    found = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    assert all(torch.equal(found[name], given[name]) for name in given)
    for task, layout, said in (
        ("detection", "official", "no names in the layout official; write it with --format safetensors, or vitdet"),
        ("segmentation", "vitdet", "no names in the layout vitdet; write it with --format safetensors"),
        ("segmentation", "timm", "--format timm has no folder for a detector or a segmenter"),
    ):
        done = mae_scale("export", whole[task], tmp_path / ("x" if layout == "timm" else "x.pth"), "--format", layout)
        assert done.returncode == 2
        assert said in done.stderr


def test_weights_of_the_other_kind_are_refused_for_what_they_are(whole, scenes, mae_scale, tmp_path):
    detector, segmenter = (whole[task] for task in TASKS)
    for task, weights, said in (
        ("detection", segmenter, "holds a segmenter, expected a detector"),
        ("segmentation", detector, "holds a detector, expected a segmenter"),
    ):
        done = mae_scale("evaluate", whole[task] / "recipe.yaml", "--weights", weights, *annotated(task, scenes))
        assert done.returncode == 2
        assert said in done.stderr
        command = ["finetune", *arguments(task, scenes), "--weights", weights, "--out", tmp_path / task]
        done = mae_scale(*command)
        assert done.returncode == 2
        assert f"these are weights of a {'segmenter' if task == 'detection' else 'detector'}" in done.stderr


def test_a_run_from_scratch_is_evaluated_by_its_own_recipe(train, scenes, mae_scale, tmp_path):
    done = mae_scale(
        "finetune", *arguments("segmentation", scenes), "segmentation.from_scratch=true", "--out", tmp_path / "run",
        "schedule.epochs=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = mae_scale("evaluate", tmp_path / "run" / "recipe.yaml", "--weights", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "mean IoU" in done.stdout


def test_ranks_that_share_weights_measure_images_with_unequal_numbers_of_windows(whole, scenes, mae_scale, tmp_path):
    """ZeRO 3 gathers weights for each call of the model: with fewer calls a rank would leave the other waiting."""
    copied = scenes_in(tmp_path)
    for folder, ending, mode in (("images", "jpg", "RGB"), ("labels", "png", "P")):
        path = copied / "val" / folder / f"000001.{ending}"
        with Image.open(path) as small:
            wide = Image.new(mode, (140, 48))
            if mode == "P":
                wide.putpalette(small.getpalette())
            wide.paste(small)
        wide.save(path)
    files = fully_sharded_configs(tmp_path)
    found = {}
    for name, nproc, more in (("one", 1, []), ("two", 2, [ZERO_3.format(**files)])):
        done = mae_scale(
            "finetune", *arguments("segmentation", copied), "segmentation.from_scratch=true", "--out", tmp_path / name,
            "schedule.epochs=1", "tracking.evaluate_every_epochs=1", "engine.collective_timeout_s=20",
            "--nproc", nproc, *more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[name] = json.loads((tmp_path / name / "evaluation.json").read_text())
    assert found["two"]["images"] == VAL
    assert found["two"]["pixel_accuracy"] == pytest.approx(found["one"]["pixel_accuracy"], abs=0.5)
