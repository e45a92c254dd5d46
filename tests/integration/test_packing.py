"""`mae-scale data pack`: shards that train as the folder does, the same from any number of processes, also cut off."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.index import build_index, load_index
from data_pipeline.loader import ImageLoader
from data_pipeline.samples import write_photos
from tests.tiny import arguments, losses


def picture(number=0, height=220, width=300, mode="RGB", kind="JPEG", **options) -> bytes:
    """About 60 KiB of noise as a JPEG, so that a few images fill a shard of 1 MiB."""
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def put(root: Path, name: str, data: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "photos", 60)


@pytest.fixture(scope="module")
def packed(tmp_path_factory, photos, mae_scale) -> Path:
    """The photos in shards of 1 MiB, from one process."""
    target = tmp_path_factory.mktemp("packed") / "shards"
    done = mae_scale("data", "pack", photos, target, "--shard-mib", 1, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("60 images, ")
    return target


def test_any_number_of_processes_writes_the_same_shards(photos, packed, tmp_path, mae_scale):
    done = mae_scale("data", "pack", photos, tmp_path / "three", "--shard-mib", 1, "--workers", 3)
    assert done.returncode == 0, done.stderr
    assert len(shards(packed)) > 2
    assert shards(tmp_path / "three") == shards(packed)
    assert (tmp_path / "three" / "pack.json").read_bytes() == (packed / "pack.json").read_bytes()
    assert {path.name for path in packed.iterdir()} == {*shards(packed), "pack.json", ".mae_scale_index.npz"}


def test_bytes_are_unchanged_and_members_tell_nothing_of_time_and_user(photos, packed):
    found = {}
    for name in shards(packed):
        with tarfile.open(packed / name) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
                found[member.name] = archive.extractfile(member).read()
    assert found == {path.name: path.read_bytes() for path in sorted(photos.glob("*.jpg"))}


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def session_of(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, *_, session = (folder / "stat").read_text().rpartition(") ")[2].split()[:4]
        except OSError:
            continue
        if int(session) == pid and state != "Z":
            found.append(int(folder.name))
    return found


def test_killed_in_the_middle_and_started_again_it_equals_the_uninterrupted(photos, tmp_path, call, mae_scale):
    options = ["--shard-mib", 1, "--shorter-side", 360]
    assert mae_scale("data", "pack", photos, tmp_path / "whole", *options, "--workers", 1).returncode == 0
    target = tmp_path / "killed"
    command = [sys.executable, "-m", "mae_scale", "data", "pack", photos, target, *options, "--workers", 2]
    process = subprocess.Popen([*map(str, command)], start_new_session=True, stderr=subprocess.PIPE)
    wait_until(lambda: (target / ".000000.tar.json").exists())
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not session_of(process.pid), 5)  # its workers end, too
    process.stderr.close()
    before = {name: (target / name).stat().st_mtime_ns for name in shards(target)}
    assert 0 < len(before) < len(shards(tmp_path / "whole"))
    assert not (target / "pack.json").exists()
    code, _, error = call("data", "index", target)
    assert code == 2
    assert "are not complete; run the same `mae-scale data pack` again" in error
    refused = call("data", "pack", photos, target, "--shard-mib", 2, "--shorter-side", 360)
    assert refused[0] == 2
    assert "other options (shard_mib 1 -> 2)" in refused[2]
    done = mae_scale("data", "pack", photos, target, *options)
    assert done.returncode == 0, done.stderr
    assert shards(target) == shards(tmp_path / "whole")
    assert (target / "000000.tar").stat().st_mtime_ns == before["000000.tar"]  # kept
    assert not [path for path in target.iterdir() if path.name.endswith((".tmp", ".json", ".unfinished"))][1:]


def test_a_shard_that_was_damaged_while_packing_was_cut_off_is_written_anew(photos, packed, tmp_path, call):
    target = tmp_path / "cut"
    shutil.copytree(packed, target)
    manifest = json.loads((target / "pack.json").read_text())
    (target / "pack.json").rename(target / "pack.json.unfinished")
    for record in manifest["shards"]:
        (target / f".{record['name']}.json").write_text(json.dumps(record))
    flip(target / "000001.tar", 70_000)
    (target / ".000002.tar.4242.tmp").write_bytes(b"a part")
    (target / ".000000.tar.json").write_bytes(b'{"format"')
    assert call("data", "pack", photos, target, "--shard-mib", 1, "--workers", 1)[0] == 0
    assert shards(target) == shards(packed)
    assert {path.name for path in target.iterdir()} == {path.name for path in packed.iterdir()}


LAYOUTS = {
    "classes": [f"{name}/{number:02d}.JPEG" for name in ("ant", "bee", "cat") for number in range(10)],
    "nested classes": [f"{name}/{number}.jpg" for name in ("Aves/3100", "Aves/31", "Fungi/56") for number in range(10)],
    "flat": [f"{number}.jpg" for number in range(30)],
    "names that WebDataset reads in another way": [
        *(f"a/{number}.jpg" for number in range(20)),
        *("a/1.png", "a/1.jpeg", "a/1.JPG", "a/1.2.jpg", "a/1%2E2.jpg", "a/v1.0/x.jpg", "b/é ü.jpg", "b/.x/hidden.jpg"),
        *(
            "b/" + "long" * 40 + ".jpg",
            "b/" + "/".join(["deep"] * 30) + "/x.jpg",
            "b-/x.jpg",
            "c.d/x.y.jpg",
            "root.jpg",
        ),
    ],
}


@pytest.fixture(params=LAYOUTS)
def folder(request, tmp_path) -> Path:
    root = tmp_path / "images"
    for number, name in enumerate(LAYOUTS[request.param]):
        put(root, name, picture(number, 200 + number, kind="PNG" if name.endswith("png") else "JPEG"))
    if request.param != "flat":
        (root / "zebra").mkdir()  # a class without images
    return root


def batches(index) -> list[tuple]:
    options = {"image_size": 32, "global_batch": 10, "micro_batch": 5, "device": "cpu", "stop_step": 5, "seed": 3}
    with ImageLoader(index, "random_resized_crop_color_jitter", **options) as loader:
        return [(batch.images, batch.labels, batch.sample_ids.tolist()) for batch in loader]


def test_batches_from_the_shards_are_the_folders_to_the_last_bit(folder, tmp_path, call):
    code, out, error = call("data", "pack", folder, tmp_path / "shards", "--shard-mib", 1, "--workers", 1)
    assert code == 0, error
    before, after = build_index(folder, progress=False), load_index(tmp_path / "shards" / ".mae_scale_index.npz")
    assert out == after.summary() + "\n"
    assert len(after.shard_names) > 1
    assert (after.classes, len(after)) == (before.classes, len(before))
    for column in ("label", "height", "width", "num_bytes"):
        assert np.array_equal(getattr(after, column), getattr(before, column)), column
    for ours, theirs in zip(batches(after), batches(before), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert ours[2] == theirs[2]


def test_keys_are_unique_and_end_at_the_first_dot(folder, tmp_path, call):
    """As any WebDataset reader groups members: all up to the first dot of the file's name."""
    assert call("data", "pack", folder, tmp_path / "shards", "--workers", 1)[0] == 0
    names = tarfile.open(tmp_path / "shards" / "000000.tar").getnames()
    samples = [name.rpartition("/")[0] + "/" + name.rpartition("/")[2].partition(".")[0] for name in names]
    images = [k for k, name in zip(samples, names, strict=True) if not name.endswith(".cls")]
    assert len(images) == len(set(images)) == len(build_index(folder, progress=False))
    labels = [k for k, name in zip(samples, names, strict=True) if name.endswith(".cls")]
    assert len(labels) == len(set(labels))
    assert set(labels) <= set(images)


def test_a_training_from_shards_has_the_folders_losses_to_the_last_bit(digits, tmp_path, mae_scale):
    assert mae_scale("data", "pack", digits / "train", tmp_path / "shards", "--shard-mib", 1).returncode == 0
    found = []
    for root in (digits / "train", tmp_path / "shards"):
        out = tmp_path / f"run{len(found)}"
        more = [f"data.root={root}", "schedule.stop_after_steps=6"]
        done = mae_scale("pretrain", "demo", "--out", out, "--tracking-uri", "off", *arguments(digits, *more))
        assert done.returncode == 0, done.stderr
        found.append(losses(out))
    assert len(found[0]) == 6
    assert found[0] == found[1]


def test_images_larger_than_the_shorter_side_are_made_smaller_and_the_others_keep_their_bytes(tmp_path, call):
    root = tmp_path / "images"
    exif = Image.Exif()
    exif[0x0112] = 6
    put(root, "large.jpg", picture(1, 600, 903, exif=exif, comment=b"c", icc_profile=b"p" * 100, subsampling=0))
    put(root, "420.jpg", picture(2, 600, 450, subsampling=2))
    put(root, "grey.jpg", picture(3, 600, 450, mode="L"))
    put(root, "cmyk.jpg", picture(4, 450, 600, mode="CMYK"))
    put(root, "alpha.png", picture(5, 450, 600, mode="RGBA", kind="PNG"))
    put(root, "palette.png", picture(5, 450, 600, mode="P", kind="PNG"))
    deep = io.BytesIO()
    Image.fromarray(np.full((450, 600), 40000, np.uint16)).save(deep, "PNG")
    put(root, "sixteen.png", deep.getvalue())
    put(root, "just.jpg", picture(6, 300, 450))
    put(root, "small.png", picture(7, 299, 5000, kind="PNG"))
    assert call("data", "pack", root, tmp_path / "a", "--shorter-side", 300, "--workers", 1)[0] == 0
    with tarfile.open(tmp_path / "a" / "000000.tar") as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}
    assert [n.partition(".")[0] for n in found] == [
        f"{p.name}".replace(".png", "%png").partition(".")[0] for p in sorted(root.glob("[!.]*"))
    ]
    for name in ("just.jpg", "small%png.png", "sixteen%png.png"):
        assert found[name] == (root / name.replace("%png", "")).read_bytes()
    assert {name for name in found if name.endswith("png")} == {"small%png.png", "sixteen%png.png"}
    sizes = {"large.jpg": (452, 300), "420.jpg": (300, 400), "grey.jpg": (300, 400), "cmyk.jpg": (400, 300)}
    sizes |= {"alpha%png.jpg": (400, 300), "palette%png.jpg": (400, 300)}
    modes = {name: "L" if name == "grey.jpg" else "RGB" for name in sizes}
    for name, size in sizes.items():
        image = Image.open(io.BytesIO(found[name]))
        assert (image.format, image.size, image.mode) == ("JPEG", size, modes[name]), name
        assert not image.getexif()
        assert not {"exif", "icc_profile", "comment"} & set(image.info)
        theirs = (
            Image.open(root / name.replace("%png.jpg", ".png")).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        )
        error = np.abs(np.asarray(image.convert("RGB"), float) - np.asarray(theirs, float)).mean()
        assert error < 12, (name, error)  # noise is what JPEG is worst at
    sampled = {
        name: image.layer[0][1:3] for name in sizes if (image := Image.open(io.BytesIO(found[name]))).mode == "RGB"
    }
    assert sampled == {name: (2, 2) if name == "420.jpg" else (1, 1) for name in sampled}
    index = load_index(tmp_path / "a" / ".mae_scale_index.npz")
    assert np.minimum(index.height, index.width).max() == 450  # the one of 16 bits
    code, _, error = call("data", "pack", root, tmp_path / "a", "--shorter-side", 300, "--quality", 80)
    assert code == 2
    assert "other options (quality 92 -> 80)" in error
    assert call("data", "pack", root, tmp_path / "b", "--shorter-side", 300, "--quality", 80)[0] == 0
    assert (tmp_path / "b" / "000000.tar").stat().st_size < (tmp_path / "a" / "000000.tar").stat().st_size


def test_unreadable_images_are_left_out_and_named(tmp_path, call):
    root = tmp_path / "images"
    for number in range(3):
        put(root, f"{number}.jpg", picture(number))
    put(root, "cut.jpg", picture(9)[:-400])
    garbled = bytearray(picture(8))
    at = garbled.index(b"\xff\xc4")
    garbled[at + 5 : at + 21] = b"\xff" * 16
    put(root, "garbled.jpg", bytes(garbled))
    code, out, _ = call("data", "pack", root, tmp_path / "same", "--workers", 1)
    assert code == 0
    assert out.startswith("cut.jpg: truncated JPEG")
    assert "4 images" in out
    for _ in range(2):  # and named again by a second call
        code, out, _ = call("data", "pack", root, tmp_path / "small", "--shorter-side", 100, "--workers", 1)
        assert code == 0
        assert "cut.jpg: truncated JPEG" in out
        assert "garbled.jpg: cannot be decoded" in out
        assert out.endswith("3 images, 0.01 MiB, 1 shards, 2 unreadable images left out\n")


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_verify_names_the_shard_with_a_flipped_byte_and_pack_mends_it(photos, packed, tmp_path, call):
    target = tmp_path / "shards"
    shutil.copytree(packed, target)
    code, out, _ = call("data", "verify", target)
    assert (code, out) == (0, "60 images, 0 bad (headers and ends only; --deep decodes), every shard has its digest\n")
    index = (target / ".mae_scale_index.npz").read_bytes()
    flip(target / "000001.tar", 70_000)
    os.truncate(target / "000002.tar", 5000)
    put(target, "000009.tar", b"")
    code, out, _ = call("data", "verify", target)
    assert code == 1
    assert out.splitlines()[0] == "000001.tar: its bytes have changed since it was packed (sha256)"
    assert out.splitlines()[1].startswith("000002.tar: 5000 bytes, ")
    assert out.splitlines()[2] == "000009.tar: not in pack.json"
    assert (target / ".mae_scale_index.npz").read_bytes() == index
    (target / "000009.tar").unlink()
    (target / "000000.tar").unlink()
    assert call("data", "verify", target)[1].startswith("000000.tar: No such file")
    assert call("data", "pack", photos, target, "--shard-mib", 1, "--workers", 1)[0] == 0
    assert shards(target) == shards(packed)
    assert call("data", "verify", target)[0] == 0


def refusals(tmp_path: Path, photos: Path, packed: Path) -> dict[str, tuple[list, str]]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    put(tmp_path / "full", "mine.txt", b"mine")
    put(tmp_path / "few", "a.jpg", picture())
    put(tmp_path / "damaged", "pack.json", b"{")
    put(tmp_path / "bad", "a.jpg", b"text")
    new = tmp_path / "new"
    return {
        "missing": ([tmp_path / "missing", new], "does not exist"),
        "empty": ([tmp_path / "empty", new], "no image in"),
        "nothing readable": ([tmp_path / "bad", new], "no readable image in"),
        "inside": ([photos, photos / "shards"], "inside the images' folder"),
        "itself": ([photos, photos], "inside the images' folder"),
        "a file": ([photos, tmp_path / "file"], "is not a folder"),
        "below a file": ([photos, tmp_path / "file" / "below"], "cannot be written to: Not a directory"),
        "something else there": ([photos, tmp_path / "full"], "is not empty and holds no packed shards"),
        "damaged manifest": ([photos, tmp_path / "damaged"], "is damaged, or no manifest"),
        "other images": ([tmp_path / "few", packed, "--shard-mib", 1], "holds shards of other images (60 of index"),
        "other options": ([photos, packed], "packed with other options (shard_mib 1 -> 256)"),
        "quality alone": ([photos, new, "--quality", 80], "--quality re-encodes nothing without --shorter-side"),
    }


CASES = ["missing", "empty", "nothing readable", "inside", "itself", "a file", "below a file", "something else there"]
CASES += ["damaged manifest", "other images", "other options", "quality alone"]


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_packed_is_one_clear_line_and_nothing_is_lost(case, tmp_path, photos, packed, call):
    words, message = refusals(tmp_path, photos, packed)[case]
    before = shards(packed)
    code, _, error = call("data", "pack", *words)
    assert code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert shards(packed) == before
    assert not (tmp_path / "new").exists()


def test_two_at_a_time_are_refused(photos, packed, call):
    import fcntl

    folder = os.open(packed, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    code, _, error = call("data", "pack", photos, packed, "--shard-mib", 1)
    os.close(folder)
    assert code == 2
    assert "another process is packing into" in error


def test_a_disk_without_room_is_one_clear_line_and_whole_shards_are_kept(photos, packed, tmp_path):
    """A limit on the size of a file, as a full disk fails: the write itself raises OSError."""
    options = ["--shard-mib", "1", "--workers", "1"]
    command = [sys.executable, "-m", "mae_scale", "data", "pack", photos, tmp_path / "shards", *options]
    largest = max(len(data) for data in list(shards(packed).values())[1:])
    small = len(shards(packed)["000000.tar"])
    assert small < largest
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, small)),
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "cannot write" in done.stderr
    assert "make room and run the same command again, whole shards are kept" in done.stderr
    kept = shards(tmp_path / "shards")
    assert 0 < len(kept) < len(shards(packed))
    assert not list((tmp_path / "shards").glob(".*.tmp"))
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "shards") == shards(packed)


def test_an_image_that_changes_while_it_is_packed_stops_with_its_name(tmp_path, call, monkeypatch):
    root = tmp_path / "images"
    for number in range(3):
        put(root, f"{number}.jpg", picture(number))
    from data_pipeline import packing

    def changed(*arguments, **options):
        index = build_index(*arguments, progress=False)
        put(root, "1.jpg", picture(1)[:-100])
        return index

    monkeypatch.setattr(packing, "open_index", changed)
    code, _, error = call("data", "pack", root, tmp_path / "shards", "--workers", 1)
    assert code == 1
    assert "1.jpg: changed since it was indexed" in error
    assert error.count("\n") == 1
    assert not shards(tmp_path / "shards")
