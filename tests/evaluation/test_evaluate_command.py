import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnssl_ext.cli.evaluate import main, parser
from nnssl_ext.cli.machine import shared_gpus, training_executor
from nnssl_ext.core.executor import InlineExecutor, LocalExecutor
from nnssl_ext.evaluation.records import load_evaluation
from nnssl_ext.evaluation.training import TrainingTask
from tests.evaluation import fakes

ARMS = ["-d", "4", "-p", "ptPlans__mae", "ptPlans__scratch"]


@pytest.fixture
def world(roots: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Data and plans, with training replaced by a pretence; `calls` counts it."""
    made = fakes.make_world(roots)
    made.calls = []

    def run_fold(dataset, plans_name, configuration, fold, *, device, trainer, verbose) -> None:
        made.calls.append((plans_name, fold, device))
        sys.stdout.write("what nnU-Net prints\n")
        task = TrainingTask(
            dataset=dataset,
            plans_name=plans_name,
            configuration=configuration,
            fold=fold,
            trainer=trainer,
            device=device,
            gpus=(),
            log_file=roots / "log",
        )
        fakes.pretend_to_train(task)

    monkeypatch.setattr("nnssl_ext.finetuning.run.run_fold", run_fold)
    return made


def test_the_whole_command(world: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    main([*ARMS, "-device", "cpu", "--num_train", "3", "all", "--tolerance", "2", "--name", "first"])
    folder = world.results / "evaluation" / "first"
    evaluation = load_evaluation(folder)
    assert len(world.calls) == 2 * 2 * 3
    assert {device for _, _, device in world.calls} == {"cpu"}
    assert evaluation.command == (
        "nnssl_evaluate -d 4 -p ptPlans__mae ptPlans__scratch -device cpu --num_train 3 all --tolerance 2 --name first"
    )
    assert evaluation.tolerance_mm == 2.0
    output = capsys.readouterr().out
    assert output.startswith(evaluation.verdicts[0].headline)
    assert output.endswith(f"report: {folder / 'report.html'}\n")
    assert "what nnU-Net prints" not in output
    assert "what nnU-Net prints" in (folder / "logs" / "ptPlans__mae__fold_0.log").read_text()
    assert (folder / "report.html").is_file()


def test_list_trains_nothing(world: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    main([*ARMS, "-device", "cpu", "--list", "-f", "0", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "missing  ptPlans__mae__fold_0  6 training, 3 validation cases"
    assert lines[-1].startswith("4 of 4 fold runs are to be trained")
    assert world.calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_train", "3", "--fractions", "0.5"], "either --num_train or --fractions"),
        (["--num_train", "99"], "Give 1 to 5, or all"),
        (["-np", "-1"], "-1 processes are not possible"),
    ],
)
def test_mistakes_are_one_line(
    world: SimpleNamespace, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*ARMS, "-device", "cpu", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_typo_is_an_error(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([*ARMS, "--seed", "3"])
    with pytest.raises(SystemExit):
        parser().parse_args([*ARMS, "--num_train", "five"])
    assert "'five' is neither a number of cases nor all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "device", "kind", "processes"),
    [
        ([], "cpu", InlineExecutor, None),
        (["-np", "1"], "cpu", InlineExecutor, None),
        (["-np", "3"], "cpu", LocalExecutor, 3),
        (["-num_gpus", "2"], "cuda", LocalExecutor, 2),
    ],
)
def test_how_many_processes(arguments: list[str], device: str, kind: type, processes: int | None) -> None:
    executor = training_executor(parser().parse_args([*ARMS, *arguments]), device)
    assert isinstance(executor, kind)
    assert getattr(executor, "num_processes", None) == processes


def test_gpus_are_taken_from_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    two = parser().parse_args([*ARMS, "-num_gpus", "2"])
    assert shared_gpus(two, "cuda") == ("4", "6")
    assert shared_gpus(two, "cpu") == ()
    with pytest.raises(ValueError, match="-num_gpus 5 is not possible: 3 CUDA devices are visible"):
        shared_gpus(parser().parse_args([*ARMS, "-num_gpus", "5"]), "cuda")
    assert shared_gpus(parser().parse_args([*ARMS, "--scheduler", "tcp://x:1"]), "cuda") == ()
