"""The other commands at the edge: data, doctor, and help."""

import signal
import subprocess
import sys

import pytest


def test_sample_index_and_verify_tell_what_there_is_and_what_is_bad(call, tmp_path):
    root = tmp_path / "digits"
    assert call("data", "sample", root)[0] == 0
    code, out, _ = call("data", "index", root / "train")
    assert (code, out) == (0, "1,442 images, 1.04 MiB, 10 classes\n")
    assert call("data", "verify", "--deep", root / "val")[:2] == (0, "355 images, 0 bad\n")
    victim = next((root / "val" / "3").glob("*.jpg"))
    victim.write_bytes(victim.read_bytes()[:-200])
    code, out, _ = call("data", "verify", root / "val")
    assert code == 1
    assert out.startswith(f"3/{victim.name}: ")
    assert "355 images, 1 bad" in out


def test_scenes_are_written_with_what_is_annotated_and_can_be_indexed(call, tmp_path):
    root = tmp_path / "scenes"
    few = ["--train", 3, "--val", 2, "--side", 64]
    code, out, _ = call("data", "scenes", root, *few)
    assert (code, out.count("\n")) == (0, 1)
    assert "3 and 2 scenes of digits on photographs, 64 px" in out
    assert call("data", "verify", "--deep", root / "train" / "images")[:2] == (0, "3 images, 0 bad\n")
    assert {path.name for path in (root / "val").iterdir()} == {"images", "labels", "instances.json"}
    code, _, error = call("data", "scenes", root, "--train", 4)
    assert (code, error.count("\n")) == (2, 1)
    assert "holds other files" in error


@pytest.mark.parametrize("command", [["data", "sample"], ["data", "scenes"], ["demo", "--out"]])
def test_a_place_that_cannot_be_written_to_is_one_clear_error(call, tmp_path, command):
    (tmp_path / "file").write_text("x")
    code, _, error = call(*command, tmp_path / "file" / "below")
    assert code == 2
    assert "cannot be written to: Not a directory" in error


@pytest.mark.parametrize("command", ["index", "verify"])
@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_folder_without_images_is_one_clear_error(call, tmp_path, command, kind):
    root = tmp_path / "nothing"
    if kind == "empty":
        root.mkdir()
    code, _, error = call("data", command, root)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert str(root) in error


def test_doctor_says_what_is_installed_and_what_will_be_used(call):
    code, out, _ = call("doctor")
    assert code == 0
    for word in ("torch", "deepspeed", "fairscale", "DALI", "GPU", "MLflow"):
        assert word in out


@pytest.mark.parametrize(
    "command",
    [
        *(["pretrain"], ["demo"], ["doctor"], ["export"], ["submit"], ["slurm"], ["data", "index"], ["data", "verify"]),
        *(["data", "pack"], ["checkpoints", "list"], ["checkpoints", "verify"], ["checkpoints", "prune"]),
    ],
)
def test_every_command_has_an_example_in_its_help(call, command):
    code, out, _ = call(*command, "--help")
    assert code == 0
    assert "Example:" in out


@pytest.mark.parametrize(
    "arguments", [["pretrain", "demo"], ["pretrian"], ["pretrain", "demo", "--out", "x", "--nproc", "0"]]
)
def test_wrong_usage_has_exit_code_2_and_no_traceback(call, arguments):
    code, _, error = call(*arguments)
    assert code == 2
    assert "Traceback" not in error


def test_ctrl_c_before_a_command_listens_ends_it_without_a_traceback():
    """Between the start of the program and the end of its imports."""
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background\n"
        "import mae_scale.__main__\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
