"""Parameter groups and optimisers."""

import pytest
import torch
from torch import nn

from nnssl_ext.engine.optim import (
    OptimConfig,
    build_optimizer,
    parameter_groups,
    set_learning_rate,
    set_weight_decay,
    size_factor,
    weight_decay_at,
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 2)
        self.head = nn.Linear(2, 1)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_vectors_are_spared_decay_only_when_asked() -> None:
    model = Small()
    everything = parameter_groups(model.named_parameters(), OptimConfig())
    assert {group["role"]: group["weight_decay"] for group in everything} == {"encoder": 3e-5, "rest": 3e-5}
    spared = parameter_groups(model.named_parameters(), OptimConfig(decay_vectors=False))
    decay_by_dims = {(p.ndim, group["weight_decay"]) for group in spared for p in group["params"]}
    assert decay_by_dims == {(1, 0.0), (2, 3e-5)}


def test_frozen_parameters_are_left_out_and_none_is_lost() -> None:
    model = Small()
    grouped = [p for group in parameter_groups(model.named_parameters(), OptimConfig()) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == 4


def test_learning_rate_is_peak_times_role_factor_times_scale() -> None:
    config = OptimConfig(lr=0.5)
    groups = parameter_groups(Small().named_parameters(), config, lambda name: 0.2 if "weight" in name else 1.0)
    optimizer = build_optimizer(groups, config)
    largest = set_learning_rate(optimizer, 0.5, lambda role: 0.5 if role == "encoder" else 1.0)
    rates = {(group["role"], group["lr_scale"]): group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx(
        {("encoder", 0.2): 0.05, ("encoder", 1.0): 0.25, ("rest", 0.2): 0.1, ("rest", 1.0): 0.5}
    )
    assert largest == 0.5


def test_weight_decay_rises_by_half_a_cosine_where_something_decays() -> None:
    """Fails if vectors that were spared come to decay, or if a constant one moves."""
    config = OptimConfig(weight_decay=0.04, final_weight_decay=0.2, decay_vectors=False)
    assert [weight_decay_at(config, share) for share in (0, 0.5, 1)] == pytest.approx([0.04, 0.12, 0.2])
    assert weight_decay_at(OptimConfig(weight_decay=0.04), 0.5) == 0.04
    optimizer = build_optimizer(parameter_groups(Small().named_parameters(), config), config)
    set_weight_decay(optimizer, 0.1)
    assert {(p.ndim, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]} == {
        (1, 0.0),
        (2, 0.1),
    }


def test_small_networks_learn_faster_by_the_root_of_their_size() -> None:
    config = OptimConfig(lr_size=30e6)
    sizes = (30_000_000, 120_000_000, 1_200_000, 5_000)
    assert [size_factor(config, size) for size in sizes] == pytest.approx([1, 0.5, 5, 10])
    assert size_factor(OptimConfig(), 5) == 1
    with pytest.raises(ValueError, match=r"optim.lr_size=0"):
        OptimConfig(lr_size=0)


def test_one_step_of_nesterov_is_the_formula() -> None:
    """With gradient g and momentum m the first Nesterov step moves by lr (1 + m) g."""
    config = OptimConfig(lr=0.1, momentum=0.5, weight_decay=0.0)
    weight = nn.Parameter(torch.tensor([[1.0]]))
    optimizer = build_optimizer(parameter_groups([("weight", weight)], config), config)
    weight.grad = torch.tensor([[2.0]])
    optimizer.step()
    assert weight.item() == pytest.approx(1.0 - 0.1 * 1.5 * 2.0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_fused_optimiser_takes_the_steps_of_the_plain_one(name: str) -> None:
    """Five steps with every setting at work; SGD's are bitwise the same."""
    config = OptimConfig(name=name, lr=1e-2, weight_decay=0.1, momentum=0.9, betas=(0.8, 0.9))
    plain_class, settings = {
        "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.9)}),
    }[name]
    start = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    fused = build_optimizer(parameter_groups([("weight", ours)], config), config)
    plain = plain_class([theirs], lr=1e-2, weight_decay=0.1, fused=False, foreach=False, **settings)
    for step in range(5):
        ours.grad = theirs.grad = torch.randn(40, 30, generator=torch.Generator().manual_seed(step + 1))
        fused.step()
        plain.step()
    states = (fused.state[ours], plain.state[theirs])
    assert states[0].keys() == states[1].keys()
    tolerance = 0.0 if name == "sgd" else 1e-6
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    torch.testing.assert_close(*states, atol=tolerance, rtol=0)
    assert not torch.equal(ours, start)


def test_adamw_gets_its_betas() -> None:
    config = OptimConfig(name="adamw", betas=(0.8, 0.95), weight_decay=0.05)
    optimizer = build_optimizer(parameter_groups(Small().named_parameters(), config), config)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["betas"] == (0.8, 0.95) and group["weight_decay"] == 0.05 for group in optimizer.param_groups)


def test_a_task_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups([], OptimConfig())


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "lamb"), ("lr", 0.0), ("weight_decay", -1.0), ("momentum", 1.0), ("betas", (0.9, 1.0)), ("clip", -1.0)],
)
def test_a_bad_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        OptimConfig(**{field: value})
