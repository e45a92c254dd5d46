"""One rank that trains under each case and counts the bytes of all tensors that are alive between two steps.

Run by test_planned_states.py: CASES.json OUT.json; each case is a recipe and overrides of it.
"""

import gc
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from mae_scale.config.load import load_recipe
from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import leave, ranks_from_environment
from mae_scale.engines.policy import layout_of
from mae_scale.engines.select import scale_out
from mae_scale.tasks.registry import task_of

SCALAR_BYTES = 8


def alive() -> dict[int, int]:
    """Bytes of every storage that a Python object holds, but for scalars."""
    found = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and one.device.type != "meta":
            for tensor in (one, one.grad if one.is_leaf else None):
                if tensor is not None and tensor.untyped_storage().nbytes() > SCALAR_BYTES:
                    found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return found


def states_of_case(case: list[str], ranks: int, device: torch.device) -> int:
    gc.collect()
    before = alive()
    recipe = load_recipe(case[0], case[1:])
    layout = layout_of(recipe, ranks)
    objective = task_of(recipe, Path()).build(None)  # none of these asks for the images
    views, decay = (2, 0.99) if objective.followers else (1, None)
    engine = scale_out(objective, recipe, layout, device)
    for step in range(2):
        drawn = objective.draw(step, np.arange(layout.micro_batch))
        micro_batches = [
            (*torch.randn(views, layout.micro_batch, 3, 32, 32).unbind(), *drawn) for _ in range(layout.accumulation)
        ]
        engine.train_step(iter(micro_batches), 1e-4, decay)
    del micro_batches, drawn
    sizes = []
    for _ in range(4):  # gloo's threads may hold what they have just reduced for a moment longer
        time.sleep(0.05)
        gc.collect()
        sizes.append(sum(nbytes for storage, nbytes in alive().items() if storage not in before))
    engine.close()
    return min(sizes)


def main() -> None:
    cases, out = sys.argv[1:]
    place = ranks_from_environment()
    with process_group(place, 120) as device:
        found = {
            name: states_of_case(case, place.world_size, device)
            for name, case in json.loads(Path(cases).read_text()).items()
        }
    if place.rank == 0:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    leave(0)
