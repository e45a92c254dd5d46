"""Images that are not square: models, masks, positions, augmentations and arithmetic, beside their peers."""

import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.stats import ks_2samp
from timm.data import auto_augment, random_erasing
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.models.beit import Beit as TimmBeit
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

import mae_scale
from data_pipeline.augment import rand_augment
from data_pipeline.augment.crop import covering
from data_pipeline.augment.kinds import SecondView, augmentation
from data_pipeline.augment.random_erasing import erasing_boxes
from data_pipeline.dali_graph import Decoding
from data_pipeline.errors import UsageError
from data_pipeline.rng import generator
from mae_scale.checkpoints.encoder import PretrainedEncoder
from mae_scale.checkpoints.export import export_weights, grid_of_weights
from mae_scale.checkpoints.model_folder import export_folder
from mae_scale.config.load import load_recipe
from mae_scale.models.attention import last_attention
from mae_scale.models.beit import Beit
from mae_scale.models.classifier import build_classifier
from mae_scale.models.dense import DenseEncoder
from mae_scale.models.mae import build_mae
from mae_scale.models.masking import KINDS, block_masks, kept_patches, mask_noise
from mae_scale.models.segmenter import Segmenter
from mae_scale.models.vit import ViTSize, patchify, unpatchify
from mae_scale.models.weights.autoencoder import load_hf, to_timm
from mae_scale.models.weights.beit import beit_to_official
from mae_scale.models.weights.classifier import load_classifier
from mae_scale.models.weights.dense import load_dense
from mae_scale.models.weights.files import read_weights
from mae_scale.planning.flops import mae_forward_flops
from mae_scale.reports.classification import attention_figure
from mae_scale.reports.pretraining import reconstruction_figure
from mae_scale.tasks.classification.mixing import draw_mix, mix_images
from mae_scale.tasks.registry import task_of
from tests.unit.test_classifier_weights import shaken

transformers = pytest.importorskip("transformers")

SIZES = {"patch_size": 8, "width": 32, "depth": 2, "heads": 2}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
TIMM = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
WIDE = (24, 40)  # 3 x 5 patches


def autoencoder(image_size=WIDE, **more):
    torch.manual_seed(0)
    return shaken(build_mae(None, image_size=image_size, **SIZES, **DECODER, **more))


def classifier(image_size=WIDE, **more):
    torch.manual_seed(1)
    return build_classifier(None, classes=10, image_size=image_size, **SIZES, **more).eval()


def timm_vit(image_size, **more):
    return shaken(VisionTransformer(img_size=image_size, **TIMM, **{"num_classes": 10, "global_pool": "avg"} | more))


def pictures(height, width):
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(7))


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("image_size", [(16, 64), (64, 16)])
def test_loss_prediction_mask_and_gradients_are_transformers(monkeypatch, image_size):
    """Of as many patches as a square has, whose positions and check of images are replaced: it takes squares only."""
    height, width = image_size
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            image_size=list(image_size),
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=64,
            layer_norm_eps=1e-6,
            norm_pix_loss=True,
        )
    )
    build = transformers.models.vit_mae.modeling_vit_mae.build_2d_sinusoidal_position_embedding
    theirs = shaken(theirs)
    with torch.no_grad():
        for positions in (theirs.vit.embeddings.position_embeddings, theirs.decoder.decoder_pos_embed):
            dim = positions.shape[-1]
            own = build(height // 8, width // 8, dim, cls_token=True)  # the row's half first, in the files the column's
            positions.copy_(torch.cat([own[:, dim // 2 :], own[:, : dim // 2]], dim=1))
    ours = autoencoder(image_size)
    load_hf(ours, theirs.state_dict())
    images, noise = pictures(height, width), torch.rand(3, ours.patches)

    out = ours(images, noise)
    to_patches = theirs.patchify
    monkeypatch.setattr(theirs, "patchify", lambda images, **_: to_patches(images, interpolate_pos_encoding=True))
    expected = theirs(pixel_values=images, noise=noise)
    assert torch.equal(out.mask, expected.mask)
    close(out.prediction, expected.logits)
    close(out.loss, expected.loss)
    out.loss.backward()
    expected.loss.backward()
    gradients = {name: p if "pos" in name else p.grad for name, p in theirs.named_parameters()}
    other = autoencoder(image_size)
    load_hf(other, gradients)
    for name, parameter in ours.named_parameters():
        close(parameter.grad, other.get_parameter(name).data)


@torch.no_grad()
def test_features_and_logits_are_timms():
    images, model, peer = pictures(*WIDE), autoencoder(), timm_vit(WIDE, num_classes=0, global_pool="token")
    peer.load_state_dict(to_timm(model), strict=True)
    close(model.forward_features(images), peer.forward_features(images))
    peer, ours = timm_vit(WIDE), classifier()
    load_classifier(ours, peer.state_dict())
    close(ours(images), peer(images))
    with pytest.raises(UsageError, match=r"takes \[B, 3, 24, 40\]"):
        ours(images.transpose(2, 3))


@torch.no_grad()
def test_a_beit_and_its_tables_on_another_grid_are_timms():
    sizes = {**TIMM, "init_values": 0.1, "use_abs_pos_emb": False, "use_rel_pos_bias": True, "num_classes": 10}
    square, wide = (shaken(TimmBeit(img_size=size, **sizes)) for size in (32, WIDE))
    ours = classifier(layer_scale=0.1)
    load_classifier(ours, wide.state_dict())
    close(ours(pictures(*WIDE)), wide(pictures(*WIDE)))
    tables = [f"blocks.{n}.attn.relative_position_bias_table" for n in range(2)]
    for start, grid, image_size in ((square, (4, 4), WIDE), (wide, (3, 5), (40, 32))):
        peer, model = shaken(TimmBeit(img_size=image_size, **sizes)), classifier(image_size, layer_scale=0.1)
        state = dict(start.state_dict())
        load_classifier(model, state, grid)
        new = (image_size[0] // 8, image_size[1] // 8)
        for name in tables:
            state[name] = resize_rel_pos_bias_table(state[name], new, peer.state_dict()[name].shape, grid)
        peer.load_state_dict({k: v for k, v in state.items() if not k.endswith("index")}, strict=False)
        close(model(pictures(*image_size)), peer(pictures(*image_size)))


@torch.no_grad()
@pytest.mark.parametrize(
    ("start", "target"), [((4, 4), (3, 5)), ((3, 5), (4, 4)), ((4, 4), (2, 8)), ((3, 5), (5, 3)), ((2, 8), (4, 12))]
)
def test_positions_are_resampled_between_any_grids(start, target):
    """Also where both have as many patches."""
    file = timm_vit((8 * start[0], 8 * start[1])).state_dict()
    model = classifier((8 * target[0], 8 * target[1]))
    load_classifier(model, file, None if start == (4, 4) else start)
    expected = resample_abs_pos_embed(file["pos_embed"], list(target), list(start), antialias=False)
    assert torch.equal(model.encoder.pos_embed, expected[0])
    assert not torch.equal(model.encoder.pos_embed[1:16], file["pos_embed"][0, 1:16])


@pytest.mark.parametrize("start", [(4, 4), (2, 8), (3, 5)])
def test_an_encoder_of_whole_images_takes_positions_of_any_grid(start):
    """2 x 8 patches are as many as its own 4 x 4."""
    file = timm_vit((8 * start[0], 8 * start[1])).state_dict()
    encoder = DenseEncoder(ViTSize(**SIZES), image_size=(48, 48), pretraining_size=32, window=None, global_blocks=())
    model = Segmenter(encoder, classes=3, after=(0, 0, 1, 1), channels=8, auxiliary_channels=8)
    load_dense(model, file, None if start == (4, 4) else start)
    expected = resample_abs_pos_embed(file["pos_embed"], [4, 4], list(start), antialias=False)
    assert torch.equal(encoder.pos_embed, expected[:, 1:].reshape(encoder.pos_embed.shape))


def test_positions_of_a_grid_that_is_not_known_are_refused(tmp_path):
    file = timm_vit(WIDE).state_dict()
    with pytest.raises(
        UsageError, match=r"pos_embed is \[1, 16, 32\], expected \[1, 17, 32\] of 4 x 4 patches.*recipe"
    ):
        load_classifier(classifier(32), file)
    torch.save(file, tmp_path / "wide.pth")
    with pytest.raises(UsageError, match=r"of no square of patches.*give the run's folder, a checkpoint"):
        mae_scale.load_encoder(tmp_path / "wide.pth", heads=2)


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_an_exported_file_knows_its_grid(tmp_path, suffix):
    """2 x 8 patches could be 4 x 4."""
    for size in ((16, 64), (24, 40)):
        model, path = shaken(classifier(size)), tmp_path / f"model{suffix}"
        export_weights(model, path, "official")
        grid = grid_of_weights(path)
        assert grid == model.encoder.grid
        other = classifier(size)
        load_classifier(other, read_weights(path), grid)
        assert torch.equal(other.encoder.pos_embed, model.encoder.pos_embed)
        encoder = mae_scale.load_encoder(path, heads=2)
        assert encoder.image_size == size
        close(encoder(pictures(*size)), model.features(pictures(*size)))
    export_weights(classifier(32), path, "official")
    assert grid_of_weights(path) is None


@torch.no_grad()
def test_folders_for_timm_and_transformers_open_with_both(tmp_path):
    images = pictures(*WIDE)
    for model in (shaken(classifier()), shaken(classifier(layer_scale=0.1))):
        folder = tmp_path / type(model.encoder).__name__
        export_folder(model, None, folder, "timm")
        peer = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        close(model(images), peer(images))
        config = timm.data.resolve_model_data_config(peer)
        assert config["input_size"] == (3, *WIDE)
        ours = PretrainedEncoder(model).transform
        photo = Image.fromarray(generator(0, "test", 0).integers(0, 256, (80, 90, 3), np.uint8))
        theirs = timm.data.create_transform(**config, is_training=False)
        assert float((ours(photo) - theirs(photo)).abs().mean()) < 0.02
    model, folder = shaken(classifier(pool="cls")), tmp_path / "hf"
    assert "without preprocessor_config.json" in export_folder(model, None, folder, "hf")
    assert not (folder / "preprocessor_config.json").exists()
    close(model(images), transformers.AutoModelForImageClassification.from_pretrained(folder)(images).logits)
    for model, name in ((autoencoder(), "ViTMAE"), (classifier(layer_scale=0.1), "BEiT")):
        with pytest.raises(UsageError, match=f"images of 24 x 40 px, and transformers' {name} takes square ones only"):
            export_folder(model, None, tmp_path / name, "hf")


def test_a_beit_in_pre_training_has_its_own_grid_back(tmp_path):
    size = ViTSize(patch_size=8, width=32, depth=2, heads=2)
    source = shaken(Beit(size, image_size=WIDE, words=50, layer_scale=0.1))
    export_weights(source, tmp_path / "beit.safetensors", "official")
    assert beit_to_official(source).keys() == read_weights(tmp_path / "beit.safetensors").keys()
    encoder = mae_scale.load_encoder(tmp_path / "beit.safetensors", heads=2)
    close(encoder.forward_features(pictures(*WIDE)), source.features(pictures(*WIDE)))


@pytest.mark.parametrize("grid", [(3, 8), (8, 4), (2, 12)])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_remove_exactly_as_many_patches(grid, kind):
    rows, columns = grid
    ratio = 0.75
    options = {"grid_size": grid, "mask_ratio": ratio, "positions": np.arange(64)}
    options["generator_of"] = lambda position: np.random.default_rng(position)
    if kind == "grid" and rows % 2:
        with pytest.raises(UsageError, match=r"3 x 8 patches.*nothing on this grid"):
            mask_noise(kind, **options)
        return
    noise = mask_noise(kind, **options)
    assert noise.shape == (64, rows * columns)
    kept = kept_patches(rows * columns, ratio)
    if kind != "random":
        assert ((noise == 0).sum(axis=1) == kept).all()
        assert set(np.unique(noise)) == {0, 1}
    if kind == "grid":
        assert np.array_equal(np.argwhere(noise[0].reshape(grid) == 0)[:2], [[0, 0], [0, 2]])


def test_beits_masks_are_blocks_within_the_grid():
    masks = block_masks(grid_size=(6, 20), removed=48, generator_of=np.random.default_rng, positions=np.arange(256))
    masks = masks.reshape(256, 6, 20)
    removed = masks.sum(axis=(1, 2))
    assert removed.max() <= 48
    assert removed.mean() > 36
    often = masks.mean(axis=0)
    assert often.min() > 0.05
    together = (masks[:, :, 1:] == masks[:, :, :-1]).mean()
    assert together > 0.75  # of 0.52 where each patch is drawn by itself


def test_patches_are_put_together_again():
    images = pictures(*WIDE)
    patches = patchify(images, 8)
    assert torch.equal(unpatchify(patches, 8, (3, 5)), images)
    assert not torch.equal(unpatchify(patches, 8, (5, 3)).transpose(2, 3), images)
    with pytest.raises(UsageError, match="not a square image"):
        unpatchify(patches, 8)
    with pytest.raises(UsageError, match="not an image of 4 x 4 patches"):
        unpatchify(patches, 8, (4, 4))


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("demo", []),
        ("finetune/demo", []),
        ("pretrain/beit_vit_base_pixels_300ep", []),
        ("pretrain/moco_v3_vit_base", ["moco.hidden=48", "moco.dim=16"]),
    ],
)
def test_plans_count_the_patches_of_both_sides(recipe, more):
    sizes = ["name=null", *(f"{key}={value}" for key, value in SIZES.items())]
    sizes = [f"model.{size}" for size in sizes] + more
    wide, tall, square, large = (
        task_of(load_recipe(recipe, [*sizes, f"model.image_size={size}"]), Path())
        for size in ("[32,128]", "[128,32]", "64", "128")
    )
    found = [(task.training_flops(), task.workload(10).forward_flops) for task in (wide, tall, square, large)]
    assert found[0] == found[1] == found[2] < found[3]
    assert wide.workload(10).image_bytes == square.workload(10).image_bytes == 3 * 64 * 64 * 4


def test_flops_are_those_that_torch_counts():
    with torch.device("meta"):
        model = build_mae(None, image_size=WIDE, **SIZES, **DECODER)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(2, 3, *WIDE), torch.empty(2, 15))
    sizes = {key: value for key, value in (SIZES | DECODER).items() if not key.endswith("heads")}
    assert counter.get_total_flops() == 2 * mae_forward_flops(image_size=WIDE, **sizes)


def test_figures_have_the_images_proportions(tmp_path):
    model, images = shaken(classifier()), pictures(*WIDE)
    attention_figure(images, last_attention(model, images), tmp_path / "a.png", 8)
    patches = patchify(images, 8)
    reconstruction_figure(images, torch.ones(3, 15), patches, tmp_path / "r.png", patch_size=8)
    with Image.open(tmp_path / "r.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), float)
    # Three images of 40 x 24 px beside each other and three bands, enlarged six times; the third is the first.
    assert pixels.shape[1] > 150 + 3 * 240
    assert pixels.shape[0] > 3 * 144
    assert np.abs(pixels[4:148, 150:390] - pixels[4 + 2 * 148 : 148 + 2 * 148, 150:390]).mean() < 2


@pytest.mark.parametrize(("height", "width"), [(375, 500), (100, 40), (30, 900), (96, 224), (7, 5)])
@pytest.mark.parametrize("output", [(96, 224), (224, 64), (32, 32)])
def test_a_fixed_crop_lies_within_the_resized_image_as_timms(height, width, output):
    found = covering(np.array([[height, width]]), output)[0]
    least = tuple(int(side / 0.875) for side in output)
    assert (found >= least).all()
    assert (found == least).any()
    theirs = ResizeKeepRatio(least)(Image.new("RGB", (width, height)))
    assert np.abs(found - (theirs.height, theirs.width)).max() <= 1  # it rounds, and torchvision's Resize cuts off


def test_the_transform_of_an_encoder_is_timms_resize_and_crop():
    encoder = PretrainedEncoder(classifier((96, 224)))
    photo = Image.fromarray(generator(0, "test", 0).integers(0, 256, (250, 500, 3), np.uint8))
    found = encoder.transform(photo)
    assert found.shape == (3, 96, 224)
    theirs = CenterCropOrPad((96, 224))(ResizeKeepRatio((109, 256), interpolation="bicubic")(photo))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    levels = (found.permute(1, 2, 0) * std + mean) * 255
    assert float((levels - torch.from_numpy(np.array(theirs)).float()).abs().mean()) < 0.5


def test_erased_boxes_are_distributed_as_timms(monkeypatch):
    height, width = 64, 224

    class Image(list):
        def __setitem__(self, place, _):
            self.append([place[1].start, place[2].start, *(part.stop - part.start for part in place[1:])])

    monkeypatch.setattr(random_erasing, "_get_pixels", lambda *_, **__: None)
    erasing = random_erasing.RandomErasing(1.0, mode="pixel", max_count=1, device="cpu")
    random.seed(0)
    images = [Image() for _ in range(4000)]
    for image in images:
        erasing._erase(image, 3, height, width, torch.float32)
    theirs = np.array([box for image in images for box in image], float)
    ours = erasing_boxes(generator(0, "test", 0).random((4000, 41)), (height, width), 1.0).astype(float)
    assert (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    for quantity in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2], lambda b: b[:, 3]):
        assert ks_2samp(quantity(ours), quantity(theirs)).pvalue > 0.001


def test_cut_boxes_are_distributed_as_timms():
    height, width = 24, 40
    mix = draw_mix(mixup=0.0, cutmix=1.0, image_size=WIDE, seed=0, step=7, positions=np.arange(8000))
    ours = mix.box[::2]
    area = (ours[:, 1] - ours[:, 0]) * (ours[:, 3] - ours[:, 2])
    assert np.allclose(mix.share[::2], 1 - area / (height * width))
    np.random.seed(0)
    shares = np.random.beta(1, 1, 4000)
    theirs = np.array([cutmix_bbox_and_lam((1, 3, height, width), share)[0] for share in shares])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.001
    images = pictures(*WIDE)[:2]
    box = torch.tensor([[2, 9, 30, 40]] * 2)
    mixed = mix_images(images, torch.ones(2), box)
    expected = images.clone()
    expected[:, :, 2:9, 30:40] = images.flip(0)[:, :, 2:9, 30:40]
    assert torch.equal(mixed, expected)


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"])
def test_geometric_operations_move_pixels_as_timms(monkeypatch, name):
    """timm's affine transforms and rotations, by the matrices that Pillow gets."""
    numbers = {
        "Rotate": rand_augment.ROTATE,
        "ShearX": rand_augment.SHEAR_X,
        "ShearY": rand_augment.SHEAR_Y,
        "TranslateXRel": rand_augment.TRANSLATE_X,
        "TranslateYRel": rand_augment.TRANSLATE_Y,
    }
    height, width = 24, 40
    caught = []
    image = Image.new("RGB", (width, height))
    monkeypatch.setattr(Image.Image, "transform", lambda self, size, method, data, *_, **__: caught.append(data))
    argument = 17.0 if name == "Rotate" else 0.3
    auto_augment.NAME_TO_OP[name](image, argument, fillcolor=(0, 0, 0), resample=Image.Resampling.BICUBIC)
    (found,) = rand_augment.to_matrices(np.array([numbers[name]]), np.array([argument], np.float32), (height, width))
    assert np.allclose(found[:2].ravel(), caught[0], atol=1e-4)


def test_what_fills_up_squares_is_refused():
    with pytest.raises(UsageError, match=r"'large_scale_jitter' fills images up to a square.*24 x 40 px"):
        Decoding(augmentation("large_scale_jitter"), WIDE)
    plain = augmentation("random_resized_crop")
    views = Decoding(plain, WIDE, second=SecondView(None, 16)).views
    assert [size for _, size, _ in views] == [WIDE, (16, 16)]
