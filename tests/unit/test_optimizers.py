"""Parameter groups: what is decayed."""

from mae_scale.config.load import load_recipe
from mae_scale.engines.optimizers import parameter_groups
from mae_scale.models.mae import build_mae
from mae_scale.tasks.mae.objective import Reconstruct


def test_biases_norms_and_tokens_are_not_decayed_and_everything_else_is():
    model = build_mae(
        None,
        image_size=16,
        patch_size=4,
        width=32,
        depth=2,
        heads=2,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
    )
    decayed, plain = parameter_groups(Reconstruct(model, seed=0), load_recipe("demo").optim)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in plain["params"]} == {
        n for n in names.values() if n.endswith(("bias", "cls_token", "mask_token")) or "norm" in n
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
