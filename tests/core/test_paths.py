import pytest

from nnssl_ext.core import paths


def test_a_dataset_is_found_by_id_number_and_name(roots):
    folder = roots / "raw" / "Dataset004_Hippocampus"
    folder.mkdir()
    for name in (4, "4", "004", "Dataset004_Hippocampus"):
        assert paths.find_dataset(name, paths.raw_root()) == folder
        assert paths.find_dataset_name(name) == "Dataset004_Hippocampus"


def test_a_missing_dataset_lists_what_is_there(roots):
    (roots / "raw" / "Dataset001_Brains").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no dataset 7 .*Dataset001_Brains"):
        paths.find_dataset(7, paths.raw_root())


def test_one_id_with_two_names_is_refused(roots):
    (roots / "raw" / "Dataset001_A").mkdir()
    (roots / "preprocessed" / "Dataset001_B").mkdir()
    with pytest.raises(ValueError, match="several datasets"):
        paths.find_dataset_name(1)


def test_nnunet_variables_serve_where_ours_are_unset(monkeypatch, tmp_path):
    monkeypatch.delenv("nnssl_raw", raising=False)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert paths.raw_root() == tmp_path
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(ValueError, match="export nnssl_raw="):
        paths.raw_root()


@pytest.mark.parametrize(("number", "name"), [(0, "A"), (1000, "A"), (1, ""), (1, "a/b")])
def test_a_bad_dataset_name_is_refused(number, name):
    with pytest.raises(ValueError, match="not allowed"):
        paths.dataset_folder_name(number, name)


def test_run_folders_are_nnunets(roots):
    folder = paths.run_folder("Dataset001_A", "MAETrainer", "nnsslPlans", "3d_fullres")
    assert folder == roots / "results/Dataset001_A/MAETrainer__nnsslPlans__3d_fullres/fold_all"


def test_plans_in_names_plans_and_no_reports(tmp_path):
    assert paths.plans_in(tmp_path) == "none"
    for name in ("nnUNetPlans", "ptPlans__mae", "ptPlans__mae_report", "dataset"):
        (tmp_path / f"{name}.json").touch()
    assert paths.plans_in(tmp_path) == "nnUNetPlans, ptPlans__mae"
