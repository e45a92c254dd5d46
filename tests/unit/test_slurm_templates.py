"""`mae-scale slurm`, what `mae-scale submit` makes of a site's own templates, and how the templates call srun."""

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from mae_scale.packaged import packaged

HUGE = "pretrain/vit_huge_1600ep"
FILES = {"environment.sh", "finetune.sbatch", "pretrain.sbatch", "scaling.sbatch"}


@pytest.fixture
def here(monkeypatch, tmp_path) -> Path:
    """An empty folder to work in, without a Slurm."""
    monkeypatch.chdir(tmp_path)
    for name in ("SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_TIMELIMIT"):
        monkeypatch.delenv(name, raising=False)
    programs(tmp_path / "bin", {})
    for needed in ("bash", "dirname"):
        (tmp_path / "bin" / needed).symlink_to(f"/bin/{needed}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def programs(folder: Path, code: dict[str, str]) -> Path:
    """Programs of these names, each a few lines of bash."""
    folder.mkdir()
    for name, lines in code.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)
    return folder


def options(script: str) -> dict[str, str]:
    """{option: value} of a script's #SBATCH lines."""
    lines = [line.removeprefix("#SBATCH --").partition("=") for line in script.splitlines() if "#SBATCH" in line]
    return {name: value for name, _, value in lines}


def test_the_templates_are_written_once_and_never_over_what_a_site_has_changed(call, here):
    code, out, error = call("slurm", "jobs")
    assert code == 0, error
    assert {path.name for path in (here / "jobs").iterdir()} == FILES
    for name in FILES - {"environment.sh"}:
        assert (here / "jobs" / name).read_bytes() == (packaged("slurm") / name).read_bytes()
    assert "sbatch --nodes=N jobs/pretrain.sbatch" in out
    assert call("slurm", "jobs")[0] == 0

    site = here / "jobs" / "environment.sh"
    changed = site.read_text().replace("${SBATCH_PARTITION:=}", "${SBATCH_PARTITION:=mine}")
    site.write_text(changed)
    (here / "jobs" / "scaling.sbatch").unlink()
    code, out, error = call("slurm", "jobs")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "environment.sh" in error
    assert site.read_text() == changed
    assert not (here / "jobs" / "scaling.sbatch").exists()


def test_a_folder_that_cannot_be_written_to_is_one_line(call, here):
    (here / "file").touch()
    code, _, error = call("slurm", "file/jobs")
    assert (code, error.count("\n")) == (2, 1)
    assert "file/jobs" in error


@pytest.fixture
def own_template(call, here) -> Path:
    """A site's own template for shared nodes of four GPUs, which this site asks for with --gres only."""
    assert call("slurm", "slurm")[0] == 0
    path = here / "slurm" / "pretrain.sbatch"
    site = {
        "#SBATCH --gpus-per-node=8": "#SBATCH --gres=scratch:100,gpu:a100:4\n#SBATCH --qos=long",
        "#SBATCH --ntasks-per-node=8": "#SBATCH --ntasks-per-node=4",
        "#SBATCH --mem=0": "#SBATCH --mem=200G",
        "#SBATCH --exclusive\n": "",
    }
    text = path.read_text()
    for line, ours in site.items():
        assert line in text
        text = text.replace(line, ours)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("asked", "gres", "ranks"),
    [
        ([], "scratch:100,gpu:a100:4", "4"),
        (["--gpus-per-node", 2], "scratch:100,gpu:a100:2", "2"),
        (["--gpus-per-node", 0, "--ntasks-per-node", 8], "scratch:100", "8"),
        (["--ntasks-per-node", 1], "scratch:100,gpu:a100:4", "1"),
    ],
)
def test_submit_asks_as_the_sites_own_template_does(call, own_template, asked, gres, ranks):
    code, out, error = call("submit", HUGE, "--nodes", 2, "--out", "runs", "data.root=/d", "--dry-run", *asked)
    assert code == 0, error
    wanted = {"gres": gres, "ntasks-per-node": ranks, "mem": "200G", "qos": "long"}
    assert wanted.items() <= options(out).items()
    assert not {"gpus-per-node", "exclusive"} & options(out).keys()


def test_a_type_of_gpu_stays_and_the_partition_of_the_template_is_looked_for(call, here, own_template, monkeypatch):
    text = own_template.read_text()
    own_template.write_text(text.replace("--gres=scratch:100,gpu:a100:4", "--gpus-per-node=h100:4\n#SBATCH -p x"))
    command = ["submit", HUGE, "--nodes", 2, "--out", "runs", "data.root=/d", "--gpus-per-node", 2]
    code, out, error = call(*command, "--dry-run")
    assert code == 0, error
    assert options(out)["gpus-per-node"] == "h100:2"
    own_template.write_text(text.replace("--qos=long", "--partition=small"))
    for name, lines in (("sinfo", "echo 'large* 9'; echo 'small 1'"), ("sbatch", "exit 1")):
        (here / "bin" / name).write_text(f"#!/bin/bash\n{lines}\n")
        (here / "bin" / name).chmod(0o755)
    code, _, error = call(*command)
    assert code == 2
    assert "partition 'small' has 1 nodes; --partition large has enough" in error


def test_ranks_are_counted_by_the_sites_own_template(call, own_template):
    code, _, error = call("submit", HUGE, "--nodes", 3, "--out", "runs", "data.root=/d", "--dry-run")
    assert code == 2
    assert "3 nodes x 4 ranks" in error


def test_a_file_that_is_no_template_is_refused(call, own_template):
    own_template.write_text("#!/bin/bash\n#SBATCH --nodes=1\nhostname\n")
    code, _, error = call("submit", HUGE, "--nodes", 2, "--out", "runs", "data.root=/d", "--dry-run")
    assert (code, error.count("\n")) == (2, 1)
    assert "slurm/pretrain.sbatch is not one of the templates" in error


class Job:
    """One start of a job of pretrain.sbatch: scontrol, srun and mae-scale note what they are told."""

    RECORD = "   Command={template} demo --out run\n   TresPerNode={tres}\n"

    def __init__(self, folder: Path, call):
        self.folder, self.notes, self.templates = folder, folder / "notes", folder / "jobs"
        self.notes.mkdir()
        assert call("slurm", self.templates)[0] == 0

    def run(self, *, code: int = 0, tres: str = "", job: int = 7, **environment: str) -> subprocess.CompletedProcess:
        """Run the template, its command ending with a code on the rank, which does not see the templates' folder.

        A code of 127: the command is not on this machine.
        """
        (self.folder / "record").write_text(self.RECORD.format(template=self.templates / "pretrain.sbatch", tres=tres))
        bin = programs(
            self.folder / "fakes",
            {
                "scontrol": f'if [ "$2" = job ]; then cat {self.folder}/record; else echo localhost; fi',
                "srun": f'printf "%s\\n" "$@" >{self.notes}/srun; env >{self.notes}/environment; '
                f'while [ "$1" != bash ]; do shift; done; mv {self.templates} {self.folder}/unseen; "$@"',
                "mae-scale": f'printf "%s\\n" "$@" >{self.notes}/mae-scale; exit {code}',
            },
        )
        if code == 127:
            (bin / "mae-scale").unlink()
        slurm = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "localhost", "MAE_SCALE_VENV": "/no"}
        return subprocess.run(
            ["/bin/bash", self.templates / "pretrain.sbatch", "demo", "--out", "run"],
            env={"PATH": f"{bin}:/usr/bin:/bin", **slurm, **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def told(self, program: str) -> list[str]:
        return (self.notes / program).read_text().splitlines()

    def saw(self, name: str) -> str | None:
        """A variable of the environment that srun was called in."""
        return dict(line.partition("=")[::2] for line in self.told("environment")).get(name)


@pytest.fixture
def job(tmp_path, call) -> Job:
    return Job(tmp_path, call)


@pytest.mark.parametrize("code", [0, 2])
def test_a_rank_needs_no_file_beside_it_and_srun_gets_the_sites_options_word_by_word(job, code):
    site = "--mpi=none  --container-image='/my images/mae.sqsh' --container-mounts=/data:/data,$HOME \"--comment=*\""
    ended = job.run(code=code, MAE_SCALE_SRUN_OPTIONS=site)
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert ("refused: not requeued" in ended.stdout) == (code == 2)
    assert job.told("mae-scale") == ["pretrain", "demo", "--out", "run"]
    words = ["--mpi=none", "--container-image=/my images/mae.sqsh", "--container-mounts=/data:/data,$HOME"]
    said = job.told("srun")
    assert said[said.index("--export=ALL") + 1 : said.index("bash")] == [*words, "--comment=*"]


def test_a_container_of_several_words_starts_the_command(job):
    folder = job.folder / "my containers"
    programs(folder, {"run it": f'echo "$1 $2" >{job.notes}/container; shift 2; "$@"'})
    ended = job.run(MAE_SCALE_CONTAINER=f"'{folder}/run it' --bind \"/a  b\"")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert job.told("container") == ["--bind /a  b"]
    assert job.told("mae-scale")[0] == "pretrain"


def test_a_node_without_the_command_is_refused_but_not_where_srun_starts_a_container(job):
    ended = job.run(code=127)
    assert ended.returncode == 2
    assert "mae-scale is not found on" in ended.stdout
    assert not (job.notes / "srun").exists()
    shutil.rmtree(job.folder / "fakes")
    job.run(code=127, MAE_SCALE_SRUN_OPTIONS="--mpi=none --container-image=/images/mae.sqsh")
    assert "--container-image=/images/mae.sqsh" in job.told("srun")


def test_a_quote_without_its_end_is_refused(job):
    ended = job.run(MAE_SCALE_SRUN_OPTIONS="--comment='mine")
    assert ended.returncode == 2
    assert "MAE_SCALE_SRUN_OPTIONS cannot be split into words: --comment='mine" in ended.stderr
    assert not (job.notes / "srun").exists()


def test_the_ranks_meet_at_a_port_that_nobody_listens_at(job):
    with socket.socket() as first, socket.socket(socket.AF_INET6) as second:
        port = next(p for p in range(21000, 32000) if not any(listens(p + i) for i in range(3)))
        first.bind(("0.0.0.0", port))
        second.bind(("::", port + 1))
        first.listen()
        second.listen()
        ended = job.run(job=port - 20000)
    assert ended.returncode == 0, ended.stderr
    assert job.saw("MASTER_PORT") == str(port + 2)


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    ("variable", "tres", "expected"),
    [
        ("8", "gres:gpu:8", "8"),
        ("8", "gres:gpu:8,gres:gpu:a100:4", "a100:4"),
        ("0", "gres:gpu:0,gres:scratch:1,gres:gpu:2", "2"),
        ("0", "gres/gpu:0,gres/gpu:2", "2"),
        ("0", "gres:gpu:0,gres:gpu:2\n   TresPerNode=gres:gpu:0,gres:gpu:2", "2"),
        ("0", "gres:gpu:0", "0"),
        ("8", "", "8"),
        (None, "gres:gpu:4", None),
    ],
)
def test_the_ranks_get_the_gpus_that_the_job_was_given_last(job, variable, tres, expected):
    environment = {} if variable is None else {"SLURM_GPUS_PER_NODE": variable}
    ended = job.run(tres=tres, **environment)
    assert ended.returncode == 0, ended.stderr
    assert job.saw("SLURM_GPUS_PER_NODE") == expected
