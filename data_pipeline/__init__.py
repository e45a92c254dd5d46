"""Images on disk to torch batches, exact and seekable; imports nothing of mae_scale.

The path of an image: index_build (the images of a folder) -> batch_order (a rank's batches), plan (their images and
crops) -> byte_reader -> dali_graph (decode, augment, normalise) -> batches, prefetch -> loader.
"""
