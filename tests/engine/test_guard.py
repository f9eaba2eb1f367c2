"""A run that is watched: what it records, how it intervenes, and that going back is exact."""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import multiprocessing

from nnssl_ext.engine import guard as guard_module
from nnssl_ext.engine import health as health_module
from nnssl_ext.engine import loop as loop_module
from nnssl_ext.engine.alarms import Alarm, HealthConfig, judge
from nnssl_ext.engine.checkpoint import load_checkpoint, load_resume
from nnssl_ext.engine.distributed import World
from nnssl_ext.engine.guard import Guard
from nnssl_ext.engine.health import Monitor
from nnssl_ext.engine.loop import Outcome, _Run, pretrain
from nnssl_ext.engine.recovery import Ring
from nnssl_ext.engine.run import RunSpec
from nnssl_ext.engine.steps import DivergedError, Stepper
from nnssl_ext.engine.task import Embeddings, StepOutput
from nnssl_ext.engine.tracking import Tracker
from tests.engine.pair import Pair, PairConfig, PairTrainer


@pytest.fixture
def spec(make_spec, monkeypatch) -> RunSpec:
    monkeypatch.setattr(Ring, "interval", staticmethod(lambda *_: 2))
    return replace(make_spec(save_every=10), trainer=PairTrainer.configured(["health.every=1", "health.min_cases=3"]))


def alarm_at(monkeypatch, *steps: int, roll_back: bool = True) -> None:
    """Sounds the same alarm after these steps, the first time that each is reached."""
    waiting = list(steps)

    def look(monitor: Monitor, step: int) -> list[Alarm]:
        if step not in waiting:
            return []
        waiting.remove(step)
        words = {"diagnosis": "it is sick", "responses": ("spread",), "slower": True, "roll_back": roll_back}
        return [Alarm(name="rank", value=0.1, limit=0.2, **words)]

    monkeypatch.setattr(Monitor, "look", look)


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def weights(folder: Path, name: str = "checkpoint_final.pth") -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / name)["network_weights"]


def test_a_watched_run_logs_its_health_and_leaves_no_states(spec, monkeypatch):
    alarm_at(monkeypatch)
    assert pretrain(spec) is Outcome.FINISHED
    for row in lines(spec.folder, "metrics.jsonl"):
        assert {"health_rank", "health_between_share", "same_case_mrr", "same_case_mrr_chance"} <= set(row)
        assert row["health_num_cases"] == 4
    assert not (spec.folder / "ring").exists()
    assert not (spec.folder / "interventions.jsonl").exists()


def test_being_watched_changes_no_number(spec, make_spec, monkeypatch):
    """Catches a look at the untrained network that moves weights, moments or random numbers, or has no moments."""
    alarm_at(monkeypatch)
    filled = []
    original = Stepper.validate

    def validate(stepper, *arguments):
        filled.append(float(stepper.task.standard.moments.weight))
        return original(stepper, *arguments)

    monkeypatch.setattr(Stepper, "validate", validate)
    pretrain(spec)
    monkeypatch.setattr(Guard, "begin", lambda *_: True)
    unseen = replace(spec, folder=spec.folder.with_name("unseen"))
    pretrain(unseen)
    assert all(map(torch.equal, weights(spec.folder).values(), weights(unseen.folder).values()))
    assert filled[0] == 1  # of the untrained network
    assert filled[1:4] == filled[4:]


@pytest.mark.parametrize(("ranks", "last"), [(1, 5), (2, 3), (8, 1)])
def test_ranks_share_the_look_at_the_untrained_network_and_stop_when_asked(tmp_path, caplog, ranks, last):
    """Ten cases, two a batch: faults are that every rank looks at all of them, and that a signal is not heard."""
    trainer = PairTrainer.configured([])
    shown = Embeddings(first=torch.ones(2, 3), second=torch.ones(2, 3))
    stepper = SimpleNamespace(trainer=trainer, world=World(size=ranks), show=lambda batch: shown, filled=nullcontext)
    asked, validated = [], []

    def batches(first: int, end: int):
        asked.append((first, end))
        return iter([SimpleNamespace(cases=("a", "b"))] * max(end - first, 0))

    with caplog.at_level("INFO"):
        for stop in (False, True):
            guard = Guard(stepper, tmp_path, tmp_path / "none", main=True)
            begun = guard.begin(batches, 10, lambda: validated.append("yes"), lambda stop=stop: stop, dict)
            assert not begun
    assert asked == [(0, 1), (0, last), (0, last)] * 2
    assert validated == ["yes"]
    assert "Looking at the untrained network: up to 10 training cases" in caplog.text


def test_going_back_is_exact(spec, monkeypatch):
    """After the roll-back the run is what a run resumed from the kept state would be, bit for bit."""
    alarm_at(monkeypatch, 7)
    kept = spec.folder.with_name("kept")
    original = _Run._go_back

    def go_back(run: _Run, *arguments) -> None:
        original(run, *arguments)
        kept.mkdir()
        (kept / "checkpoint_latest.pth").write_bytes(run.folder.latest.read_bytes())

    monkeypatch.setattr(_Run, "_go_back", go_back)
    pretrain(spec)
    (record,) = lines(spec.folder, "interventions.jsonl")
    assert (record["step"], record["resumed_at"], record["statistic"]) == (7, 6, "rank")
    assert record["changes"] == ["back to step 6", "learning rate 0.5 times the recipe's", "turned spread"]
    rows = lines(spec.folder, "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert rows[2]["lr"] < 0.5 * 1e-2
    for name in ("config.json", "splits.json"):
        (kept / name).write_bytes((spec.folder / name).read_bytes())
    again = replace(spec, folder=kept, resume=True)
    assert pretrain(again) is Outcome.FINISHED
    assert all(map(torch.equal, weights(spec.folder).values(), weights(kept).values()))
    assert lines(kept, "metrics.jsonl")[-1] == rows[-1]


TRUE = Monitor.look
WELL = dict.fromkeys(("rank", "between_share", "token_spread", "target_entropy"), 0.5)
WELL |= {"mutual_information": 2.0, "mutual_information_share": 0.5}


@pytest.mark.parametrize(
    ("now", "knob", "statistic", "back", "factor"),
    [
        ({"rank": 0.04, "mutual_information": 0.05, "target_entropy": 0.1}, "spread", "mutual_information", 6, 0.5),
        ({"between_share": 0.24, "mutual_information": 0.05}, "spread", "between_share", 7, 1.0),
        ({"between_share": 0.24, "token_spread": 0.1}, None, "token_spread", 6, 0.5),
    ],
    ids=["the graver one first", "one that has a knob", "never back without a change"],
)
def test_alarms_are_tried_by_gravity_until_something_changes(spec, monkeypatch, now, knob, statistic, back, factor):
    """Catches a warning that silences what is graver or has a knob, and a roll-back that repeats the same steps."""
    alarms = judge({**WELL, "target_entropy": 0.6, **now}, WELL, WELL, 0, 100, HealthConfig())
    assert len(alarms) == 2
    alarm_at(monkeypatch, 7)
    once = Monitor.look
    monkeypatch.setattr(Monitor, "look", lambda monitor, step: alarms if once(monitor, step) else [])
    monkeypatch.setattr(Pair, "respond", lambda task, response: "turned" * (response == knob))
    pretrain(spec)
    (record,) = lines(spec.folder, "interventions.jsonl")
    found = (record["statistic"], record["resumed_at"], record["lr_factor"])
    assert found == (statistic, back, factor)
    assert all(alarm.diagnosis in record["diagnosis"] for alarm in alarms)


def test_a_run_that_stays_ill_goes_back_further_each_time_and_does_not_end_as_if_it_were_well(
    spec, monkeypatch, caplog
):
    """Catches sick states kept while an intervention has time to help, and the same state gone back to again."""
    monkeypatch.setattr(Ring, "interval", staticmethod(lambda *_: 1))
    saved = noted_steps(monkeypatch)
    ill = []

    def judged(*_) -> list[Alarm]:
        words = {"diagnosis": "it is sick", "slower": True, "roll_back": True}
        return [Alarm(name="rank", value=0.1, limit=0.2, **words)] if ill else []

    monkeypatch.setattr(health_module, "judge", judged)
    monkeypatch.setattr(Monitor, "look", lambda monitor, step: (step > 9 and ill.append(step)) or TRUE(monitor, step))
    with caplog.at_level("INFO"):
        pretrain(replace(spec, trainer=replace(spec.trainer, num_epochs=5)))
    *rows, last = lines(spec.folder, "interventions.jsonl")
    assert [(row["step"], row["resumed_at"], row["lr_factor"]) for row in rows] == [
        (10, 9, 0.5),
        (11, 8, 0.25),
        (10, 7, 0.125),
    ]
    assert saved == [0, *range(3, 10)]
    assert last == {"step": 20, "event": "gave up", "diagnosis": "it is sick"}
    assert caplog.messages[-1] == "The run ends ill, after 3 interventions: it is sick."


def noted_steps(monkeypatch) -> list[int]:
    """After how many steps states are kept."""
    saved: list[int] = []
    original = Ring.save
    monkeypatch.setattr(Ring, "save", lambda ring, step, resume: saved.append(step) or original(ring, step, resume))
    return saved


def test_a_run_killed_after_going_back_to_its_start_does_not_measure_the_untrained_network_anew(spec, monkeypatch):
    """Catches a reference, and a queue, of a network whose knobs were turned."""
    alarm_at(monkeypatch, 1)
    begun = []
    original = Monitor.begin
    monkeypatch.setattr(Monitor, "begin", lambda *arguments: begun.append(original(*arguments)))
    monkeypatch.setattr(Monitor, "due", lambda *_: True)
    step = Stepper.train_step

    def killed(stepper, batches, number):
        if stepper.lr_factor < 1:
            raise KeyboardInterrupt
        return step(stepper, batches, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Stepper, "train_step", killed)
        pretrain(spec)
    assert pretrain(replace(spec, resume=True)) is Outcome.FINISHED
    assert [record["resumed_at"] for record in lines(spec.folder, "interventions.jsonl")] == [0]
    assert len(begun) == 1


def test_knobs_stay_turned_when_the_run_goes_back_further(spec, monkeypatch):
    """A knob turned at step 5 is no part of the state of step 4, to which the alarm at step 5 and the next go back."""
    alarm_at(monkeypatch, 5, roll_back=False)
    turned = []
    original = Guard.go_back

    def go_back(guard, *arguments):
        original(guard, *arguments)
        turned.append((float(guard.stepper.task.turned), guard.stepper.lr_factor))

    monkeypatch.setattr(Guard, "go_back", go_back)
    poisoned = replace(spec.trainer.task_config, poisoned=(5, 6, 7))
    monkeypatch.setattr(Pair, "after_step", lambda task, step, total: task.taken.fill_(0 if turned else step + 1))
    pretrain(replace(spec, trainer=replace(spec.trainer, task_config=poisoned)))
    assert turned == [(1.0, 0.25)]


def test_three_steps_that_are_not_finite_go_back_and_slow_down(spec, monkeypatch):
    alarm_at(monkeypatch)
    slowed = []
    original = Guard.go_back

    def go_back(guard, *arguments):
        original(guard, *arguments)
        slowed.append(guard.stepper.lr_factor)

    monkeypatch.setattr(Guard, "go_back", go_back)
    monkeypatch.setattr(Pair, "after_step", lambda task, step, total: task.taken.fill_(0 if slowed else step + 1))
    poisoned = replace(spec.trainer.task_config, poisoned=(5, 6, 7))
    assert pretrain(replace(spec, trainer=replace(spec.trainer, task_config=poisoned))) is Outcome.FINISHED
    rows = lines(spec.folder, "interventions.jsonl")
    assert [(row["event"], row["step"]) for row in rows] == [
        ("skipped", 6),
        ("skipped", 7),
        ("skipped", 8),
        ("intervention", 7),
    ]
    assert all(len(row["cases"]) == 2 for row in rows[:3])
    assert (rows[3]["resumed_at"], slowed) == (4, [0.5])
    assert all(value.isfinite().all() for value in weights(spec.folder).values())


def test_the_embeddings_of_a_skipped_step_are_not_looked_at(spec, monkeypatch):
    """Those of the epoch's last step would make its effective rank fail on what is not finite."""
    alarm_at(monkeypatch)
    pretrain(replace(spec, trainer=replace(spec.trainer, task_config=PairConfig(poisoned=(7,)))))
    assert [row["event"] for row in lines(spec.folder, "interventions.jsonl")] == ["skipped"]
    assert all(0 <= row["health_rank"] <= 1 for row in lines(spec.folder, "metrics.jsonl"))


def test_after_the_last_intervention_divergence_ends_the_run(spec, monkeypatch):
    alarm_at(monkeypatch)
    trainer = replace(spec.trainer, task_config=PairConfig(poisoned=(5, 6, 7)))
    with pytest.raises(DivergedError, match="not finite in 3 steps in a row"):
        pretrain(replace(spec, trainer=trainer))
    rows = lines(spec.folder, "interventions.jsonl")
    assert [row["lr_factor"] for row in rows if row["event"] == "intervention"] == [0.5, 0.25, 0.125]


def test_a_run_stopped_after_an_intervention_goes_on_with_the_same_numbers(spec, monkeypatch):
    alarm_at(monkeypatch, 7)
    pretrain(spec)
    stopped = replace(spec, folder=spec.folder.with_name("stopped"))
    alarm_at(monkeypatch, 7)
    original = Stepper.train_step

    def train_step(stepper, batches, step):
        if step == 9:
            signal.raise_signal(signal.SIGTERM)
        return original(stepper, batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "train_step", train_step)
        assert pretrain(stopped) is Outcome.STOPPED
    assert pretrain(replace(stopped, resume=True)) is Outcome.FINISHED
    assert all(map(torch.equal, weights(spec.folder).values(), weights(stopped.folder).values()))
    assert (stopped.folder / "metrics.jsonl").read_bytes() == (spec.folder / "metrics.jsonl").read_bytes()


def test_a_run_killed_after_going_back_does_not_go_on_from_the_past_that_was_given_up(spec, monkeypatch):
    """The alarm at step 9 goes back to step 5; the run dies at step 7, and step 8, after the second epoch, is what
    `checkpoint_latest` held before. Going on from there, or counting an intervention twice, gives other numbers."""

    class KilledError(BaseException):
        """Nothing is saved on the way out."""

    def look(monitor: Monitor, step: int) -> list[Alarm]:
        if step != 9 or monitor.history:
            return []
        words = {"diagnosis": "it is sick", "responses": ("spread",), "slower": True, "roll_back": True}
        return [Alarm(name="rank", value=0.1, limit=0.2, **words)]

    monkeypatch.setattr(Monitor, "look", look)
    monkeypatch.setattr(Ring, "interval", staticmethod(lambda *_: 5))
    settings = replace(spec.settings, save_every=2)
    whole, killed = (replace(spec, folder=spec.folder.with_name(name), settings=settings) for name in ("a", "b"))
    pretrain(whole)
    original = Stepper.train_step

    def train_step(stepper, batches, step):
        if step == 7 and stepper.lr_factor < 1:
            raise KilledError
        return original(stepper, batches, step)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Stepper, "train_step", train_step)
        pretrain(killed)
    with (killed.folder / "interventions.jsonl").open("a") as file:
        file.write('{"step": 7, "event": "skipped"}\n')  # what was noted between the last checkpoint and the end
    (killed.folder / "ring" / "step_000000007.pth").write_bytes(b"of the same time")
    assert pretrain(replace(killed, resume=True)) is Outcome.FINISHED
    for name in ("metrics.jsonl", "interventions.jsonl"):
        assert (killed.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert len(lines(whole.folder, "interventions.jsonl")) == 1
    assert all(map(torch.equal, weights(whole.folder).values(), weights(killed.folder).values()))


def test_nothing_is_touched_where_it_may_only_warn(spec, monkeypatch, caplog):
    alarm_at(monkeypatch, 7)
    trainer = PairTrainer.configured(["health.every=1", "health.act=false"])
    pretrain(replace(spec, trainer=trainer))
    assert "it is sick" in caplog.text
    assert not (spec.folder / "interventions.jsonl").exists()


def test_a_hopeless_run_is_stopped_with_its_diagnosis_and_goes_on_where_one_insists(spec, monkeypatch):
    """As the message says: its epoch is recorded and saved, whatever `save_every`, and it is not judged again."""
    alarm_at(monkeypatch)
    monkeypatch.setattr(Monitor, "lost", lambda _, now, step, before: "they do not find each other" * (before < 4))
    with pytest.raises(ValueError, match="they do not find each other"):
        pretrain(spec)
    (row,) = lines(spec.folder, "interventions.jsonl")
    assert (row["event"], row["step"]) == ("stopped", 4)
    assert load_resume(spec.folder / "checkpoint_latest.pth")["progress"]["epoch"] == 1
    assert pretrain(replace(spec, resume=True)) is Outcome.FINISHED
    assert [row["epoch"] for row in lines(spec.folder, "metrics.jsonl")] == [0, 1, 2]
    assert lines(spec.folder, "interventions.jsonl") == [row]


def test_a_run_is_judged_once_also_when_it_was_resumed(spec, monkeypatch):
    """A resumed run must not ask again long after a tenth of the run is over."""
    alarm_at(monkeypatch)
    asked = []
    monkeypatch.setattr(Monitor, "lost", lambda monitor, now, step, before: asked.append((before, step)) or "")
    original = Stepper.train_step

    def train_step(stepper, batches, step):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return original(stepper, batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "train_step", train_step)
        pretrain(spec)
    pretrain(replace(spec, resume=True))
    assert asked == [(0, 4), (4, 8)]  # the last epoch has nothing to go on with


def test_states_to_go_back_to_hold_no_network_and_are_kept_where_going_back_is_possible(spec, monkeypatch):
    """Not of a task that shows no embeddings, nor where the monitor may only warn: they are large."""
    alarm_at(monkeypatch)
    saved = []
    monkeypatch.setattr(Ring, "save", lambda ring, step, resume: saved.append((step, "network_weights" in resume)))
    pretrain(spec)
    assert saved == [(step, False) for step in range(0, 13, 2)]
    saved.clear()
    pretrain(warned(replace(spec, folder=spec.folder.with_name("warned"))))
    pretrain(blind(replace(spec, folder=spec.folder.with_name("blind")), monkeypatch))
    assert saved == []


def warned(spec: RunSpec) -> RunSpec:
    return replace(spec, trainer=replace(spec.trainer, health=replace(spec.trainer.health, act=False)))


def blind(spec: RunSpec, monkeypatch) -> RunSpec:
    """The same task, which shows nothing."""
    original = Pair.forward
    monkeypatch.setattr(Pair, "forward", lambda task, views: StepOutput(loss=original(task, views).loss))
    return spec


def test_a_task_without_embeddings_goes_back_to_its_checkpoint_when_all_ranks_have_read_it(spec, monkeypatch):
    """Rank 0 writes that file anew with the knobs turned; a rank that read it later would turn them twice."""
    alarm_at(monkeypatch)
    events = []
    for module, name in ((guard_module, "gather"), (loop_module, "save_checkpoint")):
        monkeypatch.setattr(module, name, noted(events, name, getattr(module, name)))
    monkeypatch.setattr(_Run, "_take_up", noted(events, "read", _Run._take_up))
    monkeypatch.setattr(
        Pair, "after_step", lambda task, *_: task.taken.fill_(0 if "read" in events else task.taken + 1)
    )
    spec = replace(spec, settings=replace(spec.settings, save_every=1))
    trainer = replace(spec.trainer, task_config=PairConfig(poisoned=(5, 6, 7)))
    assert pretrain(blind(replace(spec, trainer=trainer), monkeypatch)) is Outcome.FINISHED
    assert lines(spec.folder, "interventions.jsonl")[-1]["resumed_at"] == 4
    place = events.index("read")
    assert events[place : place + 3] == ["read", "gather", "save_checkpoint"]


def noted(events: list[str], name: str, function):
    def call(*arguments):
        events.append(name)
        return function(*arguments)

    return call


def test_losses_against_a_teachers_targets_make_no_checkpoint_the_best(spec, monkeypatch):
    """They move with the teacher: the lowest is that of the run's first epochs, or of its collapse."""
    alarm_at(monkeypatch)
    pretrain(spec)
    assert (spec.folder / "checkpoint_best.pth").exists()
    original = Pair.forward

    def forward(task, views):
        output = original(task, views)
        targets = torch.full((len(views["image"]), 4), 0.25)
        return replace(output, embeddings=replace(output.embeddings, targets=targets))

    monkeypatch.setattr(Pair, "forward", forward)
    taught = replace(spec, folder=spec.folder.with_name("taught"))
    pretrain(taught)
    assert not (taught.folder / "checkpoint_best.pth").exists()


def _train(rank: int, spec: RunSpec, poisoned: bool, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    Ring.interval = staticmethod(lambda *_: 2)
    Tracker.draw_progress = lambda self: None
    states = []
    original = Guard.go_back

    def go_back(guard: Guard, *arguments) -> None:
        original(guard, *arguments)
        stepper = guard.stepper
        momenta = [value["momentum_buffer"] for value in stepper.optimizer.state.values()]
        tensors = {**stepper.task.state_dict(), **{str(number): value for number, value in enumerate(momenta)}}
        record = guard.monitor.history[-1]
        numbers = (record["step"], record["resumed_at"], record["statistic"], stepper.lr_factor)
        states.append((numbers, {name: value.clone() for name, value in tensors.items()}))

    Guard.go_back = go_back
    if poisoned:  # on one rank alone, and until the learning rate was halved
        Pair.after_step = lambda task, step, total: task.taken.fill_(0 if states else step + 1)
    config = PairConfig(poisoned=(5, 6, 7) if poisoned and rank else ())
    pretrain(replace(spec, trainer=replace(spec.trainer, task_config=config)))
    torch.save(states, Path(folder) / f"{rank}.pt")


@pytest.mark.parametrize("poisoned", [False, True], ids=["an alarm of both", "one rank is not finite"])
def test_two_processes_go_back_at_the_same_step_to_the_same_state(spec, tmp_path, poisoned):
    """Fails if one rank alone goes back, slows down or turns a knob: they would wait for each other, or train apart."""
    limits = ("every=5", "min_cases=3", "between=1e9", "rank_warn=1e9", "rank_fail=1e9")
    sick = [f"health.{limit}" for limit in limits]
    trainer = PairTrainer.configured(["health.every=2"] if poisoned else sick)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    configuration = replace(spec.configuration, batch_size=1)
    both = replace(spec, trainer=trainer, configuration=configuration)
    multiprocessing.spawn(_train, (both, poisoned, port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected = [(7, 4, "loss", 0.5)] if poisoned else [(5, 0, "rank", factor) for factor in (0.5, 0.25, 0.125)]
    assert [numbers for numbers, _ in first] == [numbers for numbers, _ in second] == expected
    for (_, one), (_, other) in zip(first, second, strict=True):
        assert set(one) == set(other)
        assert all(torch.equal(value, other[name]) for name, value in one.items())
