"""A joint-embedding task that is quick to train and breaks on demand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nnssl_ext.engine.task import Embeddings, PretextTask, PretrainTrainer, StepOutput, TaskInfo
from nnssl_ext.models.backbone import build_encoder
from nnssl_ext.models.standardise import Standardise
from nnssl_ext.planners.rules import StepCost

WIDTH = 6


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """No settings but one."""

    poisoned: tuple[int, ...] = ()
    """Steps whose embeddings and loss are not finite while the learning rate is the recipe's."""


class Pair(PretextTask):
    """Pulls a crop and its mirror image together, by standardised features; a knob counts how often it was turned."""

    Config = PairConfig
    info = TaskInfo(idea="a pair", paper="none", encoders={"cnn"})

    def __init__(self, config, configuration, num_cases):
        super().__init__(config, configuration, num_cases)
        self.encoder = build_encoder(configuration)
        self.standard = Standardise(self.encoder.channels[-1])
        self.project = nn.Linear(self.encoder.channels[-1], WIDTH)
        self.register_buffer("turned", torch.zeros(()))
        self.register_buffer("taken", torch.zeros(()))

    def views(self, batch, random, train):
        return {"image": batch.data}

    def forward(self, views):
        pooled = [self.encoder.pooled(x) for x in (views["image"], views["image"].flip(2))]
        if self.training:
            self.standard.collect(torch.stack(pooled))
        first, second = (self.project(self.standard(each)) for each in pooled)
        if self.training and int(self.taken) in self.config.poisoned:
            first = first * torch.nan
        loss = (first - second).square().mean()
        shown = Embeddings(first=first.detach(), second=second.detach())
        return StepOutput(loss=loss, embeddings=shown)

    def after_step(self, step, total):
        self.taken.fill_(step + 1)
        self.standard.update()

    def respond(self, response):
        self.turned += 1
        return f"turned {response}"


class PairTrainer(PretrainTrainer):
    """Twelve steps."""

    task = Pair
    cost = StepCost(views=2, copies=1, decoder=False)
    num_epochs = 3
    steps_per_epoch = 4
    val_steps_per_epoch = 2
    val_fraction = 0.3
