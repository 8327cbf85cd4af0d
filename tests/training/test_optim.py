import copy

import pytest
import torch
from torch import nn

from gnnmd.training.optim import OptimConfig, build_optimizer, parameter_groups, update_average


class ScaleNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.affine_weight = nn.Parameter(torch.ones(3, 4))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), ScaleNorm(), nn.LayerNorm(4), nn.Linear(4, 1))


def test_only_weight_matrices_decay():
    net = network()
    decaying, fixed = parameter_groups(net, OptimConfig(weight_decay=0.3))
    assert [p.shape for p in decaying["params"]] == [(4, 4), (1, 4)]
    assert decaying["weight_decay"] == 0.3
    assert fixed["weight_decay"] == 0
    assert len(decaying["params"]) + len(fixed["params"]) == len(list(net.parameters()))
    with_tables, _ = parameter_groups(net, OptimConfig(decay_embeddings=True))
    assert (5, 4) in [p.shape for p in with_tables["params"]]


def test_decay_without_gradient_shrinks_matrices_and_nothing_else():
    net = network()
    before = copy.deepcopy(net)
    optimizer, _ = build_optimizer(net, OptimConfig(lr=0.1, weight_decay=0.5), total_steps=1)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    changed = [
        not torch.equal(new, old) for new, old in zip(net.parameters(), before.parameters(), strict=True)
    ]
    assert [name for (name, _), c in zip(net.named_parameters(), changed, strict=True) if c] == [
        "1.weight",
        "4.weight",
    ]


def test_shared_and_frozen_parameters_are_listed_once_or_not_at_all():
    net = network()
    net[4].weight = net[1].weight  # tied
    net[0].weight.requires_grad_(False)
    listed = [p for group in parameter_groups(net, OptimConfig()) for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == 6


def test_learning_rate_follows_the_schedule_step_by_step():
    net = network()
    optimizer, schedule = build_optimizer(net, OptimConfig(lr=0.2), total_steps=50)
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.002)


def test_average_is_the_weighted_sum_of_past_weights():
    current, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    average.weight.data.zero_()
    expected = 0.0
    for step, weight in enumerate([1.0, 5.0, -2.0]):
        current.weight.data.fill_(weight)
        update_average(average, current, decay=0.5, step=100 + step)
        expected = 0.5 * expected + 0.5 * weight
    assert average.weight.item() == pytest.approx(expected)


def test_average_forgets_the_random_start_quickly():
    current, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    current.weight.data.fill_(1.0)
    average.weight.data.fill_(1000.0)
    for step in range(200):
        update_average(average, current, decay=0.999, step=step)
    assert abs(average.weight.item() - 1) < 1e-3  # 0.999^200 would leave 818


def test_average_copies_buffers():
    current, average = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    current.running_mean.fill_(3.0)
    update_average(average, current, decay=0.9, step=0)
    assert average.running_mean.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"beta2": 1.0}, {"ema_decay": -0.1}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimConfig(**bad)
