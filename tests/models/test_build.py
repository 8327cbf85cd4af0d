import json

import pytest
import torch

from gnnmd.models.build import PotentialConfig, build_potential, from_dict, to_dict
from gnnmd.models.escn_md import EscnMDConfig, ExpertsConfig
from gnnmd.models.potential import MergedFor
from tests.models.test_escn_md import SMALL

CONFIGS = [
    PotentialConfig(),
    PotentialConfig(heads="direct", elements=(47, 29)),
    PotentialConfig(energy_head="linear", stress_head=True),
    PotentialConfig(
        model=EscnMDConfig(
            **SMALL,
            experts=ExpertsConfig(layers=(0,), where="all"),
            charge_balanced_channels=(1, 2),
        ),
        datasets=("a", "b"),
        dataset_mapping={"b": "a"},
        dataset_heads="experts",
    ),
    PotentialConfig(merged_for=MergedFor("reduced", (1, 8), (2, 1), 0, 1, "")),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_configuration_survives_json(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("config", CONFIGS)
def test_same_seed_same_weights(config):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_potential(config).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert all(
        v.dtype == torch.float32 for k, v in states[0].items() if "element" not in k and "scale" not in k
    )


def test_lists_of_a_configuration_file_are_accepted():
    config = PotentialConfig(datasets=["a"], elements=[47], model=EscnMDConfig(charge_balanced_channels=[1]))
    assert (config.datasets, config.elements) == (("a",), (47,))
    assert config.model.charge_balanced_channels == (1,)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"head": "direct"}, "PotentialConfig has no head; it has model, heads"),
        ({"model": {"chanels": 4}}, "EscnMDConfig has no chanels; it has type, r_cut"),
        ({"model": {"experts": {"number": 4}}}, "ExpertsConfig has no number"),
        ({"heads": "both"}, "heads='both' is not known; use one of conservative, direct"),
        ({"datasets": ["a", "a"]}, "must differ"),
        ({"datasets": ["a"], "dataset_mapping": {"a": "b"}}, r"dataset_mapping names \['b'\]"),
        ({"dataset_heads": "experts"}, "needs the names"),
        ({"heads": "direct", "model": {"lmax": 0, "mmax": 0}}, "direct forces need lmax >= 1"),
        ({"stress_head": True, "model": {"lmax": 1, "mmax": 1}}, "stress head needs lmax >= 2"),
    ],
)
def test_a_wrong_configuration_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        from_dict(data)


def test_direct_models_of_degree_one_have_no_stress_head():
    assert (
        "stress"
        not in build_potential(PotentialConfig(model=EscnMDConfig(lmax=1, mmax=1), heads="direct")).heads
    )
