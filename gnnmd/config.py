"""From presets, files and ``key=value`` arguments to a checked `TrainConfig`; the only file that knows Hydra.

Presets are Hydra's YAML files under ``configs/``, their schema is the dataclasses that sit beside each
subject. A key that is not in the schema and a value of the wrong type are refused in one line, with the
nearest valid key.
"""

import dataclasses
import difflib
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gnnmd.models.build import MODELS
from gnnmd.training.settings import TrainConfig

#: Presets that belong to a model unless others are chosen.
_USUAL = {MODELS[name]: {"loss": "deepmd", "optim": "deepmd"} for name in ("dpa2", "dpa3")}

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line that says what to change."""


@dataclass(frozen=True)
class Value:
    """A value that someone set.

    Attributes:
        key: dotted.
        value: parsed, not checked yet.
        where: beginning of messages about it: the file it comes from, "" for an argument.
    """

    key: str
    value: Any
    where: str = ""

    def __str__(self) -> str:
        return f"{self.where}{self.key}={'null' if self.value is None else self.value}"


@dataclass(frozen=True)
class Key:
    """A key of the schema.

    Attributes:
        type: its annotation.
        default: None where it is a section.
        meaning: the text of the dataclass's docstring.
    """

    type: Any
    default: Any
    meaning: str


def config_dir() -> Path:
    """Return the folder with the presets: inside an installed package, or at the top of a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def groups() -> dict[str, list[str]]:
    """Return the names of the presets by group (``model`` -> ["escn_md", ...])."""
    folders = sorted(folder for folder in config_dir().iterdir() if folder.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


@cache
def schema_keys(cls: type = TrainConfig, prefix: str = "") -> dict[str, Key]:
    """Return every key of a dataclass and its sections, dotted, in the order of the source."""
    keys: dict[str, Key] = {}
    hints = typing.get_type_hints(cls)
    meanings = _attribute_docs(cls)
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, hints[field.name]
        if section := _section(hint):
            keys[name] = Key(hint, None, meanings.get(field.name, ""))
            keys |= schema_keys(section, f"{name}.")
        else:
            keys[name] = Key(hint, _default(field), meanings.get(field.name, ""))
    return keys


def describe(arguments: Sequence[str] = ()) -> str:
    """Return all presets, and all keys with their values in a run with ``arguments`` and their meanings."""
    lines = ["Presets (group=preset):"]
    lines += [f"  {group:12}{', '.join(names)}" for group, names in groups().items()]
    return "\n".join([*lines, "", describe_keys(load_config(arguments), " ".join(arguments))])


def describe_keys(config: Any, arguments: str = "") -> str:
    """Return all keys of a configuration with its values and their meanings."""
    run = f"with {arguments}" if arguments else "without arguments"
    lines = [f"Keys (key=value), with their values in a run {run}:"]
    cls: Any = type(config)
    if isinstance(config, TrainConfig):
        cls = train_class(type(config.model))  # type: ignore[arg-type]
    for name, key in schema_keys(cls).items():
        if _section(key.type):
            lines.append("")
            continue
        parent, _, last = name.rpartition(".")
        section = attrgetter(parent)(config) if parent else config
        value = getattr(section, last, key.default)  # the default of a key in an optional section that is off
        options = f" ({' | '.join(map(str, typing.get_args(key.type)))})" if _is_choice(key.type) else ""
        lines.append(f"  {name}={'null' if value is None else value}{options}")
        lines += textwrap.wrap(key.meaning, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def load_config(arguments: Sequence[str] = ()) -> TrainConfig:
    """Return the configuration of a run.

    Args:
        arguments: ``group=preset`` (model=uma_s), ``key=value`` (trainer.max_epochs=10) and YAML files with
            some or all keys, for example the config.yaml of an earlier run. Presets come first, then files,
            then values. ``resume=<run folder>`` alone or with values starts from that run's config.yaml.
            A DPA model brings its loss and optimiser (loss=deepmd optim=deepmd) unless others are chosen.
            The preset ``launch=`` counts as a value: it says where, not what.

    Raises:
        ConfigError: an unknown key or preset, a wrong type, a value out of range, a missing file.
    """
    files = [Path(a) for a in arguments if "=" not in a and a.endswith((".yaml", ".yml"))]
    choices: dict[str, Any] = {}
    places: list[Value] = []
    values: list[Value] = []
    for argument in (a for a in arguments if Path(a) not in files):
        key, value = _parse(argument)
        if key == "launch":
            places = _preset_values(key, value)
        elif key in groups():
            choices[key] = value
        else:
            values += _leaves({key: value})
    resumed = [Path(str(v.value)) / "config.yaml" for v in values if v.key == "resume"]
    begun = [] if choices else [file for file in resumed if file.is_file()]
    # what the run started from is in its state
    old = [value for file in begun for value in _file_values(file) if value.key != "init_from"]
    values = old + [value for file in files for value in _file_values(file)] + places + values
    model = _model_class(choices, values)
    if "model" in choices and "experiment" not in choices:
        choices = {**_USUAL.get(model, {}), **choices}
    cls = train_class(model)
    for value in values:
        _check_key(value, cls)
    config = _compose(choices, cls)
    for value in values:
        _assign(config, value, cls)
    built = _build(cls, OmegaConf.to_container(config, resolve=True))
    return TrainConfig(**vars(built))


@cache
def train_class(model: Any) -> type[TrainConfig]:
    """Return `TrainConfig` with the keys of one model, of those that its section can hold."""
    changed = [("model", model, dataclasses.field(default_factory=model))]
    cls = dataclasses.make_dataclass(TrainConfig.__name__, changed, bases=(TrainConfig,))
    cls.__doc__ = TrainConfig.__doc__
    return cls


def _model_class(choices: dict[str, Any], values: Sequence[Value]) -> type:
    """Return the dataclass of the model; a type without a preset chooses the preset of the same name."""
    given = [value for value in values if value.key == "model.type"]
    if given and "model" not in choices:
        if given[-1].value not in MODELS:
            raise ConfigError(f"{given[-1]}: not one of {', '.join(MODELS)}")
        choices["model"] = given[-1].value
    kind = str(OmegaConf.select(_compose(choices, None), "model.type", default="escn_md"))
    if given and given[-1].value != kind:
        raise ConfigError(f"{given[-1]}: model={choices['model']} is of type {kind}; leave one of them out")
    return MODELS[kind]


def sweep(arguments: Sequence[str]) -> list[list[str]]:
    """Return the arguments of every run of a sweep: all combinations of what ``key=a,b,c`` lists.

    Hydra's ``range(1,4)`` and ``choice(a,b)`` count as lists too; the last one varies fastest.

    Raises:
        ConfigError: several values of something that cannot be listed, such as ``interval(0,1)``.
    """
    options: list[list[str]] = []
    for argument in arguments:
        override = _override(argument) if "=" in argument else None
        if override is None or not override.is_sweep_override():
            options.append([argument])
        elif override.is_discrete_sweep():
            options.append([f"{override.key_or_group}={v}" for v in override.sweep_string_iterator()])
        else:
            raise ConfigError(f"{argument!r}: a sweep needs a list of values, such as key=a,b,c")
    return [list(choice) for choice in itertools.product(*options)]


def load_values(cls: type[T], arguments: Sequence[str]) -> T:
    """Return a dataclass other than `TrainConfig`, such as `MDConfig`.

    Args:
        cls: the dataclass.
        arguments: as in `load_config`; presets are those of its sections (launch=slurm).

    Raises:
        ConfigError: as `load_config`.
    """
    config = OmegaConf.structured(_schema(typing.cast(type, cls)))
    presets: list[Value] = []
    files: list[Value] = []
    values: list[Value] = []
    for argument in arguments:
        if "=" not in argument and argument.endswith((".yaml", ".yml")):
            files += _file_values(Path(argument))
            continue
        key, value = _parse(argument)
        if key in groups() and _section(getattr(schema_keys(typing.cast(type, cls)).get(key), "type", None)):
            presets += _preset_values(key, value)
        else:
            values += _leaves({key: value})
    for value in files + presets + values:
        _check_key(value, cls)
        _assign(config, value, cls)
    return typing.cast(T, _build(cls, OmegaConf.to_container(config)))


def _parse(argument: str) -> tuple[str, Any]:
    """Split ``key=value``, with the value in Hydra's grammar (numbers, lists, null, text)."""
    key, equal, text = argument.partition("=")
    if not equal:
        raise ConfigError(f"{argument!r} is neither key=value nor a .yaml file")
    override = _override(argument)
    if override is None:
        return key, text
    if override.is_add() or override.is_delete() or override.is_force_add():
        raise ConfigError(f"{argument!r}: keys cannot be added or deleted; write key=value")
    if override.is_sweep_override():
        raise ConfigError(f"{argument!r} names several values; add -m to run each, or write a list as [a,b]")
    return override.key_or_group, override.value()


def _override(argument: str) -> Override | None:
    """Return ``key=value`` as Hydra reads it; None if the value is a path that it would misunderstand."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException as error:
        if argument.partition("=")[2][:1] in "[{'\"":
            raise ConfigError(f"{argument!r}: {_first_line(error)}") from None
        return None


def _compose(choices: Mapping[str, Any], cls: type | None) -> DictConfig:
    """Let Hydra put the presets together on top of the schema, or of nothing."""
    for group, choice in choices.items():
        if choice is not None:
            _check_choice(group, choice)
    ConfigStore.instance().store("schema", node={} if cls is None else _schema(cls))
    overrides = [f"{group}={'null' if choice is None else choice}" for group, choice in choices.items()]
    try:
        with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
            return compose("train", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        chosen = ", ".join(overrides) or config_dir()
        why = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise ConfigError(f"{chosen}: these presets do not fit together: {why}") from None


def _check_choice(group: str, choice: Any) -> None:
    options = groups()[group]
    if choice not in options:
        nearest = _nearest(str(choice), options)
        raise ConfigError(f"{group}={choice}: no such preset{nearest}; there are {', '.join(options)}")


def _preset_values(group: str, choice: Any) -> list[Value]:
    _check_choice(group, choice)
    found = _file_values(config_dir() / group / f"{choice}.yaml")
    return [Value(f"{group}.{v.key}", v.value) for v in found]


def to_yaml(config: Any) -> str:
    """Return a configuration as a file that `load_config` or `load_values` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(_listed_values(dataclasses.asdict(config))))


def _listed_values(value: Any) -> Any:
    """Return ``value`` with lists instead of tuples."""
    if isinstance(value, dict):
        return {key: _listed_values(v) for key, v in value.items()}
    return [_listed_values(v) for v in value] if isinstance(value, list | tuple) else value


def _file_values(file: Path) -> list[Value]:
    """Return what a YAML file sets."""
    if not file.is_file():
        raise ConfigError(f"{file}: no such file")
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # whatever the YAML parser raises
        raise ConfigError(f"{file}: not a YAML file ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected keys and values, found a {type(content).__name__}")
    return list(_leaves(content, where=f"{file}: "))


def _leaves(content: Mapping[Any, Any], prefix: str = "", where: str = "") -> Iterator[Value]:
    """Yield the values of nested sections under their dotted keys."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.", where)
        else:
            yield Value(f"{prefix}{key}", value, where)


def _check_key(given: Value, cls: type) -> None:
    """Refuse a key that the schema does not have, and one number for a whole section."""
    keys = schema_keys(cls)
    if given.key not in keys:
        presets = [group for group in groups() if issubclass(cls, TrainConfig) or group in keys]
        raise ConfigError(f"{given.where}unknown key {given.key!r}{_nearest(given.key, [*keys, *presets])}")
    if (section := _section(keys[given.key].type)) and given.value is not None:
        names = ", ".join(field.name for field in dataclasses.fields(section))
        raise ConfigError(f"{given}: {given.key} is a section with the keys {names}")


def _assign(config: DictConfig, given: Value, cls: type) -> None:
    """Set one value; OmegaConf checks its type."""
    parent = given.key.rpartition(".")[0]
    if parent and OmegaConf.select(config, parent) is None:  # an optional section that was off
        section = _section(schema_keys(cls)[parent].type)
        assert section is not None
        OmegaConf.update(config, parent, OmegaConf.structured(_schema(section)), merge=False)
    try:
        OmegaConf.update(config, given.key, given.value)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{given}: {_first_line(error)}") from None


@cache  # OmegaConf compares these classes by identity
def _schema(cls: Any) -> type:
    """Return a dataclass for OmegaConf, which knows no Literal (checked in `_build`), no nested tuples."""
    fields: list[tuple[str, Any, Any]] = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if (section := _section(hint)) and _is_optional(hint):
            fields.append((field.name, _schema(section) | None, None))
        elif section:
            default = partial(_mirrored, _default(field))
            fields.append((field.name, _schema(section), dataclasses.field(default_factory=default)))
        else:
            hint = str if _is_choice(hint) else _listed(hint)
            fields.append((field.name, hint, dataclasses.field(default_factory=partial(_default, field))))
    return dataclasses.make_dataclass(cls.__name__, fields)


def _build(cls: type, content: Any, path: str = "") -> Any:
    """Make a dataclass of plain values; errors of its own checks get the key's name here."""
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in content.items():
        hint, key = hints[name], f"{path}{name}"
        section = _section(hint)
        if section and value is not None:
            value = _build(section, value, f"{key}.")
        elif _is_choice(hint) and value not in typing.get_args(hint):
            options = [str(option) for option in typing.get_args(hint)]
            raise ConfigError(
                f"{key}={value}: not one of {', '.join(options)}{_nearest(str(value), options)}"
            )
        elif isinstance(value, list) and _is_tuple(hint):
            value = tuple(value)
        values[name] = value
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{path.rstrip('.') or 'configuration'}: {error}") from None


def _section(hint: Any) -> type | None:
    """Return the dataclass of an annotation like ``ExpertsConfig | None``, or None for a plain value."""
    for option in typing.get_args(hint) or (hint,):
        if dataclasses.is_dataclass(option):
            return typing.cast(type, option)
    return None


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _listed(hint: Any) -> Any:
    """Return tuple[tuple[str, str], ...] as list[list[str]], everything else as it is."""
    if typing.get_origin(hint) is not tuple:
        return hint
    return list[_listed(typing.get_args(hint)[0])]  # type: ignore[misc]


def _mirrored(section: Any) -> Any:
    """Return a section's values in the dataclass that OmegaConf sees instead of its own."""
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    mirrored = {k: _mirrored(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()}
    kind: Any = type(section)
    return _schema(kind)(**mirrored)


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType) and type(None) in typing.get_args(hint)


def _is_choice(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


def _is_tuple(hint: Any) -> bool:
    return any(typing.get_origin(option) is tuple for option in (hint, *typing.get_args(hint)))


def _nearest(word: str, options: Sequence[str]) -> str:
    """Return ", did you mean ...?" with the option closest as a whole, else in the last part of its key."""
    found = difflib.get_close_matches(word, options, n=1, cutoff=0.75)
    if not found:
        last = {option.rpartition(".")[2]: option for option in reversed(options)}
        found = [last[w] for w in difflib.get_close_matches(word.rpartition(".")[2], list(last), n=1)]
    return f", did you mean {found[0]!r}?" if found else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _attribute_docs(cls: type) -> dict[str, str]:
    """Return the texts of the Attributes section of a class's docstring."""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    docs: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if start := re.match(r"    (\w+): (.*)", line):
            name = start[1]
            docs[name] = start[2]
        elif name and line.startswith("        "):
            docs[name] += f" {line.strip()}"
    return docs
