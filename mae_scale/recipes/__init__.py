"""Packaged recipes: one YAML file a row of the paper."""
