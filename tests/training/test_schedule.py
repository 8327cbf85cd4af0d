import numpy as np
import pytest

from gnnmd.training.losses import LossConfig
from gnnmd.training.schedule import RampConfig, ScheduleConfig, learning_rate_factor, ramp


@pytest.mark.parametrize("kind", ["cosine", "exponential"])
def test_learning_rate_warms_up_to_one_and_falls_to_its_final_factor(kind):
    config = ScheduleConfig(kind=kind, warmup=0.1, final=0.02)
    progress = np.linspace(0, 1, 201)
    factors = np.array([learning_rate_factor(config, p) for p in progress])
    assert factors[0] == 0.01
    assert factors[10] == pytest.approx(0.5)
    assert factors[20] == pytest.approx(1.0)
    assert factors.max() == pytest.approx(1.0)
    assert (np.diff(factors[20:]) < 0).all()
    assert factors[-1] == pytest.approx(0.02)
    assert learning_rate_factor(config, 1.7) == pytest.approx(0.02)


def test_halfway_down_a_cosine_is_the_mean_and_down_an_exponential_the_geometric_mean():
    assert learning_rate_factor(ScheduleConfig(warmup=0.0, final=0.04), 0.5) == pytest.approx(0.52)
    assert learning_rate_factor(ScheduleConfig("exponential", 0.0, 0.04), 0.5) == pytest.approx(0.2)
    assert learning_rate_factor(ScheduleConfig("constant", 0.0), 0.5) == 1.0


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 5.5), ("cosine", 5.5), ("exponential", np.sqrt(10))]
)
def test_ramp_is_flat_outside_its_ends(shape, middle):
    config = RampConfig(shape, start=0.2, end=0.6)
    values = [ramp(config, 1.0, 10.0, p, 0.3) for p in (0.0, 0.2, 0.4, 0.6, 1.0)]
    np.testing.assert_allclose(values, [1, 1, middle, 10, 10])


def test_a_ramp_may_follow_the_learning_rate():
    """DeePMD's prefactors: limit + (start - limit) lr / lr_0."""
    rates = ScheduleConfig("exponential", warmup=0.0, final=0.01)
    weights = [
        ramp(RampConfig("learning_rate"), 100.0, 60.0, p, learning_rate_factor(rates, p))
        for p in (0.0, 0.5, 1.0)
    ]
    np.testing.assert_allclose(weights, [100.0, 64.0, 60.4])


def test_weights_of_the_loss_move_only_where_a_final_weight_is_given():
    config = LossConfig(ramp=RampConfig("linear"))
    config.energy.weight, config.energy.final_weight = 1.0, 3.0
    config.forces.weight, config.stress.weight = 7.0, 0.0
    assert config.weights(0.5) == {"energy": 2.0, "forces": 7.0}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RampConfig(start=0.5, end=0.5), "start < end"),
        (lambda: ScheduleConfig(warmup=1.0), "warmup"),
        (lambda: ScheduleConfig(final=0.0), "final"),
        (lambda: ramp(RampConfig("exponential"), 0.0, 1.0, 0.5, 1.0), "use cosine"),
    ],
)
def test_impossible_curves_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
