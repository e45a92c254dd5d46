"""Simulate pre-training on a cluster, event by event, beside the planner's formulas.

    python bench/cluster_sim.py --clusters h100-ib --models ViT-H --ranks 8,64,512,4096
    python bench/cluster_sim.py --points DIR --rates rates.json --cores 2

The first: weak scaling, 64 images per GPU, ZeRO 2. By number of GPUs the time of a step by formula; simulated under the
formula's conditions; and at work, with stragglers, a storage that all share, checkpoints and failures: what share of
the time each of these takes, and which is largest. The second: ranks that share the cores of one machine, beside the
points that `mae-scale scaling run --kind weak` has measured in DIR; of them only that of one rank is taken, and of
rates.json (`mae-scale plan --measure rates.json --nproc 2`) the link between ranks.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster_events import Conditions, Steps, Training, Work, share_lost_to_failures

from mae_scale.config.load import load_recipe
from mae_scale.planning.collectives import Cluster, all_gather_s, all_reduce_s
from mae_scale.planning.failures import RESTART_S, SAVE_S, STORAGE_BYTES_PER_S, failures_of
from mae_scale.planning.hardware import gpu_named, link_named
from mae_scale.planning.memory import Setting
from mae_scale.planning.rates import Rates, cpu_rates, rates_of
from mae_scale.planning.search import candidate, scaling
from mae_scale.planning.step_time import step_time
from mae_scale.planning.workload import Workload
from mae_scale.reports.style import BLUE, DARK, GREY, ORANGE, new_figure, save_png
from mae_scale.reports.throughput import LIGHT_BLUE
from mae_scale.tasks.plan import IMAGE_BYTES, SAVED_BYTES
from mae_scale.tasks.registry import task_of
from mae_scale.tasks.throughput_points import ThroughputPoint, read_points
from mae_scale.tracking.metrics_log import after_warm_up, read_metrics

JITTER, SPREAD = 0.01, 0.02
"""Assumed: of a rank's computing from step to step, and between GPUs."""
RECIPE, IMAGES_PER_GPU, GLOBAL_BATCH = "pretrain/vit_large_800ep", 64, 4096
STEPS = 60
FAILURES = 2000


@dataclass(frozen=True)
class Site:
    """A cluster by its nodes, its links, and the rate at which its storage reads and writes."""

    gpu: str
    gpus_per_node: int
    link: str
    storage_gb_s: float


CLUSTERS = {
    "h100-ib": Site("h100", 8, "infiniband-8x400", 200),
    "a100-ib": Site("a100", 8, "infiniband-8x200", 100),
    "a100-40gb-ib": Site("a100-40gb", 4, "infiniband-200", 50),
    "h100-ethernet": Site("h100", 8, "ethernet-100", 50),
}
MODELS = {
    "ViT-L": [],
    "ViT-H": ["model.name=vit_huge_patch14"],
    # Singh et al. (2023), "The effectiveness of MAE pre-pretraining for billion-scale pretraining": 1.9 billion.
    "ViT-2B": ["model.name=null", "model.patch_size=14", "model.width=2560", "model.depth=24", "model.heads=32"],
}


def workload_of(recipe: str, overrides: list[str]) -> Workload:
    """Return a recipe's workload."""
    loaded = load_recipe(recipe, overrides)
    return task_of(loaded, Path()).workload(1000)


def rates_at(site: Site) -> Rates:
    """Return the rates of a cluster in bf16."""
    gpu = gpu_named(site.gpu)
    return rates_of(gpu, link_named(site.link), link_named(gpu.link), "bf16")


def cluster_of(site: Site, ranks: int) -> Cluster:
    """Return so many ranks of a cluster."""
    return Cluster(max(1, ranks // site.gpus_per_node), min(ranks, site.gpus_per_node))


def work_of(work: Workload, setting: Setting, cluster: Cluster, rates: Rates) -> Work:
    """Return a step as the simulation takes it: ZeRO 0 to 2, computing and optimiser by the planner's formulas."""
    time = step_time(work, setting, cluster, rates)
    compute = (time.products + time.attention + time.elementwise) / setting.accumulation
    size = setting.value_bytes * work.trained
    buckets = -(-work.trained // setting.bucket)
    overlaps = setting.zero_stage == 2
    one = all_gather_s if overlaps else all_reduce_s
    return Work(
        units=cluster.nodes,
        ranks_per_unit=cluster.gpus_per_node,
        forward_s=compute / 3,
        backward_s=compute * 2 / 3,
        passes=setting.accumulation,
        buckets=buckets,
        reduce_s=one(size / buckets, cluster, rates),
        overlaps=overlaps,
        optimizer_s=time.optimizer,
        gather_s=all_gather_s(size, cluster, rates, messages=buckets) if overlaps else 0.0,
        batch_bytes=cluster.gpus_per_node * setting.micro_batch * setting.accumulation * IMAGE_BYTES,
    )


@dataclass(frozen=True)
class Scaled:
    """A number of GPUs: the step by formula and simulated, and the shares of the time that are lost."""

    ranks: int
    formula_s: float
    ideal_s: float
    """Simulated without stragglers, from a storage without limit."""
    steps: Steps
    failures: float
    """Share of the whole time."""

    @property
    def lost(self) -> dict[str, float]:
        """Shares of the time, by cause."""
        steps, left = self.steps, 1 - self.failures
        parts = {
            "stragglers": steps.stragglers,
            "communication": steps.communication,
            "data": steps.data,
            "checkpoints": steps.checkpoint,
        }
        return {name: left * seconds / steps.step for name, seconds in parts.items()} | {"failures": self.failures}

    @property
    def efficiency(self) -> float:
        """Share of the time in which GPUs compute and step."""
        return 1 - sum(self.lost.values())


def simulate(work: Workload, setting: Setting, site: Site, *, seed: int, steps: int = STEPS) -> Scaled:
    """Return the simulation of a setting on a cluster; checkpoints at Young's interval."""
    cluster, rates = cluster_of(site, setting.ranks), rates_at(site)
    ideal = work_of(work, setting, cluster, rates)
    without = Training(ideal, Conditions(), steps=steps, seed=seed).run()
    conditions = Conditions(JITTER, SPREAD, storage_bytes_per_s=1e9 * site.storage_gb_s)
    size = SAVED_BYTES * work.trained
    stall = SAVE_S + size / cluster.ranks / rates.host_bytes_per_s
    young = failures_of(cluster.ranks, stall, shortest_s=size / STORAGE_BYTES_PER_S)
    met = Training(ideal, conditions, steps=steps, seed=seed).run()
    # What a save at one of these steps costs, stall and writing beside reading, is spread over the interval.
    written = {"checkpoint_stall_s": stall, "checkpoint_bytes": size / cluster.nodes}
    saves = replace(ideal, checkpoint_steps=2 * steps // 3, **written)
    cost = steps * (Training(saves, conditions, steps=steps, seed=seed).run().step - met.step)
    per_step = cost * met.step / young.interval_s
    met = replace(met, step=met.step + per_step, checkpoint=per_step)
    lost = share_lost_to_failures(
        mtbf_s=young.mtbf_s,
        interval_s=young.interval_s,
        stall_s=0.0,
        write_s=size / STORAGE_BYTES_PER_S,
        restart_s=RESTART_S,
        failures=FAILURES,
        seed=seed,
    )
    return Scaled(setting.ranks, step_time(work, setting, cluster, rates).total, without.step, met, lost)


def table(found: list[Scaled]) -> list[str]:
    """Return the lines of a table of weak scaling."""
    lines = [
        "   GPUs  formula, ms  simulated, ms  at work, ms  efficiency  " + "  ".join(found[0].lost) + "  largest loss"
    ]
    for one in found:
        shares = "  ".join(f"{share:{len(name)}.1%}" for name, share in one.lost.items())
        lines.append(
            f"{one.ranks:7,}  {1000 * one.formula_s:11.1f}  {1000 * one.ideal_s:13.1f}  {1000 * one.steps.step:11.1f}  "
            f"{one.efficiency:10.1%}  {shares}  {max(one.lost, key=one.lost.__getitem__)}"
        )
    return lines


def strong_line(work: Workload, setting: Setting, site: Site, ranks: list[int]) -> str:
    """Return strong scaling by formula, from the first number of GPUs on."""
    capacity, common = 1e9 * gpu_named(site.gpu).memory_gb, {"gpus_per_node": site.gpus_per_node, "up_to": max(ranks)}
    found = scaling(work, setting, rates_at(site), capacity, global_batch=GLOBAL_BATCH, **common)
    rates = {scale.ranks: scale.images_per_second for scale in found}
    first = rates[ranks[0]] / ranks[0]
    said = (f"{n:,} GPUs {rates[n]:,.0f} images/s ({rates[n] / n / first:.0%})" for n in ranks if n in rates)
    return f"strong, {GLOBAL_BATCH:,} images, by formula: {', '.join(said)}"


def local_steps(points: list[ThroughputPoint], folder: Path, rates: Rates, cores: int, seed: int) -> list[dict]:
    """Return measured and simulated seconds of a step by ranks, without waiting for images.

    Taken from the point of one rank: the time of its step, and how much that varies.
    """
    measured = {point.ranks: point for point in points if point.measured is not None}
    one = measured[1]
    recipe = load_recipe(str(folder / one.name / "recipe.yaml"))
    work = task_of(recipe, Path()).workload(10)
    rows = after_warm_up(read_metrics(folder / one.name / "metrics.jsonl"))
    alone = [row["perf/step_time_s"] - row["perf/data_wait_s"] for row in rows]
    setting = Setting(1, recipe.engine.zero_stage, "fp32", one.measured.micro_batch or 1, compiled=False)
    found = []
    for ranks, point in measured.items():
        step = work_of(work, replace(setting, ranks=ranks), Cluster(1, ranks), rates)
        compute = statistics.median(alone) - work_of(work, setting, Cluster(1, 1), rates).optimizer_s
        step = replace(step, units=ranks, ranks_per_unit=1, forward_s=compute / 3, backward_s=compute * 2 / 3)
        varies = Conditions(jitter=statistics.stdev(alone) / statistics.fmean(alone))
        simulated = Training(step, varies, steps=STEPS, seed=seed, cores=cores).run()
        took = point.measured.step_time_s - point.measured.data_wait_s
        found.append({"ranks": ranks, "measured_s": took, "simulated_s": simulated.step})
    return found


def draw(found: dict[str, list[Scaled]], path: Path, title: str) -> None:
    """Write a PNG of efficiency by the number of GPUs, and of the losses of the last of `found`."""
    figure = new_figure((10, 4), 120)
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2)
    for (name, scaled), colour in zip(found.items(), (GREY, BLUE, ORANGE), strict=False):
        left.plot(
            [one.ranks for one in scaled],
            [100 * one.efficiency for one in scaled],
            marker="o",
            label=name,
            color=colour,
        )
    name, scaled = list(found.items())[-1]
    below = [0.0] * len(scaled)
    for cause, colour in zip(scaled[0].lost, (LIGHT_BLUE, BLUE, ORANGE, GREY, DARK), strict=True):
        heights = [100 * max(0.0, one.lost[cause]) for one in scaled]
        right.bar(range(len(scaled)), heights, bottom=below, color=colour, label=cause, width=0.6)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    right.set_xticks(range(len(scaled)), [f"{one.ranks:,}" for one in scaled], fontsize=8)
    right.set_ylabel(f"share of the time lost (%), {name}")
    left.set_xscale("log", base=2)
    left.set_xticks([one.ranks for one in scaled], [f"{one.ranks:,}" for one in scaled], fontsize=8)
    left.set_ylim(0, 100)
    left.set_ylabel("efficiency (%)")
    for axes, place in ((left, "lower left"), (right, "upper left")):
        axes.set_xlabel("GPUs")
        axes.legend(frameon=False, fontsize=8, loc=place)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    save_png(figure, path)


def setting_for(work: Workload, site: Site, ranks: int, images: int) -> Setting | None:
    """Return ZeRO 2 with the largest micro-batch that fits; None where none does."""
    cluster, rates = cluster_of(site, ranks), rates_at(site)
    for micro in (n for n in range(images, 0, -1) if images % n == 0):
        setting = Setting(cluster.ranks, 2, "bf16", micro, images // micro)
        if candidate(work, setting, cluster, rates, 1e9 * gpu_named(site.gpu).memory_gb).fits:
            return setting
    return None


def on_clusters(options: argparse.Namespace) -> dict:
    """Print weak scaling of each model on each cluster; return the figures."""
    results: dict = {}
    for cluster in options.clusters.split(","):
        site, drawn = CLUSTERS[cluster], {}
        for model in options.models.split(","):
            work = workload_of(RECIPE, MODELS[model])
            found, all_ranks = [], list(map(int, options.ranks.split(",")))
            for ranks in all_ranks:
                setting = setting_for(work, site, ranks, IMAGES_PER_GPU)
                if setting is not None:
                    found.append(simulate(work, setting, site, seed=options.seed))
            print(
                f"{model} on {cluster}: {site.gpus_per_node} {site.gpu} per node, {site.link}, "
                f"storage {site.storage_gb_s:g} GB/s"
            )
            print("\n".join(table(found)) if found else "  does not fit", flush=True)
            print(strong_line(work, Setting(1, 2, "bf16", 1), site, all_ranks), flush=True)
            results[f"{model} on {cluster}"] = [
                {**asdict(one), "efficiency": one.efficiency, "lost": one.lost} for one in found
            ]
            drawn[model] = found
        if options.out is not None:
            draw(drawn, options.out, f"weak scaling on {cluster}, {IMAGES_PER_GPU} images per GPU")
            print(options.out)
    return results


def on_one_machine(options: argparse.Namespace) -> dict:
    """Print measured and simulated steps by ranks; return the figures."""
    rates = cpu_rates(json.loads(options.rates.read_text(encoding="utf-8")), f"--rates {options.rates}")
    found = local_steps(read_points(options.points, {}), options.points, rates, options.cores, options.seed)
    for row in found:
        error = row["simulated_s"] / row["measured_s"] - 1
        print(
            f"{row['ranks']} ranks on {options.cores} cores: measured {1000 * row['measured_s']:.1f} ms per step, "
            f"simulated {1000 * row['simulated_s']:.1f} ms ({error:+.1%})"
        )
    return {"cores": options.cores, "steps": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clusters", default="h100-ib", metavar="NAME,...", help=", ".join(CLUSTERS))
    parser.add_argument("--models", default="ViT-H", metavar="NAME,...", help=", ".join(MODELS))
    parser.add_argument("--ranks", default="8,64,512,4096", metavar="N,...")
    parser.add_argument("--points", type=Path, metavar="DIR")
    parser.add_argument("--rates", type=Path, metavar="FILE")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="PNG of the last cluster")
    options = parser.parse_args()
    results = on_clusters(options) if options.points is None else on_one_machine(options)
    if options.json is not None:
        command = " ".join(["python bench/cluster_sim.py", *sys.argv[1:]])
        options.json.write_text(json.dumps({"command": command, **results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
