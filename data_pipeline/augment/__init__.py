"""Augmentations, one per file: the numbers drawn for an image and the code that applies them, side by side.

`kinds` describes the recipes' augmentations; `crop`, `flip`, `colour_jitter`, `rand_augment` and `random_erasing` each
draw their numbers (NumPy arrays of a batch's plan) and apply them: to images in the DALI graph, erasing to tensors.
Nothing here imports DALI before a graph is built.
"""
