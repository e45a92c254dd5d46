"""How fast is this machine itself? Square bf16 matrix products of random data, and copies of memory.

python bench/rates.py [--json rates.json]
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import torch
from report import machine, show
from timing import matrix_product, quartiles, seconds

COPY_MIB = {"cpu": 64, "cuda": 4096}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog="example: python bench/rates.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    product, side = matrix_product("bf16", device)
    times = 20 if device.type == "cuda" else 1
    matrices = quartiles([2 * side**3 / seconds(product, times, device) / 1e12 for _ in range(5)])
    data = torch.empty(COPY_MIB[device.type] * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(data)
    copies = quartiles([2 * data.numel() / seconds(lambda: target.copy_(data), 10, device) / 1e9 for _ in range(5)])
    report = {"command": shlex.join(["python", *sys.argv]), **machine(device), "matrix_side": side}
    report |= {"matrix_tflops_per_s": matrices, "copy_gbytes_per_s": copies}
    print(report["device"])
    quoted = [
        [f"{found[q]:.4g}" for q in ("median", "lower_quartile", "upper_quartile")] for found in (matrices, copies)
    ]
    head = ["", "median", "lower quartile", "upper quartile"]
    names = [f"{side} x {side} products in bf16, TFLOP/s", f"copy of {COPY_MIB[device.type]} MiB, read + written, GB/s"]
    show(head, [[name, *cells] for name, cells in zip(names, quoted, strict=True)])
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
