"""Planners of fixed size: the largest patch, the widths and the memory they are made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from nnssl_ext.planners.architecture import Topology
from nnssl_ext.planners.planner import PLANNERS, nnsslPlanner
from nnssl_ext.planners.primus import PRIMUS_SIZES, primus_architecture, token_topology


@PLANNERS.register
class nnsslPlannerResEncXS(nnsslPlanner):  # noqa: N801 - nnU-Net's naming of planners
    """Width 8, two blocks a stage, patches up to 64³: for CPUs, demos and tests."""

    base_features: ClassVar[int] = 8
    blocks: ClassVar[tuple[int, ...]] = (1, 2, 2, 2, 2, 2)
    max_edge: ClassVar[dict[int, int]] = {2: 256, 3: 64}
    default_memory: ClassVar[float] = 4.0


@PLANNERS.register
class nnsslPlannerResEncM(nnsslPlanner):  # noqa: N801
    """The full ResEnc U-Net on patches up to 128³: cards of 8 GB and more."""

    max_edge: ClassVar[dict[int, int]] = {2: 512, 3: 128}
    default_memory: ClassVar[float] = 8.0


@PLANNERS.register
class nnsslPlannerResEncL(nnsslPlanner):  # noqa: N801
    """The full ResEnc U-Net on patches up to 160³: OpenMind's network (arXiv 2412.17041); cards of 24 GB and more."""

    max_edge: ClassVar[dict[int, int]] = {2: 768, 3: 160}
    default_memory: ClassVar[float] = 24.0


@PLANNERS.register
class nnsslPlannerResEncXL(nnsslPlanner):  # noqa: N801
    """The full ResEnc U-Net on patches up to 192³: cards of 40 GB and more."""

    max_edge: ClassVar[dict[int, int]] = {2: 1024, 3: 192}
    default_memory: ClassVar[float] = 40.0


@PLANNERS.register
class nnsslPlannerPrimusM(nnsslPlanner):  # noqa: N801
    """Primus M on patches up to 160³: OpenMind's transformer (arXiv 2412.17041); cards of 24 GB and more."""

    size: ClassVar[str] = "M"
    """Depth and width, one of `PRIMUS_SIZES`."""
    max_edge: ClassVar[dict[int, int]] = {2: 768, 3: 160}
    default_memory: ClassVar[float] = 24.0

    def topology(self, spacing: Sequence[float], patch_size: Sequence[int]) -> Topology:
        """A patch of whole tokens."""
        return token_topology(spacing, patch_size)

    def architecture(self, topology: Topology) -> dict[str, Any]:
        """nnU-Net's `architecture` block of the transformer."""
        return primus_architecture(PRIMUS_SIZES[self.size], topology.patch_size, topology.divisor)


@PLANNERS.register
class nnsslPlannerPrimusXS(nnsslPlannerPrimusM):  # noqa: N801
    """Six blocks, 192 wide, on patches up to 64³: for CPUs, demos and tests."""

    size: ClassVar[str] = "XS"
    max_edge: ClassVar[dict[int, int]] = {2: 256, 3: 64}
    default_memory: ClassVar[float] = 4.0


@PLANNERS.register
class nnsslPlannerPrimusS(nnsslPlannerPrimusM):  # noqa: N801
    """Primus S on patches up to 128³: cards of 8 GB and more."""

    size: ClassVar[str] = "S"
    max_edge: ClassVar[dict[int, int]] = {2: 512, 3: 128}
    default_memory: ClassVar[float] = 8.0


@PLANNERS.register
class nnsslPlannerPrimusL(nnsslPlannerPrimusM):  # noqa: N801
    """Primus L on patches up to 192³: cards of 40 GB and more."""

    size: ClassVar[str] = "L"
    max_edge: ClassVar[dict[int, int]] = {2: 1024, 3: 192}
    default_memory: ClassVar[float] = 40.0
