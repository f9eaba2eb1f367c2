"""A smoke test for methods that need two modalities, and no more than that: makes a second contrast out of the first.

    python benchmarks/smoke_derived_contrast.py $nnssl_raw/Dataset001_One $nnssl_raw/Dataset101_Two

The second channel is the first one inverted, bent by a power law, with noise: up to the noise it is predictable voxel
by voxel. So a method that runs and learns on it is shown to work, and nothing is shown of what it is worth.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    """Writes a dataset of two channels beside one of a single channel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="raw dataset of one channel")
    parser.add_argument("target", type=Path, help="raw dataset to write, DatasetXXX_Name")
    arguments = parser.parse_args()
    description = read_json(arguments.source / "dataset.json")
    ending, images = description["file_ending"], arguments.target / "imagesTr"
    images.mkdir(parents=True, exist_ok=True)
    files = sorted((arguments.source / "imagesTr").glob(f"*_0000{ending}"))
    for file in files:
        case_id = file.name.removesuffix(f"_0000{ending}")
        (volume,), geometry = read_image([file])
        for channel, voxels in enumerate((volume, derived_contrast(volume, case_id))):
            write_image(voxels, geometry, images / f"{case_id}_{channel:04d}{ending}")
    channels = {"0": description["channel_names"]["0"], "1": "derived"}
    write_json(
        arguments.target / "dataset.json",
        {"channel_names": channels, "labels": {"background": 0}, "numTraining": len(files), "file_ending": ending},
    )
    print(f"{len(files)} cases of two channels in {arguments.target}: for a smoke test only")


if __name__ == "__main__":
    main()
