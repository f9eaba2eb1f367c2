"""A made-up MR-like dataset with labels, for demonstrations and tests: deformed organs, bias field, noise.

Every case shows one body with three labelled structures (a nucleus, a ventricle, a bent rod) and unlabelled
distractors of the same intensities, so that a threshold cannot segment it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from nnssl_ext.core.random import generator
from nnssl_ext.core.records import write_json

SHAPE = (24, 48, 44)
"""Voxels (Z, Y, X) of the mean case; each case differs by up to 10%."""
SPACING = (2.0, 1.0, 1.0)
"""Millimetres (Z, Y, X)."""
LABELS = {0: "background", 1: "nucleus", 2: "ventricle", 3: "rod"}
_INTENSITY = {"body": 300.0, "nucleus": 430.0, "ventricle": 150.0, "rod": 380.0}
_NUM_DISTRACTORS = 4
_DISTRACTOR_RADII = (0.2, 0.14, 0.14)
_NOISE = 25.0
_BIAS = 0.25
_WARP = 0.06
_NUM_WAVES = 6


def phantom(index: int) -> tuple[np.ndarray, np.ndarray]:
    """One made-up case, a pure function of its index.

    Args:
        index: Number of the case.

    Returns:
        Image, float32 (Z, Y, X), and labels, uint8 of the same shape.
    """
    rng = generator(0, "phantom", index)
    shape = tuple(round(n * rng.uniform(0.9, 1.1)) for n in SHAPE)
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    z, y, x = warped = grid + _WARP * _smooth_field(rng, 3, grid)
    body = _ellipsoid(rng, warped, (0, 0, 0), (0.9, 0.85, 0.85))
    structures = {
        "nucleus": _ellipsoid(rng, warped, (0, -0.15, -0.4), (0.62, 0.42, 0.34)),
        "ventricle": _ellipsoid(rng, warped, (0.05, -0.2, 0.38), (0.58, 0.42, 0.3)),
        "rod": ((y - 0.42 - 0.12 * np.cos(3 * x)) ** 2 + (0.4 * z) ** 2 < 0.2**2) & (np.abs(x) < 0.62),
    }
    image = np.where(body, _INTENSITY["body"], 0.0)
    for name in list(structures) * _NUM_DISTRACTORS:  # a structure's intensity where no structure is
        image[body & _ellipsoid(rng, warped, rng.uniform(-0.6, 0.6, 3), _DISTRACTOR_RADII)] = _INTENSITY[name]
    labels = np.zeros(shape, np.uint8)
    for value, name in list(LABELS.items())[1:]:
        inside = structures[name] & body
        image[inside], labels[inside] = _INTENSITY[name], value
    image *= np.exp(_BIAS * _smooth_field(rng, 1, grid)[0]) * rng.uniform(0.8, 1.25)
    return np.abs(image + rng.normal(0, _NOISE, shape)).astype(np.float32), labels


def _ellipsoid(rng: np.random.Generator, grid: np.ndarray, centre: ArrayLike, radii: ArrayLike) -> np.ndarray:
    at = np.array(centre) + rng.uniform(-0.05, 0.05, 3)
    radius = np.array(radii) * rng.uniform(0.85, 1.15, 3)
    return (((grid.T - at) / radius) ** 2).sum(-1).T < 1


def _smooth_field(rng: np.random.Generator, channels: int, grid: np.ndarray) -> np.ndarray:
    """Smooth random fields of about unit size, (channels, Z, Y, X): a few plane waves of low frequency."""
    frequency = rng.normal(0, 2.0, (channels, _NUM_WAVES, 3)).astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, (channels, _NUM_WAVES, 1, 1, 1)).astype(np.float32)
    angle = np.einsum("cwd,dzyx->cwzyx", frequency, grid) + phase
    return np.sin(angle).sum(axis=1) / np.sqrt(_NUM_WAVES / 2)


def write_phantom_dataset(folder: Path, num_cases: int) -> Path:
    """Writes phantoms in the layout of the Medical Segmentation Decathlon (`imagesTr`, `labelsTr`, `dataset.json`).

    Args:
        folder: Made when needed.
        num_cases: How many, at least 1.

    Returns:
        The folder.

    Raises:
        ValueError: If fewer than one case is asked for.
    """
    import SimpleITK as sitk

    if num_cases < 1:
        raise ValueError(f"a dataset of {num_cases} cases is not possible; ask for 1 or more")
    names = [f"phantom_{i:03d}.nii.gz" for i in range(num_cases)]
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        for kind, array in zip(("imagesTr", "labelsTr"), phantom(i), strict=True):
            volume = sitk.GetImageFromArray(array)
            volume.SetSpacing(SPACING[::-1])
            sitk.WriteImage(volume, str(folder / kind / name))
    training = [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names]
    write_json(
        folder / "dataset.json",
        {
            "name": "Phantom",
            "description": "Made-up volumes with three structures",
            "modality": {"0": "MRI"},
            "labels": {str(k): v for k, v in LABELS.items()},
            "numTraining": num_cases,
            "training": training,
        },
    )
    return folder
