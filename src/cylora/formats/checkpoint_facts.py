"""What a checkpoint says of itself in its header's metadata, as JSON: written, and read with every check."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from cylora import __version__, checks
from cylora.adapter import AdapterSet, LoraAdapter
from cylora.config import MAX_WINDOW, STATE_DTYPES, LoraConfig, LoraTrainingConfig
from cylora.errors import CyloraError, FormatError, InputError
from cylora.flat import Layout
from cylora.formats import strict_json
from cylora.formats.container import TensorFile
from cylora.formats.weights import check_count, most_adapters
from cylora.parts import trained_sizes
from cylora.state import TrainerState

__all__ = ["DIGEST", "Facts", "Member", "check_readable", "describe", "read_facts", "training_config"]

SCHEMA = 2
FIRST_FACTS = (
    "schema", "version", "generation", "is_set", "adapters", "lora_configs", "training", "adam", "history",
    "accumulated",
)  # fmt: skip
# What schema 1 did not have: facts, and fields of the configs. Their defaults mean what it did.
LATER_FACTS = ("ema", "watch", "good")
LATER_FIELDS: dict[type, tuple[str, ...]] = {
    LoraConfig: ("rank_pattern", "alpha_pattern"),
    LoraTrainingConfig: (
        "lora_plus_ratio", "train_a", "rate_pattern", "weight_decay_pattern", "ema_decay", "divergence",
        "divergence_factor", "divergence_window", "rollback_every", "early_stopping_patience",
        "early_stopping_min_delta",
    ),
}  # fmt: skip
DIGEST = "sha256"  # the last tensor
FACTS, ORIGIN, EXTRA, RNG = "cylora.checkpoint", "cylora.origin", "cylora.extra", "cylora.rng"
LONE = "adapter"  # how a lone LoraAdapter is listed

Member = tuple[int, int, LoraConfig]  # d_in, d_out, config


class Facts(NamedTuple):
    """What the metadata says, checked.

    Attributes
    ----------
    version, generation : of the cylora that wrote it, as its caller numbered it.
    is_set : False for a lone LoraAdapter.
    members : name to (d_in, d_out, LoraConfig), in the order of the vectors.
    training : fields of LoraTrainingConfig; ``schedule`` is None where it was a function.
    state_dtype, adam_steps : None and 0 before the first step that was applied.
    history_limit, total_steps, skipped_steps : of the history.
    accumulated : micro-batches pending.
    trained : sizes of the runs of parameters that have moments.
    has_ema, good_steps : whether there is an average; steps applied in the state to go back to, None without one.
    watched, stopping : how many losses and norms a guard has kept; early stopping's numbers, or None.
    has_watch : whether there are such.
    origin, extra, rng : as `save_checkpoint` got them; ``rng`` encoded, or None.
    """

    version: str
    generation: int
    is_set: bool
    members: dict[str, Member]
    training: dict[str, Any]
    state_dtype: str | None
    adam_steps: int
    history_limit: int | None
    total_steps: int
    skipped_steps: int
    accumulated: int
    trained: tuple[int, ...]
    has_ema: bool
    good_steps: int | None
    has_watch: bool
    watched: int
    stopping: dict[str, Any] | None
    origin: dict[str, Any]
    extra: dict[str, Any]
    rng: dict[str, Any] | None

    @property
    def size(self) -> int:
        """Parameters of all adapters."""
        return sum(config.rank * (d_in + d_out) for d_in, d_out, config in self.members.values())

    @property
    def kept_steps(self) -> int:
        """Records that the file holds."""
        return self.total_steps if self.history_limit is None else min(self.total_steps, self.history_limit)


def describe(
    config: LoraTrainingConfig,
    adapters: LoraAdapter | AdapterSet,
    state: TrainerState,
    *,
    generation: int,
    extra: Mapping[str, Any] | None,
    rng: Mapping[str, Any] | None,
) -> dict[str, str]:
    """Return a checkpoint's metadata.

    Raises
    ------
    InputError   If ``extra`` or the adapters' origin is nothing that `read_facts` would give back.
    """
    members = adapters if isinstance(adapters, AdapterSet) else {LONE: adapters}
    places = {lora: place for place, lora in enumerate(dict.fromkeys(one.config for one in members.values()))}
    # JSON has neither functions nor infinity.
    schedule = None if callable(config.schedule) else config.schedule
    limit = None if math.isinf(config.max_grad_norm) else config.max_grad_norm
    facts = {
        "schema": SCHEMA,
        "version": __version__,
        "generation": generation,
        "is_set": isinstance(adapters, AdapterSet),
        "adapters": [[name, one.d_in, one.d_out, places[one.config]] for name, one in members.items()],
        "lora_configs": [lora.to_dict() for lora in places],
        "training": config.to_dict() | {"schedule": schedule, "max_grad_norm": limit},
        "adam": None if state.adam is None else {"dtype": state.adam.moments.dtype, "t": state.adam.t},
        "history": {
            "limit": state.history.limit,
            "total_steps": state.history.total_steps,
            "skipped_steps": state.history.skipped_steps(),
        },
        "accumulated": state.accumulation.count,
        "ema": state.ema is not None,
        "watch": None if state.watch is None else {"kept": state.watch.losses.size, "stopping": state.watch.stopping},
        "good": None if state.good is None else {"t": state.good.t},
    }
    texts = {FACTS: strict_json.to_text(facts, is_sorted=False)}  # the order of a pattern's keys counts
    texts[EXTRA] = _readable("extra", {} if extra is None else extra)
    if isinstance(adapters, AdapterSet) and adapters.origin:
        texts[ORIGIN] = _readable("adapters.origin", adapters.origin)
    if rng is not None:
        texts[RNG] = strict_json.to_text(rng)
    return texts


def _readable(name: str, value: Mapping[str, Any]) -> str:
    try:
        text = strict_json.to_text(dict(value))
        if strict_json.parse(text.encode(), name) != value:
            raise ValueError("it would be read back as something else")
    except (CyloraError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name} must be a mapping of JSON values, at most four levels deep ({error})") from None
    return text


def check_readable(metadata: Mapping[str, str], count: int, size: int) -> None:
    """Raise InputError unless the metadata of a file of this size, with so many adapters, could be read back."""
    try:
        strict_json.parse(metadata[FACTS].encode(), FACTS)  # a name may be no text, or there may be too many
    except FormatError as error:
        raise InputError(f"the adapters' names and configs must fit a checkpoint ({error})") from None
    if count > (most := most_adapters(size)):
        raise InputError(f"adapters must be at most {most} in a checkpoint of {size} bytes, got {count}")


def _layout(members: Mapping[str, Member], is_set: bool) -> Layout:
    """Return the layout of adapters that are not there yet."""
    layout: list[tuple[str, tuple[int, ...]]] = []
    for name, (d_in, d_out, config) in members.items():
        prefix = f"{name}." if is_set else ""
        layout += [(f"{prefix}A", (config.rank, d_in)), (f"{prefix}B", (d_out, config.rank))]
    return tuple(layout)


def training_config(settings: Mapping[str, Any]) -> LoraTrainingConfig:
    """Return the config that settings make where a schedule that was a function is a constant."""
    named = {"schedule": "constant"} if settings["schedule"] is None else {}
    return LoraTrainingConfig.from_dict(dict(settings) | named)


def read_facts(file: TensorFile) -> Facts:
    """Return what the metadata of ``file`` says; FormatError, naming the file, if it breaks a rule."""
    try:
        return _Reader(file).facts()
    except FormatError:
        raise
    except CyloraError as error:  # a config's own rules
        raise FormatError(f"{file.path}: {error}") from error


class _Reader:
    """Check one value after another and name it in the error."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._is_first = False  # schema 1

    def facts(self) -> Facts:
        texts = self._file.metadata
        if FACTS not in texts:
            raise self._error(f"the metadata must have {FACTS!r}", f"the keys {', '.join(texts)!r:.80}")
        if unknown := set(texts) - {FACTS, ORIGIN, EXTRA, RNG}:
            raise self._error("the metadata must have no other keys than a checkpoint's", repr(min(unknown))[:80])
        document = self._parsed(FACTS)
        schema = document.get("schema")
        if schema not in (1, SCHEMA) or type(schema) is not int:
            raise self._error(f"schema must be 1 or {SCHEMA}, those this version reads", repr(schema)[:80])
        self._is_first = schema == 1
        later = () if self._is_first else LATER_FACTS
        values = self._items("facts", document, (*FIRST_FACTS, *later))
        _, version, generation, is_set, adapters, loras, training, adam, history, accumulated, *options = values
        ema, watch, good = options or (False, None, None)
        if not isinstance(version, str):
            raise self._error("version must be text", repr(version)[:80])
        if not isinstance(is_set, bool):
            raise self._error("is_set must be true or false", repr(is_set)[:80])
        limit, total, skipped = self._items("history", history, ("limit", "total_steps", "skipped_steps"))
        total = self._integer("history total_steps", total, 0)
        dtype, t = (None, 0) if adam is None else self._items("adam", adam, ("dtype", "t"))
        if adam is not None and dtype not in STATE_DTYPES:
            raise self._error(f"adam dtype must be one of {', '.join(STATE_DTYPES)}", repr(dtype)[:80])
        settings = self._training(training)
        for key, saved in (("history_limit", limit), ("state_dtype", dtype)):
            if settings[key] != saved and (key != "state_dtype" or adam is not None):
                raise self._error(f"{key} must be {saved!r} in training too", repr(settings[key])[:80])
        if not isinstance(ema, bool):
            raise self._error("ema must be true or false", repr(ema)[:80])
        watched, stopping = (0, None) if watch is None else self._items("watch", watch, ("kept", "stopping"))
        (good_steps,) = (None,) if good is None else self._items("good", good, ("t",))
        for key, is_there in (("ema_decay", ema), ("divergence", good is not None)):
            if is_there and settings[key] in (None, "ignore"):
                raise self._error(f"{key} must be set in training with what is kept for it", repr(settings[key])[:80])
        members = self._members(adapters, loras, is_set)
        return Facts(
            version=version,
            generation=self._integer("generation", generation, 0),
            is_set=is_set,
            members=members,
            training=settings,
            state_dtype=dtype,
            adam_steps=0 if adam is None else self._integer("adam t", t, 1, total),
            history_limit=None if limit is None else self._integer("history limit", limit, 1),
            total_steps=total,
            skipped_steps=self._integer("history skipped_steps", skipped, 0, total),
            accumulated=self._integer("accumulated", accumulated, 0),
            trained=trained_sizes(_layout(members, is_set), training_config(settings)),
            has_ema=ema,
            good_steps=None if good is None else self._integer("good t", good_steps, 0, total),
            has_watch=watch is not None,
            watched=self._integer("watch kept", watched, 0, MAX_WINDOW),
            stopping=stopping,
            origin=self._parsed(ORIGIN) if ORIGIN in texts else {},
            extra=self._parsed(EXTRA) if EXTRA in texts else {},
            rng=self._parsed(RNG) if RNG in texts else None,
        )

    def _members(self, adapters: Any, loras: Any, is_set: bool) -> dict[str, Member]:
        if not isinstance(loras, list):
            raise self._error("lora_configs must be a list", repr(loras)[:80])
        for one in loras:
            self._complete("one of lora_configs", one, LoraConfig)
        configs = [LoraConfig.from_dict(one) for one in loras]
        for config in configs:
            config.require_one_shape()
        if not isinstance(adapters, list) or not adapters or (len(adapters) > 1 and not is_set):
            count = "at least one" if is_set else "one"
            raise self._error(f"adapters must be a list of {count}", repr(adapters)[:80])
        check_count(str(self._file.path), len(adapters), self._file.size)
        members: dict[str, Member] = {}
        for entry in adapters:
            if not isinstance(entry, list) or len(entry) != 4 or not isinstance(entry[0], str) or not entry[0]:
                raise self._error("an adapter must be [name, d_in, d_out, place of its config]", repr(entry)[:80])
            name, *numbers = entry
            if name in members:
                raise self._error("adapters must not repeat a name", repr(name)[:80])
            d_in = self._integer(f"d_in of {name[:80]!r}", numbers[0], 1, 2**31)
            d_out = self._integer(f"d_out of {name[:80]!r}", numbers[1], 1, 2**31)
            place = self._integer(f"config of {name[:80]!r}", numbers[2], 0, len(configs) - 1)
            members[name] = (d_in, d_out, configs[place])
        return members

    def _training(self, training: Any) -> dict[str, Any]:
        """Return the fields, of which all but a missing schedule make a config."""
        self._complete("training", training, LoraTrainingConfig)
        self._complete("training lora_config", training["lora_config"], LoraConfig)
        limit = training["max_grad_norm"]
        settings: dict[str, Any] = training | {"max_grad_norm": math.inf if limit is None else limit}
        config = training_config(settings).to_dict()
        return config | {"schedule": settings["schedule"]}

    def _complete(self, name: str, values: Any, kind: type) -> None:
        """Refuse a config without all fields: a default would stand in for what was meant."""
        later = LATER_FIELDS[kind] if self._is_first else ()
        self._items(name, values, tuple(field.name for field in fields(kind) if field.name not in later))

    def _parsed(self, key: str) -> dict[str, Any]:
        parsed = strict_json.parse(self._file.metadata[key].encode(), f"{self._file.path}: {key}", leading_space=False)
        assert isinstance(parsed, dict)  # it begins with {
        return parsed

    def _integer(self, name: str, value: Any, minimum: int, maximum: int = checks.MAX_COUNT) -> int:
        return checks.integer(f"{self._file.path}: {name}", value, minimum, maximum, FormatError)

    def _items(self, name: str, value: Any, keys: tuple[str, ...]) -> list[Any]:
        return checks.items(f"{self._file.path}: {name}", value, keys, FormatError)

    def _error(self, rule: str, got: str) -> FormatError:
        return FormatError(f"{self._file.path}: {rule}, got {got}")
