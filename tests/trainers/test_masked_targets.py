"""The options that masked methods share: blocks in their own units, and no background in the loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nnssl_ext.engine.task import PretextTask, PretrainTrainer
from nnssl_ext.loading.batch import Batch
from nnssl_ext.trainers.mae import MAETrainer
from nnssl_ext.trainers.simmim import SimMIMTrainer
from nnssl_ext.trainers.spark import SparkTrainer
from tests.trainers import masked
from tests.trainers.masked import RANDOM

PATCH = (16, 24, 8)
METHODS: dict[str, tuple[type[PretrainTrainer], str, list[str], tuple[int, ...], int]] = {
    "mae-cnn": (MAETrainer, "cnn", ["block_size=4"], (4, 4, 4), 60),
    "mae-vit": (MAETrainer, "vit", [], (2, 4, 4), 200),
    "simmim": (SimMIMTrainer, "vit", [], (2, 4, 4), 200),
    "spark": (SparkTrainer, "cnn", [], (4, 4, 4), 80),
}
"""Trainer, backbone, settings, the size of blocks, and the steps in which smooth pictures are learned."""


@pytest.fixture(params=METHODS)
def method(request, tiny_plan, tiny_vit_plan):
    """Builds the task with further settings; the size of its blocks, and the steps in which it learns."""
    trainer, backbone, settings, block, steps = METHODS[request.param]

    def build(*further: str, patch: tuple[int, ...] = PATCH) -> PretextTask:
        torch.manual_seed(0)
        plan = {"cnn": tiny_plan, "vit": tiny_vit_plan}[backbone](patch)
        (name,) = plan.configuration_names
        return trainer.configured([*settings, *further], backbone).build_task(plan.configuration(name), 4).eval()

    return build, block, steps


def make_batch() -> tuple[Batch, torch.Tensor]:
    """Two crops with air, which is nearly flat, in their first half along the second axis; and where the air is."""
    data = 2 * torch.randn(2, 1, *PATCH, generator=torch.Generator().manual_seed(0)) + 1
    air = torch.zeros_like(data, dtype=torch.bool)
    air[:, :, :, :12] = True
    data = torch.where(air, 0.01 * data - 3, data)
    valid = torch.ones_like(air)
    valid[1, :, -6:] = False
    spacing = torch.ones(2, 3)
    batch = Batch(
        data * valid, valid, ("a", "b"), RANDOM.samples, torch.zeros_like(spacing, dtype=torch.int64), spacing
    )
    return batch, air


def asked_voxels(task: PretextTask, views: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where the target has a say in the loss."""
    target = views["target"].clone().requires_grad_()
    task({**views, "target": target}).loss.backward()
    return target.grad != 0


def test_background_is_seen_and_not_asked_for(method):
    """And no more is read than a patch. Catches air in the loss, and larger crops that are cut down in the end."""
    build, *_ = method
    batch, air = make_batch()
    task = build("target.background_std=0.05")
    assert task.parent_scale == 1
    views = task.views(batch, RANDOM, train=False)
    assert torch.equal(asked_voxels(task, views), views["hidden"] & batch.valid & ~air)
    assert torch.equal(views["image"], batch.data)
    assert (~views["hidden"] & air).any()
    asked = (views["hidden"] & batch.valid & ~air).sum() / (views["hidden"] & batch.valid).sum()
    assert task(views).metrics["asked_share"] == asked
    default = build().views(batch, RANDOM, train=False)
    assert torch.equal(asked_voxels(build(), default), default["hidden"] & batch.valid)
    assert "asked_share" not in build()(default).metrics


def test_targets_are_in_units_of_their_block(method):
    """Each block has mean 0 and, but for the flat air, variance 1; chance is then that variance."""
    build, block, _ = method
    batch, _ = make_batch()
    task = build("target.normalize=true", "target.background_std=0.05")
    views = task.views(batch, RANDOM, train=False)
    blocks = views["target"][0, 0]
    for axis, edge in enumerate(block):
        blocks = blocks.unfold(axis, edge, edge)
    torch.testing.assert_close(blocks.mean((3, 4, 5)), torch.zeros(blocks.shape[:3]), rtol=0, atol=1e-3)
    tissue = blocks[:, 12 // block[1] :].square().mean((3, 4, 5))
    torch.testing.assert_close(tissue, torch.ones_like(tissue), rtol=1e-3, atol=1e-3)
    output = task(views)
    assert output.metrics["mse_chance"].item() == pytest.approx(1, abs=0.1)
    assert torch.equal(output.images["target"], views["target"])
    assert torch.equal(output.images["input"], batch.data)


def test_it_learns_structure_beyond_chance(method):
    """Smooth pictures can be restored from what is visible: the error falls below that of the visible mean."""
    build, _, steps = method
    task = build("mask_ratio=0.5", patch=(24, 16)).train()
    wave = torch.sin(torch.arange(24)[:, None] / 3 + torch.arange(16) / 4)
    batch = masked.make_batch((24, 16))
    batch = replace(batch, data=torch.stack([wave, -wave])[:, None], valid=torch.ones_like(batch.valid))
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    for step in range(steps):
        output = task(task.views(batch, replace(RANDOM, step=step), train=False))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.metrics["mse"] < 0.5 * output.metrics["mse_chance"]
