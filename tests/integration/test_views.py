"""Two views of each image: of one crop at two sizes (BEiT), and of two crops with other colours (MoCo v3)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter, ImageOps

from data_pipeline.augment.kinds import SecondView, augmentation
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import TrainingOrder
from data_pipeline.byte_reader import ByteReader
from data_pipeline.dali_graph import Decoding
from data_pipeline.decoder import Decoder
from data_pipeline.errors import UsageError
from data_pipeline.index_build import build_index
from data_pipeline.loader import ImageLoader
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from data_pipeline.plan import plan_batch
from data_pipeline.samples import write_photos

COUNT, SIZE = 8, 96
CROP, PAIR = augmentation("random_resized_crop"), SecondView(augmentation("moco_v3_second"), SIZE)
BICUBIC = F.InterpolationMode.BICUBIC


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build_index(write_photos(tmp_path_factory.mktemp("photos") / "photos", COUNT), progress=False)


def levels(images: torch.Tensor) -> np.ndarray:
    """Normalisation undone: float64 [n, 3, S, S] of 255."""
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (np.asarray(images, np.float64) * std + mean) * 255


def loaded(index, kind, second, *, global_batch=COUNT, micro_batch=None, rank=0, ranks=1, size=SIZE):
    order = TrainingOrder(batch_layout(global_batch, ranks, micro_batch), rank=rank, seed=3, stop_step=1)
    decoding = Decoding(kind, size, device="cpu", second=second)
    with ImageLoader(index, order, decoding) as loader:
        return list(loader)


def test_the_second_view_of_one_crop_is_that_crop_at_another_size(index):
    (batch,) = loaded(index, augmentation("random_resized_crop_color_jitter"), SecondView(None, 48, normalised=False))
    assert batch.second.shape == (COUNT, 3, 48, 48)
    assert 0 <= batch.second.min() < 0.1
    assert 0.9 < batch.second.max() <= 1
    (plain,) = loaded(index, augmentation("random_resized_crop_color_jitter"), None)
    assert torch.equal(batch.images, plain.images)
    # Twice as large an image has in each 2 x 2 pixels about what the small one has in one.
    halved = levels(torch.nn.functional.avg_pool2d(batch.images, 2))
    assert np.abs(halved - 255 * batch.second.numpy()).mean() < 4
    assert np.abs(halved - 255 * batch.second.numpy()[..., ::-1]).mean() > 20


def test_two_views_are_two_crops_of_the_same_image(index):
    """The first is the one that is made alone, but for what lies around it: at its border the filter sees more."""
    kind = augmentation("moco_v3")
    (pair,) = loaded(index, kind, PAIR)
    (alone,) = loaded(index, kind, None)
    inside = np.abs(levels(pair.images) - levels(alone.images))[..., 8:-8, 8:-8]
    assert inside.mean() < 2
    assert np.abs(levels(pair.images) - levels(pair.second)).mean() > 20
    plan = plan_batch(index, CROP, seed=3, number=0, global_batch=COUNT, image_size=SIZE, second=SecondView(CROP, SIZE))
    for view in (plan, plan.second):
        assert (view.crops == plan.crops).all()
        assert (view.regions >= 0).all()
        assert (view.regions[:, 2:] <= plan.crops[:, 2:]).all()
    starts = np.minimum(plan.regions[:, :2], plan.second.regions[:, :2])
    ends = np.maximum(plan.regions[:, 2:], plan.second.regions[:, 2:])
    assert (starts == 0).all()
    assert (ends == plan.crops[:, 2:]).all()
    first = plan_batch(index, CROP, seed=3, number=0, global_batch=COUNT, image_size=SIZE)
    assert (plan.crops[:, :2] + plan.regions[:, :2] == first.crops[:, :2]).all()
    assert (plan.regions[:, 2:] - plan.regions[:, :2] == first.crops[:, 2:]).all()


def test_each_view_equals_pillow_and_torchvision_for_the_same_draws(index):
    """Jitter without hue, grey, blur and solarisation, within a few levels on average; on hue see colour_jitter."""
    kind = replace(augmentation("moco_v3"), jitter=(0.4, 0.4, 0.2, 0.0), blur=0.5, solarised=0.5, grey=0.5)
    rows = np.tile(np.arange(COUNT), 3)
    plan = plan_batch(
        index,
        kind,
        seed=1,
        number=0,
        global_batch=len(rows),
        sample_ids=rows,
        image_size=SIZE,
        second=SecondView(kind, SIZE),
    )
    reader, decoder = ByteReader(index), Decoder(Decoding(kind, SIZE, device="cpu", second=PAIR), len(rows))
    decoder.decoding = Decoding(kind, SIZE, device="cpu", second=SecondView(kind, SIZE))
    decoded = decoder.decode([reader.read(int(row)) for row in rows], plan)
    seen = set()
    for images, view in zip(decoded, (plan, plan.second), strict=True):
        for row, ours in enumerate(levels(images.as_array())):
            y, x, height, width = (int(v) for v in view.crops[row])
            part = Image.open(index.path(int(rows[row]))).convert("RGB").crop((x, y, x + width, y + height))
            top, left, bottom, right = (float(v) for v in view.regions[row])
            theirs = part.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
            for operation in view.jitter_order[row]:
                adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[operation]
                theirs = adjust(theirs, float(view.jitter[row, operation]))
            if view.blur[row]:
                theirs = theirs.filter(ImageFilter.GaussianBlur(float(view.blur[row]) * SIZE))
            if view.solarise[row] == 128:
                theirs = ImageOps.solarize(theirs)
            theirs = F.hflip(theirs) if view.flips[row] else theirs
            inside = np.abs(ours - np.asarray(theirs, np.float64).transpose(2, 0, 1))[:, 8:-8, 8:-8]
            # A level that jitter rounds from 127 to 128 is solarised to 127: as large a difference as before.
            assert inside.mean() < 2.5, (row, view.jitter[row], view.jitter_order[row], view.solarise[row])
            seen.add((view.jitter[row, 2] == 0, view.blur[row] > 0, view.solarise[row] == 128))
    assert len(seen) == 8


def test_views_are_drawn_as_often_as_published(index):
    plan = plan_batch(
        index,
        augmentation("moco_v3"),
        seed=0,
        number=0,
        global_batch=4000,
        sample_ids=np.zeros(4000, int),
        second=PAIR,
    )
    second = plan.second
    for view, blurred, solarised in ((plan, 1.0, 0.0), (second, 0.1, 0.2)):
        assert np.mean(view.jitter[:, 2] == 0) == pytest.approx(0.2, abs=0.03)  # grey
        assert np.mean((view.jitter[:, :2] == 1).all(axis=1)) == pytest.approx(0.2, abs=0.03)  # not jittered
        assert np.mean(view.blur > 0) == pytest.approx(blurred, abs=0.03)
        assert np.mean(view.solarise == 128) == pytest.approx(solarised, abs=0.03)
        assert np.abs(view.hue).max() == pytest.approx(36, abs=0.5)
        sigma = view.blur[view.blur > 0] * 224
        assert (sigma.min(), sigma.max()) == (pytest.approx(0.1, abs=0.02), pytest.approx(2.0, abs=0.02))
    assert np.mean(plan.flips == second.flips) == pytest.approx(0.5, abs=0.05)  # independent of each other
    assert abs(np.corrcoef(plan.hue, second.hue)[0, 1]) < 0.05


def test_hue_turns_the_same_way_as_torchvisions_and_keeps_the_luma(index):
    kind = replace(augmentation("moco_v3"), crop="whole", jitter=(0.0, 0.0, 0.0, 0.1), grey=0.0, blur=0.0, flip=0.0)
    plan = plan_batch(index, kind, seed=0, number=0, global_batch=COUNT, sample_ids=np.arange(COUNT), image_size=SIZE)
    plan = replace(plan, hue=np.full(COUNT, 36, np.float32))
    reader, decoder = ByteReader(index), Decoder(Decoding(kind, SIZE, device="cpu"), COUNT)
    encoded = [reader.read(row) for row in range(COUNT)]
    (turned,) = decoder.decode(encoded, plan)
    (same,) = decoder.decode(encoded, replace(plan, hue=np.zeros(COUNT, np.float32)))
    turned, same = levels(turned.as_array()), levels(same.as_array())
    for ours, before in zip(turned, same, strict=True):
        image = Image.fromarray(np.rint(before).astype(np.uint8).transpose(1, 2, 0))
        with_it, against_it = (np.asarray(F.adjust_hue(image, turn)).transpose(2, 0, 1) for turn in (0.1, -0.1))
        assert np.abs(ours - with_it).mean() < 0.7 * np.abs(ours - against_it).mean()
        grey = np.array([0.299, 0.587, 0.114]).reshape(3, 1, 1)
        unclipped = ((np.rint(ours) > 0) & (np.rint(ours) < 255)).all(axis=0)
        assert np.abs(((ours - before) * grey).sum(axis=0))[unclipped].max() < 4


def test_views_are_the_same_for_any_number_of_ranks_and_micro_batch(index):
    (whole,) = loaded(index, augmentation("moco_v3"), PAIR)
    for rank in (0, 1):
        for batch in loaded(index, augmentation("moco_v3"), PAIR, micro_batch=2, rank=rank, ranks=2):
            assert torch.equal(batch.images, whole.images[batch.positions])
            assert torch.equal(batch.second, whole.second[batch.positions])


def test_a_bad_image_is_replaced_in_both_views(tmp_path):
    index = build_index(write_photos(tmp_path / "photos", 4), progress=False)
    (before,) = loaded(index, augmentation("moco_v3"), PAIR, global_batch=4)
    row = int(np.flatnonzero(before.sample_ids == 1)[0])
    index.path(1).write_bytes(b"no image" * 100)
    (after,) = loaded(index, augmentation("moco_v3"), PAIR, global_batch=4)
    assert after.replaced == 1
    for old, new in ((before.images, after.images), (before.second, after.second)):
        same = [torch.equal(old[i], new[i]) for i in range(4)]
        assert same == [i != row for i in range(4)]


def test_pairs_that_cannot_be_made_are_refused():
    with pytest.raises(UsageError, match=r"rand_augment.*another size"):
        Decoding(augmentation("rand_augment"), SIZE, second=SecondView(None, 48))
    with pytest.raises(UsageError, match=r"random erasing.*data\.random_erasing=0"):
        Decoding(augmentation("moco_v3", erasing=0.5), SIZE, second=PAIR)
