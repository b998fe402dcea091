"""What a run uses: the options given, else what a TOML file says, else the task's defaults, else the fields' own.

The file has three tables, and `cylora train` writes one like it into every run folder::

    [run]
    task = "digits"
    seed = 0

    [training]            # the fields of LoraTrainingConfig
    learning_rate = 0.01
    decay_steps = "none"  # TOML has no null

    [training.rate_pattern]
    q_proj = 0.5

    [lora]                # the fields of LoraConfig
    rank = 8
"""

import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cylora import checks
from cylora.config import LoraConfig, LoraTrainingConfig
from cylora.errors import ConfigError, FormatError, TaskError

__all__ = ["FIELDS", "TABLES", "Field", "RunSettings", "Tables", "read_tables", "resolve", "task_tables"]

Tables = dict[str, dict[str, Any]]
NONE = "none"
MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One thing a user may set: ``kind`` is the type of a value, ``optional`` if "none" is one too.

    A ``kind`` of dict is a pattern: names to values of the type ``item``.
    """

    table: str
    name: str
    kind: type
    optional: bool
    default: object
    item: type = str


def _config_fields(table: str, cls: type) -> list[Field]:
    """Describe the fields of a config dataclass; a field that holds another config is that one's own table."""
    hints, defaults, found = typing.get_type_hints(cls), cls(), []
    for name in (field.name for field in fields(cls)):
        hint = hints[name]
        choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kind, item = typing.get_origin(choices[0]) or choices[0], str
        if kind is Mapping:
            kind, item = dict, typing.get_args(hint)[1]
        if kind is not LoraConfig:
            default, optional = getattr(defaults, name), type(None) in choices
            found.append(Field(table=table, name=name, kind=kind, optional=optional, default=default, item=item))
    return found


FIELDS = [
    Field(table="run", name="task", kind=str, optional=False, default="digits"),
    Field(table="run", name="seed", kind=int, optional=False, default=0),
    Field(table="run", name="eval_every", kind=int, optional=True, default=None),
    Field(table="run", name="save_every", kind=int, optional=True, default=None),
    *_config_fields("training", LoraTrainingConfig),
    *_config_fields("lora", LoraConfig),
]
TABLES = {table: [field.name for field in FIELDS if field.table == table] for table in ("run", "training", "lora")}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """Everything that decides a run, valid.

    Parameters
    ----------
    task : name of a built-in task, or "module:factory"
    seed : int in [0, 2^32)
    eval_every : steps between two evaluations; 0 means before and after only
    save_every : steps between two checkpoints; 0 means one at the end only
    config : LoraTrainingConfig
    """

    task: str
    seed: int
    eval_every: int
    save_every: int
    config: LoraTrainingConfig

    def to_tables(self) -> Tables:
        """Return the settings as a TOML file holds them; `resolve` makes the same settings of them."""
        training = self.config.to_dict()
        lora = training.pop("lora_config")
        run = {name: getattr(self, name) for name in TABLES["run"]}
        tables = {"run": run, "training": training, "lora": lora}
        return {
            table: {key: NONE if value is None else value for key, value in values.items()}
            for table, values in tables.items()
        }


def read_tables(path: Path) -> Tables:
    """Read a TOML file.

    Raises
    ------
    OSError       If it cannot be read.
    FormatError   If it is not TOML.
    ConfigError   If it has a table or key that nothing reads.
    """
    try:
        document = tomllib.loads(path.read_bytes().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} must be a TOML file: {error}") from error
    for table, values in document.items():
        if table not in TABLES:
            raise ConfigError(f"{path}: unknown key {table!r}; the tables are {', '.join(TABLES)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {table} must be a table, got {values!r}")
        for key in values:
            if key not in TABLES[table]:
                raise ConfigError(f"{path}: unknown key {key!r} in [{table}]; its keys are {', '.join(TABLES[table])}")
    return document


def task_tables(task: str, defaults: Mapping[str, Any]) -> Tables:
    """Return a task's training_defaults as tables.

    Raises
    ------
    TaskError   If a name is not a field's, or the schedule is a function, which no file could hold.
    """
    training = {key: value for key, value in defaults.items() if key != "lora_config"}
    tables = {"training": training, "lora": dict(defaults.get("lora_config", {}))}
    for table, values in tables.items():
        for key, value in values.items():
            if key not in TABLES[table]:
                raise TaskError(f"task {task!r}: training_defaults has unknown key {key!r}")
            if callable(value):
                raise TaskError(f"task {task!r}: training_defaults[{key!r}] must be a plain value, got {value!r}")
    return tables


def resolve(layers: list[tuple[str, Tables]]) -> RunSettings:
    """Merge tables, later before earlier, and check the result.

    Parameters
    ----------
    layers : pairs of where the tables come from, as a message begins ("" for the command line), and the tables.

    Raises
    ------
    ConfigError   If a value breaks its rule. The message begins with where it came from.
    """
    merged: Tables = {table: {} for table in TABLES}
    blamed: dict[str, str] = {}
    for place, tables in layers:
        for table, values in tables.items():
            merged[table].update(values)
        try:
            settings, broken = _settings(merged), None
        except ConfigError as error:
            broken = str(error)
            # The layer that brought an error in is to blame for it, not one that inherits it.
            blamed.setdefault(broken, place)
    if broken is not None:
        raise ConfigError(f"{blamed[broken]}{broken}")
    return settings


def _settings(tables: Tables) -> RunSettings:
    optional = {(field.table, field.name) for field in FIELDS if field.optional}
    plain = {
        table: {key: None if value == NONE and (table, key) in optional else value for key, value in values.items()}
        for table, values in tables.items()
    }
    config = LoraTrainingConfig.from_dict({**plain["training"], "lora_config": plain["lora"]})
    run = plain["run"]
    task = run.get("task", "digits")
    if not isinstance(task, str):
        raise ConfigError(f"task must be a name, got {task!r}")
    parts = {"eval_every": 20, "save_every": 10}  # of the run, where nothing is said
    every = {
        name: checks.integer(name, -(-config.max_steps // part) if run.get(name) is None else run[name], 0)
        for name, part in parts.items()
    }
    return RunSettings(
        task=task,
        seed=checks.integer("seed", run.get("seed", 0), 0, MAX_SEED),
        **every,
        config=config,
    )
