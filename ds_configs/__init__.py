"""Complete DeepSpeed files, one a way of sharding; copy one, edit it and pass it as engine.config=PATH.

What the recipe decides stands as "auto" and is filled in by mae_scale.training.ds_config.
"""
