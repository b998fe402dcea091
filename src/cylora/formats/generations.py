"""A folder of checkpoints, one file for each generation: the last few of one training."""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cylora import checks
from cylora.adapter import AdapterSet, LoraAdapter
from cylora.errors import FormatError, InputError
from cylora.formats.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cylora.formats.durable import remove_leftovers
from cylora.trainer import LoraTrainer

__all__ = ["list_generations", "load_generation", "save_generation"]

NAME = re.compile(r"checkpoint-(?P<number>[0-9]{8,16})\.safetensors")
logger = logging.getLogger("cylora")


def list_generations(folder: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Return number and path of every checkpoint in ``folder``, oldest first; OSError if it cannot be read.

    Only the files' names are looked at.
    """
    names = [match for match in map(NAME.fullmatch, os.listdir(folder)) if match]
    return sorted((int(match["number"]), Path(folder) / match[0]) for match in names)


def save_generation(
    folder: str | os.PathLike[str],
    trainer: LoraTrainer,
    adapters: LoraAdapter | AdapterSet,
    *,
    keep: int = 2,
    rng: np.random.Generator | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write the next generation into ``folder`` and return its path; remove all but the last ``keep`` (>= 2).

    One process at a time may write into a folder: what a killed one left half written is removed first. Arguments and
    errors as for `save_checkpoint`; after an error no older generation is gone.
    """
    keep = checks.integer("keep", keep, 2, error=InputError)
    present = list_generations(folder)
    number = present[-1][0] + 1 if present else 1
    path = Path(folder) / f"checkpoint-{number:08d}.safetensors"
    remove_leftovers(folder, "checkpoint-")  # else each kill would take a file's space for ever
    save_checkpoint(trainer, adapters, path, generation=number, rng=rng, extra=extra)
    for _, old in present[: len(present) + 1 - keep]:
        old.unlink(missing_ok=True)
    return path


def load_generation(folder: str | os.PathLike[str], *, fallback: bool = False, **arguments: Any) -> Checkpoint:
    """Load the newest generation in ``folder``.

    Parameters
    ----------
    folder : as `save_generation` filled it.
    fallback : whether to go on with an older generation where the newest is damaged; a warning to the logger ``cylora``
        names what was passed over. Otherwise that is an error.
    **arguments : as for `load_checkpoint`.

    Raises
    ------
    FormatError   If there is none, or the newest (with ``fallback``, each) is damaged.
    """
    present = list_generations(folder)
    if not present:
        raise FormatError(f"{folder}: must hold a checkpoint-<number>.safetensors, got none")
    candidates = present[::-1] if fallback else present[-1:]
    for number, path in candidates[:-1]:
        try:
            return _load(number, path, arguments)
        except FormatError as error:
            logger.warning("passed over a damaged checkpoint: %s", error)
    try:
        return _load(*candidates[-1], arguments)
    except FormatError as error:
        if len(candidates) == len(present):
            raise
        raise FormatError(f"{error}; an older one is there: {present[-2][1].name}") from error


def _load(number: int, path: Path, arguments: Mapping[str, Any]) -> Checkpoint:
    checkpoint = load_checkpoint(path, **arguments)
    if checkpoint.generation != number:
        raise FormatError(f"{path}: generation must be {number}, as in its name, got {checkpoint.generation}")
    return checkpoint
