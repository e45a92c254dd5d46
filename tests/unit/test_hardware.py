"""The peaks of GPUs."""

import pytest

from mae_scale.planning.hardware import peak_flops_per_s


@pytest.mark.parametrize(
    ("device", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA B200", "bf16", 2250),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA GeForce RTX 9999", "bf16", None),
    ],
)
def test_peaks_are_known_by_device_name(device, precision, tflops):
    expected = None if tflops is None else tflops * 1e12
    assert peak_flops_per_s(device, precision) == expected
