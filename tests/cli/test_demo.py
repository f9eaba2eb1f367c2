from types import SimpleNamespace

import pytest

from nnssl_ext.cli import demo
from nnssl_ext.core.records import read_json
from nnssl_ext.evaluation import records

SMALL = ("--num_cases", "11", "--unlabelled", "4")


@pytest.fixture
def lines(monkeypatch):
    """The command lines that the demo would run, and its end left out."""
    seen: list[list[str]] = []
    monkeypatch.setattr(demo, "_run", lambda line, environment: seen.append(list(line)))
    monkeypatch.setattr(demo, "_finish", lambda *results: None)
    return seen


def test_the_demo_runs_the_pipeline_in_order_with_options_that_exist(tmp_path, lines):
    demo.main(["--folder", str(tmp_path / "with space"), *SMALL, "--folds", "0", "1"])
    assert [line[0] for line in lines] == [
        "nnssl_convert",
        "nnssl_plan_and_preprocess",
        "nnssl_train",
        "nnssl_plan_finetuning",
        "nnssl_plan_finetuning",
        "nnssl_evaluate",
    ]
    for line in lines:
        module = __import__(f"nnssl_ext.cli.{line[0].removeprefix('nnssl_')}", fromlist=["parser"])
        module.parser().parse_args(line[1:])
    assert len(list((tmp_path / "with space/source/imagesTr").iterdir())) == 11


def test_a_second_start_goes_on_but_not_with_other_settings(tmp_path, lines, capsys):
    demo.main(["--folder", str(tmp_path), *SMALL])
    demo.main(["--folder", str(tmp_path), *SMALL, "--folds", "2"])
    assert read_json(tmp_path / "demo.json")["num_cases"] == 11
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--folder", str(tmp_path), "--num_cases", "12", *SMALL[2:]])
    assert stopped.value.code == 2
    assert "num_cases is 11, not 12" in capsys.readouterr().err


def test_a_command_that_fails_ends_the_demo_with_its_status(tmp_path, capsys):
    (tmp_path / "dataset.json").write_text('{"training": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]}')
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--folder", str(tmp_path / "demo"), "--source", str(tmp_path), *SMALL[2:]])
    assert stopped.value.code == 2
    assert "the demo stops here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "nothing"], "--source nothing has no dataset.json"),
        ([*SMALL, "--folds", "0", "9"], "--folds 9 is not there: choose from 0 to 4"),
        ([*SMALL, "--num_train", "6"], "--num_train 6 is not possible: give numbers from 1 to 5, or all"),
        ([*SMALL, "--num_train", "some"], "--num_train some is not possible"),
        (["--num_cases", "11"], "--unlabelled 24 of 11 cases is not possible"),
    ],
)
def test_what_a_later_command_would_refuse_is_refused_at_once(tmp_path, lines, capsys, words, message):
    """Planted fault: refused by the last command, or after a wrong source had been written down as the demo's."""
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--folder", str(tmp_path / "demo"), *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not lines
    assert not (tmp_path / "demo").exists()


@pytest.fixture
def finish(tmp_path, monkeypatch):
    """Ends a demo whose arm from scratch reached the given Dice after so many steps of pretraining."""
    (tmp_path / "results/Dataset002_Demo").mkdir(parents=True)

    def end(mean: float | None, steps: int) -> None:
        found = SimpleNamespace(
            reference=SimpleNamespace(name="s"),
            num_train=(5,),
            summary=lambda *key: SimpleNamespace(mean=mean),
            verdicts=[SimpleNamespace(headline="Pretraining came out behind.", certainty="One seed.")],
        )
        monkeypatch.setattr(records, "load_evaluation", lambda folder: found)
        demo._finish(tmp_path, 60, steps)

    return end


@pytest.mark.parametrize(("steps", "warned"), [(300, True), (2000, False)])
def test_a_short_pretraining_is_called_one_at_the_end(finish, capsys, steps, warned):
    """Catches a demo that lets its few steps stand for what pretraining is worth."""
    finish(0.31, steps)
    told = capsys.readouterr().out
    assert "Pretraining came out behind." in told
    assert (f"{steps} steps of pretraining show every stage, not what pretraining is worth" in told) == warned


@pytest.mark.parametrize("mean", [0.29, None])
def test_a_baseline_that_learned_nothing_ends_the_demo_loudly(finish, capsys, mean):
    """Catches a demo that compares nothing with nothing and calls that a result."""
    with pytest.raises(SystemExit) as stopped:
        finish(mean, 300)
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert f"reached a Dice of {mean}, below 0.3" in told.err
    assert told.out == ""
