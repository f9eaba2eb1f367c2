"""Preprocessing against nnU-Net's own `DefaultPreprocessor`: same files, same plan, same processes.

Makes MR-like volumes with oblique, slightly anisotropic voxels and an empty margin, preprocesses them with both by
turns, and prints seconds, voxels a second, sizes and the largest difference of the results. Ends non-zero if they
differ. Without labels nnU-Net still resamples and writes a mask of what is not zero.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import Table, describe_machine, finish, made_volume, make_parser, make_plan, random_shape

from nnssl_ext.core.executor import Executor, make_executor
from nnssl_ext.dataset.manifest import Case, Manifest, write_dataset_json
from nnssl_ext.fingerprint.foreground import nonzero_box
from nnssl_ext.imageio import read_header, read_image, read_segmentation
from nnssl_ext.planners.plan import Configuration, Plan
from nnssl_ext.planners.spacing import resampling_keys
from nnssl_ext.preprocessing.crop import nonzero_mask
from nnssl_ext.preprocessing.index import IndexEntry
from nnssl_ext.preprocessing.labels import resample_labels
from nnssl_ext.preprocessing.run import preprocess_case
from nnssl_ext.preprocessing.store import Store, write_case

ABSOLUTE, RELATIVE = 1e-2, 1e-3
"""Allowed difference of stored values: the larger of this and this share of the value."""
SPACINGS = ((1.0, 0.9, 0.9), (1.2, 0.8, 0.8), (0.9, 1.1, 1.1), (1.5, 1.0, 0.7))
LABELS = {"background": 0, "a": 1, "b": 2, "c": 3}
LABEL_SUFFIX = "_seg"
LABEL_SMOOTH = {"large": 12.0, "small": 1.5}
"""Standard deviation in voxels of the filter that makes parts of noise; of small ones nearly all is border."""
LABEL_EDGES = (1.0, 1.5, 2.0)
"""Standard deviations where one label ends and the next begins: parts within parts, as of a tumour."""
KILOBYTE = 1024
RESET_PEAK = "5"
"""Written to `/proc/self/clear_refs`, this resets the peak of the resident memory."""


def parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    result = make_parser(__doc__)
    result.add_argument("--num_volumes", type=int, default=8, help="volumes to preprocess (default: 8)")
    result.add_argument("--edge", type=int, default=170, help="mean edge of a volume in voxels (default: 170)")
    result.add_argument("-np", type=int, default=2, help="worker processes (default: 2)")
    result.add_argument(
        "--labels",
        choices=LABEL_SMOOTH,
        help="resample and write a label map with every image, in parts of this size (default: none)",
    )
    return result


def volume(seed: int, edge: int) -> np.ndarray:
    """An MR-like int16 volume (Z, Y, X): smooth tissue with noise in an ellipsoid, zero around it."""
    rng = np.random.default_rng(seed)
    image, inside = made_volume(rng, random_shape(rng, edge), noise=0.125)
    return np.where(inside, 400 + 120 * image, 0).clip(0, 3000).astype(np.int16)


def label_map(seed: int, image: np.ndarray, smooth: float) -> np.ndarray:
    """Three nested labels in parts of a volume, uint8 (Z, Y, X)."""
    from scipy.ndimage import gaussian_filter

    tissue = gaussian_filter(np.random.default_rng((seed, 1)).standard_normal(image.shape, np.float32), smooth)
    return np.where(image > 0, np.digitize(tissue / tissue.std(), LABEL_EDGES), 0).astype(np.uint8)


def write_dataset(folder: Path, num_volumes: int, edge: int, labels: str | None = None) -> Manifest:
    """Writes the volumes, and label maps if wanted, as compressed NIfTI files in nnU-Net's layout."""
    import SimpleITK as sitk

    for subfolder in ("imagesTr", "labelsTr") if labels else ("imagesTr",):
        (folder / subfolder).mkdir(parents=True)
    cosine, sine = np.cos(0.2), np.sin(0.2)
    for number in range(num_volumes):
        array = volume(number, edge)
        files = {f"imagesTr/case_{number:03d}_0000.nii.gz": array}
        if labels:
            files[f"labelsTr/case_{number:03d}.nii.gz"] = label_map(number, array, LABEL_SMOOTH[labels])
        for name, content in files.items():
            image = sitk.GetImageFromArray(content)
            image.SetSpacing(SPACINGS[number % len(SPACINGS)][::-1])
            image.SetDirection((cosine, -sine, 0, sine, cosine, 0, 0, 0, 1))
            sitk.WriteImage(image, str(folder / name), useCompression=True)
    description = LABELS if labels else None
    write_dataset_json(folder, channel_names=["MRI"], file_ending=".nii.gz", num_cases=num_volumes, labels=description)
    return Manifest.load(folder)


def preprocessing_plan() -> Plan:
    """One millimetre isotropic, z-score, nnU-Net's default resampling."""
    return make_plan((160, 160, 160), 2, **resampling_keys(kept=False))


def ours(case: Case, plan: Plan, folder: Path) -> dict[str, Any]:
    """One case with this project's preprocessing."""
    configuration = plan.configuration("3d_fullres")

    def work() -> IndexEntry:
        entry = preprocess_case(case, plan, configuration, folder, "float16")
        if case.label is not None:
            write_labels(case, case.label, configuration, folder, entry)
        return entry

    return _measured(work)


def write_labels(case: Case, label: Path, configuration: Configuration, folder: Path, entry: IndexEntry) -> None:
    """Crops, resamples and stores the label map of a stored case; -1 is what nnU-Net writes outside of the image."""
    image, geometry = read_image(case.images)
    labels = read_segmentation(label)[0].astype(np.int16)
    labels[(labels == 0) & ~nonzero_mask(image)] = -1
    crop = labels[tuple(slice(*side) for side in nonzero_box(image))][None]
    settings = configuration.resampling_fn_seg_kwargs
    resampled = resample_labels(crop, entry.shape[1:], geometry.spacing, entry.spacing, **settings)
    name = f"{case.case_id}{LABEL_SUFFIX}"
    write_case(folder, name, resampled.astype(np.float32), {}, resampled[0] > 0, spacing=entry.spacing)


def nnunet(case: Case, plan: Plan, folder: Path) -> dict[str, Any]:
    """One case with nnU-Net's preprocessor."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plan.raw)
    description = {"labels": LABELS, "channel_names": {"0": "MRI"}}
    arguments = (
        [str(image) for image in case.images],
        None if case.label is None else str(case.label),
        manager,
        manager.get_configuration("3d_fullres"),
        description,
    )
    stock = DefaultPreprocessor(verbose=False)
    return _measured(lambda: stock.run_case_save(str(folder / case.case_id), *arguments))


def _measured(work: Callable[[], Any]) -> dict[str, Any]:
    """CPU seconds and, on Linux, growth of the process in bytes while something runs, and its value."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text(RESET_PEAK)
    before = _status("VmRSS")
    start = time.process_time()
    value = work()
    return {"cpu": time.process_time() - start, "peak": _status("VmHWM") - before, "value": value}


def _status(name: str) -> int:
    """A memory figure of this process in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * KILOBYTE for line in lines if line.startswith(name)), 0)


@dataclass
class Runs:
    """What the runs of one way of preprocessing took, and left."""

    function: Callable[..., Any]
    folder: Path
    wall: list[float] = field(default_factory=list)
    """Seconds a volume of each run."""
    cpu: list[float] = field(default_factory=list)
    """CPU seconds a volume of each run."""
    peaks: list[tuple[str, int]] = field(default_factory=list)
    """Growth of a worker's memory in bytes by case, of every run."""
    values: dict[str, Any] = field(default_factory=dict)
    """Of the last run by case."""

    def add(self, executor: Executor, cases: Sequence[Case], plan: Plan, *, counts: bool = True) -> None:
        """Preprocesses cases."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        start = time.perf_counter()
        results = list(executor.run(self.function, {case.case_id: (case, plan, self.folder) for case in cases}))
        seconds = time.perf_counter() - start
        for result in results:
            if result.error is not None:
                raise RuntimeError(f"{result.key}: {result.error}")
        self.values = {result.key: result.value["value"] for result in results}
        if counts:
            self.peaks += [(result.key, result.value["peak"]) for result in results]
            self.wall.append(seconds / len(results))
            self.cpu.append(statistics.mean(result.value["cpu"] for result in results))

    def figures(self) -> dict[str, Any]:
        """Medians a volume."""
        files = [path for path in self.folder.glob("*.b2nd") if not path.stem.endswith(LABEL_SUFFIX)]
        size = sum(path.stat().st_size for path in files) / len(self.values)
        return {"wall": statistics.median(self.wall), "cpu": statistics.median(self.cpu), "megabytes": size / 1e6}


def measure(ways: Sequence[Runs], manifest: Manifest, plan: Plan, arguments: argparse.Namespace) -> None:
    """Preprocesses all volumes a number of times in warm pools, in every way by turns."""
    with ExitStack() as stack:
        pools = [stack.enter_context(make_executor(arguments.np)) for _ in ways]
        for way, pool in zip(ways, pools, strict=True):
            way.add(pool, manifest.cases[: arguments.np], plan, counts=False)  # imports, and warms caches
        for _ in range(arguments.repeats):
            for way, pool in zip(ways, pools, strict=True):
                way.add(pool, manifest.cases, plan)


def volume_bytes(case: Case, store: Store) -> int:
    """Bytes of a case as float32, before or after resampling, whichever is more."""
    raw, stored = read_header(case.images[0]).shape, store.entries[case.case_id].shape
    return max(math.prod(raw), math.prod(stored)) * np.dtype(np.float32).itemsize


def compare(store: Store, folder: Path) -> tuple[float, bool]:
    """The largest difference of images, and whether all are within tolerance and all labels the same."""
    import blosc2

    largest, equal = 0.0, True
    for case_id, entry in store.entries.items():
        reference = blosc2.open(str(folder / f"{case_id}.b2nd"), mode="r")[...]
        difference = np.abs(store.read_crop(case_id, (0, 0, 0), entry.shape[1:]) - reference)
        largest = max(largest, float(difference.max()))
        equal &= bool((difference <= np.maximum(ABSOLUTE, RELATIVE * np.abs(reference))).all())
        labels = [root / f"{case_id}{LABEL_SUFFIX}.b2nd" for root in (store.folder, folder)]
        if labels[0].exists():
            ours, theirs = (blosc2.open(str(path), mode="r")[...] for path in labels)
            equal &= bool(np.array_equal(ours, theirs))
    return largest, equal


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    arguments = parser().parse_args(argv)
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        manifest = write_dataset(root / "Dataset001_Bench", arguments.num_volumes, arguments.edge, arguments.labels)
        plan = preprocessing_plan()
        fast, stock = Runs(ours, root / "ours"), Runs(nnunet, root / "nnunet")
        measure((fast, stock), manifest, plan, arguments)
        store = Store(root / "ours", fast.values)
        columns = {"nnssl_ext": fast.figures(), "nnunet": stock.figures()}
        largest, equal = compare(store, root / "nnunet")
        sizes = {case.case_id: volume_bytes(case, store) for case in manifest.cases}
    voxels = statistics.mean(math.prod(entry.shape) for entry in store.entries.values())
    for column, way in zip(columns.values(), (fast, stock), strict=True):
        column["voxels_per_second"] = voxels / column["wall"]
        column["peak"] = max(peak / sizes[case_id] for case_id, peak in way.peaks)
    figures = {
        **columns,
        "ratio_wall": columns["nnunet"]["wall"] / columns["nnssl_ext"]["wall"],
        "ratio_cpu": columns["nnunet"]["cpu"] / columns["nnssl_ext"]["cpu"],
        "largest_difference": largest,
        "voxels": voxels,
        "processes": arguments.np,
    }
    print_table(figures)
    finish(arguments, machine, figures)
    if not equal:
        sys.exit("the results differ by more than the tolerance")


def print_table(figures: dict[str, Any]) -> None:
    """Prints both side by side."""
    rows = (
        ("wall s a volume", "wall", ".3f"),
        ("CPU s a volume", "cpu", ".3f"),
        ("million voxels a second", "voxels_per_second", ".2f"),
        ("MB a volume (images)", "megabytes", ".2f"),
        ("peak memory, volumes", "peak", ".1f"),
    )
    print(f"{figures['voxels'] / 1e6:.2f} million voxels a volume after resampling, {figures['processes']} processes")
    table = Table({"": "<25", "nnssl_ext": ">11", "nnU-Net": ">11"})
    for title, key, form in rows:
        scale = 1e-6 if key == "voxels_per_second" else 1
        table.row(title, *(format(figures[name][key] * scale, form) for name in ("nnssl_ext", "nnunet")))
    print(f"{figures['ratio_wall']:.1f}x the voxels a second, {figures['ratio_cpu']:.1f}x less CPU time")
    print(f"largest difference {figures['largest_difference']:.2g}")


if __name__ == "__main__":
    main()
