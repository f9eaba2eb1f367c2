"""An extractor of features and clusters of them, as one frozen module and one file that needs nothing else."""

from __future__ import annotations

import importlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from nnssl_ext.core.records import atomic_path
from nnssl_ext.models.backbone import build_encoder, is_transformer
from nnssl_ext.models.clusters import Clusters
from nnssl_ext.models.encoder import Encoder
from nnssl_ext.models.gaussian_scales import GaussianScales
from nnssl_ext.models.upsampling import Upsampling, upsampled
from nnssl_ext.planners.plan import Configuration, Plan

SCALES, CHECKPOINT = "scales", "checkpoint"
"""What features come from, besides a module by its name."""
_KEY = "nnssl_clusters"


class ClusterModel(nn.Module):
    """Clusters with the extractor of their features. It is always in eval mode, and no gradient reaches it.

    Args:
        extractor: `GaussianScales`, or what has `channels`, `strides` and `feature_maps` as an `Encoder` has.
        clusters: Of its features.
        level: The feature map that is clustered.
        upsampling: How the features of its cells get to voxels.
    """

    def __init__(
        self,
        extractor: GaussianScales | Encoder,
        clusters: Clusters,
        level: int = 0,
        upsampling: Upsampling = "linear",
    ) -> None:
        super().__init__()
        self.extractor, self.clusters, self.level, self.upsampling = extractor, clusters, level, upsampling
        self.requires_grad_(False).eval()

    @property
    def num_clusters(self) -> int:
        """K."""
        return len(self.clusters.centroids)

    def train(self, mode: bool = True) -> ClusterModel:
        """Stays in eval mode, whatever is asked for."""
        return super().train(False)

    @torch.no_grad()
    def features(self, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Features of every voxel of crops: those of a network's cells, upsampled.

        Args:
            image: (B, C, *size).
            valid: (B, 1, *size), bool.

        Returns:
            (B, D, *size), float32.
        """
        if isinstance(self.extractor, GaussianScales):
            return self.extractor(image, valid)
        size, stride = image.shape[2:], self.extractor.strides[self.level]
        gaps = [-edge % step for edge, step in zip(size, self.extractor.strides[-1], strict=True)]
        padded = functional.pad(torch.where(valid, image, 0), [side for gap in reversed(gaps) for side in (0, gap)])
        values = upsampled(self.extractor.feature_maps(padded)[self.level], padded, stride, self.upsampling)
        return values[(slice(None), slice(None), *(slice(edge) for edge in size))]

    @torch.no_grad()
    def forward(self, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """The cluster of every voxel of crops, (B, 1, *size), int64, from 0; see `features`."""
        return self.clusters(self.features(image, valid))


@dataclass(frozen=True)
class Origin:
    """What one has to know of clusters to use them on images."""

    source: str
    """What the features come from: `scales`, `checkpoint`, or `package.module:name` of a module."""
    plan: Plan
    """With the one configuration by which images are prepared."""
    background_std: float
    """Voxels around which prepared intensities deviate by less are background, 0 or more."""

    @property
    def configuration(self) -> Configuration:
        """By which images are prepared."""
        (name,) = self.plan.configuration_names
        return self.plan.configuration(name)


def save_clusters(path: Path, model: ClusterModel, origin: Origin) -> None:
    """Writes a file that `load_clusters` reads."""
    content = {
        "source": origin.source,
        "plan": origin.plan.raw,
        "background_std": origin.background_std,
        "level": model.level,
        "upsampling": model.upsampling,
        "clusters": {name: value.cpu() for name, value in model.clusters.state_dict().items()},
        "extractor": {name: value.cpu() for name, value in model.extractor.state_dict().items()},
    }
    with atomic_path(path) as temporary:
        torch.save({_KEY: content}, temporary)


def load_clusters(path: Path, module: str | None = None) -> tuple[ClusterModel, Origin]:
    """Reads what `save_clusters` wrote, onto the CPU. Nothing in the file is executed.

    Args:
        path: The file.
        module: Name of the module that its features come from, which is imported and called; None: it must be none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another file, or its features come from a module that was not named.
    """
    content = read_clusters(path)
    if content is None:
        raise ValueError(f"{path} holds no clusters: make some by nnssl_cluster fit IMAGE ... -o clusters.pth")
    origin = Origin(content["source"], Plan(content["plan"]), content["background_std"])
    if origin.source not in (SCALES, CHECKPOINT, module):
        raise ValueError(
            f"{path} takes its features from the module {origin.source}, whose code would be run: allow it by "
            f"nnssl_cluster predict --module {origin.source}"
        )
    extractor = build_extractor(origin.source, origin.configuration)
    extractor.load_state_dict(content["extractor"])
    state, level = content["clusters"], content["level"]
    clusters = Clusters(extractor.channels[level], len(state["centroids"]), len(state["components"]))
    clusters.load_state_dict(state)
    return ClusterModel(extractor, clusters, level, content["upsampling"]), origin


def read_clusters(path: Path) -> Mapping[str, Any] | None:
    """What a file of clusters holds; None where it is another file of torch's.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no file of torch's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: make clusters by nnssl_cluster fit IMAGE ... -o clusters.pth")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no file of nnssl_cluster, or damaged: use another one")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no file of nnssl_cluster, or damaged: use another one") from error
    return content.get(_KEY) if isinstance(content, dict) else None


def build_extractor(source: str, configuration: Configuration) -> GaussianScales | Encoder:
    """What gives features: Gaussian scales, an encoder of the plan's, untrained as yet, or a module by its name."""
    if source == SCALES:
        return GaussianScales(configuration.dims, configuration.num_input_channels)
    if source == CHECKPOINT:
        return build_encoder(configuration)
    return cast(Encoder, NamedModule(source, configuration))


class NamedModule(nn.Module):
    """A torch module by its name, as an extractor of one feature map.

    Args:
        name: `package.module:name` of what makes the module when called without arguments. The module takes
            (B, C, *patch) to (B, D, *patch / stride).
        configuration: Of the images.

    Raises:
        ValueError: If there is no such module, or it makes no such map.
    """

    kind = "cnn"

    def __init__(self, name: str, configuration: Configuration) -> None:
        super().__init__()
        package, _, attribute = name.partition(":")
        try:
            make = getattr(importlib.import_module(package), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"--module {name!r} cannot be had ({error}): give it as package.module:name") from error
        self.module: nn.Module = make().eval()
        self.anchor = nn.Parameter(torch.zeros(()))  # tells the device of a module without parameters of its own
        patch = configuration.patch_size
        with torch.no_grad():
            shape = self.module(torch.zeros(1, configuration.num_input_channels, *patch)).shape
        fits = len(shape) == len(patch) + 2 and not any(a % b for a, b in zip(patch, shape[2:], strict=True))
        if not fits:
            raise ValueError(f"{name} makes {tuple(shape)} of a patch {patch}: it takes a map of whole strides of it")
        self.channels = (shape[1],)
        self.strides = (tuple(a // b for a, b in zip(patch, shape[2:], strict=True)),)

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Its map, alone."""
        return [self.module(x)]


def check_crops(model: ClusterModel, origin: Origin, configuration: Configuration) -> None:
    """Refuses clusters that do not fit the crops of a training run.

    Raises:
        ValueError: Where images were prepared otherwise for the clusters, or a transformer gives the features.
    """
    own = origin.configuration
    for what, theirs, ours in (
        ("spacing", own.spacing, configuration.spacing),
        ("normalization_schemes", own.normalization_schemes, configuration.normalization_schemes),
    ):
        if theirs != ours:
            raise ValueError(
                f"the clusters were found on images with {what} {theirs}, this configuration has {ours}: fit them anew "
                "by nnssl_cluster fit --plans nnsslPlans.json"
            )
    if not isinstance(model.extractor, GaussianScales) and is_transformer(model.extractor):
        raise ValueError(
            "the clusters are of a transformer's features, which takes crops of one size alone: fit clusters of a "
            "U-Net's checkpoint, or of Gaussian scales"
        )
