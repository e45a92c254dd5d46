"""Fine-tuning, probing, evaluation and k-NN as a user runs them: real digits through DALI into DeepSpeed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from mae_scale.checkpoints.export import checkpoint_model
from mae_scale.checkpoints.store import list_checkpoints
from mae_scale.models.classifier import build_classifier
from mae_scale.models.weights.classifier import classifier_to_official
from mae_scale.models.weights.files import read_weights
from mae_scale.tasks.classification.datasets import ALEXNET_ERROR, imagenet_wnids
from mae_scale.tracking.metrics_log import read_metrics
from tests.tiny import arguments, losses

pytestmark = pytest.mark.timeout(600)

SIZE = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
TINY = [f"model.{key}={value}" for key, value in SIZE.items()]
SHORT = ["data.global_batch=24", "schedule.epochs=3", "schedule.warmup_epochs=1", "tracking.log_every_steps=1"]
AUGMENTED = ["data.augmentation=rand_augment", "data.random_erasing=0.25", "model.drop_path=0.2"]
AUGMENTED += ["classifier.mixup=0.8", "classifier.cutmix=1.0"]
STEPS = 3 * (100 // 24)


def few(digits: Path, *more: str) -> list[str]:
    """Overrides of a tiny classifier on ten labels per class."""
    return [f"data.root={digits}/train", f"data.val_root={digits}/val", *TINY, *SHORT, *more]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, digits, mae_scale) -> Path:
    """The folder of a tiny pre-training run, stopped early."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    recipe = arguments(digits, "schedule.stop_after_steps=3")
    done = mae_scale("pretrain", "demo", "--out", out, "--tracking-uri", "off", *recipe)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, digits, mae_scale, pretrained):
    """A whole fine-tuning on two ranks: its folder, what it printed, its --json file."""
    out = tmp_path_factory.mktemp("finetuned") / "run"
    command = ["finetune", "finetune/demo", "--weights", pretrained, "--out", out, "--json", out.parent / "f.json"]
    done = mae_scale(*command, "--nproc", 2, "--tracking-uri", "off", *few(digits, *AUGMENTED))
    assert done.returncode == 0, done.stderr
    return out, done.stdout, out.parent / "f.json"


def test_fine_tuning_trains_evaluates_and_says_what_it_started_from(finetuned):
    out, said, answer = finetuned
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {"val/top1", "val/top5", "val/loss"} <= rows[-1].keys()
    assert "fresh: fc_norm (2), head (2); unused: norm (2)" in said
    assert "layer 0, decayed" in said
    assert "lr x 0.4219" in said  # 0.75 ^ 3, the embedding of a model of two blocks
    result = json.loads(answer.read_text())
    assert result == json.loads((out / "evaluation.json").read_text())
    assert result["images"] == 355
    assert result["top1"] == rows[-1]["val/top1"]
    assert sum(found["images"] for found in result["per_class"]) == 355


def test_one_rank_and_two_draw_the_same_augmented_curve(tmp_path, digits, mae_scale, pretrained, finetuned):
    more = [*AUGMENTED, "engine.zero_stage=2", "engine.micro_batch=6", "data.threads=2"]
    command = ["finetune", "finetune/demo", "--weights", pretrained, "--out", tmp_path / "r", "--tracking-uri", "off"]
    done = mae_scale(*command, *few(digits, *more))
    assert done.returncode == 0, done.stderr
    mine, theirs = losses(tmp_path / "r"), losses(finetuned[0])
    assert mine.keys() == theirs.keys()
    assert max(abs(mine[step] - theirs[step]) for step in mine) < 1e-6


def test_the_weights_it_leaves_are_timms_too(finetuned):
    out, _, _ = finetuned
    model, _ = checkpoint_model(list_checkpoints(out / "checkpoints")[-1][1])
    peer = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10, global_pool="avg"
    )
    peer.load_state_dict(read_weights(out / "export" / "model.safetensors"))
    images = torch.randn(4, 3, 32, 32)
    assert torch.allclose(model(images), peer.eval()(images), atol=1e-5)


def test_evaluation_is_equal_to_the_digit_for_any_ranks_and_batch_sizes(tmp_path, digits, mae_scale, call, finetuned):
    out, _, trained = finetuned
    command = ["evaluate", "finetune/demo", "--weights", out, f"data.val_root={digits}/val", *TINY]
    ways = {"one": ["engine.micro_batch=64"], "two": ["--nproc", 2, "engine.micro_batch=17"], "three": ["--nproc", 3]}
    for name, way in ways.items():
        done = mae_scale(*command, *way, "--json", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert "of 355 images" in done.stdout
    one, two, three = (json.loads((tmp_path / name).read_text()) for name in ways)
    keys = ("top1", "top5", "images", "per_class")
    assert [one[key] for key in keys] == [two[key] for key in keys] == [three[key] for key in keys]
    assert [one[key] for key in keys] == [json.loads(trained.read_text())[key] for key in keys]


def test_the_exported_file_evaluates_as_the_run_does(digits, mae_scale, finetuned, tmp_path):
    out, _, trained = finetuned
    for layout in ("official", "safetensors"):
        file = tmp_path / f"{layout}.safetensors"
        assert mae_scale("export", out, file, "--format", layout).returncode == 0
        command = ["evaluate", "finetune/demo", "--weights", file, f"data.val_root={digits}/val", *TINY]
        done = mae_scale(*command, "--json", tmp_path / "answer.json")
        assert done.returncode == 0, done.stderr
        expected = json.loads(trained.read_text())
        assert json.loads((tmp_path / "answer.json").read_text())["top1"] == expected["top1"]


def test_a_224_style_model_goes_on_at_double_resolution(tmp_path, digits, mae_scale, finetuned):
    """As 448 px after 224: the head goes along, positions are resampled."""
    command = ["finetune", "finetune/demo", "--weights", finetuned[0], "--out", tmp_path / "r", "--tracking-uri", "off"]
    more = ["model.image_size=64", "schedule.epochs=2", "engine.activation_checkpointing=all", "engine.zero_stage=2"]
    done = mae_scale(*command, *few(digits, *more))
    assert done.returncode == 0, done.stderr
    assert "32 tensors from" in done.stdout
    assert "fresh" not in done.stdout


def test_nearest_neighbours_are_the_same_on_two_ranks(tmp_path, digits, mae_scale, pretrained):
    command = ["knn", "probe/demo", "--weights", pretrained, *few(digits, "data.labels_per_class=20")]
    for name, way in {"one": [], "two": ["--nproc", 2, "engine.micro_batch=30"]}.items():
        done = mae_scale(*command, *way, "--json", tmp_path / name, "--figure", tmp_path / f"{name}.png")
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert (one["top1"], one["images"]) == (two["top1"], two["images"])
    assert 20 < one["top1"] < 100
    with Image.open(tmp_path / "two.png") as picture:
        assert min(picture.size) > 300


def test_imagenet_c_gives_a_mean_corruption_error(tmp_path, mae_scale):
    """A model that always says the first class, on one image of the first class and one of the second."""
    torch.manual_seed(0)
    model = build_classifier(None, classes=1000, **SIZE)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data[0] = 1
    torch.save({"model": classifier_to_official(model)}, tmp_path / "model.pth")
    for corruption in ALEXNET_ERROR:
        for severity in range(1, 6):
            for wnid in imagenet_wnids()[:2]:
                folder = tmp_path / "c" / corruption / str(severity) / wnid
                folder.mkdir(parents=True)
                Image.new("RGB", (32, 32)).save(folder / "1.JPEG")
    command = ["evaluate", "finetune/demo", "--weights", tmp_path / "model.pth", "--set", "imagenet-c", *TINY]
    done = mae_scale(*command, f"data.val_root={tmp_path}/c", "--json", tmp_path / "c.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "c.json").read_text())
    expected = sum(50 / error for error in ALEXNET_ERROR.values()) / 15
    assert found["mCE"] == pytest.approx(expected)
    assert f"mean corruption error {expected:.2f}" in done.stdout


def test_images_that_cannot_be_read_are_counted_every_time(tmp_path, digits, mae_scale, finetuned):
    shutil.copytree(digits / "val", tmp_path / "val", ignore=shutil.ignore_patterns(".*"))
    image = next((tmp_path / "val" / "3").iterdir())
    image.write_bytes(image.read_bytes()[:300])
    for _ in range(2):  # found while indexing, then known
        command = ["evaluate", "finetune/demo", "--weights", finetuned[0], f"data.val_root={tmp_path}/val", *TINY]
        done = mae_scale(*command, "--json", tmp_path / "e.json")
        assert "of 354 images (1 more cannot be read)" in done.stdout, done.stderr
    assert json.loads((tmp_path / "e.json").read_text())["left_out"] == 1


WRONG = {
    "no weights": (["finetune", "finetune/demo"], [], "add --weights PATH"),
    "weights that are not there": (["finetune", "finetune/demo", "--weights", "{out}/none"], [], "does not exist"),
    "a pre-training recipe": (["finetune", "demo"], [], "use `mae-scale pretrain`"),
    "a classifier's recipe": (["pretrain", "scratch/demo"], [], "use `mae-scale finetune`"),
    "probing that trains blocks": (["probe", "finetune/demo", "--weights", "{run}"], [], "trains the head alone"),
    "a patch that does not fit": (["finetune", "scratch/demo"], ["model.image_size=30"], "the nearest that fits is 32"),
    "an odd micro-batch": (
        ["finetune", "scratch/demo"],
        ["data.global_batch=25", "classifier.mixup=1"],
        "even engine.micro_batch",
    ),
    "batch norm in parts": (
        ["probe", "probe/demo", "--weights", "{run}"],
        ["engine.micro_batch=6"],
        "drop engine.micro",
    ),
    "more labels than images": (["finetune", "scratch/demo"], ["data.labels_per_class=200"], "choose at most"),
    "LARS under ZeRO": (["probe", "probe/demo", "--weights", "{run}"], ["engine.zero_stage=1"], "zero_stage=0"),
    "another size": (
        ["finetune", "finetune/demo", "--weights", "{run}"],
        ["model.width=64"],
        "patch 8 px, width 32, 2 blocks",
    ),
    "labels missing": (
        ["finetune", "scratch/demo"],
        ["data.root={flat}", "data.labels_per_class=null"],
        "lie in no class folder; expected a folder per class",
    ),
    "neighbours without labels": (
        ["knn", "probe/demo", "--weights", "{run}"],
        ["data.root={flat}", "data.labels_per_class=null"],
        "lie in no class folder; expected a folder per class",
    ),
    "classes that training lacks": (["finetune", "scratch/demo"], ["data.val_root={more}"], "zebra"),
    "a head of other classes": (
        ["finetune", "finetune/demo", "--weights", "{tuned}"],
        ["data.root={nine}", "data.val_root={nine}"],
        "the file's head has 10 classes, the data 9",
    ),
    "nothing to evaluate": (["evaluate", "finetune/demo", "--weights", "{run}"], [], "no classifier's head"),
    "no validation images": (["evaluate", "finetune/demo", "--weights", "{tuned}"], ["data.val_root=null"], "val_root"),
    "an unknown set": (["evaluate", "finetune/demo", "--weights", "{tuned}", "--set", "imagenet-x"], [], "imagenet-a"),
    "a set for ImageNet's classes": (
        ["evaluate", "finetune/demo", "--weights", "{tuned}", "--set", "imagenet-a"],
        [],
        "1000 classes; this one has 10",
    ),
    "JSON of nothing measured": (
        ["finetune", "scratch/demo", "--json", "{out}/x.json"],
        ["data.val_root=null"],
        "data.val_root is not set",
    ),
    "JSON nowhere after training": (["finetune", "scratch/demo", "--json", "{out}/no/x"], [], "no folder"),
    "JSON nowhere": (
        ["evaluate", "finetune/demo", "--weights", "{tuned}", "--json", "{out}/no/x.json"],
        [],
        "no folder",
    ),
}


# Found by the ranks, not before they are started: these need a process of their own.
BY_THE_RANKS = {"another size", "labels missing", "classes that training lacks", "a head of other classes"}
BY_THE_RANKS |= {"more labels than images", "nothing to evaluate", "an unknown set", "a set for ImageNet's classes"}
BY_THE_RANKS |= {"neighbours without labels", "JSON of nothing measured"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, digits, pretrained, finetuned) -> dict:
    """Places that the wrong commands name."""
    root = tmp_path_factory.mktemp("wrong")
    images = sorted((digits / "val").rglob("*.jpg"))
    (root / "flat").mkdir()
    for image in images[:30]:
        shutil.copy(image, root / "flat")
    for kind, classes in {"more": [*"0123456789", "zebra"], "nine": [*"012345678"]}.items():
        for name in classes:
            shutil.copytree(digits / "val" / (name if name in "0123456789" else "0"), root / kind / name)
    return {name: root / name for name in ("flat", "more", "nine")} | {"run": pretrained, "tuned": finetuned[0]}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_line(case, tmp_path, digits, mae_scale, call, folders):
    words, overrides, message = WRONG[case]
    places = folders | {"out": tmp_path}
    words = [word.format(**places) for word in words]
    if words[0] not in ("evaluate", "knn"):
        words += ["--out", tmp_path / "r", "--tracking-uri", "off"]
    words += few(digits, *(o.format(**places) for o in overrides))
    if case in BY_THE_RANKS:
        done = mae_scale(*words)
        code, error = done.returncode, done.stderr
    else:
        code, _, error = call(*words)
    assert code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert message in error


def test_a_published_file_with_a_decoder_is_drawn_as_the_run_is(tmp_path, digits, call, pretrained):
    """In the authors' layout and in Hugging Face's; one without a decoder is refused."""
    model = [word for word in arguments(digits) if word.startswith("model.")]
    command = ["reconstruct", "demo", *model, f"data.val_root={digits}/val", "--weights"]
    pictures = []
    for layout in (None, "official", "hf"):
        weights, picture = pretrained, tmp_path / f"{layout}.png"
        if layout is not None:
            weights = tmp_path / f"{layout}.pth"
            assert call("export", pretrained, weights, "--format", layout)[0] == 0
        assert call(*command, weights, "--out", picture)[0] == 0
        with Image.open(picture) as drawn:
            pictures.append(drawn.tobytes())
    assert pictures[0] == pictures[1] == pictures[2]
    call("export", pretrained, tmp_path / "timm.pth", "--format", "timm")
    code, _, error = call(*command, tmp_path / "timm.pth", "--out", tmp_path / "x.png")
    assert (code, error.count("\n")) == (2, 1)
    assert "has no decoder" in error
