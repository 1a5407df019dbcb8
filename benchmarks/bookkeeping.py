"""Seconds and memory that the rows of an evaluation cost beside the device.

    python -m benchmarks.bookkeeping [--examples=50000] [--repeats=5] [--batch_size=256]

Two estimators give rows with the fields of the ODE. Printed: seconds to ask what is missing and to
append batch by batch, as an evaluation does; to read the folder again and find nothing missing; to
make the table of results; and by how much resident memory has grown after each.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from records import Records
from run_lib import report

SHARED = {
    "protocol": "solver dopri5, rtol 3e-05, atol 3e-05, trace rademacher, t_min 1e-05, "
    "dequantisation uniform, start noised, decoder cells",
    "step": 100_000, "split": "test", "identity": "0123456789abcdef",
}  # fmt: skip
MORE = {"nfe": 83, "unit": "bits/dim", "seconds": 0.01, "commit": "0123456789abcdef0123"}


def append(folder: Path, examples: int, repeats: int, batch_size: int) -> None:
    """Fill a folder as an evaluation does."""
    records, rng = Records(folder), np.random.default_rng(0)
    for name in ("ODE", "bound"):
        shared = SHARED | {"estimator": name}
        table = records.table(shared)
        for repeat in range(repeats):
            for first in range(0, examples, batch_size):
                ids = range(first, min(first + batch_size, examples))
                if not table.lacks(ids, repeat):
                    continue
                values = rng.random(len(ids)).tolist()
                records.append(
                    shared | {"index": index, "repeat": repeat, "value": value} | MORE
                    for index, value in zip(ids, values, strict=True)
                )


def resident() -> float:
    """MB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    """Print the costs of each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=256)
    options = parser.parse_args()
    number = 2 * options.examples * options.repeats
    with tempfile.TemporaryDirectory() as where:
        folder, start = Path(where) / "eval", resident()

        def fill() -> None:
            append(folder, options.examples, options.repeats, options.batch_size)

        parts: dict[str, Callable[[], object]] = {
            "append": fill,
            "find nothing missing": fill,
            "table of results": lambda: report.summaries(folder),
        }
        print(f"{number} rows; {'seconds':>20}{'µs a row':>12}{'MB more':>12}")
        for name, part in parts.items():
            begun = time.perf_counter()
            part()
            seconds = time.perf_counter() - begun
            each = 1e6 * seconds / number
            print(f"{name:24}{seconds:12.2f}{each:12.2f}{resident() - start:12.1f}", flush=True)


if __name__ == "__main__":
    main()
