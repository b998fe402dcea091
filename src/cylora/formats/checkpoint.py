"""Checkpoints: everything that training needs to go on to the same bits, in one safetensors file.

(a) The file holds the parameters, both moments as they are stored, a pending accumulation, the history, what options
    need besides (an average, a guard's last values, a state to go back to), and as the last tensor the sha256 of every
    byte before it. What is no array is JSON in the header's metadata (`checkpoint_facts`).
(b) Nothing is copied to be saved: the arrays' own memory is hashed and written while no step can begin. Loading reads
    straight into the arrays that the new trainer will use.
(c) Everything is checked before a trainer comes into being: there is no half-loaded one.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cylora import checks
from cylora.accumulation import Accumulation
from cylora.adapter import AdapterSet, LoraAdapter
from cylora.config import LoraTrainingConfig
from cylora.errors import ConfigError, CyloraError, FormatError, InputError, StateError
from cylora.flat import FloatArray, aligned_zeros
from cylora.formats import generators
from cylora.formats.checkpoint_facts import DIGEST, Facts, check_readable, describe, read_facts, training_config
from cylora.formats.container import DTYPES, NAMES, TensorFile, content
from cylora.formats.durable import replace_file
from cylora.formats.weights import check_finite
from cylora.good_state import GoodState
from cylora.history import STORED, TrainingHistory, TrainingStep
from cylora.moments import Moments
from cylora.optimizer import AdamState
from cylora.parts import trained_runs
from cylora.state import TrainerState, check_layout
from cylora.trainer import LoraTrainer
from cylora.watch import WatchState

__all__ = ["Checkpoint", "SavedState", "load_checkpoint", "read_checkpoint", "save_checkpoint"]

Arrays = dict[str, NDArray[Any]]


class Checkpoint(NamedTuple):
    """What a file held.

    Attributes
    ----------
    trainer : LoraTrainer that goes on where the saved one was. It binds to ``adapters`` at its next step.
    adapters : LoraAdapter or AdapterSet, as it was saved.
    generation : int, as the caller numbered it.
    rng : numpy.random.Generator in its saved state, or None.
    extra : dict, what the caller gave to be kept.
    """

    trainer: LoraTrainer
    adapters: LoraAdapter | AdapterSet
    generation: int
    rng: np.random.Generator | None
    extra: dict[str, Any]


class SavedState(NamedTuple):
    """A verified file's content before a trainer is made of it."""

    facts: Facts
    adapters: LoraAdapter | AdapterSet
    state: TrainerState
    rng: np.random.Generator | None


def save_checkpoint(
    trainer: LoraTrainer,
    adapters: LoraAdapter | AdapterSet,
    path: str | os.PathLike[str],
    *,
    generation: int = 0,
    rng: np.random.Generator | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a trainer's whole state and its adapters to the file ``path``, atomically and durably.

    Meanwhile no step of this trainer begins: one that another thread tries waits or is a TrainerBusyError.

    Parameters
    ----------
    trainer, adapters : read only.
    path : the file to create or replace.
    generation : int >= 0, to tell the files of one training apart.
    rng : the caller's generator, to be restored with the rest.
    extra : what else the caller needs to go on: JSON values, at most four levels deep, without NaN and infinities.

    Raises
    ------
    InputError, StateError
        If an argument breaks its rule, a weight is not finite, or the adapters are not the trainer's.
    TrainerBusyError
        If a step is under way.
    OSError
        If the file cannot be written. What was there is untouched (see `replace_file`).
    """
    if not isinstance(trainer, LoraTrainer):
        raise InputError(f"trainer must be a LoraTrainer, got {type(trainer).__name__}")
    if not isinstance(adapters, (LoraAdapter, AdapterSet)):
        raise InputError(f"adapters must be a LoraAdapter or an AdapterSet, got {type(adapters).__name__}")
    generation = checks.integer("generation", generation, 0, error=InputError)
    encoded = None if rng is None else generators.to_dict(rng)

    def write(state: TrainerState) -> None:
        check_finite(adapters)
        metadata = describe(trainer.config, adapters, state, generation=generation, extra=extra, rng=encoded)
        digest: NDArray[np.uint8] = np.zeros(32, np.uint8)
        parts = content(_saved_arrays(adapters.flat.vector, state) | {DIGEST: digest}, metadata)
        check_readable(metadata, len(adapters) if isinstance(adapters, AdapterSet) else 1, sum(map(len, parts)))
        running = hashlib.sha256()
        for part in parts[:-1]:
            running.update(part)
        digest[:] = np.frombuffer(running.digest(), np.uint8)
        replace_file(path, parts)

    trainer.hold(adapters, write)


def load_checkpoint(
    path: str | os.PathLike[str], *, on_step: Callable[[TrainingStep], object] | None = None, **changes: Any
) -> Checkpoint:
    """Read what `save_checkpoint` wrote, verify all of it, and return a trainer that goes on to the same bits.

    Parameters
    ----------
    path : a regular file.
    on_step : as for `LoraTrainer`.
    **changes
        Fields of LoraTrainingConfig that shall differ from the saved ones, such as ``threads`` or ``max_steps``. A
        schedule that was a function is not in the file: ``schedule`` must give it again.

    Raises
    ------
    FormatError   If the file breaks a rule, or is damaged anywhere. The message names file, key and rule.
    ConfigError, StateError
        If ``changes`` or ``on_step`` break a rule, or ``changes`` do not go with the saved state.
    OSError       If the file cannot be read.
    """
    facts, adapters, state, rng = read_checkpoint(path)
    if facts.training["schedule"] is None and "schedule" not in changes:
        raise ConfigError(f"schedule must be given again, since {path} does not hold the function it was, got none")
    trainer = LoraTrainer(LoraTrainingConfig.from_dict(facts.training | changes), on_step=on_step)
    check_layout(state, adapters.flat.layout, trainer.config, f"{adapters!r}")  # before the first step would
    saved, changed = (
        trained_runs(adapters.flat.layout, config) for config in (training_config(facts.training), trainer.config)
    )
    if state.adam is not None and saved != changed:  # of equal sizes: moments of one matrix would become another's
        rule = f"what the config trains must be what the saved one did, {saved} as (start, size)"
        raise StateError(f"{rule}, got {changed}")
    trainer.adopt(state)
    return Checkpoint(trainer, adapters, facts.generation, rng, facts.extra)


def read_checkpoint(path: str | os.PathLike[str]) -> SavedState:
    """Read and verify a checkpoint without making a trainer of it; errors as for `load_checkpoint`."""
    with TensorFile(path, leading_space=False) as file:
        facts = read_facts(file)
        _check_forms(file, _forms(facts))
        adapters = _adapters(facts)  # takes no more memory than the file has, whose tensors have these sizes
        vector = adapters.flat.vector
        moments = None if facts.state_dtype is None else Moments(facts.trained, facts.state_dtype)
        accumulation = Accumulation()
        arrays: Arrays = {"parameters": vector}
        if moments is not None:
            arrays |= {f"adam.{name}": array for name, array in moments.arrays().items()}
        if facts.has_ema:
            arrays["ema"] = aligned_zeros(vector.size, np.float32, phase=0)
        good = _good(facts, vector.size)
        if good is not None:
            arrays |= {f"good.{name}": array for name, array in good.arrays().items()}
        if facts.accumulated:
            arrays["accumulated.gradient"] = accumulation.buffer(vector.size)
        _read(file, arrays)
    try:
        check_finite(adapters)
        if facts.accumulated:
            accumulation.resume(facts.accumulated, *arrays["accumulated.sums"].tolist())
        if moments is not None:
            moments.check()
        adam = None if moments is None else AdamState(adapters.flat.layout, moments, facts.adam_steps)
        for name in ("ema", "good.parameters", "good.ema"):
            if name in arrays:
                checks.array(name, arrays[name], np.float32, (vector.size,), FormatError, finite=True)
        if good is not None:
            good.moments.check()
        state = TrainerState(
            adam, _history(facts, arrays), accumulation, arrays.get("ema"), _watch(facts, arrays), good
        )
        check_layout(state, adapters.flat.layout, training_config(facts.training), f"{adapters!r}")
        rng = None if facts.rng is None else generators.from_dict(facts.rng)
    except CyloraError as error:
        raise FormatError(f"{file.path}: {error}") from error
    return SavedState(facts, adapters, state, rng)


def _good(facts: Facts, size: int) -> GoodState | None:
    """Return a state to go back to, all zero, or None."""
    if facts.good_steps is None:
        return None
    ema = aligned_zeros(size, np.float32, phase=0) if facts.has_ema else None
    moments = Moments(facts.trained, facts.training["state_dtype"])
    return GoodState(aligned_zeros(size, np.float32, phase=1), moments, ema, facts.good_steps)


def _watch(facts: Facts, arrays: Arrays) -> WatchState | None:
    if not facts.has_watch:
        return None
    state = {"losses": arrays["watch.losses"], "norms": arrays["watch.norms"], "stopping": facts.stopping}
    return WatchState.from_dict(state)


def _adapters(facts: Facts) -> LoraAdapter | AdapterSet:
    """Return the adapters, all zero."""
    if not facts.is_set:
        (member,) = facts.members.values()
        return LoraAdapter.zeros(*member)
    adapters = AdapterSet.zeros(facts.members)
    adapters.origin = facts.origin
    return adapters


# ------------------------------------------------------------------ the arrays, and their names in the file


def _saved_arrays(vector: FloatArray, state: TrainerState) -> Arrays:
    """Return what a file holds: the live arrays, and of the history copies."""
    history = state.history.state_dict()
    arrays: Arrays = {"parameters": vector}
    if state.adam is not None:
        arrays |= {f"adam.{name}": array for name, array in state.adam.moments.arrays().items()}
    if state.accumulation.count and state.accumulation.gradient is not None:
        arrays["accumulated.gradient"] = state.accumulation.gradient
        arrays["accumulated.sums"] = state.accumulation.buffers()[0]
    if state.ema is not None:
        arrays["ema"] = state.ema
    if state.good is not None:
        arrays |= {f"good.{name}": array for name, array in state.good.arrays().items()}
    if state.watch is not None:
        arrays |= {"watch.losses": state.watch.losses, "watch.norms": state.watch.norms}
    arrays["history.sums"] = np.array([history["loss_sum"], history["first_loss"]])
    return arrays | {f"history.{name}": history[name] for name in STORED}


def _forms(facts: Facts) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every tensor that a file with these facts has."""
    forms: dict[str, tuple[Any, tuple[int, ...]]] = {"parameters": (np.float32, (facts.size,))}
    if facts.state_dtype is not None:
        forms |= {f"adam.{name}": form for name, form in Moments.forms(facts.trained, facts.state_dtype).items()}
    if facts.has_ema:
        forms["ema"] = (np.float32, (facts.size,))
    if facts.good_steps is not None:
        kept = Moments.forms(facts.trained, facts.training["state_dtype"])
        forms |= {f"good.{name}": form for name, form in kept.items()}
        for name in ("parameters", "ema") if facts.has_ema else ("parameters",):
            forms[f"good.{name}"] = (np.float32, (facts.size,))
    if facts.has_watch:
        forms |= {f"watch.{name}": (np.float64, (facts.watched,)) for name in ("losses", "norms")}
    if facts.accumulated:
        forms |= {"accumulated.gradient": (np.float32, (facts.size,)), "accumulated.sums": (np.float64, (2,))}
    forms["history.sums"] = (np.float64, (2,))
    for name in STORED:
        forms[f"history.{name}"] = (np.bool_ if name == "skipped" else np.float64, (facts.kept_steps,))
    forms[DIGEST] = (np.uint8, (32,))
    return {name: (NAMES[np.dtype(dtype)], shape) for name, (dtype, shape) in forms.items()}


def _check_forms(file: TensorFile, forms: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    for name, (dtype, shape) in forms.items():
        if name not in file.tensors:
            raise FormatError(f"{file.path}: {name!r} must be among the tensors, got {', '.join(file.tensors)!r:.80}")
        got = file.tensors[name]
        if (got.dtype, got.shape) != (dtype, shape):
            raise FormatError(
                f"{file.path}: {name!r} must be {dtype} of shape {list(shape)}, as the metadata has it, "
                f"got {got.dtype} of shape {list(got.shape)}"
            )
    if unknown := set(file.tensors) - set(forms):
        raise FormatError(f"{file.path}: the tensors must be those of a checkpoint, got also {min(unknown)!r:.80}")
    if next(reversed(file.tensors)) != DIGEST:
        raise FormatError(f"{file.path}: {DIGEST!r} must be the last tensor, got {next(reversed(file.tensors))!r}")


def _read(file: TensorFile, arrays: Arrays) -> None:
    """Read every tensor into its array, or a new one, and check that the last is the sha256 of all before."""
    running = hashlib.sha256(file.head)
    for name, tensor in file.tensors.items():
        if name not in arrays:
            arrays[name] = np.empty(tensor.shape, DTYPES[tensor.dtype])
        file.read_into(name, arrays[name].reshape(-1).view(np.uint8), None if name == DIGEST else running)
    if arrays[DIGEST].tobytes() != running.digest():
        got = f"{arrays[DIGEST].tobytes().hex()} for content of {running.hexdigest()}"
        raise FormatError(f"{file.path}: {DIGEST!r} must be that of all bytes before it, got {got}: it is damaged")


def _history(facts: Facts, arrays: Arrays) -> TrainingHistory:
    loss_sum, first_loss = arrays["history.sums"].tolist()
    flags = arrays["history.skipped"].view(np.uint8)
    if flags.max(initial=0) > 1:
        raise FormatError(f"'history.skipped' must be 0 or 1, got {flags.max()}")
    return TrainingHistory.from_state_dict(
        {
            "limit": facts.history_limit,
            "total_steps": facts.total_steps,
            "loss_sum": loss_sum,
            "skipped_steps": facts.skipped_steps,
            "first_loss": first_loss,
            **{name: arrays[f"history.{name}"] for name in STORED},
        }
    )
