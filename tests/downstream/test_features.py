"""Features of whole images: in their place, blended as they should be, blind to padding and to what was altered."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from nnssl_ext.downstream.features import (
    _extractor,
    blend,
    cell_shares,
    default_level,
    dense_features,
    gaussian,
    prepare,
    shown_tokens,
)
from nnssl_ext.downstream.frozen import Frozen, random_frozen
from nnssl_ext.downstream.grids import index_to_scanner
from nnssl_ext.downstream.layers import painted, save_npz, save_stack, shown, stretched
from nnssl_ext.downstream.pca import colour_range, colours, fit_pca, project
from nnssl_ext.downstream.windows import crop_window, window_size, windows
from nnssl_ext.imageio import Geometry, read_image
from tests.downstream.test_grids import OBLIQUE


class Cells(torch.nn.Module):
    """The image, and its means over cells of 2 and 4: features that know nothing but their place."""

    kind = "cnn"

    def __init__(self, dims: int, shift: bool = False) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.channels, self.shift = (1, 1, 1), shift
        self.strides = tuple((stride,) * dims for stride in (1, 2, 4))

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        pool = functional.avg_pool2d if x.ndim == 4 else functional.avg_pool3d
        x = x - x.flatten(1).mean(1).view(-1, *[1] * (x.ndim - 1)) if self.shift else x
        return [x, pool(x, 2), pool(x, 4)]


def frozen_cells(tiny_plan, patch, axes=(0, 1, 2), spacing=None, shift=False) -> Frozen:
    plan = tiny_plan(patch)
    plan.raw["transpose_forward"] = list(axes)
    plan.raw["transpose_backward"] = np.argsort(axes).tolist()
    (name,) = plan.configuration_names
    raw = plan.raw["configurations"][name]
    raw["normalization_schemes"] = ["NoNormalization"]
    raw["spacing"] = list(spacing or raw["spacing"])
    return Frozen(Cells(len(patch), shift), plan, plan.configuration(name))


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize(
    ("patch", "spacing"), [((16, 8, 12), (1.1, 1.0, 1.3)), ((16, 12), (1.5, 1.1))], ids=["3d", "2d"]
)
def test_a_landmark_is_where_the_scanner_saw_it(tiny_plan, tmp_path, patch, spacing, level):
    """Fails where the crop, the resampling, the order of axes or the stride is not undone, by half a cell already."""
    image = np.zeros((1, 21, 50, 43), dtype=np.float32)
    image[:, 2:18, 7:45, 5:] = 0.01
    image[0, 11:14, 24:30, 19:24] = 5
    middle = np.array([12.0, 26.5, 21.0, 1.0])
    frozen = frozen_cells(tiny_plan, patch, (2, 0, 1), spacing)
    features = dense_features(frozen, prepare(frozen, image, OBLIQUE, "oblique"), level, scratch=tmp_path)
    truth = (index_to_scanner(OBLIQUE) @ middle)[:3]
    save_npz(features, tmp_path / "cells.npz")
    save_stack(features, tmp_path / "cells.nii.gz", on_image=False)
    save_stack(features, tmp_path / "full.nii.gz", on_image=True)
    with np.load(tmp_path / "cells.npz") as content:
        found = centre(content["features"][0], content["to_scanner"])
    for name in ("cells", "full"):
        values, geometry = read_image([tmp_path / f"{name}.nii.gz"])
        assert np.allclose(centre(values[0], index_to_scanner(geometry)), found, atol=0.35)
    assert np.linalg.norm(found - truth) < 0.6
    assert read_image([tmp_path / "full.nii.gz"])[0].shape == image.shape
    assert geometry.same_place(OBLIQUE)
    assert not values[0][:2].any()
    assert not values[0][..., :5].any()


def centre(values: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Where the bright cells have their centre of mass, in mm."""
    weights = np.clip(values.astype(float) - 0.1, 0, None)
    places = np.indices(values.shape).reshape(3, -1)
    return (matrix @ np.append((places * weights.ravel()).sum(1) / weights.sum(), 1))[:3]


@pytest.mark.parametrize("patch", [(8, 16, 8), (8, 16)], ids=["3d", "2d"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_windows_blend_into_the_map_of_the_whole(tiny_plan, patch, level):
    """Features that depend on their cell alone are those of the whole volume: fails where a window lies a cell off."""
    frozen = frozen_cells(tiny_plan, patch)
    data = torch.randn(1, 21, 37, 18, generator=torch.Generator().manual_seed(0))
    stride = (1,) * (3 - len(patch)) + frozen.encoder.strides[level]
    slabs = list(blend(frozen, _extractor(frozen, level, "features"), data, stride))
    found = torch.cat([slab for _, slab in slabs], 1)
    gaps = [-n % s for n, s in zip(data.shape[1:], stride, strict=True)]
    padded = functional.pad(data, [side for gap in reversed(gaps) for side in (0, gap)])
    assert torch.allclose(found, functional.avg_pool3d(padded, stride), atol=1e-5)
    assert [first for first, _ in slabs] == np.cumsum([0, *(slab.shape[1] for _, slab in slabs[:-1])]).tolist()
    assert len(slabs) > 2


def test_windows_count_by_their_gaussian(tiny_plan):
    """Windows that disagree: against a slow mean. Fails where weights are even, or sums are divided by a count."""
    frozen = frozen_cells(tiny_plan, (8, 16, 8), shift=True)
    data = torch.randn(1, 18, 27, 13, generator=torch.Generator().manual_seed(1))
    found = torch.cat([slab for _, slab in blend(frozen, _extractor(frozen, 1, "features"), data, (2, 2, 2))], 1)
    total, norm = torch.zeros(1, 12, 16, 8), torch.zeros(12, 16, 8)
    for window in windows(data.shape[1:], (8, 16, 8), multiple=(2, 2, 2)):
        values = frozen.encoder.feature_maps(crop_window(data, window, window_size(frozen))[None])[1][0]
        z, y, x = (low // 2 for low in window.lower)
        for k, j, i in np.ndindex(4, 8, 4):
            apart = [(a + 0.5) / n - 0.5 for a, n in zip((k, j, i), (4, 8, 4), strict=True)]
            weight = np.exp(-sum(a**2 for a in apart) * 32)
            total[:, z + k, y + j, x + i] += values[:, k, j, i] * weight
            norm[z + k, y + j, x + i] += weight
    expected = (total / norm)[:, :9, :14, :7]
    assert torch.allclose(found, expected, atol=1e-4)
    assert float(gaussian((4, 8, 4)).min()) > 0


def test_windows_leave_no_gap_where_a_window_is_one_cell():
    for full in range(1, 40):
        count = torch.zeros(full)
        for window in windows((full,), (8,), multiple=(8,)):
            assert window.lower[0] % 8 == 0
            count[window.lower[0] : window.lower[0] + 8] += 1
        assert count.min() >= 1


def test_padding_and_altered_voxels_leave_no_trace(tiny_plan):
    """Whatever stood in a face that was removed: the components stay, and no cell of it counts or is painted."""
    frozen = frozen_cells(tiny_plan, (8, 8, 8))
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 17, 16, 16)).astype(np.float32) + 10
    altered = np.zeros(image.shape[1:], dtype=bool)
    altered[3:7, 4:12, 4:8] = True
    geometry = Geometry(spacing=(1.0, 1.0, 1.0))
    found = []
    for garbage in (0.5, 1e3):
        changed = image.copy()
        changed[0, altered] = garbage
        volume = prepare(frozen, changed, geometry, "face", altered)
        with torch.no_grad():
            frozen.encoder.channels = (3, 3, 3)
            frozen.encoder.feature_maps = lambda x: [torch.cat([x, x**2, x.roll(1, 2)], 1)] * 3
        features = dense_features(frozen, volume, 0)
        cells = dense_features(frozen_cells(tiny_plan, (8, 8, 8)), volume, 1)
        assert not cells.known[8].any()  # the last cell hangs over the 17th slice
        assert not cells.known[1:4, 2:6, 2:4].any()
        assert cells.known[4:8].all()
        pca = fit_pca([features], 3)
        limits = colour_range([project(pca, features)], [features])
        rgb = painted(features, pca, limits, foreground=False)
        assert not rgb[altered].any()
        assert rgb[~altered].min() > 0
        found.append((pca.components, pca.mean))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-3)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3)


def test_components_are_those_of_a_singular_value_decomposition(tiny_plan):
    frozen = frozen_cells(tiny_plan, (8, 8, 8))
    frozen.encoder.channels = (5, 1, 1)
    mixing = torch.randn(5, 5, generator=torch.Generator().manual_seed(2))
    rng = np.random.default_rng(3)
    codes = [
        torch.from_numpy(rng.normal(size=(5, 8, 8, 8)) * np.arange(1, 6).reshape(5, 1, 1, 1)).float() for _ in "ab"
    ]
    maps = []
    for code in codes:
        mixed = torch.einsum("ij,jzyx->izyx", mixing, code)
        frozen.encoder.feature_maps = lambda x, mixed=mixed: [mixed[None]]
        volume = prepare(frozen, np.ones((1, 8, 8, 8), np.float32), Geometry(spacing=(1.0, 1.0, 1.0)), "a")
        maps.append(dense_features(frozen, volume, 0))
    table = np.concatenate([m.values.reshape(5, -1).T.astype(float) for m in maps])
    _, sizes, directions = np.linalg.svd(table - table.mean(0), full_matrices=False)
    pca = fit_pca(maps, 3)
    assert np.allclose(np.abs((pca.components.numpy() * directions[:3]).sum(1)), 1, atol=1e-4)
    assert np.allclose(pca.variances.numpy(), sizes[:3] ** 2 / len(table), rtol=1e-3)
    assert (pca.components.gather(1, pca.components.abs().argmax(1, keepdim=True)) > 0).all()
    values = torch.cat([project(pca, m).flatten(1) for m in maps], 1)
    assert np.allclose(values.numpy(), pca.components.numpy() @ (table - table.mean(0)).T, atol=2e-2)


def test_colours_run_from_none_to_full():
    limits = torch.tensor([0.0, -1.0, 2.0]), torch.tensor([1.0, 1.0, 2.0])
    values = torch.tensor([[0.5, -3.0], [1.0, 0.0], [2.0, 5.0]]).view(3, 1, 1, 2)
    assert colours(values, limits)[0, 0].tolist() == [[128, 255, 1], [1, 128, 255]]


@pytest.mark.parametrize("patch", [(16, 24, 8), (24, 8)], ids=["3d", "2d"])
def test_a_transformer_does_not_see_padding(tiny_vit_plan, patch):
    """Noise in the padding changes nothing: fails where tokens of pure padding are attended to."""
    plan = tiny_vit_plan(patch)
    frozen = random_frozen(plan, plan.configuration(plan.configuration_names[0]), 0)
    real = torch.zeros(1, 1, *patch, dtype=torch.bool)
    real[..., : patch[-2] - 9, :] = True
    crops = torch.randn(1, 1, *patch, generator=torch.Generator().manual_seed(0))
    last = (slice(None),) * (len(patch)) + (slice(patch[-2] - 8, None),)
    noisy = crops.clone()
    noisy[last] += 100
    for what in ("features", "attention"):
        extract = _extractor(frozen, 0, what)
        with torch.no_grad():
            first, second = extract(crops, real), extract(noisy, real)
        assert torch.equal(first, second)
        assert first.abs().sum() > 0
        assert not first[..., -2:, :].any()
    whole = torch.ones_like(real)
    with torch.no_grad():
        assert torch.allclose(
            _extractor(frozen, 0, "features")(crops, whole), frozen.encoder.token_map(crops), atol=1e-5
        )
    assert shown_tokens(whole, frozen.encoder.token_size).min() == 0


@pytest.mark.parametrize("registers", [0, 2])
def test_attention_is_the_softmax_of_the_last_block(tiny_vit_plan, registers):
    """Against what the library itself computes: fails where rotations, the scale or the registers are missed."""
    from nnssl_ext.downstream.attention import last_attention
    from nnssl_ext.models.primus import build_primus

    plan = tiny_vit_plan()
    configuration = plan.configuration("3d_fullres")
    configuration.architecture["arch_kwargs"]["num_register_tokens"] = registers
    torch.manual_seed(1)
    encoder = build_primus(configuration).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    x = torch.randn(2, 1, *configuration.patch_size)
    kept = torch.arange(96).expand(2, -1).clone()
    kept[1, -20:] = -1
    attn, weights = encoder.eva.blocks[-1].attn, []
    attn.fused_attn = False
    handle = attn.attn_drop.register_forward_hook(lambda *args: weights.append(args[2]))
    with torch.no_grad():  # one by one: the library's slow path adds a mask of booleans instead of masking by it
        encoder.tokens(x[:1], kept[:1])
        encoder.tokens(x[1:], kept[1:, :76])
    handle.remove()
    found = last_attention(encoder, x, kept)
    for sample, number in enumerate((96, 76)):
        asked = slice(registers) if registers else slice(number)
        expected = weights[sample][0, :, asked, registers:].mean(1) * number
        assert torch.allclose(found[sample, :, :number], expected, atol=1e-4)
    assert not found[1, :, 76:].any()
    if not registers:
        assert torch.allclose(found[0].mean(1), torch.ones(2), atol=1e-5)


def test_mistakes_are_named(tiny_plan):
    frozen = frozen_cells(tiny_plan, (16, 24, 8))
    geometry = Geometry(spacing=(1.0, 1.0, 1.0))
    with pytest.raises(
        ValueError, match=r"twins has 2 channels, and the checkpoint's network takes 1.*joined by commas"
    ):
        prepare(frozen, np.ones((2, 16, 24, 8), np.float32), geometry, "twins")
    with pytest.raises(ValueError, match=r"small has \(7, 24, 8\) voxels.*less than half of the patch \(16, 24, 8\)"):
        prepare(frozen, np.ones((1, 7, 24, 8), np.float32), geometry, "small")
    with pytest.raises(ValueError, match="picture of one slice"):
        prepare(frozen, np.ones((1, 1, 24, 8), np.float32), geometry, "flat")
    volume = prepare(frozen, np.ones((1, 16, 24, 8), np.float32), geometry, "fits")
    with pytest.raises(ValueError, match=r"level 3 is not there: this network has 0 \(finest\) to 2"):
        dense_features(frozen, volume, 3)
    with pytest.raises(ValueError, match="no attention"):
        dense_features(frozen, volume, what="attention")
    with pytest.raises(ValueError, match="3 components of 1 channels"):
        fit_pca([dense_features(frozen, volume, 0)], 3)
    assert default_level(frozen) == 2
    frozen.encoder.strides = ((1, 1, 1), (1, 4, 4), (2, 8, 8))
    assert default_level(frozen) == 1


def test_cells_beyond_the_volume_are_partly_padding():
    shares = cell_shares(torch.ones(3, 4, 5, dtype=torch.bool), (2, 4, 4))
    assert shares.tolist() == [[[1.0, 0.25]], [[0.5, 0.125]]]


def test_the_background_can_be_left_out(tiny_plan):
    frozen = frozen_cells(tiny_plan, (8, 8, 8))
    image = np.zeros((1, 16, 16, 16), np.float32) + 0.1
    image[0, 4:12, 4:12, 4:12] = 5
    volume = prepare(frozen, image, Geometry(spacing=(1.0, 1.0, 1.0)), "box")
    mask = shown(volume.place, foreground=True)
    assert torch.equal(mask, torch.from_numpy(image[0] > 1))
    features = dense_features(frozen, volume, 1)
    assert features.foreground.sum() == 4**3
    assert stretched(features).shape == image.shape
