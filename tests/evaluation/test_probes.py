"""The record of a probe: in which windows features are computed, and what is kept."""

import json
from pathlib import Path

import numpy as np

from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.downstream.frozen import random_frozen
from nnssl_ext.downstream.probing import ProbeConfig
from nnssl_ext.evaluation.probes import probe_record
from nnssl_ext.planners.plan import Plan
from tests.evaluation import fakes

CONFIG = ProbeConfig(num_labelled=2, subset_seeds=(0, 1), voxels_per_case=60, bank_voxels_per_case=60, neighbours=0)
WIDE, NARROW = (12, 16, 16), (4, 8, 8)


def probed(manifest: Manifest, plan: Plan, windows: tuple[int, ...]) -> dict:
    frozen = random_frozen(plan, plan.configuration("3d_fullres"), seed=0)
    cases = fakes.CASES[:3], fakes.CASES[3:5]
    record = probe_record(frozen, manifest, *cases, patch_size=windows, config=CONFIG)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["classes"], record["cases"]) == ([1, 2], list(cases[1]))
    assert np.shape(record["dice"]) == (2, 2, 2)  # subsets, cases, classes
    return record


def test_windows_are_those_asked_for_and_a_transformer_s_own(roots: Path, tiny_plan, tiny_vit_plan) -> None:
    """Catches U-Nets compared in windows of their own patches, and a transformer taken out of its patch."""
    fakes.make_dataset(roots)
    manifest = Manifest.load(roots / "raw" / fakes.DATASET)
    wide = probed(manifest, tiny_plan(WIDE), WIDE)
    assert probed(manifest, tiny_plan(NARROW), WIDE) == wide
    assert probed(manifest, tiny_plan(WIDE), NARROW) != wide
    transformer = tiny_vit_plan(NARROW)
    assert probed(manifest, transformer, WIDE) == probed(manifest, transformer, NARROW)
