"""Planners of fixed size: the largest patch, the widths and the memory they are made for."""

from __future__ import annotations

from typing import ClassVar

from nnssl_ext.planners.planner import PLANNERS, nnsslPlanner


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
