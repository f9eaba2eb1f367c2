"""Preprocessing against nnU-Net's own `DefaultPreprocessor`: same files, same plan, same processes.

Makes MR-like volumes with oblique, slightly anisotropic voxels and an empty margin, preprocesses them with both, and
prints seconds, voxels a second, sizes and the largest difference of the results. Ends non-zero if they differ.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.core.executor import make_executor
from nnssl_ext.dataset.manifest import Case, Manifest, write_dataset_json
from nnssl_ext.fingerprint.foreground import nonzero_box
from nnssl_ext.imageio import read_header, read_image, read_segmentation
from nnssl_ext.planners.plan import Configuration, Plan
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
LABEL_EDGES = (1, 350, 450)
"""Intensities where one label ends and the next begins."""
KILOBYTE = 1024
RESET_PEAK = "5"
"""Written to `/proc/self/clear_refs`, this resets the peak of the resident memory."""


def parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--num_volumes", type=int, default=8, help="volumes to preprocess (default: 8)")
    result.add_argument("--edge", type=int, default=170, help="mean edge of a volume in voxels (default: 170)")
    result.add_argument("--repeats", type=int, default=5, help="runs of each, of which the median counts (default: 5)")
    result.add_argument("-np", type=int, default=2, help="worker processes (default: 2)")
    result.add_argument("--labels", action="store_true", help="resample and write a label map with every image")
    result.add_argument("--json", type=Path, help="also write the figures to this file")
    return result


def volume(seed: int, edge: int) -> np.ndarray:
    """An MR-like int16 volume (Z, Y, X): smooth tissue with noise in an ellipsoid, zero around it."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(round(0.9 * edge), round(1.1 * edge) + 1, 3))
    tissue = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 3)
    image = 400 + 120 * tissue / tissue.std() + 15 * rng.standard_normal(shape, dtype=np.float32)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    outside = sum(axis**2 for axis in grid) > 0.85
    image[outside] = 0
    return image.clip(0, 3000).astype(np.int16)


def write_dataset(folder: Path, num_volumes: int, edge: int, labels: bool = False) -> Manifest:
    """Writes the volumes, and label maps of three parts if wanted, as compressed NIfTI files in nnU-Net's layout."""
    import SimpleITK as sitk

    for subfolder in ("imagesTr", "labelsTr") if labels else ("imagesTr",):
        (folder / subfolder).mkdir(parents=True)
    cosine, sine = np.cos(0.2), np.sin(0.2)
    for number in range(num_volumes):
        array = volume(number, edge)
        files = {f"imagesTr/case_{number:03d}_0000.nii.gz": array}
        if labels:
            files[f"labelsTr/case_{number:03d}.nii.gz"] = np.digitize(array, LABEL_EDGES).astype(np.uint8)
        for name, content in files.items():
            image = sitk.GetImageFromArray(content)
            image.SetSpacing(SPACINGS[number % len(SPACINGS)][::-1])
            image.SetDirection((cosine, -sine, 0, sine, cosine, 0, 0, 0, 1))
            sitk.WriteImage(image, str(folder / name), useCompression=True)
    description = LABELS if labels else None
    write_dataset_json(folder, channel_names=["MRI"], file_ending=".nii.gz", num_cases=num_volumes, labels=description)
    return Manifest.load(folder)


def make_plan() -> Plan:
    """One millimetre isotropic, z-score, nnU-Net's default resampling."""
    keywords = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "bench",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [160, 160, 160],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": keywords,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**keywords, "is_seg": True, "order": 1},
        "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
    }
    return Plan(
        {
            "dataset_name": "Dataset001_Bench",
            "plans_name": "bench",
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "foreground_intensity_properties_per_channel": {"0": {}},
            "configurations": {"3d_fullres": configuration},
        }
    )


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


def measure(
    function: Callable[..., Any], manifest: Manifest, plan: Plan, folder: Path, arguments: Any
) -> dict[str, Any]:
    """Preprocesses all volumes a number of times in a warm pool.

    Returns:
        Medians over the repeats of wall seconds and CPU seconds a volume, the growth of a worker's memory in bytes by
        case and run, and the values of the last run by case.
    """
    wall, cpu, peaks, values = [], [], [], {}
    with make_executor(arguments.np) as executor:
        for repeat in range(arguments.repeats + 1):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            start = time.perf_counter()
            cases = manifest.cases if repeat else manifest.cases[: arguments.np]
            tasks = {case.case_id: (case, plan, folder) for case in cases}
            results = list(executor.run(function, tasks))
            for result in results:
                if result.error is not None:
                    raise RuntimeError(f"{result.key}: {result.error}")
            values = {result.key: result.value["value"] for result in results}
            if repeat:  # the first run imports and warms caches
                peaks += [(result.key, result.value["peak"]) for result in results]
                wall.append((time.perf_counter() - start) / len(results))
                cpu.append(statistics.mean(result.value["cpu"] for result in results))
    size = sum(path.stat().st_size for path in folder.glob("*.b2nd") if not path.stem.endswith(LABEL_SUFFIX))
    return {
        "wall": statistics.median(wall),
        "cpu": statistics.median(cpu),
        "peaks": peaks,
        "megabytes": size / len(manifest.cases) / 1e6,
        "values": values,
    }


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


def main() -> None:
    """Runs the benchmark."""
    arguments = parser().parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        manifest = write_dataset(root / "Dataset001_Bench", arguments.num_volumes, arguments.edge, arguments.labels)
        plan = make_plan()
        fast = measure(ours, manifest, plan, root / "ours", arguments)
        stock = measure(nnunet, manifest, plan, root / "nnunet", arguments)
        store = Store(root / "ours", fast.pop("values"))
        stock.pop("values")
        largest, equal = compare(store, root / "nnunet")
        sizes = {case.case_id: volume_bytes(case, store) for case in manifest.cases}
    voxels = statistics.mean(math.prod(entry.shape) for entry in store.entries.values())
    for figures in (fast, stock):
        figures["voxels_per_second"] = voxels / figures["wall"]
        figures["peak"] = max(peak / sizes[case_id] for case_id, peak in figures.pop("peaks"))
    figures = {
        "nnssl_ext": fast,
        "nnunet": stock,
        "ratio_wall": stock["wall"] / fast["wall"],
        "ratio_cpu": stock["cpu"] / fast["cpu"],
        "largest_difference": largest,
        "voxels": voxels,
        "processes": arguments.np,
    }
    print_table(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
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
    print(f"{'':26}{'nnssl_ext':>12}{'nnU-Net':>12}")
    for title, key, form in rows:
        scale = 1e-6 if key == "voxels_per_second" else 1
        values = (format(figures[name][key] * scale, form) for name in ("nnssl_ext", "nnunet"))
        print(f"{title:26}" + "".join(f"{value:>12}" for value in values))
    print(f"{figures['ratio_wall']:.1f}x the voxels a second, {figures['ratio_cpu']:.1f}x less CPU time")
    print(f"largest difference {figures['largest_difference']:.2g}")


if __name__ == "__main__":
    main()
