"""Write the curve of a packaged recipe from a run of it, for `mae-scale compare`.

    python bench/reference_curve.py RUN RECIPE "two CPU cores, digits"

RUN is a finished run of the recipe; the third argument is what it ran on. The curve lies beside the recipe.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mae_scale.config.load import load_recipe
from mae_scale.config.schema import differing_keys
from mae_scale.tracking.metrics_log import read_metrics
from mae_scale.training.reference_curves import curve, curve_file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("ran_on")
    options = parser.parse_args()
    recipe, rows = load_recipe(str(options.run / "recipe.yaml")), read_metrics(options.run / "metrics.jsonl")
    if different := differing_keys(load_recipe(options.recipe), recipe):
        sys.exit(f"{options.run} is not a run of {options.recipe}: {'; '.join(different)}")
    if rows[-1]["epoch"] != recipe.schedule.epochs:
        sys.exit(f"{options.run} has {rows[-1]['epoch']:g} of {recipe.schedule.epochs} epochs")
    found = {
        metric: [None if value is None else float(f"{value:.5g}") for value in values]
        for metric, values in curve(rows).items()
    }
    lines = [f"  {json.dumps(metric)}: {json.dumps(values)}" for metric, values in found.items()]
    content = f'{{"ran_on": {json.dumps(options.ran_on)}, "curve": {{\n' + ",\n".join(lines) + "\n}}\n"
    curve_file(options.recipe).write_text(content, encoding="utf-8")
    print(curve_file(options.recipe))
    return 0


if __name__ == "__main__":
    sys.exit(main())
