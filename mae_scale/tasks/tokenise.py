"""`mae-scale tokens`: write the words that a tokeniser finds in a folder's images, once, on any number of ranks."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from data_pipeline.bad_images import BadImagePolicy
from data_pipeline.errors import RunError, UsageError
from data_pipeline.files import write_atomically, write_json
from data_pipeline.index import Index
from data_pipeline.index_build import open_index
from mae_scale.checkpoints.tokeniser import open_tokeniser
from mae_scale.config.required import required
from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import first_then_others, from_all, from_first
from mae_scale.distributed.ranks import Ranks
from mae_scale.models.tokeniser import Tokeniser
from mae_scale.tasks.evaluation import all_ranks
from mae_scale.tasks.tokens import MANIFEST, UNFINISHED, Heading, Shard, damage, read_heading, shard_name
from mae_scale.tasks.words import TokenisedWords, view_of, word_grid
from mae_scale.training.evaluation_loader import BATCH_SIZE, evaluation_loader

SLOWEST_SHARD = timedelta(hours=12)
"""Time that a rank waits, at the end, for one with a file more. One that has died is noticed at once."""


def check(recipe: Recipe, tokeniser: Path | None, out: Path) -> Path:
    """Return the place of the tokeniser, checked like the rest before a rank is started. Raises UsageError."""
    required(recipe.data.root, "data.root", "add data.root=/path/to/images, a folder of images or of tar shards")
    given = tokeniser or (recipe.tokeniser.weights if recipe.tokeniser else None)
    path = required(given, "tokeniser.weights", "add --tokeniser PATH (a file, or the folder of a run of task dvae)")
    if not path.exists():
        raise UsageError(f"--tokeniser {path} does not exist; give a file, or the folder of a run of task dvae")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, expected a folder (or a name for a new one)")
    if recipe.task == "dvae":
        raise UsageError("task: dvae reads no words; give the recipe that is to be trained on them")
    view_of(recipe)
    return path


def write_tokens(recipe: Recipe, tokeniser: Path, out: Path, shard_images: int) -> Heading | None:
    """Write the words of data.root's images, cut as in evaluation, into a folder; return its heading on rank 0.

    As a task computes them while it trains with data.augmentation=none, in float32. Each rank writes whole shards, each
    when it is done; shards that an earlier start has finished are kept where their bytes are what was written and all
    of their images could be read. On one kind of device the files are the same for any number of ranks.

    Raises UsageError when the folder holds the words of other images, of another tokeniser or cut, or another file.
    """
    with all_ranks(recipe) as (ranks, device):
        model, index = first_then_others(lambda: _opened(recipe, tokeniser))
        source = TokenisedWords(model)
        heading = Heading(
            index=index.digest(),
            images=len(index),
            tokeniser=source.digest,
            words=model.size.words,
            grid=word_grid(recipe),
            image_size=recipe.model.square_side,
            exif_orientation=recipe.data.exif_orientation,
            shard_images=shard_images,
        )
        from_first(lambda: _begin(out, heading))
        mine = range(ranks.rank, len(heading.shards), ranks.world_size)
        others = torch.distributed.new_group(backend="gloo", timeout=SLOWEST_SHARD)
        parts = from_all(
            lambda: [_shard(recipe, index, source, out, heading, number, ranks, device) for number in mine], others
        )
        records = [record for part in parts for record in part]
        from_first(lambda: check_readable(recipe, index, records))
        from_first(lambda: _finish(out, heading, records))
        return heading if ranks.is_first else None


def _opened(recipe: Recipe, tokeniser: Path) -> tuple[Tokeniser, Index]:
    data = recipe.data
    index = open_index(required(data.root, "data.root", "add data.root=/path/to/images"), data.index)
    return open_tokeniser(tokeniser), index if data.fraction is None else index.share(data.fraction, seed=recipe.seed)


def _begin(out: Path, heading: Heading) -> None:
    """Make the folder, or compare an earlier start's; raise UsageError where that wrote something else."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = read_heading(out / UNFINISHED) or read_heading(out / MANIFEST)
        if found is None:
            if other := next(out.iterdir(), None):
                raise UsageError(f"--out {out} holds {other.name} and no words; choose an empty or a new folder")
            write_json(out / UNFINISHED, asdict(heading))
            return
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written to: {error.strerror}") from None
    before, now = asdict(found[0]), asdict(heading)
    different = [f"{key} {before[key]}, now {now[key]}" for key in now if before[key] != now[key]]
    if different:
        raise UsageError(
            f"--out {out} holds the words of other inputs ({'; '.join(different)}); choose another folder, or remove it"
        )


def _shard(
    recipe: Recipe,
    index: Index,
    source: TokenisedWords,
    out: Path,
    heading: Heading,
    number: int,
    ranks: Ranks,
    device: torch.device,
) -> Shard:
    """Write a shard and its record, unless they are there; return the record."""
    name = shard_name(number)
    known = _known(out, number)
    if known is not None and not known.unreadable and not damage(out, known):
        return known
    rows = np.asarray(heading.shards[number])
    words = np.zeros((len(rows), heading.grid**2), heading.dtype)
    readable = np.zeros(len(rows), bool)
    alone = Ranks(0, 1, ranks.local_rank)
    loading = evaluation_loader(
        recipe,
        index.take(rows),
        alone,
        batch_size=BATCH_SIZE,
        second=view_of(recipe),
        bad_images=BadImagePolicy(1.0, recipe.data.on_bad_image),  # the limit is on all of them: _finish
    )
    with loading as loader, torch.inference_mode():
        for batch in loader:
            found = source.of(batch, device).cpu().numpy()
            words[batch.sample_ids[batch.valid]] = found[batch.valid]
            readable[batch.sample_ids[batch.valid]] = True
    content = io.BytesIO()
    np.save(content, words, allow_pickle=False)
    shard = Shard(name, len(rows), hashlib.sha256(content.getvalue()).hexdigest(), rows[~readable].tolist())
    write_atomically(out / name, content.getvalue())
    write_json(out / name.replace(".npy", ".json"), asdict(shard))
    return shard


def _known(out: Path, number: int) -> Shard | None:
    """Return a shard's record, of its own file or of the manifest; None where neither is there and whole."""
    try:
        return Shard(**json.loads((out / shard_name(number).replace(".npy", ".json")).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        found = read_heading(out / MANIFEST)
        return found[1][number] if found is not None and number < len(found[1]) else None


def check_readable(recipe: Recipe, index: Index, records: list[Shard]) -> None:
    """Raise RunError when more images could not be read than data.bad_image_limit allows of all."""
    unreadable = [row for record in records for row in record.unreadable]
    allowed = max(1, int(recipe.data.bad_image_limit * len(index)))
    if len(unreadable) > allowed:
        raise RunError(
            f"{len(unreadable)} of {len(index)} images cannot be read, such as {index.name(unreadable[0])}; "
            f"data.bad_image_limit allows {allowed}; restore them, and the same command goes on"
        )


def _finish(out: Path, heading: Heading, records: list[Shard]) -> None:
    """Write the manifest, then remove what stood for it."""
    records.sort(key=lambda record: record.name)
    write_json(out / MANIFEST, {**asdict(heading), "shards": [asdict(record) for record in records]})
    for record in records:
        (out / record.name.replace(".npy", ".json")).unlink(missing_ok=True)
    (out / UNFINISHED).unlink(missing_ok=True)
