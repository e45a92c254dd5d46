"""The peak arithmetic of GPUs, from their data sheets."""

from __future__ import annotations

# Dense peak of the tensor cores in TFLOP/s (bf16, fp16, accumulating in fp32), and of plain fp32, not TF32,
# from NVIDIA's data sheets. The first name that the device's name contains wins: the longer ones come first.
_PEAK_TFLOPS = (
    ("B200", {"bf16": 2250.0, "fp16": 2250.0, "fp32": 75.0}),
    ("H200", {"bf16": 989.0, "fp16": 989.0, "fp32": 67.0}),
    ("GH200", {"bf16": 989.0, "fp16": 989.0, "fp32": 67.0}),
    ("H100 PCIe", {"bf16": 756.0, "fp16": 756.0, "fp32": 51.0}),
    ("H100 NVL", {"bf16": 835.0, "fp16": 835.0, "fp32": 60.0}),
    ("H100", {"bf16": 989.0, "fp16": 989.0, "fp32": 67.0}),
    ("A100", {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5}),
    ("A40", {"bf16": 149.7, "fp16": 149.7, "fp32": 37.4}),
    ("A30", {"bf16": 165.0, "fp16": 165.0, "fp32": 10.3}),
    ("L40S", {"bf16": 362.0, "fp16": 362.0, "fp32": 91.6}),
    ("V100", {"fp16": 125.0, "fp32": 15.7}),
    ("Tesla T4", {"fp16": 65.0, "fp32": 8.1}),
)


def peak_flops_per_s(device_name: str, precision: str = "bf16") -> float | None:
    """Return a GPU's dense peak in FLOP/s by its `torch.cuda.get_device_name()`, for "bf16", "fp16" or "fp32".

    None for a device that is not in the table, or has no units for that precision (bf16 on V100).
    """
    for name, tflops in _PEAK_TFLOPS:
        if name in device_name:
            return tflops[precision] * 1e12 if precision in tflops else None
    return None
