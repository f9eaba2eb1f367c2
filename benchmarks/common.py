"""What the benchmarks share: options, the machine's state, made volumes and plans, medians in turn, tables, JSON."""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.core.records import write_json
from nnssl_ext.planners.plan import Plan
from nnssl_ext.planners.spacing import resampling_keys

PROCESSOR_TIMES = Path("/proc/stat")
PROCESSOR_NAMES = Path("/proc/cpuinfo")
WATCHED_SECONDS = 1.0
IDLE_SHARE = 0.1
"""Share of the cores that may be busy with other things on a machine that counts as idle."""
SMOOTH = 3
"""Standard deviation in voxels of the filter that makes tissue of noise."""
EXTENT = 0.85
"""Squared half axes of the ellipsoid in a made volume, as a share of its squared half edges."""

Figures = Mapping[str, Any]

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the commands do: else a thread that waits keeps a core busy


def make_parser(description: str | None, repeats: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark has; its own are added to them."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = "runs of each, of which the median counts (default: %(default)s)"
    result.add_argument("--repeats", type=int, default=repeats, help=number)
    result.add_argument("--json", type=Path, help="also write the figures to this file")
    return result


def describe_machine() -> dict[str, Any]:
    """Prints what the benchmark runs on and how busy it is, with a warning where it is not idle, and returns it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    machine = {
        "processor": _processor(),
        "cores": cores,
        "load": round(os.getloadavg()[0], 2),
        "busy_cores": _busy_cores(),
    }
    print("{processor}, {cores} cores, of which {busy_cores} busy; load {load}".format_map(machine))
    busy = machine["load"] if machine["busy_cores"] is None else machine["busy_cores"]
    if busy > IDLE_SHARE * cores:
        print("WARNING: this machine is not idle. The figures show proportions and are no record.", flush=True)
    return machine


def _processor() -> str:
    text = PROCESSOR_NAMES.read_text() if PROCESSOR_NAMES.is_file() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1) if found else platform.processor() or platform.machine()


def _busy_cores() -> float | None:
    """Cores that others use now, which the load, a mean over a minute, tells late; None where nobody knows."""
    if not PROCESSOR_TIMES.is_file():
        return None

    def times() -> np.ndarray:
        rows = re.findall(r"^cpu(\d+) (.+)$", PROCESSOR_TIMES.read_text(), re.MULTILINE)
        mine = os.sched_getaffinity(0)
        return np.array([list(map(int, row.split()))[:8] for core, row in rows if int(core) in mine])

    before = times()
    time.sleep(WATCHED_SECONDS)
    passed = times() - before
    idle = passed[:, 3:5].sum(1) / passed.sum(1).clip(min=1)  # waiting for a disk counts as idle
    return round(float((1 - idle).sum()), 2)


def now(device: str) -> float:
    """Seconds of this process's CPU time, or on a GPU of the clock, once the GPU is done."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds that something takes; see `now`."""
    start = now(device)
    work()
    return now(device) - start


def medians(runs: Sequence[Callable[[], float]], repeats: int) -> list[float]:
    """The median figure of each run.

    All take turns, so that what else the machine does meets them alike; a first round is not counted.
    """
    found = [[run() for run in runs] for _ in range(repeats + 1)]
    return [statistics.median(column) for column in zip(*found[1:], strict=True)]


class Table:
    """Prints rows of figures as they come, beneath a heading.

    Args:
        columns: Title and format specification of each column; the width is part of the specification.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.forms = list(columns.values())
        print(" ".join(f"{title:{self._plain(form)}}" for title, form in columns.items()), flush=True)

    def row(self, *values: Any) -> None:
        """Prints a row; text stands as it is, and a dash where there is None."""
        cells = []
        for value, form in zip(values, self.forms, strict=True):
            plain = value is None or isinstance(value, str)
            cells.append(f"{'-' if value is None else value:{self._plain(form)}}" if plain else f"{value:{form}}")
        print(" ".join(cells), flush=True)

    @staticmethod
    def _plain(form: str) -> str:
        """Side and width of a format."""
        found = re.match(r"[<>]?\d+", form)
        assert found is not None, "every column has a width"
        width = found.group()
        return width if width[0] in "<>" else f">{width}"


def finish(arguments: argparse.Namespace, machine: Figures, figures: Any) -> None:
    """Writes the figures with the machine's description, where `--json` asks for it."""
    if arguments.json:
        write_json(arguments.json, {"machine": dict(machine), "figures": figures})


def made_volume(
    rng: np.random.Generator, shape: Sequence[int], noise: float = 0.1, extent: float = EXTENT
) -> tuple[np.ndarray, np.ndarray]:
    """Smooth tissue of variance 1 with noise, float32 (Z, Y, X), and where the ellipsoid of a body is, bool."""
    from scipy.ndimage import gaussian_filter

    tissue = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), SMOOTH)
    image = tissue / tissue.std() + noise * rng.standard_normal(shape, dtype=np.float32)
    grid = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij", sparse=True)
    inside = sum(axis**2 for axis in grid) < extent
    return image.astype(np.float32), np.asarray(inside)


def random_shape(rng: np.random.Generator, edge: int) -> tuple[int, ...]:
    """Three edges within a tenth of a mean one."""
    return tuple(int(size) for size in rng.integers(round(0.9 * edge), round(1.1 * edge) + 1, 3))


def make_plan(
    patch: Sequence[int], batch_size: int, architecture: Figures | None = None, channels: int = 1, **keys: Any
) -> Plan:
    """A plan of one configuration, `3d_fullres`: one millimetre isotropic, z-score.

    Args:
        patch: Edges of a patch in voxels.
        batch_size: Crops of a step.
        architecture: nnU-Net's block of that name; None for what needs no network.
        channels: Of every case.
        keys: More of the configuration.
    """
    configuration = {
        "data_identifier": "bench",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch_size,
        "patch_size": list(patch),
        "median_image_size_in_voxels": list(patch),
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "architecture": architecture or {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
        "batch_dice": False,
        **resampling_keys(kept=True),
        **keys,
    }
    return Plan(
        {
            "dataset_name": "Dataset001_Bench",
            "plans_name": "bench",
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "foreground_intensity_properties_per_channel": {str(channel): {} for channel in range(channels)},
            "configurations": {"3d_fullres": configuration},
        }
    )
