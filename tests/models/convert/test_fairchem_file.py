"""Tasks, normalisers and references; numbers of the models are those of tests/golden/fairchem.

Whole files are compared with upstream's predict unit in tests/predict/test_upstream.py.
"""

from typing import Any

import pytest
import torch

from gnnmd.models.convert import fairchem_file
from gnnmd.models.potential import Potential
from tests.models.convert.test_fairchem import batch_of, golden
from tests.models.convert.test_fairchem import build as build_golden
from tests.models.systems import predict

NORMALIZATION = "fairchem.core.modules.normalization."
REFERENCES = [0.0, *(-0.1 * z for z in range(1, 100))]


def task(quantity: str = "energy", datasets: tuple[str, ...] = ("omol",), **changes: Any) -> dict[str, Any]:
    normalizer = {"_target_": NORMALIZATION + "normalizer.Normalizer", "mean": 0.0, "rmsd": 1.5}
    name = f"{datasets[0]}_{quantity}"
    return {
        "name": name,
        "property": quantity,
        "datasets": list(datasets),
        "normalizer": normalizer,
    } | changes


def element_references(values: Any) -> dict[str, Any]:
    return {"_target_": NORMALIZATION + "element_references.ElementReferences", "element_references": values}


def content(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    g = golden(name)
    moe = g.options["moe"]
    kind = "eSCNMDMoeBackbone" if moe else "eSCNMDBackbone"
    heads = {
        head: {"module": cls, **(g.options["head_kwargs"] or {}).get(head, {})}
        for head, cls in g.options["heads"].items()
    }
    model = {"backbone": {"model": kind, **g.backbone, **(moe or {})}, "heads": heads}
    averaged = {f"module.module.{key}": x for key, x in g.state.items()}
    return model | {"model_id": g.options["model_id"]}, averaged | {"n_averaged": torch.tensor(3)}


def build(name: str, tasks: list[dict[str, Any]], dataset: str | None = None, **changes: Any) -> Potential:
    model, averaged = content(name)
    return fairchem_file.build(model | changes, averaged, tasks, dataset)[0].double().eval()


def energy(potential: Potential, name: str = "conserv_layernorm", system: str = "mol_charged") -> float:
    return predict(potential, batch_of(name, [system])).energy.item()


@pytest.mark.parametrize(
    "name",
    ["head_ds_moe", "head_ds_moe_mapping", "dataset_mapping", "head_ds_single", "no_dataset_embedding"],
)
def test_one_data_set_is_the_same_function_and_the_only_one(name):
    whole = build_golden(name)
    for system in golden(name).systems:
        batch = batch_of(name, [system])
        (dataset,) = batch.dataset
        one = build(name, [task(datasets=(dataset,))])
        found, expected = predict(one, batch), predict(whole, batch)
        torch.testing.assert_close(found.energy, 1.5 * expected.energy)
        torch.testing.assert_close(found.forces, 1.5 * expected.forces)
        assert one.datasets == (dataset,)
        with pytest.raises(ValueError, match=f"is not known; the model knows {dataset}"):
            one.dataset_name("spice")


@pytest.mark.parametrize("kind", ["torch.DoubleTensor", "torch.FloatTensor", "tensor"])
def test_references_are_added_after_the_scale(kind):
    values = {"_target_": kind, "_args_": [REFERENCES]}
    if kind == "tensor":
        values = torch.tensor(REFERENCES, dtype=torch.float64)
    plain, shifted = (
        energy(build("conserv_layernorm", [task(element_references=r)]))
        for r in (None, element_references(values))
    )
    numbers = batch_of("conserv_layernorm", ["mol_charged"]).numbers
    rounding = 1e-6 if kind == "torch.FloatTensor" else 1e-12
    assert shifted - plain == pytest.approx(-0.1 * numbers.sum().item(), abs=rounding)


def test_a_task_is_chosen_by_name():
    tasks = [task(), task(datasets=("omat",))]
    with pytest.raises(ValueError, match="predicts for omol, omat; choose one with task="):
        build("head_ds_moe", tasks)
    with pytest.raises(ValueError, match="task 'oc22' is not in the file, which has omol, omat"):
        build("head_ds_moe", tasks, "oc22")
    assert build("head_ds_moe", tasks, "omat").datasets == ("omat",)
    with pytest.raises(ValueError, match="two tasks of omol predict the energy"):
        build("head_ds_moe", [task(), task()])
    with pytest.raises(ValueError, match="task 'spice' has no weights"):
        build("head_ds_moe", [task(datasets=("spice",))])


NORMALIZER = task()["normalizer"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([task(normalizer=NORMALIZER | {"mean": 2.0})], r"omol_energy adds a mean \(2.0\)"),
        ([task(normalizer=NORMALIZER | {"_target_": "a.Log"})], "normalizer of omol_energy .a.Log"),
        ([task(normalizer=NORMALIZER | {"file": "x.pt"})], "'file'"),
        ([task(), task("forces", normalizer=NORMALIZER | {"rmsd": 2.0})], "no derivatives of the energy"),
        ([task(element_references={"_target_": "a.Other"})], "element references of the kind a.Other"),
        ([task(element_references=element_references({"_target_": "numpy.load"}))], "numpy.load"),
        ([task(element_references=element_references(torch.zeros(200)))], r"shape \(200,\)"),
    ],
)
def test_what_would_give_other_numbers_is_refused(tasks, message):
    with pytest.raises(ValueError, match=message):
        build("conserv_layernorm", tasks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"model": "equiformer_v2"}}, "'equiformer_v2' is not supported"),
        ({"finetune_config": {"starting_checkpoint": "a.pt"}}, "finetune_config"),
        ({"model_id": None}, "UMA 1.0"),
    ],
)
def test_another_model_is_refused(changes, message):
    model, _ = content("moe_uma_s_1p2")
    model["backbone"]["model_version"] = 1.0
    with pytest.raises(ValueError, match=message):
        build("moe_uma_s_1p2", [task()], **(model | changes))


def test_the_published_model_is_known_by_its_name():
    """UMA-S-1.2 counts one atom more in the mean composition."""
    name = "moe_uma_s_1p2"
    found = energy(build(name, [task()]), name)
    assert found == pytest.approx(1.5 * energy(build_golden(name), name), abs=1e-12)
    assert abs(found - energy(build(name, [task()], model_id="UMA-M-1.1"), name)) > 1e-6


@pytest.mark.parametrize("quantity", ["forces", "stress"])
def test_direct_heads_have_their_own_scale(quantity):
    name = "direct_l3m2"
    tasks = [task(what, ("omat",)) for what in ("energy", "forces", "stress")]
    batch = batch_of(name, ["ag16_pbc"])
    before = predict(build(name, tasks), batch)
    changed = [
        t | {"normalizer": NORMALIZER | {"rmsd": 6.0}} if t["property"] == quantity else t for t in tasks
    ]
    after = predict(build(name, changed), batch)
    for other in ("energy", "forces", "stress"):
        factor = 4 if other == quantity else 1
        torch.testing.assert_close(getattr(after, other), factor * getattr(before, other))


def test_inference_ignores_always_use_pbc():
    model, _ = content("conserv_layernorm")
    backbone = model["backbone"] | {"always_use_pbc": True, "radius_pbc_version": 1, "use_pbc": True}
    changed = build("conserv_layernorm", [task()], backbone=backbone)
    assert energy(changed) == energy(build("conserv_layernorm", [task()]))
