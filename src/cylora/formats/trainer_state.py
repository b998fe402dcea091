"""trainer_state.json: a training's log as the Trainer of Hugging Face's transformers writes it (TrainerState, 5.24).

Differences from what that Trainer would write, all of them ours on purpose:

- A number that is not finite is left out. Theirs writes a bare ``NaN``, which is no JSON; of losses their default
  (``logging_nan_inf_filter``) leaves those that are not finite out of the mean, and so does this.
- ``total_flos``, ``train_batch_size`` and the other things that cylora does not know have their defaults.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from cylora import checks
from cylora.errors import InputError
from cylora.formats.durable import replace_file
from cylora.formats.strict_json import to_text
from cylora.history import TrainingHistory

__all__ = ["TRAINER_STATE", "save_trainer_state", "trainer_state"]

TRAINER_STATE = "trainer_state.json"
NEVER = 0


def trainer_state(
    history: TrainingHistory,
    *,
    max_steps: int | None = None,
    logging_steps: int = 1,
    eval_steps: int = NEVER,
    save_steps: int = NEVER,
    steps_per_epoch: int | None = None,
    measures: Iterable[tuple[int, Mapping[str, float]]] = (),
) -> dict[str, Any]:
    """Return the fields of a ``transformers.TrainerState`` as JSON values.

    Parameters
    ----------
    history : TrainingHistory
    max_steps : int >= 0 or None, the steps of the whole training; None: those that are done.
    logging_steps : int >= 1
        Each entry of ``log_history`` is about so many steps: the mean of their losses, the gradient norm and rate of
        the last. The steps are those the history kept.
    eval_steps, save_steps : int >= 0, how often was evaluated and saved; they are noted, no more.
    steps_per_epoch : int >= 1 or None
        What makes an epoch. None: ``max_steps``, as their Trainer has it for data without a length.
    measures : pairs of steps done and evaluations by name; ``eval_`` is put before the names, as theirs does.

    Raises
    ------
    ConfigError   If a number breaks its rule.
    InputError    If ``history`` is none, or a measure is no number.
    """
    if not isinstance(history, TrainingHistory):
        raise InputError(f"history must be a TrainingHistory, got {type(history).__name__}")
    done = history.total_steps
    wanted = done if max_steps is None else checks.integer("max_steps (if not None)", max_steps, 0)
    every = checks.integer("logging_steps", logging_steps, 1)
    noted = {"eval_steps": eval_steps, "save_steps": save_steps}
    noted = {name: checks.integer(name, value, 0) for name, value in noted.items()}
    if steps_per_epoch is not None:
        steps_per_epoch = checks.integer("steps_per_epoch (if not None)", steps_per_epoch, 1)
    an_epoch = steps_per_epoch or max(wanted, 1)
    entries = [*_training_entries(history, every), *_evaluation_entries(measures)]
    entries.sort(key=lambda entry: entry["step"])  # stable: at the same step, the training's comes first as theirs does
    return {
        "epoch": done / an_epoch,
        "global_step": done,
        "max_steps": wanted,
        "logging_steps": every,
        **noted,
        "train_batch_size": None,
        "num_train_epochs": -(-wanted // an_epoch),
        "num_input_tokens_seen": 0,
        "total_flos": 0,
        "log_history": [{**entry, "epoch": entry["step"] / an_epoch} for entry in entries],
        "best_metric": None,
        "best_global_step": None,
        "best_model_checkpoint": None,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "is_hyper_param_search": False,
        "trial_name": None,
        "trial_params": None,
        "stateful_callbacks": {},
    }


def save_trainer_state(history: TrainingHistory, path: str | os.PathLike[str], **about: Any) -> None:
    """Write `trainer_state` as strict JSON to ``path``, normally ``trainer_state.json``, whole or not at all.

    Keywords and errors as for `trainer_state`; an OSError if it cannot be written.
    """
    replace_file(path, (to_text(trainer_state(history, **about), indent=2) + "\n").encode())


def _training_entries(history: TrainingHistory, every: int) -> Iterator[dict[str, Any]]:
    """Yield an entry for each step that ``every`` divides, made of the kept steps since the one before."""
    steps, losses = history.column("step") + 1, history.column("loss")
    first = 0
    for last in np.flatnonzero(steps % every == 0).tolist():
        window = losses[first : last + 1]
        window = window[np.isfinite(window)]
        loss = float((window / len(window)).sum()) if len(window) else math.nan
        yield _finite({**history[last].to_dict("hf"), "loss": loss})
        first = last + 1


def _evaluation_entries(measures: Iterable[tuple[int, Mapping[str, float]]]) -> Iterator[dict[str, Any]]:
    for step, named in measures:
        # Theirs puts the prefix before the names that have it not; where that would make two of one name, all get it.
        clash = any(f"eval_{name}" in named for name in named)
        values = {name: checks.real(f"measure {name!r}", value, error=InputError) for name, value in named.items()}
        prefixed = {
            name if name.startswith("eval_") and not clash else f"eval_{name}": value for name, value in values.items()
        }
        yield _finite({**prefixed, "step": checks.integer("a measure's step", step, 0, error=InputError)})


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if math.isfinite(value)}
