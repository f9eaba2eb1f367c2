"""The command `nnssl_train`."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nnssl_ext.cli.machine import num_workers
from nnssl_ext.cli.train import STOPPED, free_memory, main, parser, run_trainer_name, sampling_setting
from nnssl_ext.cli.train import _spec as make_spec
from nnssl_ext.core.records import read_json
from tests.engine.conftest import preprocessed  # noqa: F401 - a fixture
from tests.finetuning.conftest import write_raw

PROJECT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as status:
        return int(status.code or 0)
    return 0


def test_list_shows_every_trainer_with_idea_and_backbones(capsys):
    main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("MAETrainer "))
    assert "hide blocks" in line
    assert "cnn" in line
    assert all(len(line.split()) > 3 for line in lines)
    (pairs,) = (line for line in lines if line.startswith("CroCoTrainer "))
    assert "any volumes; with pair=session: two co-registered images a session" in pairs


def test_describe_shows_type_default_and_meaning(capsys):
    main(["-tr", "MAETrainer", "--describe"])
    text = capsys.readouterr().out
    assert "mask_ratio = 0.75  (float)\n      " in text
    assert "optim.lr = 0.01  (float)" in text
    assert "data: any volumes\n" in text
    assert "task_config" not in text


def test_every_described_setting_can_be_set(capsys):
    from nnssl_ext.trainers.mae import MAETrainer

    main(["-tr", "MAETrainer", "--describe"])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " = " in line]
    assert len(names) > 20
    assert MAETrainer.configured(["spatial.flip=0.25"]).task_config.spatial.flip == 0.25


def test_an_unknown_trainer_names_the_nearest(capsys):
    assert run("-tr", "mae", "--describe") == 2
    assert "Did you mean MAETrainer?" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["1"], [], ["1", "3d_fullres", "--epochs", "3"]])
def test_missing_and_mistyped_arguments_are_errors(arguments, capsys):
    assert run(*arguments) == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.usefixtures("roots")
def test_a_dataset_that_is_not_there_is_one_line(capsys):
    assert run("7", "3d_fullres") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no dataset '7'")
    assert "nnssl_plan_and_preprocess -d 7" in error
    assert error.count("\n") == 1


def test_help_states_the_exit_status_of_a_stopped_run():
    assert f"exit status {STOPPED}" in parser().format_help()


def test_help_imports_neither_torch_nor_nnunet():
    code = (
        "import sys\nfrom nnssl_ext.cli.train import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'nnunetv2', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_free_memory_of_this_machine_is_plausible():
    memory = free_memory("cpu")
    assert memory is None or 0.05 < memory < 1e5


@pytest.mark.parametrize(("cores", "expected"), [(2, 2), (9, 4)])
def test_no_more_processes_read_crops_for_a_gpu_than_there_are_cores(monkeypatch, cores, expected):
    """Catches four of them on two cores."""
    monkeypatch.setattr("nnssl_ext.core.executor.available_cores", lambda: cores)
    args = parser().parse_args(["1", "3d_fullres"])
    assert (num_workers(args, "cuda"), num_workers(args, "cpu")) == (expected, 0)


def test_repeated_set_options_add_up():
    args = parser().parse_args(["1", "3d_fullres", "--set", "a=1", "b=2", "--set", "c=3"])
    assert args.set == ["a=1", "b=2", "c=3"]


@pytest.mark.parametrize(
    ("tag", "sham", "expected"),
    [
        ([], False, "MAETrainer"),
        ([], True, "MAETrainer-sham"),
        (["-tag", "a"], False, "MAETrainer-a"),
        (["-tag", "a"], True, "MAETrainer-sham-a"),
    ],
)
def test_the_folder_of_a_run_names_its_tag_and_a_sham(tag, sham, expected):
    assert run_trainer_name(parser().parse_args(tag), sham) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], []), (["modality"], ["sampling_weights=modality"]), (["T1w=2", "a=b=.5"], ['{"T1w": 2.0, "a=b": 0.5}'])],
)
def test_sampling_weights_are_a_setting_and_name_the_folder(given, expected):
    args = parser().parse_args(["1", "3d_fullres", *(["--sampling_weights", *given] if given else [])])
    assert [setting.removeprefix("sampling_weights=") for setting in sampling_setting(args.sampling_weights)] == [
        setting.removeprefix("sampling_weights=") for setting in expected
    ]
    assert run_trainer_name(args, False).startswith("MAETrainer-") == bool(given)


@pytest.mark.parametrize("given", [["CT", "T1w=1"], ["=1"], ["CT=two"], ["CT=1", "CT=2"]])
def test_sampling_weights_that_are_no_weights_are_refused(given):
    with pytest.raises(ValueError, match=r"must be uniform, dataset, modality, or NAME=WEIGHT"):
        sampling_setting(given)


class TestOnData:
    """With a preprocessed dataset."""

    QUICK = ("-device", "cpu", "--no_tensorboard", "-num_epochs", "1", "-steps_per_epoch", "1")
    SMALL = ("block_size=4", "val_steps_per_epoch=1")

    @pytest.fixture(autouse=True)
    def _data(self, preprocessed):  # noqa: F811
        self.results = preprocessed.parents[1] / "results" / "Dataset999_Tiny"

    def test_tags_name_the_folder(self):
        where = ("999", "3d_fullres", *self.QUICK)
        assert run(*where, "--set", *self.SMALL) == 0
        assert run(*where, "-tag", "mine", "--set", *self.SMALL) == 0
        first, second = sorted(path.name for path in self.results.iterdir())
        assert second == "MAETrainer-mine__nnsslPlans__3d_fullres"
        assert first.removeprefix("MAETrainer-").removesuffix("__nnsslPlans__3d_fullres").isalnum()
        config = read_json(self.results / second / "fold_all" / "config.json")
        assert config["recipe"]["num_epochs"] == 1
        assert config["settings"]["device"] == "cpu"

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["-tag", "a/b"], "not allowed"),
            (["-tag", "a__b"], "not allowed"),
            (["-num_gpus", "0"], "num_gpus=0"),
            (["--set", "mask_rato=0.5"], "no setting 'mask_rato'"),
            (["--set", "mask_ratio=2"], "mask_ratio"),
            (["-batch_size", "0"], "batch_size=0"),
            (["--precision", "fp8"], "precision"),
            (["-num_workers", "-1"], "num_workers=-1"),
            (["-p", "otherPlans"], "nnssl_plan_experiment"),
        ],
    )
    def test_mistakes_are_one_line(self, arguments, words, capsys):
        assert run("999", "3d_fullres", *self.QUICK, *arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error

    def test_probes_are_made_on_another_dataset_where_one_is_named(self, roots, capsys):
        write_raw(roots / "raw")
        words = ["999", "3d_fullres", "-device", "cpu", "--probe_every", "2", "--probe_dataset", "7"]
        spec = make_spec(parser().parse_args(words))
        assert (spec.probe is not None, spec.settings.probe_every) == (True, 2)
        assert make_spec(parser().parse_args(words[:4])).probe is None
        assert run(*words[:-1], "8") == 2
        assert "no dataset '8'" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("given", "held_out_only"),
        [([], True), (["999"], True), (["Dataset999_Tiny"], True), (["7"], False), (["8"], True)],
    )
    def test_a_probe_on_the_runs_own_dataset_sees_held_out_cases_only(self, roots, monkeypatch, given, held_out_only):
        """Fault: a dataset that is named counts as another one, and the cases trained on are probed."""
        seen = []
        monkeypatch.setattr(
            "nnssl_ext.downstream.during_training.make_probe", lambda *_, held_out_only: seen.append(held_out_only)
        )
        write_raw(roots / "raw").rename(roots / "raw" / "Dataset999_Tiny")
        write_raw(roots / "raw")
        (roots / "raw" / "Dataset008_Link").symlink_to(roots / "raw" / "Dataset999_Tiny")
        words = ["999", "3d_fullres", "-device", "cpu", "--probe_every", "2"]
        make_spec(parser().parse_args([*words, *(["--probe_dataset", *given] if given else [])]))
        assert seen == [held_out_only]

    def test_an_unknown_configuration_lists_those_there_are(self, capsys):
        assert run("999", "3d_lowres", *self.QUICK) == 2
        assert "3d_fullres" in capsys.readouterr().err

    def test_refusals_come_before_processes_are_started(self, monkeypatch, capsys):
        monkeypatch.setattr("nnssl_ext.engine.distributed.torchrun", lambda *_: pytest.fail("it was started"))
        assert run("999", "3d_fullres", *self.QUICK, "-num_gpus", "2", "--precision", "fp16") == 2
        assert "CUDA" in capsys.readouterr().err

    def test_several_gpus_are_not_taken_for_several_cpus(self, monkeypatch, capsys):
        """Planted fault: without a GPU, `-num_gpus 2` trained in two processes on the CPU."""
        monkeypatch.setattr("nnssl_ext.engine.distributed.torchrun", lambda *_: pytest.fail("it was started"))
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert run("999", "3d_fullres", "-num_gpus", "2") == 2
        assert "torch sees no CUDA GPU. Use -device cpu" in capsys.readouterr().err

    def test_a_stopped_run_ends_with_the_stated_status_and_goes_on(self, monkeypatch):
        from nnssl_ext.engine.steps import Stepper

        original = Stepper.train_step

        def train_step(stepper, batches, step):
            os.kill(os.getpid(), signal.SIGTERM)
            return original(stepper, batches, step)

        where = ("999", "3d_fullres", *self.QUICK, "-tag", "stopped", "--set", *self.SMALL)
        with monkeypatch.context() as patch:
            patch.setattr(Stepper, "train_step", train_step)
            assert run(*where) == STOPPED
        assert run(*where, "--c") == 0
