"""Recipe keys that have a better name now: refused in what a user writes, understood in what a run has stored."""

from typing import Any

RENAMED = {
    "data.labels_a_class": "data.labels_per_class",
    "classifier.evaluate_every_epochs": "tracking.evaluate_every_epochs",
}


def with_new_names(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a stored recipe's tree with the keys of this version."""
    tree = {name: dict(section) if isinstance(section, dict) else section for name, section in tree.items()}
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        if key in (tree.get(section) or {}):
            new_section, _, new_key = new.partition(".")
            tree.setdefault(new_section, {})[new_key] = tree[section].pop(key)
    return tree
