"""`nnssl_cluster`: clusters of voxels by their features, and maps of any image by them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.cli.common import command, image_names

if TYPE_CHECKING:
    from nnssl_ext.downstream.clustering import Mapper
    from nnssl_ext.downstream.features import FeatureMap

EPILOG = """\
examples:
  nnssl_cluster fit scans/*.nii.gz --plans nnsslPlans.json -o clusters.pth
  nnssl_cluster fit scans/*.nii.gz --checkpoint checkpoint_final.pth -o clusters.pth
  nnssl_cluster predict clusters.pth new.nii.gz -o maps
  nnssl_cluster predict checkpoint_final.pth new.nii.gz -o maps

Without a checkpoint the features are the image under several Gaussians and its steepness under each, or those of
--module. predict takes what fit wrote, or a checkpoint of PatchClusteringTrainer or PixelClusteringTrainer. It writes
NAME_clusters.nii.gz on the image's own voxels, 1 to K and 0 in the background, and a picture of it.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="nnssl_cluster",
        description="Cluster the voxels of images by their features, once, and write the clusters of any image.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    steps = result.add_subparsers(dest="step", required=True, metavar="fit|predict")
    fit = steps.add_parser("fit", help="find the clusters of many images", allow_abbrev=False)
    predict = steps.add_parser("predict", help="write the clusters of images", allow_abbrev=False)
    predict.add_argument("model", type=Path, help="what fit wrote, or a checkpoint that has learned clusters")
    for each in (fit, predict):
        each.add_argument(
            "images", nargs="+", metavar="IMAGE", help="an image; one of several channels as FILE,FILE in their order"
        )
        each.add_argument("--module", help="package.module:name of a torch module that gives the features instead")
        each.add_argument("-device", default="cpu", help="cpu (default), cuda or cuda:N")
    fit.add_argument("-o", type=Path, required=True, metavar="FILE.pth", help="where to write the clusters")
    fit.add_argument("--checkpoint", type=Path, help="checkpoint of nnssl_train that the features come from")
    fit.add_argument("--plans", type=Path, help="plans that say how to prepare images, where there is no checkpoint")
    fit.add_argument("-c", default="3d_fullres", help="configuration of these plans (default: %(default)s)")
    fit.add_argument("--level", type=int, help="feature map, 0 is the finest (default: the deepest with cells of 4)")
    fit.add_argument(
        "--upsampling",
        choices=("linear", "bilateral"),
        default="linear",
        help="how features of cells get to voxels; bilateral: along the edges of the image, at the cost of memory",
    )
    fit.add_argument("--num_clusters", type=int, default=10, help="clusters, 2 to 255 (default: %(default)s)")
    fit.add_argument("--per_case", type=int, default=200, help="foreground voxels of an image (default: %(default)s)")
    fit.add_argument(
        "--background_std",
        type=float,
        default=0.05,
        help="voxels around which z-scored intensities deviate by less are background (default: %(default)s)",
    )
    fit.add_argument("--seed", type=int, default=0, help="of the drawn voxels and the starts (default: %(default)s)")
    predict.add_argument("-o", type=Path, default=Path(), metavar="FOLDER", help="where to write (default: here)")
    predict.add_argument("--background", action="store_true", help="map the background, too")
    return result


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `nnssl_cluster`."""
    args = parser().parse_args(argv)
    files = [[Path(name) for name in image.split(",")] for image in args.images]
    names = image_names(files, "they would be taken for one another")
    from nnssl_ext.core.logs import configure_logging

    configure_logging()
    if args.step == "fit":
        _fit(args, files, names)
    else:
        _predict(args, files, names)


def _fit(args: argparse.Namespace, files: Sequence[Sequence[Path]], names: Sequence[str]) -> None:
    if args.per_case < 1:
        raise ValueError(f"--per_case {args.per_case} must be 1 or more")
    if args.background_std < 0:
        raise ValueError(f"--background_std {args.background_std} must be 0 or more")
    if args.o.is_dir():
        raise ValueError(f"-o {args.o} is a folder; name the file that the clusters are written to")
    from nnssl_ext.core.logs import track
    from nnssl_ext.downstream.clustering import ModelMapper, drawn_voxels, fit_clusters, unfitted_clusters
    from nnssl_ext.engine.device import resolve_device
    from nnssl_ext.models.cluster_model import save_clusters

    plans = (args.plans, args.c) if args.plans else None
    model, origin = unfitted_clusters(
        args.checkpoint, plans, args.module, args.level, args.num_clusters, args.upsampling, args.background_std
    )
    model.to(resolve_device(args.device))
    mapper = ModelMapper(model, origin)
    samples = [
        drawn_voxels(_features(mapper, image, name), args.per_case, args.seed)
        for image, name in track(zip(files, names, strict=True), len(files), "features")
    ]
    fit_clusters(model, samples, args.seed)
    save_clusters(args.o, model, origin)
    shares = ", ".join(f"{share:.0%}" for share in model.clusters.shares.tolist())
    print(
        f"{args.o}: {model.num_clusters} clusters of {sum(map(len, samples))} voxels of {len(files)} images ({shares})"
    )


def _predict(args: argparse.Namespace, files: Sequence[Sequence[Path]], names: Sequence[str]) -> None:
    from nnssl_ext.core.logs import track
    from nnssl_ext.downstream.clustering import cluster_map, load_mapper
    from nnssl_ext.engine.device import resolve_device
    from nnssl_ext.engine.pictures import label_colours
    from nnssl_ext.imageio import read_image, write_segmentation
    from nnssl_ext.reports.planes import Row, draw_planes

    mapper = load_mapper(args.model, args.module, str(resolve_device(args.device)))
    for image, name in track(zip(files, names, strict=True), len(files), "clusters"):
        features = _features(mapper, image, name)
        labels = cluster_map(mapper, features, args.background)
        write_segmentation(labels, features.place.geometry, args.o / f"{name}_clusters.nii.gz")
        voxels, geometry = read_image(image)
        colours = (255 * label_colours(labels)).astype("uint8")
        rows = [Row("image", grey=voxels[0]), Row("clusters", grey=voxels[0], colours=colours)]
        draw_planes(rows, geometry, args.o / f"{name}_clusters.png")
        found = len(set(labels.ravel().tolist()) - {0})
        print(f"{args.o / name}_clusters.nii.gz: {found} of {mapper.num_clusters} clusters")


def _features(mapper: Mapper, image: Sequence[Path], name: str) -> FeatureMap:
    from nnssl_ext.imageio import read_image

    return mapper.features(mapper.prepare(*read_image(image), name))
