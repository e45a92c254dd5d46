"""Draw a sweep of the mask ratio beside what the paper says of it.

    python bench/mask_ratio.py SWEEP/results.json --out mask_ratio.png

SWEEP is the folder of `mae-scale sweep RECIPE model.mask_ratio=... --then probe/...`. Of the paper's curve (He et al.,
figure 5) the text gives linear probing at two ratios, 54.6 % and 73.5 % (ViT-L, ImageNet-1K); more is not drawn.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mae_scale.reports.style import BLUE, GREY, ORANGE, new_figure, save_png

PAPER = {0.1: 54.6, 0.75: 73.5}
LABELS = {"then_top1": ("linear probing", BLUE), "knn_top1": ("k-NN", GREY)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    points = json.loads(options.results.read_text(encoding="utf-8"))["points"]
    figure = new_figure((6.2, 3.6), 120)
    figure.set_layout_engine("constrained")
    ours = figure.subplots()
    paper = ours.twinx()
    for metric, (label, colour) in LABELS.items():
        values = [(100 * float(point["values"]["mask_ratio"]), point["metrics"][metric]["values"]) for point in points]
        ratios, means = [ratio for ratio, _ in values], [statistics.fmean(seeds) for _, seeds in values]
        spread = [statistics.stdev(seeds) if len(seeds) > 1 else 0 for _, seeds in values]
        ours.errorbar(ratios, means, yerr=spread, color=colour, marker="o", markersize=4, capsize=3, label=label)
    paper.plot(
        [100 * ratio for ratio in PAPER], list(PAPER.values()), "D", color=ORANGE, label="linear probing, paper (right)"
    )
    ours.set_xlabel("mask ratio (%)")
    ours.set_ylabel("top-1 (%)")
    paper.set_ylabel("top-1 (%), ViT-L, ImageNet-1K", color=ORANGE)
    paper.set_ylim(50, 78)
    theirs, name = paper.get_legend_handles_labels()
    handles, labels = ours.get_legend_handles_labels()
    figure.legend(handles + theirs, labels + name, frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    ours.spines["top"].set_visible(False)
    paper.spines["top"].set_visible(False)
    save_png(figure, options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
