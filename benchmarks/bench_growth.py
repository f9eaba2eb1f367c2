"""How the cost of preprocessing and loading grows with voxels, cases and worker processes.

Each table varies one of them and leaves the others; seconds are those of the clock, so that workers count. Where a cost
is in proportion, the last column shows the same figure in every row, but for those of the workers, where it rises. The
last table is of an index of made-up cases, from opening it to a loader that knows its first sample.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench_loader import BATCH_SIZE, volume
from bench_preprocess import ours, preprocessing_plan, write_dataset
from common import Table, describe_machine, finish, make_parser, medians

from nnssl_ext.core.executor import Executor, make_executor
from nnssl_ext.dataset.manifest import Case
from nnssl_ext.loading.loader import PatchLoader
from nnssl_ext.preprocessing.index import Index, IndexEntry, write_index
from nnssl_ext.preprocessing.store import Store, write_case

MILLION = 1e6
CASES, WORKERS = 6, 2
THIRDS = (2, 3, 4)
"""Edges, in thirds of the middle one."""
VOLUME, CROP = 1.5, 0.8
"""Edges of the volumes that are loaded from, and of the crops, as multiples of `--edge`."""
INDEXED = (1_000, 10_000, 100_000)
INDEX_ENTRY = IndexEntry(
    case_id="",
    shape=(1, 192, 224, 192),
    spacing=(1.0, 1.0, 1.0),
    subject="subject",
    dataset="Dataset_001",
    modalities=("T1w",),
    checksum="c" * 64,
    num_bytes=10**7,
    foreground_fraction=0.4,
    content_hashes=("h" * 64,),
    source=("12345678:1700000000000000000",),
)


def parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    result = make_parser(__doc__)
    result.add_argument("--edge", type=int, default=120, help="mean edge of a raw volume in voxels (default: 120)")
    result.add_argument("--batches", type=int, default=24, help="batches of one run of loading (default: 24)")
    return result


def each_once(
    chosen: Sequence[Mapping[str, int]], run: Callable[[Mapping[str, int]], Callable[[], float]], repeats: int
) -> list[float]:
    """Median seconds of each setting; one that stands in several tables is measured once."""
    different = list({tuple(c.items()): c for c in chosen}.values())
    found = medians([run(c) for c in different], repeats)
    return [found[different.index(c)] for c in chosen]


def preprocess(executor: Executor, cases: list[Case], folder: Path) -> float:
    """Seconds to preprocess cases."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    start = time.perf_counter()
    for result in executor.run(ours, {case.case_id: (case, preprocessing_plan(), folder) for case in cases}):
        if result.error is not None:
            raise RuntimeError(f"{result.key}: {result.error}")
    return time.perf_counter() - start


def preprocessing(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of what was varied, its value, cases a second and million voxels read a second."""
    small, edge, large = (thirds * arguments.edge // 3 for thirds in THIRDS)
    numbers = {small: CASES, edge: 2 * CASES, large: CASES}
    manifests = {size: write_dataset(folder / f"raw_{size}", n, size).cases for size, n in numbers.items()}
    settings: list[tuple[str, Mapping[str, int]]] = [
        *(("edge", {"edge": size}) for size in numbers),
        *(("cases", {"cases": number}) for number in (CASES // 2, CASES, 2 * CASES)),
        *(("workers", {"workers": number}) for number in (1, WORKERS)),
    ]
    rows = []
    with ExitStack() as stack:
        executors = {number: stack.enter_context(make_executor(number)) for number in (1, WORKERS)}
        chosen = [{"edge": edge, "cases": CASES, "workers": WORKERS, **setting} for _, setting in settings]

        def run(c: Mapping[str, int]) -> Callable[[], float]:
            cases = list(manifests[c["edge"]][: c["cases"]])
            return partial(preprocess, executors[c["workers"]], cases, folder / "out")

        for (varied, _), c, seconds in zip(settings, chosen, each_once(chosen, run, arguments.repeats), strict=True):
            voxels = c["cases"] * c["edge"] ** 3
            rate = voxels / seconds / MILLION
            rows.append({"varied": varied, **c, "cases_a_second": c["cases"] / seconds, "mvoxels_a_second": rate})
    return rows


def load(loader: PatchLoader, batches: int) -> float:
    """Seconds to deliver batches."""
    start = time.perf_counter()
    for batch in loader.batches(0, batches):
        batch.to("cpu")
    return time.perf_counter() - start


def loading(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of what was varied, its value, crops a second and million voxels of crops a second."""
    entries = {}
    for number in range(8):
        image, inside = volume(number, round(VOLUME * arguments.edge))
        entries[f"case_{number}"] = write_case(folder / "store", f"case_{number}", image, {}, inside, spacing=(1, 1, 1))
    store, patch = Store(folder / "store", entries), round(CROP * arguments.edge)
    settings: list[tuple[str, Mapping[str, int]]] = [
        *(("patch", {"patch": thirds * patch // 3}) for thirds in THIRDS),
        *(("cases", {"cases": number}) for number in (2, 4, 8)),
        *(("workers", {"workers": number}) for number in (1, WORKERS)),
    ]
    rows = []
    with ExitStack() as stack:
        chosen = [{"patch": patch, "cases": 4, "workers": WORKERS, **setting} for _, setting in settings]

        def run(c: Mapping[str, int]) -> Callable[[], float]:
            cases, patch = list(entries)[: c["cases"]], (c["patch"],) * 3
            loader = PatchLoader(store, cases, patch, BATCH_SIZE, seed=0, num_workers=c["workers"])
            return partial(load, stack.enter_context(loader), arguments.batches)

        for (varied, _), c, seconds in zip(settings, chosen, each_once(chosen, run, arguments.repeats), strict=True):
            crops = arguments.batches * BATCH_SIZE
            rate = crops * math.prod((c["patch"],) * 3) / seconds / MILLION
            rows.append({"varied": varied, **c, "crops_a_second": crops / seconds, "mvoxels_a_second": rate})
    return rows


def ready(folder: Path) -> float:
    """Seconds from a store's index to the first sample of its loader, which is not read."""
    start = time.perf_counter()
    store = Store.open(folder)
    loader = PatchLoader(store, list(store.entries), (96,) * 3, BATCH_SIZE, seed=0)
    loader._request(0)
    return time.perf_counter() - start


def indices(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of the number of cases and the seconds until a loader is ready."""
    runs = []
    for number in INDEXED:
        names = [f"Dataset_{case % 50:03d}__sub-{case:06d}__ses-1__T1w" for case in range(number)]
        target = folder / f"index_{number}"
        target.mkdir()
        write_index(target, Index(settings={}, entries={name: replace(INDEX_ENTRY, case_id=name) for name in names}))
        runs.append(partial(ready, target))
    return [
        {"cases": number, "seconds": seconds}
        for number, seconds in zip(INDEXED, medians(runs, arguments.repeats), strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and prints its tables."""
    arguments = parser().parse_args(argv)
    machine, figures = describe_machine(), {}
    with tempfile.TemporaryDirectory() as folder:
        for what, measure in (("preprocessing", preprocessing), ("loading", loading)):
            figures[what] = measure(arguments, Path(folder))
            count = "cases/s" if what == "preprocessing" else "crops/s"
            table = Table({what: "<14", "": ">5", count: ">9.2f", "Mvoxels/s": ">10.1f"})
            for row in figures[what]:
                *_, number, rate = row.values()
                table.row(row["varied"], row[row["varied"]], number, rate)
        figures["index"] = indices(arguments, Path(folder))
        table = Table({"index": "<10", "cases": ">9", "seconds": ">9.3f"})
        for row in figures["index"]:
            table.row("ready", *row.values())
    finish(arguments, machine, figures)


if __name__ == "__main__":
    main()
