import numpy as np
import pytest

from nnssl_ext.evaluation.metrics import ClassScores, score_case, score_masks, surface_distances

SPACING = (3.0, 0.7, 1.1)
CLASSES = {"one": (1,), "two": (2,)}


def blobs(seed: int, shape=(7, 15, 13)) -> tuple[np.ndarray, np.ndarray]:
    """Two label maps with two overlapping balls each, shifted against one another; one touches the border."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    maps = []
    for _ in range(2):
        labels = np.zeros(shape, np.uint8)
        for value, centre in ((1, (2, 4, 3)), (2, (5, 12, 9))):
            distance = np.linalg.norm((grid - centre - rng.uniform(-1, 1, 3)) * (1.6, 1, 1), axis=-1)
            labels[distance < rng.uniform(3, 4.5)] = value
        maps.append(labels)
    return maps[0], maps[1]


def slow_surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of a mask with a face neighbour outside, by looking at every neighbour."""
    points = []
    for point in np.argwhere(mask):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                other = point.copy()
                other[axis] += step
                outside = other[axis] < 0 or other[axis] >= mask.shape[axis]
                if outside or not mask[tuple(other)]:
                    points.append(tuple(point))
    return np.array(sorted(set(points)))


def slow_scores(reference: np.ndarray, prediction: np.ndarray, spacing, tolerance: float) -> tuple[float, float, float]:
    first, second = slow_surface(reference) * np.array(spacing), slow_surface(prediction) * np.array(spacing)
    table = np.linalg.norm(first[:, None] - second[None], axis=-1)
    one, two = table.min(1), table.min(0)
    dice = 2 * np.sum(reference & prediction) / (reference.sum() + prediction.sum())
    nsd = ((one <= tolerance).sum() + (two <= tolerance).sum()) / (len(one) + len(two))
    return dice, nsd, max(np.percentile(one, 95), np.percentile(two, 95))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.5])
def test_equals_an_independent_slow_version(seed: int, tolerance: float) -> None:
    reference, prediction = blobs(seed)
    scores = score_case(reference, prediction, SPACING, CLASSES, tolerance)
    for name, (value,) in CLASSES.items():
        dice, nsd, hd95 = slow_scores(reference == value, prediction == value, SPACING, tolerance)
        assert scores[name].dice == pytest.approx(dice)
        assert scores[name].nsd == pytest.approx(nsd)
        assert scores[name].hd95 == pytest.approx(hd95)


def test_equals_monai() -> None:
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    reference, prediction = blobs(7)
    one_hot = [
        torch.from_numpy(np.stack([m == v for v in (1, 2)])[None].astype(np.float32)) for m in (prediction, reference)
    ]
    options = {"include_background": True, "spacing": list(SPACING)}
    nsd = compute_surface_dice(*one_hot, class_thresholds=[1.0, 1.0], **options)[0]
    hd95 = compute_hausdorff_distance(*one_hot, percentile=95, **options)[0]
    scores = list(score_case(reference, prediction, SPACING, CLASSES).values())
    assert [s.nsd for s in scores] == pytest.approx(nsd.tolist(), rel=1e-5)
    assert [s.hd95 for s in scores] == pytest.approx(hd95.tolist(), rel=1e-5)


def test_dice_equals_nnunet(tmp_path) -> None:
    import SimpleITK as sitk
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    reference, prediction = blobs(3)
    reference[0, :3] = 3
    files = []
    for name, labels in (("reference", reference), ("prediction", prediction)):
        files.append(str(tmp_path / f"{name}.nii.gz"))
        sitk.WriteImage(sitk.GetImageFromArray(labels), files[-1])
    expected = compute_metrics(*files, SimpleITKIO(), [1, 2, (1, 2)], ignore_label=3)["metrics"]
    scores = score_case(reference, prediction, SPACING, {**CLASSES, "both": (1, 2)}, ignore_label=3)
    for name, key in (("one", 1), ("two", 2), ("both", (1, 2))):
        assert scores[name].dice == pytest.approx(expected[key]["Dice"])
        assert scores[name].reference_voxels == expected[key]["n_ref"]
        assert scores[name].predicted_voxels == expected[key]["n_pred"]


def test_a_shifted_slab_has_the_values_computed_by_hand() -> None:
    reference, prediction = np.zeros((2, 10, 8, 8), bool)
    reference[2:6], prediction[3:7] = True, True
    scores = score_masks(reference, prediction, (2.0, 1.0, 1.0), tolerance_mm=1.0)
    assert scores.dice == pytest.approx(0.75)
    assert scores.hd95 == pytest.approx(2.0)
    # Surface: two full layers of 64 and two rims of 28. Within 1 mm of the other surface lie, in plane: the rims of the
    # three shared layers, and in the one end layer that lies inside the other slab the 20 voxels next to its rim.
    assert scores.nsd == pytest.approx((3 * 28 + 20) / (2 * 64 + 2 * 28))


def test_the_right_order_of_axes_is_used_for_spacing() -> None:
    reference, prediction = np.zeros((2, 9, 9, 9), bool)
    reference[4, 4, 4], prediction[6, 4, 4] = True, True
    assert score_masks(reference, prediction, (5.0, 1.0, 1.0), 1.0).hd95 == pytest.approx(10.0)
    assert score_masks(reference, prediction, (1.0, 1.0, 5.0), 1.0).hd95 == pytest.approx(2.0)


def test_empty_masks_follow_the_stated_rules() -> None:
    empty, full = np.zeros((4, 5, 6), np.uint8), np.ones((4, 5, 6), np.uint8)
    nothing = score_case(empty, empty, SPACING, {"one": (1,)})["one"]
    assert nothing == ClassScores(dice=1.0, nsd=1.0, hd95=0.0, reference_voxels=0, predicted_voxels=0)
    diagonal = np.linalg.norm([3 * 3.0, 4 * 0.7, 5 * 1.1])
    for reference, prediction in ((empty, full), (full, empty)):
        scores = score_case(reference, prediction, SPACING, {"one": (1,)})["one"]
        assert (scores.dice, scores.nsd) == (0.0, 0.0)
        assert scores.hd95 == pytest.approx(diagonal)


def test_a_perfect_prediction() -> None:
    reference, _ = blobs(1)
    for scores in score_case(reference, reference, SPACING, CLASSES, tolerance_mm=0).values():
        assert (scores.dice, scores.nsd, scores.hd95) == (1.0, 1.0, 0.0)


def test_a_2d_image_has_2d_surfaces() -> None:
    reference, prediction = blobs(2)
    flat, flat_prediction = reference[2:3], prediction[2:3]
    in_3d = score_case(flat, flat_prediction, (999.0, 0.7, 1.1), {"one": (1,)})["one"]
    in_2d = score_case(flat[0], flat_prediction[0], (0.7, 1.1), {"one": (1,)})["one"]
    assert in_3d == in_2d
    assert 0 < in_3d.nsd <= 1
    inner = surface_distances(flat == 1, flat == 1, (999.0, 0.7, 1.1))[0]
    assert len(inner) < (flat == 1).sum()


def test_cropping_to_the_union_changes_nothing() -> None:
    reference, prediction = blobs(5)
    padded = [np.pad(m, ((6, 2), (3, 9), (4, 4))) for m in (reference, prediction)]
    assert score_case(*padded, SPACING, CLASSES) == score_case(reference, prediction, SPACING, CLASSES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction": np.zeros((2, 2, 3), np.uint8)}, "different shapes"),
        ({"classes": {"all": (0, 1)}}, "background"),
        ({"tolerance_mm": -1.0}, "tolerance of -1.0 mm"),
        ({"spacing": (1.0, 1.0)}, "one entry per axis"),
    ],
)
def test_refuses_what_makes_no_sense(arguments: dict, message: str) -> None:
    zeros = np.zeros((2, 2, 2), np.uint8)
    defaults = {"reference": zeros, "prediction": zeros, "spacing": (1.0, 1.0, 1.0), "classes": {"one": (1,)}}
    with pytest.raises(ValueError, match=message):
        score_case(**{**defaults, **arguments})
