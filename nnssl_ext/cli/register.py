"""`nnssl_register`: brings one image onto another by the features of a pretrained network, without training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.cli.common import command, image_name

if TYPE_CHECKING:
    from nnssl_ext.downstream.registration import Describe, Image, Labels, Registered

EPILOG = """\
examples:
  nnssl_register moving.nii.gz fixed.nii.gz --checkpoint checkpoint_final.pth -o registered
  nnssl_register moving.nii.gz fixed.nii.gz --mind --start mass
  nnssl_register m.nii.gz f.nii.gz --checkpoint c.pth --moving_labels m_seg.nii.gz --fixed_labels f_seg.nii.gz

It writes, into the folder of -o:
  MOVING_to_FIXED_field.nii.gz    displacements on the fixed image in mm, as ITK and ANTs read them
  MOVING_to_FIXED.nii.gz          the moving image on the fixed one's voxels (of several channels: one file each)
  MOVING_to_FIXED_labels.nii.gz   its labels, with --moving_labels
  MOVING_to_FIXED.png             both images, before and after, and the bent grid
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="nnssl_register",
        description="Register MOVING to FIXED by dense features: ConvexAdam on the joint principal components of a "
        "pretrained network's features, or on MIND's.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("moving", help="the image that is deformed; one of several channels as FILE,FILE")
    add("fixed", help="the image that stays")
    features = result.add_mutually_exclusive_group(required=True)
    features.add_argument("--checkpoint", type=Path, help="checkpoint of nnssl_train whose features are matched")
    features.add_argument("--mind", action="store_true", help="match MIND's self-similarities, without a network")
    features.add_argument("--none", action="store_true", help="only the start: what there is without registration")
    add("-o", type=Path, default=Path(), metavar="FOLDER", help="where to write (default: here)")
    add("--level", type=int, help="feature map, 0 is the finest (default: the deepest with cells of 4 voxels)")
    add("--start", default="scanner", help="scanner (default: as the headers say), centre (of the images), mass")
    add("--spacing", type=float, metavar="MM", help="edge of the cubes that are matched (default: the checkpoint's)")
    add("--regularization", type=float, help="weight of smoothness beside the features (default: 0.1)")
    add("--moving_labels", type=Path, metavar="FILE", help="label map of the moving image")
    add("--fixed_labels", type=Path, metavar="FILE", help="label map of the fixed image: Dice is printed")
    add("-device", default="cpu", help="where the network runs and features are matched: cpu (default), cuda, cuda:N")
    return result


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `nnssl_register`."""
    args = parser().parse_args(argv)
    if args.fixed_labels and not args.moving_labels:
        raise ValueError("--fixed_labels needs --moving_labels to compare them with")
    if args.level is not None and not args.checkpoint:
        raise ValueError("--level chooses a network's feature map: it needs --checkpoint")
    if args.spacing is not None and not args.spacing > 0:
        raise ValueError(f"--spacing {args.spacing} must be above 0, in mm")
    from nnssl_ext.core.logs import configure_logging
    from nnssl_ext.downstream.convex import ConvexConfig
    from nnssl_ext.downstream.registration import read, register

    configure_logging()
    moving, fixed = (read([Path(name) for name in image.split(",")]) for image in (args.moving, args.fixed))
    labels = _labels(args.moving_labels, moving), _labels(args.fixed_labels, fixed)
    describe, spacing = _features(args, fixed)
    settings: dict[str, Any] = {} if args.regularization is None else {"regularization": args.regularization}
    found = register(moving, fixed, describe, args.spacing or spacing, args.start, ConvexConfig(**settings))
    _write(args.o, moving, fixed, found, labels)
    print(f"voxels folded: {found.deformation.folding:.2%}")
    print(f"SD of log Jacobian: {found.deformation.sd_log_jacobian:.3f}")
    print(f"time: {found.seconds:.1f} s")


def _features(args: argparse.Namespace, fixed: Image) -> tuple[Describe | None, float]:
    """What is matched, and on cubes of how many mm."""
    from nnssl_ext.downstream.frozen import load_frozen
    from nnssl_ext.downstream.registration import mean_spacing, mind_features, network_features
    from nnssl_ext.engine.device import resolve_device

    device = resolve_device(args.device)
    thick = [edge for edge, size in zip(fixed.geometry.spacing, fixed.voxels.shape[1:], strict=True) if size > 1]
    if args.checkpoint is None:
        return mind_features(device) if args.mind else None, mean_spacing(thick)
    frozen = load_frozen(args.checkpoint)
    frozen.encoder.to(device)
    return network_features(frozen, args.level), mean_spacing(frozen.configuration.spacing)


def _labels(file: Path | None, image: Image) -> Labels | None:
    """The label map of an image, if there is one; read before anything is computed."""
    from nnssl_ext.imageio import read_segmentation_of

    return None if file is None else read_segmentation_of(file, image.voxels.shape[1:], image.geometry)


def _write(
    folder: Path, moving: Image, fixed: Image, found: Registered, labels: tuple[Labels | None, Labels | None]
) -> None:
    import numpy as np

    from nnssl_ext.downstream.fields import sample_moving
    from nnssl_ext.imageio import write_image
    from nnssl_ext.imageio.layers import write_field

    stem = f"{folder / image_name(Path(moving.name))}_to_{image_name(Path(fixed.name))}"
    write_field(found.field, fixed.geometry, Path(f"{stem}_field.nii.gz"))
    values, seen = sample_moving(moving.voxels, moving.geometry, found.field, fixed.geometry)
    warped = np.where(seen, values, 0).astype(np.float32)
    for number, channel in enumerate(warped):
        suffix = f"_{number:04d}" if len(warped) > 1 else ""
        write_image(channel, fixed.geometry, Path(f"{stem}{suffix}.nii.gz"))
    _draw(moving, fixed, found, warped, Path(f"{stem}.png"))
    if labels[0] is not None:
        _move_labels(labels[0], labels[1], moving, fixed, found, Path(f"{stem}_labels.nii.gz"))
    print(f"{stem}_field.nii.gz")


def _move_labels(
    labels: Labels, target: Labels | None, moving: Image, fixed: Image, found: Registered, path: Path
) -> None:
    """Writes the moved labels, and prints their overlap with the fixed ones before and after."""
    import numpy as np

    from nnssl_ext.downstream.registration import moved_labels, overlaps
    from nnssl_ext.imageio import write_segmentation

    fields = np.zeros_like(found.field), found.start, found.field
    before, started, after = (moved_labels(labels, moving.geometry, field, fixed.geometry) for field in fields)
    write_segmentation(after, fixed.geometry, path)
    if target is not None:
        columns = [overlaps(moved, target) for moved in (before, started, after)]
        print("label    Dice before   at the start   after")
        for label in sorted({label for column in columns for label in column}):
            scores = [column.get(label, float("nan")) for column in columns]
            print(f"{label:<8} {scores[0]:<13.3f} {scores[1]:<14.3f} {scores[2]:.3f}")


def _draw(moving: Image, fixed: Image, found: Registered, warped: Any, path: Path) -> None:
    import numpy as np

    from nnssl_ext.downstream.fields import places_moved, sample_moving
    from nnssl_ext.reports.planes import Row, draw_planes

    started, seen = sample_moving(moving.voxels[:1], moving.geometry, found.start, fixed.geometry)
    bent = places_moved(found.field - found.start, fixed.geometry)
    rows = [
        Row("fixed", grey=fixed.voxels[0]),
        Row("moving, at the start", grey=np.where(seen, started[0], 0)),
        Row("moving, registered", grey=warped[0]),
        Row("the grid, bent", grey=fixed.voxels[0], bent=bent),
    ]
    draw_planes(rows, fixed.geometry, path)
