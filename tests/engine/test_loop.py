"""The loop as a whole, in this process."""

import json

import pytest
import torch

from nnssl_ext.core.records import read_json
from nnssl_ext.engine.checkpoint import RELEASED_KEYS, load_checkpoint
from nnssl_ext.engine.loop import Outcome, pretrain


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_it_promises(make_spec):
    spec = make_spec(tensorboard=True)
    assert pretrain(spec) is Outcome.FINISHED
    names = {path.name for path in spec.folder.iterdir()}
    assert names == {
        "checkpoint_best.pth",
        "checkpoint_final.pth",
        "config.json",
        "metrics.jsonl",
        "pretraining_cases.json",
        "progress.png",
        "reconstructions",
        "splits.json",
        "tensorboard",
        "timing.jsonl",
        "training_log.txt",
    }
