"""Images on disk to torch batches, exact and seekable; imports nothing of mae_scale.

The way of an image: index_build (which there are) -> plan (which a step has, how each is cut) -> byte_reader ->
dali_graph (decode, augment, normalise) -> batches, prefetch -> loader (a rank's part).
"""
