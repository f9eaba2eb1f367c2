"""A comparison from its command to its records, with pretraining, probing and fine-tuning replaced by pretences."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnssl_ext.cli import compare as command
from nnssl_ext.cli import plan_finetuning, train
from nnssl_ext.core.executor import InlineExecutor
from nnssl_ext.core.records import read_json, to_dict, write_json
from nnssl_ext.dataset.integrity import content_hash
from nnssl_ext.evaluation import comparison, comparison_jobs, comparison_plan, comparison_settings
from nnssl_ext.evaluation.comparison import compare_methods
from nnssl_ext.evaluation.comparison_records import load_comparison
from nnssl_ext.evaluation.comparison_settings import Budget, ComparisonSettings, epochs_of, read_settings
from nnssl_ext.evaluation.comparison_tasks import Machine, random_key
from nnssl_ext.evaluation.preparation import EvaluationSettings
from tests.evaluation import fakes

UNLABELLED = "Dataset001_Scans"
CPU = Machine()
GREEDY = comparison_settings.ProbeProtocol(config=comparison_settings.ProbeConfig(num_labelled=7))
TRAINERS = ("MAETrainer", "SparkTrainer")


class Reached(Exception):  # noqa: N818 - no error
    """Fine-tuning would begin now."""


class World:
    """Data, plans and pretences; remembers what was run."""

    def __init__(self, root: Path, make_plan: Callable, patch: pytest.MonkeyPatch) -> None:
        self.root, self.calls, self.fail = root, [], ""
        self.seconds = {"MAETrainer": 0.1, "SparkTrainer": 0.25}
        fakes.make_dataset(root)
        self.labelled = root / "preprocessed" / fakes.DATASET
        write_json(self.labelled / "splits_final.json", [to_dict(split) for split in fakes.splits()])
        folder = root / "preprocessed" / UNLABELLED
        make_plan((16, 16, 8)).save(folder / "nnsslPlans.json")
        write_json(folder / "nnsslPlans_3d_fullres" / "nnssl_index.json", {})
        self.seen = SimpleNamespace(content_hashes=("0" * 64,), subject="a")
        patch.setattr(comparison_plan.Store, "open", lambda folder: SimpleNamespace(entries={"a": self.seen}))
        patch.setattr(comparison_plan, "prepare_dataset", lambda *_, **__: self.labelled)
        patch.setattr(comparison, "preprocess", lambda *_: None)
        for name in ("measure_step", "pretrain_method", "probe_method", "plan_arm"):
            patch.setattr(comparison_jobs, name, self.named(name))

    def named(self, name: str) -> Callable:
        def run(task):
            self.calls.append((name, task.log_file.stem))
            if self.fail and self.fail in f"{name} {task.log_file.stem}":
                raise ValueError("no memory left")
            return getattr(self, name)(task)

        run.__name__ = name
        return run

    def measure_step(self, task) -> float:
        return self.seconds[task.trainer]

    def pretrain_method(self, task) -> None:
        write_json(task.checkpoint, {})
        value = 0.5 if task.trainer == "MAETrainer" and not task.sham else 1.01
        (task.folder / "metrics.jsonl").write_text(json.dumps({"val_mse": value, "val_mse_chance": 1.0}) + "\n")

    def probe_method(self, task) -> None:
        key = task.target.stem
        level = 0.3 if key.startswith("random") else 0.45 if "sham" in key else 0.6
        dice = [[[level + 0.01 * index] for index in range(len(task.test))]]
        record = {"classes": [1], "cases": list(task.test), "dice": dice, comparison_jobs.MADE_OF: task.made_of}
        write_json(task.target, record)

    def plan_arm(self, task) -> None:
        weights = (
            {} if task.from_scratch else {"pretrained_weights": "w.pth", "pretraining_content_hashes": ("0" * 64,)}
        )
        fakes.make_plans(self.root, task.plans_path.stem, seed=task.seed, **weights)
        report = task.plans_path.with_name(f"{task.plans_path.stem}_report.json")
        write_json(report, {"command": comparison_jobs.finetuning_command(task, "encoder")})

    def run(self, settings: ComparisonSettings, train_fold=fakes.pretend_to_train):
        return compare_methods(settings, InlineExecutor(), CPU, command="nnssl_compare", train_fold=train_fold)

    def prepare(self, settings: ComparisonSettings) -> EvaluationSettings:
        """Everything before fine-tuning; what would be evaluated."""
        reached = []

        def stop(settings, *_, **__):
            reached.append(settings)
            raise Reached

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Reached):
            patch.setattr(comparison, "evaluate", stop)
            self.run(settings)
        return reached[0]

    def counts(self) -> dict[str, int]:
        names = [name for name, _ in self.calls]
        self.calls.clear()
        return {name: names.count(name) for name in sorted(set(names))}


@pytest.fixture
def world(roots: Path, tiny_plan: Callable, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(roots, tiny_plan, monkeypatch)


def settings(budget: str = "50", trainers: tuple[str, ...] = TRAINERS, **values) -> ComparisonSettings:
    probe = comparison_settings.ProbeProtocol(config=comparison_settings.ProbeConfig(num_labelled=3, neighbours=0))
    defaults = {"seeds": (0, 1), "folds": (0,), "num_train": (3,), "probe": probe, **read_settings(None, trainers)}
    made = {
        **defaults,
        "dataset": 4,
        "trainers": trainers,
        "budget": Budget.parse(budget),
        **{"probe": probe},
        **values,
    }
    return ComparisonSettings(**made)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_plan: Callable) -> Iterator[SimpleNamespace]:
    """One comparison that was run to its end, which tests may look at and start again, and not change."""
    root = tmp_path_factory.mktemp("finished")
    protocol = comparison_settings.Protocol(
        patch_size=(8, 16, 8), batch_size=3, settings=("mask_ratio=0.6", "optim.lr=1e-3")
    )
    asked = settings(protocols={**settings().protocols, "MAETrainer": protocol}, sham="probe")
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("raw", "preprocessed", "results"):
            (root / kind).mkdir()
            for prefix in ("nnssl", "nnUNet"):
                patch.setenv(f"{prefix}_{kind}", str(root / kind))
        world = World(root, tiny_plan, patch)
        yield SimpleNamespace(world=world, asked=asked, made=world.run(asked), counts=world.counts())


def test_from_settings_to_records(finished: SimpleNamespace) -> None:
    """Catches a gate that has no part in the verdict, and one of sham runs that has a part in the warnings."""
    found, evaluation, folder = finished.made
    assert folder == finished.world.root / "results" / fakes.DATASET / "evaluation" / "compare-50steps"
    assert finished.counts == {"measure_step": 2, "plan_arm": 5, "pretrain_method": 8, "probe_method": 10}
    assert [arm.label for arm in evaluation.arms] == ["scratch", "MAE", "Spark"]
    assert len(evaluation.runs) == 3 * 2  # arms, seeds
    mae = found.method("MAE")
    assert (mae.steps, mae.seconds_per_step, mae.gate) == (50, 0.1, "passed")
    assert mae.pretext == "mse 0.500 (chance 1.000, sham 1.010)"
    assert mae.over_sham.mean == pytest.approx(0.15)
    assert mae.over_random.mean == pytest.approx(0.30)
    assert mae.verdict == "beats sham"
    assert found.method("Spark").verdict == "did not learn its task"
    (warning,) = (text for text in found.warnings if "chance" in text)
    assert warning.startswith("Not shown to beat chance at their own task on held-out cases: Spark. ")
    assert (found.method("MAE sham").arm, found.method("MAE sham").verdict) == (None, "-")
    assert found.method("scratch").probe == pytest.approx({0: 0.31, 1: 0.31})
    assert {arm.label for arm in found.rankings[0].arms} == {"scratch", "MAE", "Spark"}
    assert load_comparison(folder) == found


def test_every_seed_fine_tunes_the_weights_of_its_own_pretraining(world: World) -> None:
    """Fails where all seeds start from the first seed's weights."""
    scratch, mae, _ = world.prepare(settings()).plans
    assert mae.endswith("__p{seed}")
    assert "{seed}" not in scratch
    for seed in (0, 1):
        report = read_json(world.labelled / f"{mae.format(seed=seed)}_report.json")
        assert f"-s{seed}__" in report["command"][report["command"].index("-pc") + 1]


def test_a_second_start_does_nothing_and_finds_the_same(finished: SimpleNamespace) -> None:
    trained = []
    second, _, _ = finished.world.run(finished.asked, train_fold=trained.append)
    assert finished.world.counts() == {"plan_arm": 5}  # which find their plans
    assert trained == []
    assert replace(second, created="") == replace(finished.made[0], created="")


def test_a_pretraining_that_was_done_again_is_probed_again(world: World) -> None:
    """Catches a probe that is taken for that of weights, or of labels, that came after it."""
    world.prepare(settings())
    world.counts()
    checkpoint = next((world.root / "results" / UNLABELLED).glob("MAE*-s1__*/fold_all/checkpoint_final.pth"))
    write_json(checkpoint, {"other": "weights"})
    world.prepare(settings())
    probed = [log for name, log in world.calls if name == "probe_method"]
    assert len(probed) == 1
    assert probed[0].startswith("probe-MAE-")
    world.counts()
    case = comparison_plan.plan_comparison(settings(), InlineExecutor()).probe_cases()[0][0]
    (world.root / "raw" / fakes.DATASET / "labelsTr" / f"{case}.nii.gz").write_bytes(b"corrected")
    world.prepare(settings())
    assert world.counts()["probe_method"] == 6  # MAE, Spark and an untrained network, for two seeds


def test_a_failing_run_stops_no_other_and_the_same_command_goes_on(world: World) -> None:
    world.fail = "pretrain_method pretraining-Spark"
    with pytest.raises(ValueError, match=r"2 of 4 runs failed, the first is Spark-.*: ValueError: no memory left"):
        world.run(settings())
    assert world.counts() == {"measure_step": 2, "pretrain_method": 4}
    world.fail = ""
    world.prepare(settings())
    assert world.counts() == {"plan_arm": 5, "pretrain_method": 2, "probe_method": 6}


def test_a_budget_of_time_is_measured_once(world: World) -> None:
    """Ten seconds are 100 steps of one method and 40 of the other, also when the machine has become slower since."""
    world.prepare(settings("10s"))
    assert world.counts() == {"measure_step": 2, "plan_arm": 5, "pretrain_method": 4, "probe_method": 6}
    world.seconds = dict.fromkeys(world.seconds, 9.0)
    world.prepare(settings("10s", seeds=(0, 1, 2)))
    assert world.counts() == {"plan_arm": 7, "pretrain_method": 2, "probe_method": 3}  # the new seed's
    kept = read_json(world.root / "results" / fakes.DATASET / "evaluation" / "compare-10s" / "budget.json")
    found = sorted((row["trainer"], row["steps"]) for row in kept["methods"].values())
    assert found == [("MAETrainer", 100), ("SparkTrainer", 40)]
    with pytest.raises(ValueError, match="begun with budget 10s, not 20s"):
        world.run(settings("20s", name="compare-10s"))
    planned = comparison_plan.plan_comparison(settings("10s"), InlineExecutor())
    with pytest.raises(ValueError, match="begun with precision auto, not fp32"):
        comparison.fix_steps(planned, InlineExecutor(), Machine(precision="fp32"))


def test_what_is_there_serves_other_comparisons_and_other_settings_lie_elsewhere(world: World) -> None:
    world.prepare(settings())
    world.counts()
    world.prepare(settings(trainers=("MAETrainer",), name="other"))
    assert "pretrain_method" not in world.counts()
    changed = comparison_settings.Protocol(settings=("mask_ratio=0.5",))
    world.prepare(settings(protocols={**settings().protocols, "MAETrainer": changed}, name="third"))
    assert world.counts()["pretrain_method"] == 2  # MAE's two seeds


def test_other_images_or_another_preparation_are_other_runs(world: World) -> None:
    """Catches weights, networks from scratch and probes taken for those of data prepared anew or another device."""

    def names() -> tuple[str, str, str]:
        planned = comparison_plan.plan_comparison(settings(), InlineExecutor())
        method = planned.methods[0]
        task = comparison.pretraining_task(planned, method, 50, 0, CPU)
        return task.tag, planned.scratch_name(method.network, "cpu"), random_key(method, 0)

    planned = comparison_plan.plan_comparison(settings(), InlineExecutor())
    assert len({planned.scratch_name("network", device) for device in ("cpu", "cuda")}) == 2
    before = names()
    world.seen.content_hashes = ("1" * 64,)
    after = names()
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, True]
    path = world.root / "preprocessed" / UNLABELLED / "nnsslPlans.json"
    plans = read_json(path)
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    write_json(path, plans)
    assert not set(names()) & {*before, *after}


def test_leaks_are_refused_before_the_first_step(world: World) -> None:
    """Catches a further image of a patient who was pretrained on, among others."""
    image = fakes.image_of(world.root, fakes.splits()[0].val[0])
    world.seen.content_hashes = (content_hash(image[0]),)
    with pytest.raises(ValueError, match=f"1 validation cases were in the pretraining set of {UNLABELLED}"):
        world.run(settings())
    images, split = world.root / "raw" / fakes.DATASET / "imagesTr", fakes.splits()[0]
    world.seen.content_hashes, world.seen.subject = (), split.train[0]
    with pytest.raises(ValueError, match=f"1 training cases are of patients in the pretraining set of {UNLABELLED}"):
        world.run(settings())
    copied = (images / f"{split.train[0]}_0000.nii.gz").read_bytes()
    (images / f"{split.val[0]}_0000.nii.gz").write_bytes(copied)
    with pytest.raises(ValueError, match=f"fold 0 validates on {split.val[0]} and trains on {split.train[0]}"):
        world.run(settings())
    assert world.calls == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folds": (7,)}, "fold 7 is not planned"),
        ({"num_train": (99,)}, "--num_train 99 is not possible"),
        ({"seeds": (1, 1)}, "seeds must be one or more different values"),
        ({"trainers": ("SimMIMTrainer",)}, "SimMIMTrainer runs on a vit, and its plans have a cnn.*transformer"),
        ({"finetuning": comparison_settings.FinetuningProtocol(settings=("lrr=1",))}, "has no field 'lrr'"),
        ({"pretrain_dataset": 9}, "no dataset 9"),
        ({"probe": GREEDY}, "6 training and 3 validation cases, and a probe learns from 7"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    finished: SimpleNamespace, changes: dict, message: str
) -> None:
    finished.world.calls.clear()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finished.world.run(settings(**changes))
    assert finished.world.calls == []


def test_the_recorded_commands_do_the_same(finished: SimpleNamespace) -> None:
    """Parsed by their own parsers, they come to the very run; fails where a setting is missing in the command."""
    found, _, _ = finished.made
    asked = finished.world.prepare(replace(finished.asked, sham="finetune", seeds=(0,)))
    arms = dict(zip(asked.labels, asked.plans, strict=True))
    for label, sham in (("MAE", False), ("MAE sham", True)):
        pretraining = found.method(label).commands[0].split()
        report = read_json(finished.world.labelled / f"{arms[label].format(seed=0)}_report.json")
        finetuning = report["command"]
        assert found.method(label).commands[1:] == (() if sham else (" ".join(finetuning),))
        args = train.parser().parse_args(pretraining[1:])
        spec = train._spec(args)
        assert spec.folder.parent.name.startswith(f"MAETrainer{'-sham' if sham else ''}-")
        assert (spec.trainer.total_steps, spec.trainer.sham, spec.trainer.optim.lr) == (50, sham, 1e-3)
        assert (spec.configuration.patch_size, spec.configuration.batch_size) == ((8, 16, 8), 3)
        planned = plan_finetuning.parser().parse_args(finetuning[1:])
        assert planned.pretrained_checkpoint == str(spec.folder / "checkpoint_final.pth")
        assert planned.allow_sham is sham
        assert planned.patch_size == [16, 16, 8]  # that of the plans, for all arms


def test_a_worker_builds_the_run_of_its_command(finished: SimpleNamespace) -> None:
    planned = comparison_plan.plan_comparison(settings(), InlineExecutor())
    task = comparison.pretraining_task(planned, planned.methods[0], 50, 1, CPU)
    spec = train._spec(train.parser().parse_args(task.command[1:]))
    assert comparison_jobs.run_spec(task) == spec


def test_a_network_from_scratch_stands_beside_every_kind_of_network(world: World) -> None:
    vit = comparison_settings.Protocol(transformer="XS", token=(8, 8, 8))
    protocols = {"MAETrainer": comparison_settings.Protocol(), "SimMIMTrainer": vit}
    world.seconds["SimMIMTrainer"] = 0.1
    asked = world.prepare(settings(trainers=("MAETrainer", "SimMIMTrainer"), protocols=protocols))
    assert asked.labels == ("scratch cnn", "scratch vit", "MAE", "SimMIM")
    assert asked.reference == asked.plans[0]
    assert (world.root / "preprocessed" / UNLABELLED / "nnsslPlans-vitXS-8x8x8.json").is_file()


@pytest.mark.parametrize(
    ("text", "steps", "seconds"), [("500", 500, None), ("500steps", 500, None), ("90s", None, 90), ("1.5h", None, 5400)]
)
def test_budgets(text: str, steps: int | None, seconds: float | None) -> None:
    assert (Budget.parse(text).steps, Budget.parse(text).seconds) == (steps, seconds)


@pytest.mark.parametrize("text", ["0", "ten", "10 min", "-5", "0min", "1.5"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ValueError, match="give steps, such as 500, or time"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("steps", "epochs"),
    [(1, (1, 1)), (3, (3, 1)), (50, (5, 10)), (1249, (5, 249)), (1251, (6, 208)), (25000, (100, 250))],
)
def test_epochs_exceed_no_budget(steps: int, epochs: tuple[int, int]) -> None:
    assert epochs_of(steps) == epochs
    assert steps - epochs[0] < epochs[0] * epochs[1] <= steps


def test_patterns_of_a_settings_file_apply_in_order(tmp_path: Path) -> None:
    content = {
        "pretraining": {
            "*": {"batch_size": 4, "settings": ["optim.lr=1e-3"], "settings_if_known": ["block_size=8"]},
            "Spark*": {"batch_size": 6, "settings": ["optim.lr=1e-4"]},
        },
        "finetuning": {"settings": ["num_epochs=6"]},
        "probe": {"num_pool": 12, "config": {"num_labelled": 4}},
    }
    write_json(tmp_path / "s.json", content)
    found = read_settings(tmp_path / "s.json", ("MAETrainer", "SparkTrainer", "DINOTrainer"))
    mae, spark, dino = (found["protocols"][f"{name}Trainer"] for name in ("MAE", "Spark", "DINO"))
    assert mae.settings == ("val_steps_per_epoch=10", "optim.lr=1e-3", "block_size=8")
    assert (spark.batch_size, spark.settings[1:3]) == (6, ("optim.lr=1e-3", "optim.lr=1e-4"))
    assert not any("block_size" in text for text in dino.settings)
    assert found["finetuning"].settings == ("num_epochs=6",)
    assert (found["probe"].num_pool, found["probe"].config.num_labelled) == (12, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pretrain": {}}, "must hold nothing but finetuning, pretraining, probe"),
        ({"pretraining": {"Nothing*": {}}}, "no method matches 'Nothing\\*'"),
        ({"pretraining": {"*": {"batch": 3}}}, "Protocol has no field 'batch'"),
        ({"pretraining": {"*": {"settings": "optim.lr=1"}}}, "settings"),
        ({"pretraining": {"*": {"steps": 0}}}, "steps=0 must be 1 or more"),
        ({"probe": {"num_test": 1}}, "a probe needs 2 test cases"),
    ],
)
def test_mistakes_in_a_settings_file_are_named(tmp_path: Path, content: dict, message: str) -> None:
    write_json(tmp_path / "s.json", content)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / "s.json", TRAINERS)


def test_the_whole_command(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    write_json(world.root / "s.json", {"probe": {"config": {"num_labelled": 3, "neighbours": 0}}})
    monkeypatch.setattr(command, "_executor", lambda *_: InlineExecutor())
    monkeypatch.setattr("nnssl_ext.evaluation.comparison.evaluate", _with(fakes.pretend_to_train))
    drawn = []

    def draw(*arguments):
        drawn.append(arguments[-1])
        return arguments[-1] / "page"

    monkeypatch.setattr("nnssl_ext.reports.page.write_report", draw)
    monkeypatch.setattr("nnssl_ext.reports.comparison.write_comparison", draw)
    line = f"-d 4 -tr {' '.join(TRAINERS)} --budget 20 --num_train 3 --seeds 0 -f 0 -device cpu"
    words = [*line.split(), "--settings", str(world.root / "s.json")]
    command.main([*words, "--list"])
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].startswith("missing  MAE-")
    assert listed[-1].startswith("then 3 fine-tunings of 3 arms")
    command.main(words)
    output = capsys.readouterr().out
    folder = world.root / "results" / fakes.DATASET / "evaluation" / "compare-20steps"
    assert output.endswith(f"report: {folder / 'page'}\n")
    assert drawn == [folder, folder]
    assert load_comparison(folder).command.startswith("nnssl_compare -d 4 -tr MAETrainer SparkTrainer --budget 20")


def _with(trainer):
    from nnssl_ext.evaluation.run import evaluate

    return lambda *args, **values: evaluate(*args, **{**values, "trainer": trainer})
