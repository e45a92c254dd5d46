"""The batch layout of a recipe, and the combinations that are refused."""

import json

import pytest

from data_pipeline.errors import UsageError
from mae_scale.config.load import load_recipe
from mae_scale.engines.policy import compiles, layout_of, refuse_wrong_combinations


def test_the_batch_layout_follows_from_the_global_batch():
    recipe = load_recipe("pretrain/vit_huge_1600ep")
    for ranks, micro_batch, accumulation in ((1, 256, 16), (8, 256, 2), (16, 256, 1), (64, 64, 1), (4096, 1, 1)):
        layout = layout_of(recipe, ranks)
        assert (layout.micro_batch, layout.accumulation) == (micro_batch, accumulation)
        assert layout.world_size * layout.micro_batch * layout.accumulation == 4096


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        ([], 3, "4095 or 4098 would fit, with this batch 1, 2, 4 or 8 ranks"),
        (["engine.micro_batch=48"], 64, "engine.micro_batch=8, 16, 32 or 64 would fit"),
        (["engine.micro_batch=12"], 256, "share of 16 images"),
    ],
)
def test_a_mismatch_says_what_would_fit(overrides, ranks, message):
    with pytest.raises(UsageError) as error:
        layout_of(load_recipe("pretrain/vit_huge_1600ep", overrides), ranks)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "gpu", "reason"),
    [
        (["engine.precision=fp16"], False, "fp16 needs a GPU"),
        (["engine.zero_stage=3", "engine.compile=true"], True, "loses gradients"),
        (["engine.compile=true", "engine.activation_checkpointing=offload"], True, "uncompiled"),
        (["engine.offload=true"], True, "needs engine.zero_stage=3"),
        (["engine.backend=fairscale", "engine.zero_stage=2"], True, "wrong gradients"),
        (["engine.backend=fairscale", "engine.zero_stage=3"], False, "needs a GPU"),
        (["engine.backend=fairscale", "engine.zero_stage=1", "engine.precision=fp16"], True, "bf16"),
        (["engine.backend=fairscale", "engine.zero_stage=1", "engine.offload=true"], True, "offload"),
        (["data.device=gpu"], False, "no GPU is visible"),
    ],
)
def test_what_is_wrong_without_an_error_is_refused_with_the_reason(overrides, gpu, reason):
    with pytest.raises(UsageError, match=reason):
        refuse_wrong_combinations(load_recipe("demo", overrides), gpu=gpu)


def test_compiling_zero_3_is_refused_through_a_file_of_ones_own_too(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(UsageError, match="loses gradients"):
        refuse_wrong_combinations(load_recipe("demo", [f"engine.config={path}", "engine.compile=true"]), gpu=True)
    assert not compiles(load_recipe("demo", [f"engine.config={path}"]), 3, gpu=True)
