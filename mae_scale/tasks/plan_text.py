"""A plan as text: what `mae-scale plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from mae_scale.planning.hardware import Gpu, gpu_of_device
from mae_scale.planning.search import HOST_MEMORY, Candidate
from mae_scale.tasks.plan import GIB, IMAGE_BYTES, SAVED_BYTES, Plan

WORTH_A_LINE = 1.05
"""A setting that is faster by more than this is named beside a job."""


def plan_lines(plan: Plan) -> list[str]:
    """Return the plan as text, line by line."""
    asked, one, best = plan.asked, plan.as_is, plan.best
    cluster, gpu = asked.cluster, asked.gpu
    between = f", {asked.link.name} between nodes" if cluster.nodes > 1 else ""
    lines = [
        f"{asked.name} on {cluster.nodes} x {cluster.gpus_per_node} {gpu.name} "
        f"({gpu.memory_gb:g} GB, {gpu.link}{between}){_other_device(plan)}",
        "",
        f"as it stands  {_said(one)}: {_fit(one, gpu)}",
        f"              {_time(plan, one)}",
    ]
    if best is None:
        lines += ["nothing fits; what would have to change, in order of cost:", *(f"  {line}" for line in plan.larger)]
    else:
        same = overrides_of(plan, best) == overrides_of(plan, one)
        lines += [f"recommended   {'the same' if same else overrides_of(plan, best)}"]
        if not same:
            lines += [f"              {_fit(best, gpu)}; {_why(plan, best)}", f"              {_time(plan, best)}"]
    shown = best or one
    lines += ["", "memory per GPU, GiB   " + _parts(asdict(shown.memory), GIB, "{:.1f}", shown.memory.total)]
    lines += ["time of a step, ms    " + _parts(asdict(shown.time), 1e-3, "{:.1f}", shown.time.total)]
    rate = shown.images_per_second
    lines += [
        f"data                  {rate:,.0f} files/s, {rate * IMAGE_BYTES / 1e6:,.0f} MB/s of JPEG over all nodes",
        f"checkpoint            {SAVED_BYTES * plan.work.trained / 1e9:.1f} GB, "
        f"{SAVED_BYTES * plan.work.trained / 1e9 / cluster.ranks:.2f} GB per GPU",
        _failures(plan),
        "",
        *_table(
            ["ZeRO", "checkpointing", "largest micro-batch", "GiB", "images/s", ""],
            [
                [
                    f"{c.setting.zero_stage}{' offload' * c.setting.offload}",
                    str(c.setting.checkpointing),
                    str(c.setting.micro_batch),
                    f"{c.memory.total / GIB:.1f}",
                    f"{c.images_per_second:,.0f}",
                    "" if c.fits else "does not fit",
                ]
                for c in plan.choices
            ],
        ),
        "",
        *_scaling_table(plan),
        "",
    ]
    measured = ", ".join(sorted(plan.rates.measured)) or "nothing"
    lines.append(f"measured: {measured}; all other rates are of data sheets, with assumed shares (docs/planning.md)")
    return lines


def fit_of(plan: Plan) -> str:
    """Return whether the recipe fits as it stands, its memory and its setting."""
    return f"{_fit(plan.as_is, plan.asked.gpu)}: {_said(plan.as_is)}"


def _other_device(plan: Plan) -> str:
    """Return that the rates are of another device than the one planned for, where it is known."""
    device = plan.rates.measured_on
    return "" if device is None or gpu_of_device(device) is plan.asked.gpu else f", by rates measured on {device}"


def plan_summary(plan: Plan) -> list[str]:
    """Return the plan of the recipe as it stands in three lines, and a fourth where another setting is faster."""
    one, best = plan.as_is, plan.best
    lines = [
        f"memory     {fit_of(plan)}",
        f"hours      {plan.hours(one):,.1f} for ImageNet-1K's {plan.images:,} images, {_step(one)}",
        f"GPU hours  {plan.gpu_hours(one):,.0f}",
    ]
    if one.fits and best is not None and one.time.total > WORTH_A_LINE * best.time.total:
        lines.append(f"faster     by {one.time.total / best.time.total - 1:.0%}: {overrides_of(plan, best)}")
    return lines


def _failures(plan: Plan) -> str:
    found, shown = plan.failures, plan.best or plan.as_is
    steps = max(1, round(found.interval_s / shown.time.total))
    return (
        f"failures              one per {found.mtbf_s / 3600:,.0f} h; checkpoint.every_steps={steps} "
        f"({found.interval_s / 60:,.1f} min) loses least, {found.lost:.2%} of the time"
    )


def _said(one: Candidate) -> str:
    setting = one.setting
    times = f" x {setting.accumulation}" if setting.accumulation > 1 else ""
    return (
        f"ZeRO {setting.zero_stage}{', offload' * setting.offload}, {setting.precision}, "
        f"micro-batch {setting.micro_batch}{times}, checkpointing {setting.checkpointing}"
    )


def _fit(one: Candidate, gpu: Gpu) -> str:
    verdict, capacity = "fits" if one.fits else "does not fit", gpu.memory_gb * 1e9
    lacks_host = not one.fits and one.memory.total <= capacity
    host = f" and more than {HOST_MEMORY / 1e9:.0f} GB of the node's own" if lacks_host else ""
    return f"{verdict}, {one.memory.total / GIB:.1f} of {capacity / GIB:.1f} GiB{host}"


def _time(plan: Plan, one: Candidate) -> str:
    gpu_hours = plan.gpu_hours(one)
    return (
        f"{_step(one)}, {one.images_per_second:,.0f} images/s; {plan.hours(one):,.1f} h, "
        f"{gpu_hours:,.0f} GPU hours, {gpu_hours * plan.rates.power_w / 1000:,.0f} kWh at full power"
    )


def _step(one: Candidate) -> str:
    return f"{1000 * one.time.total:,.1f} ms per step"


def _why(plan: Plan, best: Candidate) -> str:
    if not plan.as_is.fits:
        return "the fastest that fits"
    gain = plan.as_is.time.total / best.time.total - 1
    return f"{gain:.0%} faster" if gain > 0.005 else "as fast, and simpler"


def _parts(parts: dict[str, float], unit: float, shape: str, total: float) -> str:
    said = [f"{name} {shape.format(value / unit)}" for name, value in parts.items() if value > 0]
    return f"{shape.format(total / unit)}: {', '.join(said)}"


def _scaling_table(plan: Plan) -> list[str]:
    strong = {scale.ranks: scale for scale in plan.strong}
    rows = []
    for scale in plan.weak:
        other = strong.get(scale.ranks)
        rows.append(
            [
                f"{scale.ranks:,}",
                f"{scale.images_per_second:,.0f}",
                f"{scale.efficiency:.0%}",
                f"{other.images_per_second:,.0f}" if other else "",
                f"{other.efficiency:.0%}" if other else "",
            ]
        )
    batch = plan.asked.recipe.data.global_batch
    return _table(["GPUs", "weak: images/s", "efficiency", f"strong ({batch:,} images): images/s", "efficiency"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]


def overrides_of(plan: Plan, one: Candidate) -> str:
    """Return a setting as overrides of the planned recipe, with those that take back what would be against it."""
    setting, engine = one.setting, plan.asked.recipe.engine
    said = f"engine.zero_stage={setting.zero_stage} engine.micro_batch={setting.micro_batch}"
    said += f" engine.activation_checkpointing={setting.checkpointing}"
    if setting.offload != engine.offload and engine.config is None:
        said += f" engine.offload={str(setting.offload).lower()}"
    return said + (" engine.compile=null" if engine.compile and setting.zero_stage == 3 else "")
