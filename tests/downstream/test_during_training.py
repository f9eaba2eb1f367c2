"""Probes while a run goes on: when they are made, on which cases, and that training does not notice."""

import json
import math
from dataclasses import replace

import pytest
import SimpleITK as sitk
import torch

from nnssl_ext.dataset.integrity import image_hashes
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.downstream.during_training import make_probe
from nnssl_ext.downstream.frozen import random_frozen
from nnssl_ext.downstream.labelled import read_labelled
from nnssl_ext.engine.checkpoint import load_checkpoint
from nnssl_ext.engine.loop import pretrain
from nnssl_ext.engine.run import TrainedOn
from tests.engine.conftest import make_spec, preprocessed  # noqa: F401 - fixtures
from tests.finetuning.conftest import write_raw


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_probes_come_every_other_epoch_and_at_the_end_and_change_nothing(make_spec, monkeypatch):  # noqa: F811
    monkeypatch.setattr("nnssl_ext.engine.tracking.Tracker.draw_progress", lambda self: None)
    seen = []
    plain, probed = make_spec(), make_spec(name="probed", probe_every=2)

    def probe(held_out, trained):
        seen.append(tuple(held_out))
        assert trained.hashes == {f"{n:064x}" for n in range(6)} - {f"{int(case[-2:]):064x}" for case in held_out}
        assert trained.patients == {f"patient_{int(code, 16)}" for code in trained.hashes}
        assert not probed.folder.exists()
        return run

    def run(encoder):
        """Fault: a run that is killed while it is probed goes on without the numbers."""
        assert not encoder.training
        done = len(rows(probed.folder))
        assert not (probed.folder / "checkpoint_final.pth").exists()
        assert load_checkpoint(probed.folder / "checkpoint_latest.pth")["resume"]["progress"]["epoch"] == done
        return {"probe_dice": 0.5, "probe_knn_dice": math.nan}

    probed = replace(probed, probe=probe)
    pretrain(plain)
    pretrain(probed)
    numbers = {"probe_dice": 0.5, "probe_knn_dice": None}
    expected = zip(rows(plain.folder), ({}, numbers, numbers), strict=True)
    assert rows(probed.folder) == [row | more for row, more in expected]
    (held_out,) = seen
    assert held_out == tuple(json.loads((probed.folder / "splits.json").read_text())["val"])
    weights = [load_checkpoint(s.folder / "checkpoint_final.pth")["network_weights"] for s in (plain, probed)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return Manifest.load(write_raw(tmp_path / "labelled"))


def test_a_probe_gives_the_same_numbers_for_the_same_encoder(manifest, tiny_plan):
    plan = tiny_plan()
    configuration = plan.configuration("3d_fullres")
    encoder = random_frozen(plan, configuration, 0).encoder
    run = make_probe(manifest, plan, configuration, held_out_only=False)((), TrainedOn())
    first, second = run(encoder), run(encoder)
    assert first == second
    assert set(first) == {"probe_dice", "probe_knn_dice"}
    assert all(0.3 < value <= 1 for value in first.values())  # bright balls in noise are easy


def test_only_held_out_cases_are_looked_at_where_the_run_trains_on_the_dataset(manifest, tiny_plan, monkeypatch):
    plan = tiny_plan()
    configuration = plan.configuration("3d_fullres")
    read = []
    monkeypatch.setattr(
        "nnssl_ext.downstream.during_training.read_labelled", lambda manifest, ids, *_: read.extend(ids) or []
    )
    probe = make_probe(manifest, plan, configuration, held_out_only=True)
    probe(("ball_1", "ball_4", "unlabelled"), TrainedOn())(None)
    assert read == ["ball_1", "ball_4"]
    with pytest.raises(ValueError, match=r"1 of the held-out patients have labels.*val_fraction.*--probe_dataset"):
        probe(("ball_1",), TrainedOn())


def test_no_patient_is_in_both_halves(manifest, tiny_plan, monkeypatch):
    """Fault: the halves are cut by case, and the probe is tested on the patients it learned from."""
    patients = ["p", "p", "p", "q"] + [f"r{number}" for number in range(len(manifest.cases) - 4)]
    cases = tuple(replace(case, subject=patient) for case, patient in zip(manifest.cases, patients, strict=True))
    plan, read = tiny_plan(), []
    monkeypatch.setattr(
        "nnssl_ext.downstream.during_training.read_labelled", lambda manifest, ids, *_: read.extend(ids) or []
    )
    probe = make_probe(replace(manifest, cases=cases[:4]), plan, plan.configuration("3d_fullres"), held_out_only=False)
    probe((), TrainedOn())(None)
    assert read == [cases[0].case_id, cases[3].case_id]
    with pytest.raises(ValueError, match="has labels of 1 patients"):
        make_probe(replace(manifest, cases=cases[:3]), plan, plan.configuration("3d_fullres"), held_out_only=False)


def test_images_and_patients_trained_on_under_another_name_are_left_out(manifest, tiny_plan, monkeypatch, caplog):
    """Catches cases told apart by folder or name alone, the other scans of a patient, and a test without cases."""
    patients = ["set/a", "ball_1", "set/c", "set/d", "set/d", "ball_5"]
    cases = tuple(replace(case, subject=patient) for case, patient in zip(manifest.cases, patients, strict=True))
    plan, read = tiny_plan(), []
    monkeypatch.setattr(
        "nnssl_ext.downstream.during_training.read_labelled", lambda manifest, ids, *_: read.extend(ids) or []
    )
    probe = make_probe(replace(manifest, cases=cases), plan, plan.configuration("3d_fullres"), held_out_only=False)
    hashes = frozenset(image_hashes(cases[4].images))
    probe((), TrainedOn(hashes, frozenset({"set/c", "ball_9"})))(None)
    assert read == ["ball_0", "ball_1", "ball_5"]
    assert "leaves out 3 labelled cases" in caplog.text
    with pytest.raises(ValueError, match=r"1 patients .* not trained on \(5 cases are left out\).*--probe_dataset"):
        probe((), TrainedOn(hashes | {*image_hashes(cases[1].images)}, frozenset({"set/a", "set/c"})))


def test_too_few_held_out_labels_are_refused_before_training(make_spec, manifest):  # noqa: F811
    """Fault: it shows at the first probe, epochs later."""
    spec = make_spec(probe_every=2)
    probe = make_probe(manifest, spec.plan, spec.configuration, held_out_only=True)
    with pytest.raises(ValueError, match=r"0 of the held-out patients have labels"):
        pretrain(replace(spec, probe=probe))
    assert not spec.folder.exists()


@pytest.mark.parametrize("empty", [slice(0, 3), slice(3, 6)], ids=["learned from", "tested on"])
def test_a_half_without_foreground_tells_nothing(manifest, tiny_plan, monkeypatch, empty):
    """Fault: the probe raises, or a test without foreground counts as Dice 0, and the run ends or looks bad."""
    plan = tiny_plan()
    configuration = plan.configuration("3d_fullres")
    cases = read_labelled(manifest, [case.case_id for case in manifest.cases], plan, configuration)
    cases[empty] = [replace(case, labels=case.labels.clamp(max=0)) for case in cases[empty]]
    monkeypatch.setattr("nnssl_ext.downstream.during_training.read_labelled", lambda *_: cases)
    run = make_probe(manifest, plan, configuration, held_out_only=False)((), TrainedOn())
    numbers = run(random_frozen(plan, configuration, 0).encoder)
    assert set(numbers) == {"probe_dice", "probe_knn_dice"}
    assert all(map(math.isnan, numbers.values()))


def test_a_label_that_lies_elsewhere_is_refused(manifest, tiny_plan):
    """Fault: only the shape is compared, and the features of one place are scored by the labels of another."""
    plan, path = tiny_plan(), str(manifest.case("ball_0").label)
    label = sitk.ReadImage(path)
    label.SetOrigin((0.0, 30.0, 0.0))
    sitk.WriteImage(label, path)
    with pytest.raises(
        ValueError, match=r"ball_0\.nii\.gz .* same place: .*30\.0.*the image's .*origin=\(0\.0, 0\.0, 0\.0"
    ):
        read_labelled(manifest, ["ball_0"], plan, plan.configuration("3d_fullres"))


def test_a_dataset_without_labels_is_refused_before_training(tmp_path, tiny_plan):
    folder = write_raw(tmp_path)
    for label in (folder / "labelsTr").iterdir():
        label.unlink()
    plan = tiny_plan()
    with pytest.raises(ValueError, match=r"has labels of 0 patients.*--probe_dataset"):
        make_probe(Manifest.load(folder), plan, plan.configuration("3d_fullres"), held_out_only=False)
