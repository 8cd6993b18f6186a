import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from protoseg.config import Optim, UserError
from protoseg.engine.optim import build_optimizer, build_schedule, learning_rate, parameter_groups


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.backbone.pos_embed = nn.Parameter(torch.zeros(1, 4, 4))
        self.decoder = nn.Conv2d(4, 4, 1, bias=False)
        self.head = nn.Module()
        self.head.log_scale = nn.Parameter(torch.tensor(1.0))
        self.head.register_buffer("prototypes", torch.zeros(2, 3, 4))


def named(groups):
    return {group["name"]: group for group in groups}


def test_every_parameter_is_in_exactly_one_group_and_prototypes_in_none():
    net = Net()
    members = [p for group in parameter_groups(net, Optim()) for p in group["params"]]
    assert sorted(map(id, members)) == sorted(map(id, net.parameters()))
    assert id(net.head.prototypes) not in set(map(id, members))


def test_norms_biases_position_embeddings_and_the_scale_are_not_decayed():
    net = Net()
    groups = named(parameter_groups(net, Optim(weight_decay=0.1)))
    assert [p.shape for p in groups["backbone"]["params"]] == [net.backbone[0].weight.shape]
    assert groups["backbone"]["weight_decay"] == 0.1
    spared = set(map(id, groups["backbone_no_decay"]["params"]))
    assert spared == {
        id(p) for p in (net.backbone.pos_embed, net.backbone[0].bias, net.backbone[1].weight, net.backbone[1].bias)
    }
    assert groups["backbone_no_decay"]["weight_decay"] == 0.0
    assert list(map(id, groups["head_no_decay"]["params"])) == [id(net.head.log_scale)]


def test_decay_norm_decays_everything():
    groups = parameter_groups(Net(), Optim(decay_norm=True, weight_decay=0.1))
    assert [group["name"] for group in groups] == ["backbone", "head"]
    assert all(group["weight_decay"] == 0.1 for group in groups)


def test_head_lr_multiplies_decoder_and_head_only():
    groups = named(parameter_groups(Net(), Optim(lr=0.01, head_lr=10.0)))
    assert groups["backbone"]["lr"] == 0.01
    assert groups["backbone_no_decay"]["lr"] == 0.01
    assert groups["head"]["lr"] == pytest.approx(0.1)
    assert groups["head_no_decay"]["lr"] == pytest.approx(0.1)


def test_frozen_parameters_are_left_out():
    net = Net()
    net.backbone.requires_grad_(False)
    assert set(named(parameter_groups(net, Optim()))) == {"head", "head_no_decay"}


@pytest.mark.parametrize("step", [0, 1, 17, 99])
def test_poly_is_the_formula_of_mmsegmentation(step):
    optim = Optim(lr=0.01, min_lr=1e-4, schedule="poly", power=0.9)
    expected = (0.01 - 1e-4) * (1 - step / 100) ** 0.9 + 1e-4
    assert learning_rate(step, optim, 100, 0.01) == pytest.approx(expected, rel=1e-12)


def test_cosine_falls_from_peak_to_min():
    optim = Optim(lr=0.01, min_lr=1e-4, schedule="cosine")
    assert learning_rate(0, optim, 100, 0.01) == pytest.approx(0.01)
    assert learning_rate(50, optim, 100, 0.01) == pytest.approx((0.01 + 1e-4) / 2)
    assert learning_rate(100, optim, 100, 0.01) == pytest.approx(1e-4)


def test_constant_stays():
    optim = Optim(lr=0.01, min_lr=1e-4, schedule="constant")
    assert {learning_rate(step, optim, 100, 0.01) for step in (0, 50, 99)} == {0.01}


def test_warmup_rises_linearly_on_top_of_the_schedule():
    optim = Optim(lr=6e-5, schedule="poly", power=1.0, warmup_steps=1500, warmup_ratio=1e-6)
    for step in (0, 1, 700, 1499):
        ramp = 1 - (1 - step / 1500) * (1 - 1e-6)
        assert learning_rate(step, optim, 160_000, 6e-5) == pytest.approx(6e-5 * (1 - step / 160_000) * ramp, rel=1e-9)
    assert learning_rate(1500, optim, 160_000, 6e-5) == pytest.approx(6e-5 * (1 - 1500 / 160_000), rel=1e-12)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_scheduler_gives_each_group_its_own_rate(name):
    net = Net()
    optim = Optim(name=name, lr=0.01, head_lr=10, min_lr=1e-3, warmup_steps=3)
    optimizer = build_optimizer(net, optim)
    schedule = build_schedule(optimizer, optim, 10)
    for step in range(12):
        for group in optimizer.param_groups:
            peak = 0.01 if group["name"].startswith("backbone") else 0.1
            assert group["lr"] == pytest.approx(learning_rate(step, optim, 10, peak), rel=1e-9)
        optimizer.step()
        schedule.step()
    assert math.isclose(optimizer.param_groups[0]["lr"], 1e-3)


def test_sgd_momentum_and_adamw_betas_arrive():
    assert build_optimizer(Net(), Optim(name="sgd", momentum=0.8)).param_groups[0]["momentum"] == 0.8
    assert build_optimizer(Net(), Optim(betas=(0.8, 0.95))).param_groups[0]["betas"] == (0.8, 0.95)


@pytest.mark.parametrize(
    "change", [{"lr": -1.0}, {"lr": math.nan}, {"warmup_steps": -1}, {"min_lr": 1.0}, {"clip": -0.1}], ids=str
)
def test_impossible_numbers_are_refused_by_name(change):
    with pytest.raises(UserError, match=f"optim.{next(iter(change))}"):
        build_optimizer(Net(), replace(Optim(), **change))
