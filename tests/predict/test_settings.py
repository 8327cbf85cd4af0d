import pytest
import torch

from gnnmd.predict import InferenceSettings


def test_dtype_may_be_a_name_or_a_torch_dtype() -> None:
    assert InferenceSettings(dtype=torch.float64) == InferenceSettings(dtype="float64")
    assert InferenceSettings(dtype="float64").torch_dtype == torch.float64
    assert InferenceSettings().torch_dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "double"}, "'double' is not one of float32, float64"),
        ({"dtype": torch.bfloat16}, "not one of float32, float64"),
        ({"dtype": "float64", "tf32": True}, "drop one of the two"),
        ({"edge_chunk": 0}, "edge_chunk must be at least 1, got 0"),
        ({"max_atoms": 0}, "max_atoms must be at least 1"),
        ({"max_edges": -5}, "max_edges must be at least 1, got -5"),
    ],
)
def test_settings_are_checked_when_they_are_made(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InferenceSettings(**settings)
