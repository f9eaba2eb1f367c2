"""Several crops of different sizes from one place, each resized to its own fixed size (Caron et al. 2020, SwAV).

All views of a sample are cut from one parent crop, inside its real voxels, and each knows where it was taken. Their
shapes follow the patch, so anisotropic patches give anisotropic crops, and anatomy is magnified but never distorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

from nnssl_ext.core.checks import at_least, rising
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.loading.batch import Batch
from nnssl_ext.views.crops import UNMOVED, random_crop
from nnssl_ext.views.intensity import IntensityConfig, intensity_view
from nnssl_ext.views.spatial import SpatialConfig
from nnssl_ext.views.transform import SpatialView

NUM_GLOBALS = 2
MIN_POSITIONS = 2
"""Positions per axis that the deepest feature map has at least: of a single one, instance normalisation leaves 0."""
LOCAL_POSITIONS, ROOM = 4, 6
"""Positions per axis that it has of a local view, at least, where a global one has `ROOM` or more of them."""


@dataclass(frozen=True, kw_only=True)
class MultiCropConfig:
    """Which views are taken of a sample."""

    parent_scale: float = 4 / 3
    """Edge of the crop that all views are cut from, as a multiple of the patch's, 1 or more. At 4/3 the global views
    lie about the scale that the network is fine-tuned at."""
    num_locals: int = 4
    """Local views beside the two global ones, 0 or more."""
    global_scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest edge of a global view as a share of the parent crop's."""
    local_scale: tuple[float, float] = (0.25, 0.5)
    """The same of a local view."""
    global_size: tuple[int, ...] | None = None
    """Voxels of a global view per axis; none: the patch."""
    local_size: tuple[int, ...] | None = None
    """Voxels of a local view per axis; none: half of a global one, in whole strides of the network, two at least, and
    four where a global view has six."""
    spatial: SpatialConfig = field(default_factory=SpatialConfig)
    """How each view is flipped, rotated and scaled in training."""
    intensity: IntensityConfig = field(default_factory=lambda: IntensityConfig(low_resolution=0.1, inverted_gamma=0.0))
    """How each view's intensities change in training; mild. Where values are measured (CT), brightness, contrast and
    gamma stay as they are."""

    def __post_init__(self) -> None:
        at_least(self, parent_scale=1, num_locals=0)
        rising(self, "(0, 1]", "global_scale", "local_scale")

    def suited_to(self, normalization_schemes: Sequence[str]) -> MultiCropConfig:
        """With intensities that change no more than such channels bear; see `IntensityConfig.suited_to`."""
        return replace(self, intensity=self.intensity.suited_to(normalization_schemes))


def view_sizes(
    config: MultiCropConfig, patch_size: Sequence[int], stride: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Voxels of global and of local views.

    Args:
        config: What is asked for.
        patch_size: The plan's.
        stride: Voxels per position of the deepest feature map, per axis.

    Raises:
        ValueError: Where a size has another number of axes than the patch, or is not whole strides, two at least.
    """
    large = config.global_size or tuple(patch_size)
    small = config.local_size or tuple(map(_local_edge, large, stride))
    for name, size in (("global_size", large), ("local_size", small)):
        whole = len(size) == len(stride) and not any(edge % step for edge, step in zip(size, stride, strict=True))
        if not whole or all(edge < MIN_POSITIONS * step for edge, step in zip(size, stride, strict=True)):
            raise ValueError(
                f"{name}={size} must be a multiple of the network's strides {tuple(stride)} along each axis, and twice "
                f"them along one. Set it by --set crops.{name}=[...], or plan another patch than {tuple(patch_size)}"
            )
    return large, small


def _local_edge(edge: int, step: int) -> int:
    least = LOCAL_POSITIONS if edge >= ROOM * step else MIN_POSITIONS
    return min(edge, step * max(least, -(-edge // (2 * step))))


def enlarged(size: Sequence[int], stride: Sequence[int], scale: float) -> tuple[int, ...]:
    """A size some times as large along each axis, rounded to whole strides, and never smaller."""
    return tuple(max(edge, step * round(edge * scale / step)) for edge, step in zip(size, stride, strict=True))


def num_patches(
    config: MultiCropConfig,
    num_globals: int,
    patch_size: Sequence[int],
    stride: Sequence[int],
    scale: float = 1.0,
) -> float:
    """How many patches have the voxels of so many global views, enlarged by a scale, and of the local ones."""
    large, small = view_sizes(config, patch_size, stride)
    voxels = num_globals * prod(enlarged(large, stride, scale)) + config.num_locals * prod(small)
    return voxels / prod(patch_size)


def multi_crop(
    batch: Batch,
    random: SampleRandom,
    config: MultiCropConfig,
    sizes: tuple[Sequence[int], Sequence[int]],
    *,
    augment: bool,
) -> tuple[list[SpatialView], list[SpatialView]]:
    """Cuts the views of a batch.

    Args:
        batch: Parent crops.
        random: Keyed by sample.
        config: How many views, of what size, and how they change.
        sizes: Voxels of global and of local views.
        augment: Whether views are moved and their intensities changed; size and place are random in any case.

    Returns:
        The global views and the local ones. All their voxels are valid wherever the volume holds a view at all.
    """
    spatial = config.spatial if augment else UNMOVED

    def cut(name: str, scale: tuple[float, float], size: Sequence[int]) -> SpatialView:
        draws = random.child(name)
        view = random_crop(batch.data, batch.valid, batch.spacing, draws, scale, size, spatial)
        if not augment:
            return view
        changed = intensity_view(view.data, view.valid, draws.child("intensity"), config.intensity, inplace=True)
        return replace(view, data=changed)

    large = [cut(f"global{number}", config.global_scale, sizes[0]) for number in range(NUM_GLOBALS)]
    return large, [cut(f"local{number}", config.local_scale, sizes[1]) for number in range(config.num_locals)]
