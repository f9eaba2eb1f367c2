"""`nnssl_features`: what a pretrained network sees in images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.cli.common import command, image_names

if TYPE_CHECKING:
    import numpy as np

    from nnssl_ext.downstream.features import FeatureMap, Volume
    from nnssl_ext.downstream.frozen import Frozen

MOST_HEADS = 6
"""That the picture shows; the file has all."""
FORMATS = ("npz", "nifti", "nifti_full", "none")
EPILOG = """\
examples:
  nnssl_features checkpoint_final.pth scan.nii.gz
  nnssl_features checkpoint_final.pth a.nii.gz b.nii.gz c.nii.gz -o seen --foreground
  nnssl_features checkpoint_final.pth T1.nii.gz,T2.nii.gz --level 1 --features nifti

Of each image NAME it writes, into the folder of -o:
  NAME_features.npz       dense features in float16, where they lie, and which cells hold no padding
  NAME_pca.nii.gz         three principal components as red, green and blue, on the image's own voxels
  NAME_attention.nii.gz   of a transformer: what its last block attends to, mean and each head; 1 is the even share
  NAME_planes.png         image, components and attention in three planes
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="nnssl_features",
        description="Write dense features of whole images, their principal components as colours, and a transformer's "
        "attention, all in the place of the image.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("checkpoint", type=Path, help="checkpoint of nnssl_train")
    add("images", nargs="+", metavar="IMAGE", help="an image; one of several channels as FILE,FILE in their order")
    add("-o", type=Path, default=Path(), metavar="FOLDER", help="where to write (default: here)")
    add("--level", type=int, help="feature map, 0 is the finest (default: the deepest with cells of 4 voxels)")
    add(
        "--features",
        default="npz",
        help="npz (default), nifti (a 4D image whose voxels are the cells of the feature map), nifti_full (on the "
        "image's own voxels: large) or none",
    )
    add("--foreground", action="store_true", help="leave the background out of the components and pictures")
    add("--separate", action="store_true", help="components of each image by itself: colours then do not compare")
    add(
        "--anonymization_masks",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="one per image: what is not 0 was altered, is not shown to the network and has no colour",
    )
    add("-device", default="cpu", help="cpu (default), cuda or cuda:N")
    return result


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `nnssl_features`."""
    args = parser().parse_args(argv)
    files = [[Path(name) for name in image.split(",")] for image in args.images]
    names = image_names(files, "their results would overwrite each other")
    masks: list[Path | None] = list(args.anonymization_masks) or [None] * len(files)
    if len(masks) != len(files):
        raise ValueError(f"{len(masks)} anonymization masks for {len(files)} images: give one per image, or none")
    if args.features not in FORMATS:
        raise ValueError(f"--features {args.features!r} is not known: use one of {', '.join(FORMATS)}")
    from nnssl_ext.core.logs import configure_logging, track
    from nnssl_ext.downstream.features import dense_features
    from nnssl_ext.downstream.frozen import load_frozen
    from nnssl_ext.engine.device import resolve_device
    from nnssl_ext.models.backbone import is_transformer

    configure_logging()
    frozen = load_frozen(args.checkpoint)
    frozen.encoder.to(resolve_device(args.device))
    maps, attention = [], []
    for image, mask, name in track(zip(files, masks, names, strict=True), len(files), "features"):
        volume = _volume(frozen, image, mask, name)
        maps.append(dense_features(frozen, volume, args.level, scratch=args.o))
        attends = is_transformer(frozen.encoder)
        attention.append(dense_features(frozen, volume, what="attention", scratch=args.o) if attends else None)
    _write(args, files, maps, attention)


def _volume(frozen: Frozen, image: Sequence[Path], mask: Path | None, name: str) -> Volume:
    from nnssl_ext.downstream.features import prepare
    from nnssl_ext.imageio import read_image, read_segmentation_of

    voxels, geometry = read_image(image)
    altered = None if mask is None else read_segmentation_of(mask, voxels.shape[1:], geometry) != 0
    return prepare(frozen, voxels, geometry, name, altered)


def _write(
    args: argparse.Namespace,
    files: Sequence[Sequence[Path]],
    maps: Sequence[FeatureMap],
    attention: Sequence[FeatureMap | None],
) -> None:
    from nnssl_ext.downstream.layers import painted, save_npz, save_stack
    from nnssl_ext.downstream.pca import colour_range, fit_pca, project
    from nnssl_ext.imageio.layers import write_rgb

    groups = [[features] for features in maps] if args.separate else [list(maps)]
    coloured = []
    for group in groups:
        pca = fit_pca(group, 3, args.foreground)
        limits = colour_range((project(pca, features) for features in group), group, args.foreground)
        coloured += [(features, pca, limits) for features in group]
        shares = ", ".join(f"{share:.0%}" for share in (pca.variances / pca.total_variance).tolist())
        print(f"red, green and blue are {shares} of the variance of {len(pca.mean)} channels")
    for image, (features, pca, limits), attended in zip(files, coloured, attention, strict=True):
        stem = args.o / features.place.name
        if args.features == "npz":
            save_npz(features, Path(f"{stem}_features.npz"))
        elif args.features != "none":
            save_stack(features, Path(f"{stem}_features.nii.gz"), on_image=args.features == "nifti_full")
        rgb = painted(features, pca, limits, args.foreground)
        write_rgb(rgb, features.place.geometry, Path(f"{stem}_pca.nii.gz"))
        if attended is not None:
            save_stack(attended, Path(f"{stem}_attention.nii.gz"), on_image=True)
        _draw(image, rgb, attended, features, Path(f"{stem}_planes.png"))
        print(f"{stem}: {'x'.join(map(str, features.grid.size))} cells of {len(features.values)} features")


def _draw(
    image: Sequence[Path], rgb: np.ndarray, attended: FeatureMap | None, features: FeatureMap, path: Path
) -> None:
    from nnssl_ext.downstream.layers import stretched
    from nnssl_ext.imageio import read_image
    from nnssl_ext.reports.planes import Row, draw_planes

    voxels, geometry = read_image(image)
    rows = [Row("image", grey=voxels[0]), Row("components", grey=voxels[0], colours=rgb)]
    if attended is not None:
        mean, *heads = stretched(replace(attended, values=attended.values[: 1 + MOST_HEADS])).astype("float32")
        rows += [Row("attention, mean", heat=mean)]
        rows += [Row(f"head {number}", heat=head) for number, head in enumerate(heads, start=1)]
    draw_planes(rows, geometry, path)
