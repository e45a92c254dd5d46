"""`mae-scale submit`: render the Slurm templates for a chain of recipes, and send each link after the one before."""

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.errors import RunError, UsageError
from mae_scale.config.load import load_recipe
from mae_scale.config.schema import DENSE, STARTING, TASKS_WITH_SECTION, Recipe
from mae_scale.engines.policy import layout_of, refuse_wrong_combinations
from mae_scale.launch.job_plan import Nodes, check_hardware, job_plan
from mae_scale.launch.slurm_templates import (
    PROLOGUE,
    ask_for_gpus,
    find_template,
    gpu_type_of,
    gpus_of,
    render,
    sbatch_options,
)
from mae_scale.launch.transfer_check import refuse_other_model, without_weights, without_words
from mae_scale.models.targets import WORDS
from mae_scale.tasks.registry import TASKS, task_of
from mae_scale.tracking.mlflow_uri import hide_password
from mae_scale.training.preflight import training_augmentation

NO_SLURM = "Slurm is not found here (no sbatch and sinfo on PATH); run this on a login node of the cluster"
# What sbatch would read from the environment, above what the rendered script says.
SBATCH_VARIABLES = {"partition": "SBATCH_PARTITION", "account": "SBATCH_ACCOUNT", "time": "SBATCH_TIMELIMIT"}
SITE_VARIABLES = {**SBATCH_VARIABLES, "gpu": "MAE_SCALE_GPU", "link": "MAE_SCALE_LINK"}


@dataclass(frozen=True)
class Shape:
    """The resources that each link asks Slurm for; None leaves them to the site, the template and the cluster."""

    nodes: int
    gpus_per_node: int | None = None
    ntasks_per_node: int | None = None
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    gpu: str | None = None
    """What the nodes have, for planning."""
    link: str | None = None
    """Between the nodes, for planning."""

    @property
    def ranks(self) -> int:
        return self.nodes * (self.ntasks_per_node or 1)

    def on(self, template: str) -> "Shape":
        """Return the shape with a template's values for what is None; one rank per GPU where GPUs are given here."""
        lines = sbatch_options(template)
        gpus = gpus_of(lines) if self.gpus_per_node is None else self.gpus_per_node
        ntasks = lines.get("ntasks-per-node", "") if self.gpus_per_node is None else ""
        return replace(
            self,
            gpus_per_node=gpus,
            ntasks_per_node=self.ntasks_per_node or (int(ntasks) if ntasks.isdecimal() else gpus or 1),
            partition=self.partition or lines.get("partition"),
            gpu=self.gpu or gpu_type_of(lines),
        )

    def options(self, template: str) -> dict[str, str | int | None]:
        """Return sbatch's options by name; None removes the template's line, an option not listed keeps it."""
        given = {"cpus-per-task": self.cpus_per_task}
        given |= {name: getattr(self, name) for name in SBATCH_VARIABLES}
        return {
            "nodes": self.nodes,
            **ask_for_gpus(sbatch_options(template), self.gpus_per_node or 0),
            "ntasks-per-node": self.ntasks_per_node,
            **{name: value for name, value in given.items() if value is not None},
        }


@dataclass(frozen=True)
class Place:
    """Where a job's run and its files go."""

    label: str
    """For the job's name."""
    folder: Path
    files: Path
    """Beginning of the paths of its script and logs."""


@dataclass(frozen=True)
class Link:
    """One job of the chain: its recipe, its folder, its script and the script's text."""

    name: str
    recipe: Recipe
    out: Path
    script: Path
    text: str
    shape: Shape

    @property
    def nodes(self) -> Nodes:
        """The nodes that it asks for."""
        shape = self.shape
        return Nodes(shape.nodes, shape.gpus_per_node or 0, shape.ntasks_per_node or 1, shape.gpu, shape.link)


def submit(words: list[str], shape: Shape, out: Path, *, dry_run: bool, force: bool) -> None:
    """Check, plan, render and send the chain of the recipes in `words`; what holds an = is an override for all of them.

    Those of a section that not all tasks have, such as classifier, are for those that have it. What needs weights and
    has none set starts from the link before it (a detector or a segmenter from the last that is neither), and what
    predicts words and has no tokeniser set takes that of the last link before it that trains one. force: send also what
    does not fit by its plan. Raises UsageError before anything is sent, RunError when sbatch refuses a link after all.
    """
    names = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    if not names:
        raise UsageError("no recipe given; expected one or more, such as pretrain/vit_huge_1600ep")
    refuse_password(overrides)
    out = out.absolute()
    prologue = find_template(PROLOGUE)
    shape = with_site(shape, prologue)
    check_hardware(shape.gpu, shape.link)
    links: list[Link] = []
    for name in names:
        path = Path(name)
        label = path.stem if path.is_file() else name.replace("/", "-")
        place = Place(label, out / label, out / "slurm" / f"{len(links) + 1}-{label}")
        links.append(make_link(name, overrides, shape, place, links))
    for override in overrides:
        if not any(_takes(link.recipe.task, override) for link in links):
            tasks = " or ".join(TASKS_WITH_SECTION[_section(override)])
            raise UsageError(f"'{override}' is for task {tasks}; found {', '.join(names)}")
    _refuse_shared_folders(links)
    plans = dict.fromkeys("\n".join(job_plan(link.name, link.recipe, link.nodes, force=force)) for link in links)
    slurm = shutil.which("sbatch") is not None and shutil.which("sinfo") is not None
    if slurm and dry_run:
        slurm = _run(["sinfo", "--noheader"]).returncode == 0  # installed, but no cluster answers
    if slurm:
        check_partitions(links)
    elif not dry_run:
        raise UsageError(f"{NO_SLURM}, or add --dry-run, which works without")
    print("".join(f"{plan}\n" for plan in plans if plan), end="")
    if dry_run:
        for number, link in enumerate(links):
            after = f"JOB_ID_{number}" if number else None
            print(f"# {link.script}\n# {shlex.join(_sbatch(link, after))}\n{link.text}")
        print(f"dry run: nothing written or sent{'' if slurm else '; no Slurm answers here, partition not checked'}")
        return
    write(links, prologue)
    jobs = send(links)
    print(f"scripts and logs in {links[0].script.parent}; squeue --jobs={','.join(jobs)} shows them")


def refuse_password(overrides: list[str]) -> None:
    """Raise UsageError for overrides with a password, which would stand in the scripts."""
    if hide_password(overrides)[1]:
        raise UsageError(
            "tracking.uri holds a password, which would stand in the scripts; leave it out there, and export the whole "
            "URI as MLFLOW_TRACKING_URI (or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD): jobs inherit them"
        )


def check(recipe: Recipe, name: str, shape: Shape, out: Path, start: Link | None = None) -> None:
    """Raise UsageError for all that can be refused before a job waits in a queue.

    `out` is the job's folder, `start` the link whose weights or tokeniser, not there yet, the recipe takes.
    """
    try:
        if recipe.data.root is None:
            raise UsageError("data.root is not set; add data.root=/path/to/train, as the nodes see it")
        layout = layout_of(recipe, shape.ranks)
        refuse_wrong_combinations(recipe, gpu=bool(shape.gpus_per_node))
        if start is not None and recipe.model.target == WORDS:
            if start.recipe.task != "dvae":
                raise UsageError(f"{start.name} trains no tokeniser; give tokeniser.weights of task dvae")
            recipe = without_words(recipe)
        elif start is not None:
            refuse_other_model(start.name, start.recipe, recipe)
            recipe = without_weights(recipe)
        task_of(recipe, out).check(layout)
        training_augmentation(recipe)
    except UsageError as error:
        raise UsageError(f"{name} on {shape.nodes} nodes x {shape.ntasks_per_node} ranks: {error}") from None


def check_partitions(links: list[Link]) -> None:
    """Raise UsageError when a link asks for a partition that does not exist or is too small."""
    for shape in dict.fromkeys(link.shape for link in links):
        check_partition(shape)


def check_partition(shape: Shape) -> None:
    """Raise UsageError when the partition does not exist or has fewer nodes than asked for."""
    listed = _run(["sinfo", "--noheader", "--format=%P %D"])
    if listed.returncode:
        raise UsageError(f"sinfo failed: {_last_line(listed.stderr)}; is the cluster up?")
    sizes: dict[str, int] = {}
    default = None
    for partition, nodes in (line.split() for line in listed.stdout.splitlines()):
        name = partition.rstrip("*")
        default = name if partition.endswith("*") else default
        sizes[name] = sizes.get(name, 0) + int(nodes)
    wanted = (shape.partition or default or "").split(",")
    unknown = [name for name in wanted if name not in sizes]
    if unknown:
        found = f"partition '{unknown[0]}' is not there" if unknown[0] else "this cluster has no default partition"
        raise UsageError(f"{found}; choose --partition among {', '.join(sizes)}")
    largest = max(wanted, key=sizes.__getitem__)
    if shape.nodes > sizes[largest]:
        larger = [name for name, size in sizes.items() if size >= shape.nodes]
        raise UsageError(
            f"--nodes {shape.nodes}: partition '{largest}' has {sizes[largest]} nodes"
            + (f"; --partition {' or '.join(larger)} has enough" if larger else "; ask for fewer")
        )


def write(links: list[Link], prologue: Path) -> None:
    """Write the scripts and their prologue into DIR/slurm."""
    folder = links[0].script.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PROLOGUE).write_bytes(prologue.read_bytes())
        for link in links:
            link.script.write_text(link.text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out {folder.parent} cannot be written to: {error.strerror}") from None


def send(links: list[Link]) -> list[str]:
    """Send each link to run after the one before, and return the jobs' ids; cancel all when one is refused.

    Slurm is asked first whether it could ever run them: it may take a shape that no node has, and let it wait for ever.
    """
    for link in links:
        tested = _run(["sbatch", "--test-only", str(link.script)])
        if tested.returncode:
            raise UsageError(f"{link.script} cannot run on this cluster: {_last_line(tested.stderr)}; nothing was sent")
    jobs: list[str] = []
    for number, link in enumerate(links, start=1):
        sent = _run(_sbatch(link, jobs[-1] if jobs else None))
        if sent.returncode:
            if jobs:
                _run(["scancel", *jobs])
            raise RunError(
                f"sbatch refused link {number}, {link.name}: {_last_line(sent.stderr)}"
                + (f"; cancelled the links before it ({', '.join(jobs)})" if jobs else "")
            )
        after = f", after {jobs[-1]}" if jobs else ""
        jobs.append(sent.stdout.strip().partition(";")[0])  # JOB or JOB;CLUSTER
        print(f"job {jobs[-1]}{after}: {link.name} -> {link.out}")
    return jobs


def make_link(name: str, overrides: list[str], shape: Shape, place: Place, before: list[Link]) -> Link:
    """Return the link after those `before`, checked. Raises UsageError for what can be refused now."""
    task = load_recipe(name).task
    overrides = [override for override in overrides if _takes(task, override)]
    recipe = load_recipe(name, overrides)
    if recipe.start is not None and recipe.start.weights is None and not recipe.start.from_scratch:
        key = f"{STARTING[task]}.weights"
        source = _source(task, before)
        if source is None:
            raise UsageError(
                f"{name} has no weights to start from; put the recipe that trains them before it, or add "
                f"{key}=PATH (a run's folder, a checkpoint or a file of weights)"
            )
        overrides.append(f"{key}={source.out}")
        recipe = load_recipe(name, overrides)
    taken = recipe.start.weights if recipe.start is not None else None
    if recipe.model.target == WORDS:
        tokenisers = [link for link in before if link.recipe.task == "dvae"]
        if tokenisers and (recipe.tokeniser is None or recipe.tokeniser.weights is None):
            overrides.append(f"tokeniser.weights={tokenisers[-1].out}")
            recipe = load_recipe(name, overrides)
        taken = recipe.tokeniser.weights if recipe.tokeniser else None
    start = next((link for link in before if taken and link.out == taken.absolute()), None)
    template = _template(f"{TASKS[recipe.task].command}.sbatch")
    shape = shape.on(template)
    # A recipe of one's own is found from any directory; a packaged one by its name.
    given = str(Path(name).absolute()) if Path(name).is_file() else name
    check(recipe, name, shape, place.folder, start)

    options = {**shape.options(template), "job-name": f"mae-{place.label}", "output": f"{place.files}-%j.log"}
    text = render(template, options, [given, "--out", str(place.folder), *overrides])
    return Link(name, recipe, place.folder, script=Path(f"{place.files}.sbatch"), text=text, shape=shape)


def _source(task: str, before: list[Link]) -> Link | None:
    """Return the link that a task starts from: the one before it, or of dense tasks the last that is none."""
    if task in DENSE:
        before = [link for link in before if link.recipe.task not in DENSE]
    return before[-1] if before else None


def _template(name: str) -> str:
    """Return the text of a template, the site's own or the package's."""
    path = find_template(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if "run_job" not in text or not sbatch_options(text):
        raise UsageError(f"{path} is not one of the templates that `mae-scale slurm` writes; move it away")
    return text


def _takes(task: str, override: str) -> bool:
    """Return whether recipes of a task take an override: not that of a section which only other tasks have."""
    return task in TASKS_WITH_SECTION.get(_section(override), (task,))


def _section(override: str) -> str:
    return override.partition("=")[0].partition(".")[0]


def _refuse_shared_folders(links: list[Link]) -> None:
    for number, link in enumerate(links):
        for other in links[:number]:
            if link.out == other.out:
                raise UsageError(
                    f"{other.name} and {link.name} would both write to {link.out}; give each recipe once: "
                    "a job that meets its time limit goes on by itself"
                )


def _sbatch(link: Link, after: str | None) -> list[str]:
    # A requeued job keeps its id, so afterok waits for its real end. Without --kill-on-invalid-dep a link after one
    # that failed would wait for ever.
    dependency = [] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return ["sbatch", "--parsable", *dependency, str(link.script)]


def with_site(shape: Shape, prologue: Path) -> Shape:
    """Return the shape with the values of the prologue or the environment where no option gave one."""
    names = " ".join(f'"${{{variable}:-}}"' for variable in SITE_VARIABLES.values())
    told = subprocess.run(
        ["bash", "-euc", f'source "$1"; printf "%s\\n" {names}', "bash", prologue.absolute()],
        capture_output=True,
        text=True,
    )
    if told.returncode:
        raise UsageError(f"{prologue} cannot be read by bash: {_last_line(told.stderr)}")
    site = dict(zip(SITE_VARIABLES, told.stdout.splitlines()[-len(SITE_VARIABLES) :], strict=True))
    return Shape(**{**vars(shape), **{k: v or None for k, v in site.items() if getattr(shape, k) is None}})


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in SBATCH_VARIABLES.values()}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
