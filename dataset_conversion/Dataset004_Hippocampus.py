"""Task 4 of the Medical Segmentation Decathlon: the hippocampus in MR crops of 1 mm (Simpson et al. 2019)."""

from pathlib import Path

from dataset_conversion import msd

DATASET_ID = 4


def convert(source: Path, raw: Path) -> list[Path]:
    """Converts the extracted `Task04_Hippocampus` into `Dataset004_Hippocampus`.

    Args:
        source: The extracted folder.
        raw: Where raw datasets live.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If the folder is not of the Decathlon, or the target is taken.
    """
    return msd.convert(source, raw, dataset_id=DATASET_ID, name="Hippocampus")
