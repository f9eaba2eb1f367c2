"""Runs in processes of their own: killed ones, stopped ones, and several that train together."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from nnssl_ext.cli.train import STOPPED, main
from nnssl_ext.core.paths import run_folder
from nnssl_ext.engine.checkpoint import load_checkpoint

PROJECT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "nnssl_ext.cli.train")
DEADLINE = 300.0
SETTINGS = ["--set", "block_size=4", "num_epochs=12", "steps_per_epoch=3", "val_steps_per_epoch=2", "val_fraction=0.3"]


def arguments(tag: str, *more: str) -> list[str]:
    where = ["Dataset999_Tiny", "3d_fullres", "-device", "cpu", "--no_tensorboard", "--save_every", "2", "-tag", tag]
    return [*where, *SETTINGS, *more]


def folder(tag: str) -> Path:
    return run_folder("Dataset999_Tiny", f"MAETrainer-{tag}", "nnsslPlans", "3d_fullres")


def train(*args: str) -> int:
    try:
        main(list(args))
    except SystemExit as status:
        return int(status.code or 0)
    return 0


def start(args: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.Popen([*COMMAND, *args], env=environment, cwd=PROJECT, stderr=subprocess.DEVNULL)


def wait_for_epochs(child: subprocess.Popen[bytes], tag: str, number: int) -> None:
    """Wait until a run has recorded that many epochs."""
    metrics, deadline = folder(tag) / "metrics.jsonl", time.monotonic() + DEADLINE
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < number:
        assert child.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def saved_step(tag: str) -> int:
    return load_checkpoint(folder(tag) / "checkpoint_latest.pth")["resume"]["progress"]["step"]


def records(tag: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder(tag) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("preprocessed")
def test_a_process_killed_at_once_is_resumed_to_the_same_bytes():
    assert train(*arguments("whole")) == 0
    child = start(arguments("killed"))
    wait_for_epochs(child, "killed", 4)
    child.kill()
    assert child.wait(DEADLINE) == -signal.SIGKILL
    assert 0 < saved_step("killed") < 36
    assert train(*arguments("killed", "--c")) == 0
    assert (folder("killed") / "metrics.jsonl").read_bytes() == (folder("whole") / "metrics.jsonl").read_bytes()
    weights = [load_checkpoint(folder(tag) / "checkpoint_final.pth")["network_weights"] for tag in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not list(folder("killed").glob(".tmp-*"))


@pytest.mark.usefixtures("preprocessed")
def test_two_processes_equal_one_with_twice_the_batch_and_stop_together():
    """Through torchrun and gloo, with gradients accumulated; one process goes on where the two were stopped."""
    assert train(*arguments("one", "--set", "accumulate=2", "-batch_size", "2")) == 0
    child = start(arguments("two", "--set", "accumulate=2", "-batch_size", "1", "-num_gpus", "2"))
    wait_for_epochs(child, "two", 2)
    child.send_signal(signal.SIGUSR1)
    assert child.wait(DEADLINE) == STOPPED
    together = len(records("two"))
    assert 2 <= together < 12
    assert saved_step("two") >= 3 * together
    assert train(*arguments("two", "--set", "accumulate=2", "-batch_size", "2", "--c")) == 0
    assert len(records("two")) == 12
    for one, two in zip(records("one"), records("two"), strict=True):
        assert set(one) == set(two)
        for name in ("train_loss", "val_loss", "train_gradient_norm", "effective_rank", "token_spread"):
            assert two[name] == pytest.approx(one[name], rel=1e-3), name
