"""One rank that trains under each case and counts the bytes of all tensors that are alive between two steps.

Run by test_planned_states.py: CASES.json OUT.json; each case is a list of overrides of the demo.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from mae_scale.config.load import load_recipe
from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import leave, ranks_from_environment
from mae_scale.engines.policy import layout_of
from mae_scale.engines.select import scale_out
from mae_scale.models.build import build_model
from mae_scale.tasks.mae.objective import Reconstruct

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


def states_of_case(overrides: list[str], ranks: int, device: torch.device) -> int:
    gc.collect()
    before = alive()
    recipe = load_recipe("demo", overrides)
    layout = layout_of(recipe, ranks)
    engine = scale_out(Reconstruct(build_model(recipe), seed=0), recipe, layout, device)
    for _ in range(2):
        micro_batches = [
            (torch.randn(layout.micro_batch, 3, 32, 32), torch.rand(layout.micro_batch, 64))
            for _ in range(layout.accumulation)
        ]
        engine.train_step(iter(micro_batches), 1e-4)
    del micro_batches
    gc.collect()
    size = sum(nbytes for storage, nbytes in alive().items() if storage not in before)
    engine.close()
    return size


def main() -> None:
    cases, out = sys.argv[1:]
    place = ranks_from_environment()
    with process_group(place, 120) as device:
        found = {
            name: states_of_case(overrides, place.world_size, device)
            for name, overrides in json.loads(Path(cases).read_text()).items()
        }
    if place.rank == 0:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    leave(0)
