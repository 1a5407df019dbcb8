"""Decode every image of a set before training, so that a damaged one stops the run before it.

What was decoded without an error is remembered by its digest in the cache of the user, so other
runs on the same content skip the check. A set of so many bytes that it is known by size and time
only is not checked: a damaged image of it is named when its turn comes.
"""

import contextlib
import logging
import os

from checks import user_cache
from run_lib import devices
from run_lib.metrics import Progress
from streams import Dataset, Finite, is_known_by_content

logger = logging.getLogger("fokker")
BATCH = 64  # images that a process decodes at once


def check(dataset: Dataset) -> None:
    """Decode the part of this process of every split that is decoded on demand; wait for all.

    Raises:
        ValueError: an image is damaged; names its file or record.
    """
    host = devices.host()
    for name, split in dataset.splits.items():
        if not isinstance(split, Finite) or split.pipeline is None:
            continue
        if not is_known_by_content(split.known_by):
            logger.info(
                "the %s images have more than 1 GiB and are not decoded before training: a damaged "
                "one is named when its turn comes",
                name,
            )  # fmt: skip
            continue
        part = f"{dataset.digests[name]}-{host.index}-of-{host.count}"
        kept = user_cache() / f"decoded-{part}"
        if not os.path.exists(kept):  # False, too, where it may not be looked for
            _decode(dataset, name)
            with contextlib.suppress(OSError):  # without a place to write, it is done again
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.touch()
    devices.wait_for_all("images are decoded")


def _decode(dataset: Dataset, name: str) -> None:
    """Decode the part of this process of one split."""
    host, size = devices.host(), dataset.size(name)
    logger.info("decoding the %d %s images once, to find damaged ones", size, name)
    with contextlib.closing(Progress(0, size, "image")) as progress:
        batch_size = BATCH * host.count
        batches = dataset.eval_batches(name, batch_size=batch_size, host=host)
        for number, _ in enumerate(batches, 1):
            progress.update(min(number * batch_size, size), {})
