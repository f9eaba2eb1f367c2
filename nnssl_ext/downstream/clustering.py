"""Clusters of voxels: k-means over many images, and maps of any image by centroids that stay where they are.

Of each case as many foreground voxels are drawn, so that large organs and large images do not decide alone. Features
are standardised, brought to their first principal components, and clustered once; from then on nothing moves: a map
depends on its image and the file alone. Tasks that learn clusters map images by what they have learned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import ceil, floor
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from nnssl_ext.core.random import generator
from nnssl_ext.core.records import from_dict
from nnssl_ext.downstream.features import (
    LARGEST,
    FeatureMap,
    Volume,
    default_level,
    dense_features,
    dense_map,
    feature_map,
    prepare,
)
from nnssl_ext.downstream.frozen import Frozen, freeze, frozen_encoder, load_frozen
from nnssl_ext.downstream.grids import Grid, by_rows, image_grid, interpolate
from nnssl_ext.downstream.layers import shown
from nnssl_ext.engine.checkpoint import load_checkpoint
from nnssl_ext.engine.task import TRAINERS
from nnssl_ext.imageio import Geometry
from nnssl_ext.models.cluster_model import (
    CHECKPOINT,
    SCALES,
    ClusterModel,
    Origin,
    build_extractor,
    load_clusters,
    read_clusters,
)
from nnssl_ext.models.clusters import Clusters
from nnssl_ext.models.encoder import Encoder
from nnssl_ext.models.gaussian_scales import GaussianScales
from nnssl_ext.models.upsampling import Upsampling
from nnssl_ext.planners.plan import Configuration, Plan
from nnssl_ext.trainers.patch_clustering import PatchClustering, PatchClusteringTrainer
from nnssl_ext.trainers.pixel_clustering import PixelClustering, PixelClusteringTrainer
from nnssl_ext.views.occupancy import occupied_cells

ClusterTask = PatchClustering | PixelClustering
LEARNS_CLUSTERS = (PatchClusteringTrainer.__name__, PixelClusteringTrainer.__name__)
"""Trainers whose checkpoints map images."""
SLICES_AT_ONCE = 32
"""Slices of a volume whose Gaussian scales are computed together; bounds the memory."""
TEXTURED_SHARE = 0.5
"""Of a cell; here cells are voxels."""
MOST_CLUSTERS = 255
"""That a map of bytes can name beside the background."""


class Mapper(ABC):
    """What gives every voxel of an image a cluster.

    Attributes:
        frozen: How images are prepared, and on which windows they are looked at.
        num_clusters: K.
        background_std: Voxels around which prepared intensities deviate by less are background.
    """

    frozen: Frozen
    num_clusters: int
    background_std: float

    def prepare(self, image: npt.NDArray[np.float32], geometry: Geometry, name: str) -> Volume:
        """A prepared image whose foreground is what is not flat, or foreground by the rule of the fingerprint.

        In training only the former is known. The latter tells bright from dark, and in a scan without air around the
        darker tissues would be background; but the inside of an organ may be flat beside all that is around.

        Args:
            image: (C, Z, Y, X), as it was read.
            geometry: Of the image.
            name: For messages.

        Raises:
            ValueError: As `features.prepare`.
        """
        volume, configuration = prepare(self.frozen, image, geometry, name), self.frozen.configuration
        real = volume.place.known.permute(configuration.transpose_forward)[None]
        data, valid = (each.movedim(1, 0) if configuration.dims == 2 else each[None] for each in (volume.data, real))
        found = occupied_cells(data, valid, (1,) * configuration.dims, self.background_std, TEXTURED_SHARE)
        texture = found[:, 0] if configuration.dims == 2 else found[0, 0]
        textured = texture.permute(configuration.transpose_backward)
        place = replace(volume.place, foreground=volume.place.foreground | textured)
        return replace(volume, place=place)

    @abstractmethod
    def features(self, volume: Volume) -> FeatureMap:
        """What clusters are told by, of a whole image."""

    def components(self, cells: torch.Tensor) -> torch.Tensor:
        """What is interpolated to the image's voxels, (k, Z, Y, X), of cells (D, Z, Y, X)."""
        return cells

    def clusters(self, components: torch.Tensor) -> torch.Tensor:
        """Clusters (Z, Y, X), int64, from 0."""
        return components.argmax(0)


class ModelMapper(Mapper):
    """By clusters that were fitted to features.

    Args:
        model: The clusters.
        origin: How images are prepared for them.
    """

    def __init__(self, model: ClusterModel, origin: Origin) -> None:
        self.model, self.num_clusters = model, model.num_clusters
        self.frozen = Frozen(cast(Encoder, model.extractor), origin.plan, origin.configuration)
        self.background_std = origin.background_std

    @property
    def device(self) -> torch.device:
        """Where it works."""
        return self.model.clusters.mean.device

    def features(self, volume: Volume) -> FeatureMap:
        """See `Mapper`; Gaussian scales are those of the whole volume, a network's features those of windows."""
        if isinstance(self.model.extractor, GaussianScales):
            return _scale_features(self.model.extractor, self.frozen.configuration, self.device, volume)
        if self.model.upsampling == "linear":  # the map is interpolated as it is
            return dense_features(self.frozen, volume, self.model.level)
        return dense_map(self.frozen, self.model.features, volume, (1,) * self.frozen.configuration.dims)

    def components(self, cells: torch.Tensor) -> torch.Tensor:
        """See `Mapper`: principal components, so that borders of clusters are not those of cells."""
        return self.model.clusters.project(cells[None].to(self.device))[0]

    def clusters(self, components: torch.Tensor) -> torch.Tensor:
        """See `Mapper`."""
        return self.model.clusters.nearest(components[None])[0, 0]


class TaskMapper(Mapper):
    """By the clusters that a pretraining task has learned to predict; see `PatchClustering.scores`.

    Args:
        task: In eval mode.
        plan: By which images are prepared.
    """

    def __init__(self, task: ClusterTask, plan: Plan) -> None:
        self.task = task
        self.frozen = freeze(task.encoder, plan, task.configuration)
        self.num_clusters, self.background_std = task.num_clusters, task.config.background_std

    def features(self, volume: Volume) -> FeatureMap:
        """See `Mapper`: probabilities of the clusters, of overlapping windows."""
        return dense_map(self.frozen, self._probabilities, volume, self.task.cell)

    def _probabilities(self, crops: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return self.task.scores(crops, real).softmax(1)


def load_task(path: Path, device: str) -> TaskMapper:
    """The mapper of a checkpoint that has learned clusters.

    Args:
        path: Of the checkpoint.
        device: Where it works.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is of another method, or was written by a version that did not keep what it takes.
    """
    content = load_checkpoint(path)
    pretraining = content.get("nnssl_pretraining", {})
    name, predictor = pretraining.get("trainer"), pretraining.get("predictor")
    if name not in LEARNS_CLUSTERS or predictor is None:
        raise ValueError(
            f"{path} is a checkpoint of {name or 'another program'} that predicts no clusters: give one of "
            f"{' or '.join(LEARNS_CLUSTERS)}, or find clusters of its features by nnssl_cluster fit --checkpoint {path}"
        )
    trainer = from_dict(TRAINERS.get(name), pretraining["recipe"], str(path))
    frozen = frozen_encoder(content, path)
    task = trainer.build_task(frozen.configuration, pretraining["num_cases"]).eval()
    task.load_state_dict({**task.state_dict(), **predictor})
    task.encoder.load_state_dict(frozen.encoder.state_dict())
    return TaskMapper(cast(ClusterTask, task.to(device)), frozen.plan)


def _scale_features(
    extractor: GaussianScales, configuration: Configuration, device: torch.device, volume: Volume
) -> FeatureMap:
    real = volume.place.known.permute(configuration.transpose_forward)[None]
    depth, flat = volume.data.shape[1], configuration.dims == 2
    halo = 0 if flat else extractor.reach
    values = np.empty((*extractor.channels, *volume.data.shape[1:]), dtype=np.float16)
    for start in range(0, depth, SLICES_AT_ONCE):
        stop, low = min(start + SLICES_AT_ONCE, depth), max(start - halo, 0)
        image, valid = (each[:, low : min(stop + halo, depth)].to(device) for each in (volume.data, real))
        if flat:  # slices are the batch
            found = extractor(image.movedim(1, 0), valid.movedim(1, 0)).movedim(0, 1)
        else:
            found = extractor(image[None], valid[None])[0]
        found = found[:, start - low : stop - low].clamp(-LARGEST, LARGEST)
        values[:, start:stop] = found.half().cpu().numpy()
    return feature_map(volume.place, values, (1, 1, 1), configuration.transpose_backward)


def unfitted_clusters(
    checkpoint: Path | None,
    plans: tuple[Path, str] | None,
    module: str | None,
    level: int | None,
    num_clusters: int,
    upsampling: Upsampling = "linear",
    background_std: float = 0.05,
) -> tuple[ClusterModel, Origin]:
    """An extractor of features, and clusters of them that have to be fitted.

    Args:
        checkpoint: Of `nnssl_train`, whose encoder gives the features; None: `module`, or else Gaussian scales.
        plans: A plans file and the configuration by which images are prepared, where there is no checkpoint.
        module: `package.module:name` of a torch module that gives the features.
        level: Feature map; None: the deepest one with cells of 4 voxels or less.
        num_clusters: K, from 2 to 255.
        upsampling: How features of cells get to voxels.
        background_std: Voxels around which intensities deviate by less are background, 0 or more.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the arguments contradict each other, or there is no such level or module.
    """
    if (checkpoint is None) == (plans is None) or (module and checkpoint):
        raise ValueError("give either --checkpoint FILE, or --plans FILE, with --module NAME or without")
    if not 2 <= num_clusters <= MOST_CLUSTERS:
        raise ValueError(f"--num_clusters {num_clusters} must lie between 2 and {MOST_CLUSTERS}")
    if checkpoint is not None:
        frozen, source = load_frozen(checkpoint), CHECKPOINT
        plan, configuration = frozen.plan, frozen.configuration
        extractor: GaussianScales | Encoder = frozen.encoder
    else:
        assert plans is not None
        plan, source = Plan.load(plans[0]), module or SCALES
        configuration = plan.configuration(plans[1])
        extractor = build_extractor(source, configuration)
    if level is None:
        level = default_level(Frozen(cast(Encoder, extractor), plan, configuration))
    if not 0 <= level < len(extractor.channels):
        raise ValueError(f"--level {level} is not there: choose 0 (finest) to {len(extractor.channels) - 1}")
    own = Plan({**plan.raw, "configurations": {configuration.name: configuration.raw}})
    clusters = Clusters(extractor.channels[level], num_clusters)
    return ClusterModel(extractor, clusters, level, upsampling), Origin(source, own, background_std)


def drawn_voxels(features: FeatureMap, number: int, seed: int) -> torch.Tensor:
    """Features of that many foreground voxels, or of all where there are fewer, drawn by the image's name: (n, D).

    They are drawn on the prepared image of `Mapper.prepare`, and the features of cells are interpolated linearly.
    """
    place = features.place
    where = np.argwhere((place.known & place.foreground).numpy())
    order = generator(seed, "cluster", place.name).permutation(len(where))[:number]
    chosen = torch.from_numpy(where[np.sort(order)])
    cells = [features.grid.places(place.grid, axis)[chosen[:, axis]] for axis in range(3)]
    result = torch.zeros(len(chosen), len(features.values))
    low = [at.clamp(0, size - 1).floor().long() for at, size in zip(cells, features.grid.size, strict=True)]
    for corner in product((0, 1), repeat=3):
        weight, index = torch.ones(len(chosen)).double(), []
        for at, first, size, step in zip(cells, low, features.grid.size, corner, strict=True):
            share = at.clamp(0, size - 1) - first
            weight = weight * (share if step else 1 - share)
            index.append((first + step).clamp(max=size - 1).numpy())
        found = np.asarray(features.values[:, index[0], index[1], index[2]], dtype=np.float32)
        result += weight[:, None].float() * torch.from_numpy(found.T)
    return result


def cluster_map(mapper: Mapper, features: FeatureMap, background: bool = False) -> npt.NDArray[np.integer]:
    """The cluster of every voxel of an image, from 1.

    What clusters are told by is interpolated to the image's voxels and told there, so that borders are not those of
    cells.

    Args:
        mapper: Gives the clusters.
        features: Of the image, by the same mapper.
        background: Whether the background is mapped too; clusters were found in the foreground alone.

    Returns:
        (Z, Y, X); 0 where nothing is mapped.
    """
    mask = shown(features.place, not background)
    names = np.uint8 if mapper.num_clusters <= MOST_CLUSTERS else np.uint16
    labels = np.zeros(features.place.shape, dtype=names)
    for rows, target in by_rows(image_grid(features.place.shape)):
        near, source = _rows_around(features.grid, target)
        cells = torch.from_numpy(np.array(features.values[:, near], dtype=np.float32))
        found = mapper.clusters(interpolate(mapper.components(cells), source, target)).cpu() + 1
        labels[rows] = (found * mask[rows]).numpy()
    return labels


def _rows_around(source: Grid, target: Grid) -> tuple[slice, Grid]:
    """The rows of a grid that the target lies between, and the grid that they are."""
    at = source.places(target, 0).clamp(0, source.size[0] - 1)
    low, high = floor(float(at.min())), ceil(float(at.max())) + 1
    first = (source.first[0] + low * source.step[0], *source.first[1:])
    return slice(low, high), Grid((high - low, *source.size[1:]), first, source.step)


def load_mapper(path: Path, module: str | None = None, device: str = "cpu") -> Mapper:
    """What a file maps images by.

    Args:
        path: Of `nnssl_cluster fit`, or a checkpoint of a method that learns clusters.
        module: Name of the module that the features come from, where they come from one.
        device: Where it works.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another file.
    """
    if read_clusters(path) is None:
        return load_task(path, device)
    model, origin = load_clusters(path, module)
    return ModelMapper(model.to(device), origin)


def fit_clusters(model: ClusterModel, samples: Sequence[torch.Tensor], seed: int) -> None:
    """Finds the clusters of a model, in the voxels of all cases: one entry of `drawn_voxels` each.

    Raises:
        ValueError: If there are fewer different voxels than clusters.
    """
    model.clusters.fit(torch.cat(list(samples)), seed)
