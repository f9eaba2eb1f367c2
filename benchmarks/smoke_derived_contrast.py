"""A smoke test for methods that need two modalities, and no more than that: makes a second contrast out of the first.

    python benchmarks/smoke_derived_contrast.py $nnssl_raw/Dataset001_One $nnssl_raw/Dataset101_Two

The second channel is the first one inverted, bent by a power law, with noise: up to the noise it is predictable voxel
by voxel. So a method that runs and learns on it is shown to work, and nothing is shown of what it is worth.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np

from nnssl_ext.core.random import generator
from nnssl_ext.core.records import read_json, write_json
from nnssl_ext.imageio.read import read_image
from nnssl_ext.imageio.write import write_image

GAMMA = 0.7
NOISE = 0.02
"""Standard deviation of the noise as a share of the range of values."""


def derived_contrast(volume: np.ndarray, case_id: str) -> np.ndarray:
    """The volume inverted within its range, to the power of `GAMMA`, with noise that the case's name decides.

    Args:
        volume: (Z, Y, X).
        case_id: Key of the noise.

    Returns:
        float32 (Z, Y, X), in the range of the volume up to the noise.
    """
    low, high = float(volume.min()), float(volume.max())
    span = max(high - low, 1e-6)
    noise = generator(0, "derived contrast", case_id).standard_normal(volume.shape, dtype=np.float32)
    return (low + span * (((high - volume) / span) ** GAMMA + NOISE * noise)).astype(np.float32)


def add_derived_contrast(source: Path, target: Path) -> int:
    """Writes a dataset of two channels beside one of a single channel, with its labels where it has some.

    Args:
        source: The raw dataset.
        target: The folder to write; its `dataset.json` comes last.

    Returns:
        The number of cases.
    """
    description = read_json(source / "dataset.json")
    ending, images = description["file_ending"], target / "imagesTr"
    images.mkdir(parents=True, exist_ok=True)
    files = sorted((source / "imagesTr").glob(f"*_0000{ending}"))
    for file in files:
        case_id = file.name.removesuffix(f"_0000{ending}")
        (volume,), geometry = read_image([file])
        for channel, voxels in enumerate((volume, derived_contrast(volume, case_id))):
            write_image(voxels, geometry, images / f"{case_id}_{channel:04d}{ending}")
    if (source / "labelsTr").is_dir():
        shutil.copytree(source / "labelsTr", target / "labelsTr", dirs_exist_ok=True)
    channels = {"0": description["channel_names"]["0"], "1": "derived"}
    own = {"labels": {"background": 0}, **description, "channel_names": channels, "numTraining": len(files)}
    write_json(target / "dataset.json", own)
    return len(files)


def main() -> None:
    """Runs `add_derived_contrast`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="raw dataset of one channel")
    parser.add_argument("target", type=Path, help="raw dataset to write, DatasetXXX_Name")
    arguments = parser.parse_args()
    number = add_derived_contrast(arguments.source, arguments.target)
    print(f"{number} cases of two channels in {arguments.target}: for a smoke test only")


if __name__ == "__main__":
    main()
