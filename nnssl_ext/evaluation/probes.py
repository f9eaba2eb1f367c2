"""The linear probe of an encoder on cases of a raw dataset, as the record that is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.downstream.frozen import Frozen
from nnssl_ext.downstream.labelled import read_labelled
from nnssl_ext.downstream.probing import ProbeConfig, probe
from nnssl_ext.evaluation.learning import without_nan


def probe_record(
    frozen: Frozen,
    manifest: Manifest,
    pool: Sequence[str],
    test: Sequence[str],
    *,
    patch_size: Sequence[int],
    config: ProbeConfig,
) -> dict[str, Any]:
    """Probes frozen features by labels.

    Args:
        frozen: The encoder.
        manifest: The raw dataset with labels.
        pool: Cases that subsets to learn from are drawn from.
        test: Cases that are scored.
        patch_size: Windows (z, y, x) in which a U-Net's features are computed, so that methods with different patches
            see equally far. A transformer keeps its own: its position embeddings belong to them.
        config: The probe.

    Returns:
        `classes`, `cases` and `dice` (subsets, cases, classes), None for a class that no
        test case holds; JSON can hold it.
    """
    if frozen.configuration.backbone == "cnn":
        frozen = replace(frozen, configuration=replace(frozen.configuration, patch_size=tuple(patch_size)))
    known, unseen = (read_labelled(manifest, ids, frozen.plan, frozen.configuration) for ids in (pool, test))
    result = probe(frozen, known, unseen, config)
    return {"classes": list(result.classes), "cases": list(result.cases), "dice": without_nan(result.linear)}
