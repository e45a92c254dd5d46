"""How long training stands still for a checkpoint: saved in the background beside saved synchronously.

One rank trains a ViT (--width, --depth) with AdamW on random images and saves every few steps, the two ways by
turns. Printed and written as JSON: the seconds a save takes out of training, the seconds until the file is whole
and on the disk, and the step time while a save is under way beside the step time without one.
    python bench/checkpoint_stall.py --out bench/results/NAME.json
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from mae_scale.checkpoints.save import Saver
from mae_scale.checkpoints.store import Retention
from mae_scale.config.load import load_recipe
from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import ranks_from_environment
from mae_scale.engines.policy import layout_of
from mae_scale.engines.select import scale_out
from mae_scale.models.build import build_model
from mae_scale.tasks.mae.objective import Reconstruct

STEPS_BETWEEN = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--saves", type=int, default=6, help="of each kind")
    parser.add_argument("--folder", type=Path, help="where to save; by default a temporary folder")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    overrides = [
        "model.image_size=64",
        "model.patch_size=16",
        f"model.width={options.width}",
        f"model.depth={options.depth}",
        f"model.heads={options.width // 64}",
        "model.decoder_width=64",
        "model.decoder_depth=1",
        "engine.activation_checkpointing=none",
        "data.global_batch=8",
    ]
    recipe = load_recipe("demo", overrides)
    ranks = ranks_from_environment()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, process_group(ranks, 600) as device:
        result = measure(recipe, ranks, device, Path(folder), options.saves)
    report(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(recipe, ranks, device, folder: Path, saves: int) -> dict:
    objective = Reconstruct(build_model(recipe), seed=0)
    layout = layout_of(recipe, ranks.world_size)
    engine = scale_out(objective, recipe, layout, device)
    batch = [torch.randn(8, 3, 64, 64, device=device), torch.rand(8, 16, device=device)]

    def step() -> float:
        began = time.perf_counter()
        engine.train_step([tuple(batch)], 1e-4).loss.item()
        return time.perf_counter() - began

    savers = {
        kind: Saver(folder / kind, Retention(keep=1), background=kind == "background", timeout_s=600)
        for kind in ("background", "synchronous")
    }
    for _ in range(3):
        step()
    alone, beside, number = [], [], 0
    for _ in range(saves + 1):
        for kind, saver in savers.items():
            alone += [step() for _ in range(STEPS_BETWEEN)]
            number += 1
            saver.save(engine.state(), {"step": number, "epoch": 0.0, "loss": None})
            while kind == "background" and saver.is_writing():
                beside.append(step())
            saver.wait()
    size = sum(piece.data.numel() * piece.data.element_size() for piece in engine.state().own)
    engine.close()
    # The first save of each kind, which makes the host buffers, is not counted but told.
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), {device}",
        "torch": torch.__version__,
        "state_mib": round(size / 2**20, 1),
        "step_alone_s": statistics.median(alone),
        "step_while_saving_s": statistics.median(beside) if beside else None,
        "first_stall_s": savers["background"].times[0].stall_s,
        **{
            kind: {
                what: {"median": statistics.median(values), "min": min(values), "max": max(values)}
                for what in ("stall_s", "total_s")
                for values in [[getattr(t, what) for t in saver.times[1:]]]
            }
            for kind, saver in savers.items()
        },
    }


def report(result: dict) -> None:
    print(f"{result['machine']}; a state of {result['state_mib']} MiB on this rank")
    print(f"{'':12} {'training stands still':>24} {'whole on the disk after':>26}   (median s, min to max)")
    for kind in ("background", "synchronous"):
        cells = [
            f"{v['median']:8.3f} ({v['min']:.3f}-{v['max']:.3f})"
            for v in (result[kind][w] for w in ("stall_s", "total_s"))
        ]
        print(f"{kind:12} {cells[0]:>24} {cells[1]:>26}")
    ratio = result["synchronous"]["stall_s"]["median"] / result["background"]["stall_s"]["median"]
    print(f"a background save holds training up {ratio:.1f}x less; the first one took {result['first_stall_s']:.3f} s")
    beside = result["step_while_saving_s"]
    print(
        f"a step takes {result['step_alone_s']:.3f} s" + (f", {beside:.3f} s while a save is written" if beside else "")
    )


if __name__ == "__main__":
    main()
