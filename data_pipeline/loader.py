"""The loader: one rank's batches as torch tensors, decoded in a background thread.

Images, crops and bytes are the same for any number of ranks, micro-batch and number of threads; an order that starts at
step t gives the batches that one from step 0 gives from step t on.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from data_pipeline.bad_images import DEFAULT_POLICY, BadImagePolicy, BadImages
from data_pipeline.batch_order import BatchOrder
from data_pipeline.batches import Annotate, Batch, Draw, Loading, draw_nothing
from data_pipeline.cache import ImageCache
from data_pipeline.dali_graph import Decoding
from data_pipeline.decoder import Decoder
from data_pipeline.index import Index
from data_pipeline.index_build import check_data
from data_pipeline.prefetch import Stream


class ImageLoader:
    """The micro-batches of `order` from the images of `index`, `prefetch` of them decoded ahead.

    `draw` is called in the background thread; its tensors, on the host, are in `Batch.drawn`. So is `annotate`, once an
    image, with the image's plan; its results are in `Batch.annotated`. Images in `cache` are not
    read from the source. The number of reads in flight follows from their latency (`read_ahead`).

    An image that turns bad after indexing is named once in a warning (logger data_pipeline), replaced by the next
    readable image of the index, and counted in `Batch.replaced` and `bad_images`. One that is damaged, yet decoded, is
    named once and used.

    Raises UsageError when the data folder does not exist or a shard has shrunk. Iterating raises UsageError when the
    index has fewer images than a global batch, and RunError when the policy on bad images asks for it or the data
    folder is gone.
    """

    def __init__(
        self,
        index: Index,
        order: BatchOrder,
        decoding: Decoding,
        *,
        draw: Draw = draw_nothing,
        annotate: Annotate | None = None,
        bad_images: BadImagePolicy = DEFAULT_POLICY,
        prefetch: int = 2,
        cache: ImageCache | None = None,
    ):
        if cache is None or index.kind == "shards":  # a cache may hold all images of a folder that is gone
            check_data(index)
        index = index.turned() if decoding.exif_orientation else index
        self.bad_images = BadImages(index, bad_images)
        decoder = Decoder(decoding, order.layout.micro_batch)
        self._loading = Loading(
            index, order, decoder, draw=draw, annotate=annotate, bad_images=self.bad_images, cache=cache
        )
        self._prefetch = prefetch
        self._closing: weakref.finalize[[], ImageLoader] | None = None

    def __iter__(self) -> Iterator[Batch]:
        self._end_stream()
        stream = Stream(
            self._loading.batches(), self._prefetch
        )  # holds no reference to this loader, so that it can be freed
        closing = self._closing = weakref.finalize(self, stream.close)
        try:
            yield from stream
        finally:
            closing()

    def close(self) -> None:
        """End the background thread and release DALI's memory; iterating again starts from the beginning."""
        self._end_stream()
        self._loading.close()

    def _end_stream(self) -> None:
        if self._closing is not None:
            self._closing()

    def __enter__(self) -> ImageLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
