"""What users type: presets, keys, values, and how mistakes are refused."""

import dataclasses
from dataclasses import replace
from typing import get_args

import pytest

from gnnmd.config import (
    ConfigError,
    config_dir,
    describe,
    groups,
    load_config,
    load_values,
    schema_keys,
    sweep,
    to_yaml,
)
from gnnmd.md.settings import MDConfig
from gnnmd.models.escn_md import ExpertsConfig
from gnnmd.training.settings import TrainConfig


def presets():
    return [(group, name) for group, names in groups().items() for name in names]


def test_without_arguments_the_default_model_trains_on_silver():
    config = load_config()
    assert type(config) is TrainConfig
    assert config.data.train == "silver"
    assert config.heads == "conservative"


@pytest.mark.parametrize(("group", "name"), presets())
def test_every_preset_fits_the_schema(group, name):
    load_config([f"{group}={name}", "data.train=frames.xyz"])


def test_presets_cover_the_models_and_data_formats_of_the_readme():
    assert {"escn_md", "esen", "uma_s", "uma_m"} <= set(groups()["model"])
    assert {"silver", "extxyz", "deepmd", "ase_db"} <= set(groups()["data"])
    assert {"silver_fast", "silver_accurate", "debug", "water"} <= set(groups()["experiment"])


def test_published_shapes():
    small, medium = load_config(["model=uma_s"]).model, load_config(["model=uma_m"]).model
    assert (small.lmax, small.mmax, small.num_layers, small.channels, small.num_basis) == (2, 2, 4, 128, 64)
    assert (medium.lmax, medium.mmax, medium.num_layers, medium.channels, medium.num_basis) == (
        4,
        2,
        10,
        128,
        128,
    )
    assert small.experts.count == medium.experts.count == 32


def test_values_override_presets_wherever_they_stand():
    config = load_config(["model.channels=32", "model=uma_s", "experiment=debug", "trainer.max_epochs=7"])
    assert config.model.channels == 32
    assert config.trainer.max_epochs == 7
    assert config.name == "debug"


def test_a_preset_on_the_command_line_beats_that_of_an_experiment():
    assert load_config(["experiment=water", "data=silver"]).data.train == "silver"


def test_values_get_the_types_of_the_schema():
    config = load_config(
        [
            "optim.lr=1",
            "data.train=[a.xyz,b.xyz]",
            "data.type_map=[O,H]",
            "model.charge_balanced_channels=[0,1]",
            "data.dataset=",
            "trainer.early_stop=null",
        ]
    )
    assert isinstance(config.optim.lr, float)
    assert config.data.train == ["a.xyz", "b.xyz"]
    assert config.data.type_map == ["O", "H"]
    assert config.model.charge_balanced_channels == (0, 1)
    assert config.trainer.early_stop is None


@pytest.mark.parametrize("path", ["a b.xyz", "runs/*/x.xyz@:100", "x=y.xyz", "~/frames(1).xyz"])
def test_paths_with_odd_characters_need_no_second_quoting(path):
    assert load_config([f"data.train={path}"]).data.train == path


def test_an_optional_section_is_switched_on_by_any_of_its_keys():
    assert load_config().model.experts is None
    assert load_config(["model.experts.count=3"]).model.experts == ExpertsConfig(count=3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trainer.max_epoch=3"], ["'trainer.max_epoch'", "did you mean 'trainer.max_epochs'"]),
        (["max_epochs=3"], ["did you mean 'trainer.max_epochs'"]),
        (["loss.energy={weigth: 3}"], ["'loss.energy.weigth'", "'loss.energy.weight'"]),
        (["modle=uma_s"], ["did you mean 'model'"]),
        (["model=umas"], ["model=umas", "did you mean 'uma_s'", "escn_md"]),
        (["trainer.max_epochs=many"], ["trainer.max_epochs=many", "Integer"]),
        (["trainer.max_epochs=1.5"], ["trainer.max_epochs=1.5", "Integer"]),
        (["model.lmax=null"], ["model.lmax=null"]),
        (["model.charge_balanced_channels=[1,x]"], ["model.charge_balanced_channels", "Integer"]),
        (["trainer.precision=float46"], ["trainer.precision=float46", "did you mean 'float64'"]),
        (["heads=both"], ["heads=both", "conservative, direct"]),
        (["optim=5"], ["optim=5", "adamw"]),
        (["loss.energy=5"], ["loss.energy", "huber_width"]),
        (["optim.schedule.warmup=2"], ["optim.schedule", "warmup"]),
        (["optim.lr=-1"], ["optim:", "lr must be positive"]),
        (["model.mmax=5"], ["model:", "mmax=5"]),
        (["trainer.max_time=5min"], ["trainer:", "hours:minutes:seconds"]),
        (["+model.width=3"], ["cannot be added"]),
        (["~model"], ["'~model'"]),
        (["trainer.max_epochs=1,2"], ["several values", "add -m"]),
        (["launch=slrum"], ["launch=slrum", "did you mean 'slurm'"]),
        (["launch.warn=3"], ["launch:", "warn=3"]),
        (["data.train=[a,"], ["data.train=[a,"]),
        (["hello"], ["'hello'", "key=value"]),
        (["data=extxyz"], ["data.train"]),
        (["nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["resume=a", "init_from=b"], ["one of the two"]),
    ],
)
def test_mistakes_are_refused_in_one_line_that_says_what_to_change(arguments, words):
    with pytest.raises(ConfigError) as refusal:
        load_config(arguments)
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_file_is_checked_like_arguments_and_lies_between_presets_and_values(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("trainer: {max_epochs: 4, device: cpu}\nmodel: {experts: {count: 5}}\n")
    config = load_config([str(file), "trainer.max_epochs=9", "model=esen"])
    assert (config.trainer.max_epochs, config.trainer.device) == (9, "cpu")
    assert (config.model.experts.count, config.model.num_layers) == (5, 4)
    file.write_text("trainer: {max_epoch: 4}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: unknown key 'trainer\.max_epoch', did you mean"):
        load_config([str(file)])
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: expected keys"):
        load_config([str(file)])


def test_resume_alone_takes_the_configuration_of_that_run(tmp_path):
    (tmp_path / "config.yaml").write_text("name: old\nmodel: {channels: 6, experts: null}\n")
    config = load_config([f"resume={tmp_path}", "trainer.max_epochs=99"])
    assert (config.name, config.model.channels, config.trainer.max_epochs) == ("old", 6, 99)
    # the full command of a job that is started again
    assert load_config(["model=escn_md", f"resume={tmp_path}"]).name != "old"


def _is_section(key):
    return any(dataclasses.is_dataclass(t) for t in (key.type, *get_args(key.type)))


def test_dynamics_are_read_with_the_same_rules():
    config = load_values(MDConfig, ["model=best.safetensors", "repeat=[2,2,3]", "ensemble=nvt", "steps=50"])
    assert config == MDConfig(model="best.safetensors", repeat=(2, 2, 3), ensemble="nvt", steps=50)
    with pytest.raises(ConfigError, match="unknown key 'step', did you mean 'steps'"):
        load_values(MDConfig, ["step=3"])
    with pytest.raises(ConfigError, match="ensemble=npx: not one of nve, nvt"):
        load_values(MDConfig, ["ensemble=npx"])


def test_help_names_every_key_with_a_meaning():
    text = describe()
    for name, key in schema_keys().items():
        if not _is_section(key):
            assert f"  {name}=" in text
    assert [name for name, key in schema_keys().items() if not _is_section(key) and not key.meaning] == []


def test_presets_are_found_in_a_checkout():
    assert (config_dir() / "train.yaml").is_file()


def test_a_model_preset_brings_its_own_keys():
    config = load_config(["model=dpa3_l3", "model.exclude_types=[[O,H]]", "model.fitting_net.neuron=[24]"])
    assert type(config) is TrainConfig
    assert (config.model.type, config.model.nlayers, config.model.n_dim) == ("dpa3", 3, 128)
    assert config.model.exclude_types == (("O", "H"),)
    assert config.model.fitting_net.neuron == (24,)
    assert config.model.fitting_net.activation_function == "silut:10"  # the model's default, not the net's
    with pytest.raises(ConfigError, match=r"unknown key 'model\.lmax'"):
        load_config(["model=dpa3", "model.lmax=2"])
    with pytest.raises(ConfigError, match=r"unknown key 'model\.nlayer', did you mean 'model\.nlayers'"):
        load_config(["model=dpa3", "model.nlayer=2"])


def test_the_type_of_a_model_chooses_its_preset(tmp_path):
    assert load_config(["model.type=dpa2", "model.repformer.nlayers=2"]).model.repformer.nlayers == 2
    file = tmp_path / "config.yaml"
    file.write_text("model: {type: dpa3, nlayers: 5}")
    assert load_config([str(file)]).model.nlayers == 5
    with pytest.raises(ConfigError, match="not one of escn_md, dpa3, dpa2"):
        load_config(["model.type=dpa4"])
    with pytest.raises(ConfigError, match="leave one of them out"):
        load_config(["model=uma_s", "model.type=dpa3"])


def test_presets_that_do_not_fit_together_are_named():
    with pytest.raises(ConfigError, match=r"experiment=debug, model=dpa3: .*lmax"):
        load_config(["experiment=debug", "model=dpa3"])


def test_help_shows_the_keys_of_the_chosen_model():
    assert "model.repformer.nlayers=12" in describe(["model=dpa2_large"])
    assert "model.lmax" not in describe(["model=dpa2_large"])


def test_a_sweep_is_all_combinations_of_what_is_listed():
    assert sweep(
        ["data=silver", "optim.lr=1e-3,1e-4", "seed=range(0,2)", "mine.yaml", "data.train=[a,b]"]
    ) == [
        ["data=silver", f"optim.lr={lr}", f"seed={seed}", "mine.yaml", "data.train=[a,b]"]
        for lr in ("0.001", "0.0001")
        for seed in ("0", "1")
    ]
    with pytest.raises(ConfigError, match="a sweep needs a list of values, such as key=a,b,c"):
        sweep(["optim.lr=interval(0,1)"])


@pytest.mark.parametrize(
    "arguments", [[], ["model=dpa3", "launch=slurm"], ["model=uma_s", "launch.setup=[a b,c]"]]
)
def test_a_written_configuration_is_read_back(arguments, tmp_path):
    config = load_config(arguments)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config([str(tmp_path / "config.yaml")]) == config


def test_an_earlier_run_can_be_started_elsewhere(tmp_path):
    config = load_config(["model=dpa3", "launch=slurm", "launch.nodes=2", "launch.partition=gpu"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    for source in (f"resume={tmp_path}", f"{tmp_path}/config.yaml"):
        again = load_config([source, "launch=local"])
        assert (again.model, again.launch.kind) == (config.model, "local")
    again = load_config([f"resume={tmp_path}", "launch.nodes=4"])
    assert again.launch == replace(config.launch, nodes=4)


def test_other_commands_have_the_presets_of_their_sections(tmp_path):
    config = load_values(MDConfig, ["launch=slurm", "launch.nodes=2", "repeat=[2,2,2]"])
    assert (config.launch.kind, config.launch.nodes, config.launch.gpus_per_node) == ("slurm", 2, 1)
    (tmp_path / "md.yaml").write_text(to_yaml(config))
    assert load_values(MDConfig, [str(tmp_path / "md.yaml")]) == config
    again = load_values(MDConfig, ["launch=local", str(tmp_path / "md.yaml")])
    assert again == replace(config, launch=replace(config.launch, kind="local", nodes=1))
    with pytest.raises(ConfigError, match="launch=slrum: no such preset, did you mean 'slurm'"):
        load_values(MDConfig, ["launch=slrum"])
    with pytest.raises(ConfigError, match="unknown key 'model.lmax'"):
        load_values(MDConfig, ["model.lmax=2"])


def test_dpa_models_bring_their_loss_and_optimiser_unless_others_are_chosen():
    data = ["data=deepmd", "data.train=x", "data.val=y"]
    for model in ("dpa2", "dpa3", "dpa3_l16"):
        config = load_config([f"model={model}", *data])
        assert config.loss.ramp.shape == "learning_rate"
        assert config.optim.schedule.kind == "exponential"
    chosen = load_config(["model=dpa3", "loss=l2mae", "optim.lr=0.1", *data])
    assert chosen.loss == load_config(["loss=l2mae", *data]).loss
    assert (chosen.optim.lr, chosen.optim.schedule.kind) == (0.1, "exponential")
    assert load_config(["model=escn_md", *data]).loss == load_config(data).loss
