"""nnssl_convert: somebody's folder layout to a raw dataset."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

import dataset_conversion
from nnssl_ext.cli.common import command

EPILOG = """examples:
  nnssl_convert folder /data/scans -d 1 --name Scans                         any tree of images, BIDS included
  nnssl_convert folder /data/ct -d 2 --name Lungs --modality CT --subject 'patient_([0-9]+)'
  nnssl_convert msd Task04_Hippocampus -d 4
  nnssl_convert msd Task04_Hippocampus -d 4 --unlabelled 60 --unlabelled_dataset 1     60 cases for pretraining
  nnssl_convert folder --help                                                the options of one layout
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments: one sub-command per layout and per `dataset_conversion/DatasetXXX_Name.py`."""
    p = argparse.ArgumentParser(
        prog="nnssl_convert",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        description="Writes a raw dataset, $nnssl_raw/DatasetXXX_Name. Can be interrupted and repeated.",
    )
    layouts = p.add_subparsers(dest="layout", required=True, metavar="LAYOUT")
    _add_msd(layouts.add_parser("msd", help="a dataset of the Medical Segmentation Decathlon", allow_abbrev=False))
    _add_folder(layouts.add_parser("folder", help="any tree of images, without labels", allow_abbrev=False))
    for name in converters():
        _add_source(layouts.add_parser(name, help=f"dataset_conversion/{name}.py", allow_abbrev=False))
    return p


def converters() -> list[str]:
    """Names of the modules of `dataset_conversion` that convert one public dataset, found without importing them."""
    return sorted({path.stem for folder in dataset_conversion.__path__ for path in Path(folder).glob("Dataset*.py")})


def _add_source(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", type=Path, metavar="SOURCE", help="the folder to convert")


def _add_common(p: argparse.ArgumentParser) -> None:
    p.add_argument("-d", "--dataset_id", type=int, required=True, help="id of the new dataset, 1 to 999")
    p.add_argument("-np", "--num_processes", type=int, default=0, help="worker processes (default: none but this one)")


def _add_msd(p: argparse.ArgumentParser) -> None:
    p.description = "Converts images and labels; with --unlabelled, some cases become a second dataset without labels."
    _add_source(p)
    _add_common(p)
    p.add_argument("--name", help="name of the new dataset (default: the source's)")
    p.add_argument("--unlabelled", type=int, default=0, metavar="N", help="give N cases to a dataset for pretraining")
    p.add_argument("--unlabelled_dataset", type=int, metavar="ID", help="id of the dataset for pretraining")
    p.add_argument("--seed", type=int, default=0, help="of the draw of the N cases (default: 0)")


def _add_folder(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Takes every .nii, .nii.gz, .nrrd, .mha, .mhd, .png, .bmp, .tif and .tiff below SOURCE as one case. The images "
        "stay where they are unless --copy is given."
    )
    _add_source(p)
    _add_common(p)
    p.add_argument("--name", required=True, help="name of the new dataset")
    p.add_argument("--copy", action="store_true", help="copy the images into the new dataset")
    p.add_argument("--modality", default="image", help="what the images show; CT is normalised by Hounsfield units")
    p.add_argument("--subject", metavar="REGEX", help="finds the patient in a file's path (default: BIDS's sub-LABEL)")
    p.add_argument("--include", nargs="+", default=["*"], metavar="PATTERN", help="only such paths, e.g. '*T1w*'")
    p.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="no such paths, e.g. 'labelsTr/*'")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    options = vars(parser().parse_args(argv))
    layout, source = options.pop("layout"), options.pop("source")

    from nnssl_ext.core.history import record_command
    from nnssl_ext.core.logs import configure_logging
    from nnssl_ext.core.paths import raw_root
    from nnssl_ext.dataset.manifest import Manifest

    configure_logging()
    convert = importlib.import_module(f"dataset_conversion.{layout}").convert
    for folder in convert(source, raw_root(), **options):
        record_command(folder, "nnssl_convert", argv)
        manifest = Manifest.load(folder)
        labelled = sum(case.label is not None for case in manifest.cases)
        patients = len(set(manifest.subjects().values()))
        print(f"{folder}: {len(manifest.cases)} cases of {patients} patients, {labelled} with labels")
