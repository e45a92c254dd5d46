"""What detection and segmentation make of a batch: labels, the order of objects, seeds, layers, weights of losses."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.annotations.placing import PlacedObjects
from mae_scale.config.load import load_recipe
from mae_scale.engines.optimizers import parameter_groups
from mae_scale.models.segmenter import pixel_losses
from mae_scale.tasks.detection.objective import SeenObjects
from mae_scale.tasks.registry import task_of
from tests.dense import MODEL, TINY

CPU = torch.device("cpu")


def objective_of(task, *more):
    recipe = load_recipe(f"{task}/demo", [*MODEL, *TINY[task], f"{task}.pretraining_size=32", *more])
    torch.manual_seed(0)
    return task_of(recipe, Path()).objective(classes=5)


def seen(count, first, filled):
    masks = np.zeros((count, 32, 32), np.uint8)
    boxes = np.zeros((count, 4), np.float32)
    for number in range(count):
        boxes[number] = (first + number, 2, first + number + 8, 20)
        masks[number, 2:20, first + number : first + number + 8] = 1
    return SeenObjects(filled, PlacedObjects(boxes, np.arange(count, dtype=np.int32), masks, np.arange(count)))


def test_objects_keep_their_images_and_labels_begin_with_one():
    objective = objective_of("detection", "model.drop_path=0.1")
    batch = SimpleNamespace(
        images=torch.randn(3, 3, 32, 32),
        annotated=(seen(2, 1, (32, 32)), seen(0, 0, (20, 32)), seen(1, 9, (32, 30))),
        drawn=objective.draw(4, np.array([5, 6, 7])),
    )
    images, sizes, counts, seeds, boxes, labels, masks, scales = objective.tensors(batch, CPU)
    assert sizes.tolist() == [[32, 32], [20, 32], [32, 30]]
    assert counts.tolist() == [2, 0, 1]
    assert labels.tolist() == [1, 2, 1]
    assert boxes[:, 0].tolist() == [1, 2, 9]
    assert (masks.shape, scales.shape) == ((3, 32, 32), (3, 4, 2))
    # The mean over the images of each one's losses.
    whole = objective.train()(images, sizes, counts, seeds, boxes, labels, masks, scales)
    parts = []
    for row, objects in enumerate((slice(0, 2), slice(2, 2), slice(2, 3))):
        one = slice(row, row + 1)
        rest = (boxes[objects], labels[objects], masks[objects], scales[one])
        parts.append(objective(images[one], sizes[one], counts[one], seeds[one], *rest))
    assert whole.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)


def test_seeds_are_of_step_and_position_alone():
    objective = objective_of("detection")
    (seeds,) = objective.draw(4, np.arange(6))
    assert len(set(seeds.tolist())) == 6
    assert torch.equal(objective.draw(4, np.array([2, 3]))[0], seeds[2:4])
    assert not set(objective.draw(5, np.arange(6))[0].tolist()) & set(seeds.tolist())


@pytest.mark.parametrize("task", TINY)
def test_each_block_learns_faster_than_the_one_before_it(task):
    """BEiT's layers: the embedding, the blocks, and what comes after, at 0.8 ^ (layers after it)."""
    objective = objective_of(task)
    groups = parameter_groups(objective, load_recipe(f"{task}/demo", ["optim.layer_decay=0.8"]).optim)
    share = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decayed = {id(p): group["weight_decay"] > 0 for group in groups for p in group["params"]}
    names = dict(objective.named_parameters())
    of = {name: share[id(p)] for name, p in names.items()}
    assert of["model.encoder.pos_embed"] == of["model.encoder.patch_embed.weight"] == pytest.approx(0.8**5)
    for block in range(4):
        for part in ("attn.qkv.weight", "attn.rel_pos_h", "norm2.bias"):
            assert of[f"model.encoder.blocks.{block}.{part}"] == pytest.approx(0.8 ** (4 - block))
    assert {value for name, value in of.items() if not name.startswith("model.encoder.")} == {1.0}
    assert not decayed[id(names["model.encoder.pos_embed"])]
    assert decayed[id(names["model.encoder.blocks.0.attn.qkv.weight"])]


def test_the_auxiliary_heads_loss_weighs_as_published():
    objective = objective_of("segmentation").train()
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32), dtype=torch.uint8)
    labels[0, :10] = 255
    with torch.no_grad():
        loss = objective(images, labels)
        logits, auxiliary = objective.model(images)
        head, beside = (pixel_losses(one, labels.long()).mean() for one in (logits, auxiliary))
    assert loss.item() == pytest.approx((head + 0.4 * beside).item(), rel=1e-5)


def test_a_plan_is_made_for_the_runs_own_classes():
    recipe = load_recipe("segmentation/vit_base", ["segmentation.class_names=names.txt"])
    task = task_of(recipe, Path())
    task.__dict__["_names"] = ["a", "b", "c"]
    assert task.number_of_classes(SimpleNamespace(classes=[])) == 3
    assert task.workload(3).predicted == 2 * 3 * 512**2
    assert task_of(load_recipe("detection/vit_base"), Path()).workload(3).predicted < (
        task_of(load_recipe("detection/vit_base"), Path()).workload(80).predicted
    )
