"""The loader and the views on real volumes that are smaller than the patch on most axes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.fingerprint.foreground import foreground_mask
from nnssl_ext.imageio import read_image
from nnssl_ext.loading.loader import PatchLoader
from nnssl_ext.preprocessing.store import Store, write_case
from nnssl_ext.views.masks import block_mask
from nnssl_ext.views.spatial import SpatialConfig, spatial_view

PATCH = (40, 56, 40)


@pytest.mark.real_data
def test_hippocampus_crops_are_padded_masked_and_mostly_foreground(real_data: Path, tmp_path: Path) -> None:
    entries = {}
    for path in sorted((real_data / "Task04_Hippocampus" / "imagesTr").glob("*.nii.gz"))[:6]:
        image, geometry = read_image([path])
        foreground = foreground_mask(image[0])
        scored = (image - image.mean()) / image.std()
        name = path.name.split(".")[0]
        entries[name] = write_case(tmp_path, name, scored, {}, foreground, spacing=geometry.spacing)
    loader = PatchLoader(Store(tmp_path, entries), list(entries), PATCH, 2, seed=0)
    for step, batch in enumerate(each.to("cpu") for each in loader.batches(0, 3)):
        real = [np.prod(np.minimum(entries[case].shape[1:], PATCH)) for case in batch.cases]
        assert batch.valid.flatten(1).sum(1).tolist() == real
        random = SampleRandom(0, step, batch.samples)
        view = spatial_view(batch.data, batch.valid, batch.spacing, random, SpatialConfig(rotation=1))
        assert (view.data.masked_fill(view.valid, 0) == 0).all()
        assert view.valid.flatten(1).any(1).all()
        hidden = block_mask(random, PATCH, 8, 0.75, valid=view.valid)
        share = (hidden & view.valid).flatten(1).sum(1) / view.valid.flatten(1).sum(1)
        torch.testing.assert_close(share, torch.full((2,), 0.75), atol=0.01, rtol=0)
    assert loader.statistics().num_padded == 6
    assert loader.statistics().mean_foreground > 0.3
