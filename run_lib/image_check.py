"""Decode every image of a set once before training, so that a damaged one is met then, not later.

What was decoded without an error is remembered by its digest in the cache of the user, so other
runs on the same content skip the check. A set that is known by size and time only, because it has
too many bytes to be read at every start, is not checked: an image of it is named when its turn
comes.
"""

import contextlib
import logging

from checks import user_cache
from run_lib import devices
from run_lib.metrics import Progress
from streams import Dataset, Finite, is_known_by_content

logger = logging.getLogger("fokker")
BATCH = 64  # images that a process decodes at once


def check(dataset: Dataset) -> None:
    """Decode the part of this process of every split that is decoded on demand.

    Raises:
        ValueError: an image is damaged or gone; names its file or record.
    """
    host = devices.host()
    for name, split in dataset.splits.items():
        if not isinstance(split, Finite) or split.pipeline is None:
            continue
        if not is_known_by_content(split.known_by):
            logger.info(
                "the %d %s images are too many to decode before training: a damaged one is named "
                "when its turn comes",
                split.size, name,
            )  # fmt: skip
            continue
        part = f"{dataset.digests[name]}-{host.index}-of-{host.count}"
        kept = user_cache() / f"decoded-{part}"
        if not kept.exists():
            _decode(dataset, name)
            with contextlib.suppress(OSError):  # without a place to write, it is done again
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.touch()


def _decode(dataset: Dataset, name: str) -> None:
    """Decode the part of this process of one split."""
    host, size = devices.host(), dataset.size(name)
    logger.info("decoding the %d %s images once, to find damaged ones", size, name)
    with contextlib.closing(Progress(0, size, "image")) as progress:
        batch_size = BATCH * host.count
        batches = dataset.eval_batches(name, batch_size=batch_size, host=host)
        for number, _ in enumerate(batches, 1):
            progress.update(min(number * batch_size, size), {})
