"""Look at what a path holds: a run, a checkpoint or an adapter, with the facts that people ask for."""

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cylora import checks
from cylora.adapter import AdapterSet, LoraAdapter
from cylora.errors import CyloraError, FormatError
from cylora.formats.checkpoint import read_checkpoint
from cylora.formats.container import open_regular
from cylora.formats.durable import LATEST, PUBLISHED, directory_digest
from cylora.formats.generations import list_generations
from cylora.formats.gguf_reader import GGUF_MAGIC, read_gguf
from cylora.formats.peft import TENSORS_NAME, read_peft
from cylora.formats.peft_config import CONFIG_NAME
from cylora.optimizer import grad_norm

__all__ = ["ADAPTERS", "CHECKPOINTS", "Inspected", "Verdict", "inspect", "verify"]

CHECKPOINTS, ADAPTERS = "checkpoints", "adapters"  # the folders in a run's folder


class Inspected(NamedTuple):
    """What was found.

    Attributes
    ----------
    kind : "checkpoint", "PEFT adapter" or "GGUF adapter"
    path : Path of the file or directory that was read; of a run, its newest checkpoint.
    adapters : AdapterSet or LoraAdapter
    facts : dict of JSON values by name, in the order to show them; NaN and infinities are text.
    average : adapters that hold the average of the weights, where a checkpoint has one.
    """

    kind: str
    path: Path
    adapters: AdapterSet | LoraAdapter
    facts: dict[str, Any]
    average: AdapterSet | LoraAdapter | None = None


class Verdict(NamedTuple):
    """Whether one file or directory is whole; ``problem`` is None if so."""

    path: Path
    problem: str | None


def inspect(path: str | os.PathLike[str]) -> Inspected:
    """Read the run, checkpoint or adapter at ``path``, which may be a link to one.

    Raises
    ------
    FormatError   If it is none of these, or breaks a rule of its format.
    OSError       If it cannot be read.
    """
    given = Path(path)
    while True:
        found = _resolve(given)
        try:
            return _read(found)
        except FileNotFoundError:
            if not given.is_dir() or os.path.lexists(found):
                raise
            # What was a run's newest has been removed since, in favour of a newer one: look again.


def verify(path: str | os.PathLike[str]) -> Iterator[Verdict]:
    """Check everything under ``path``: of a run, each checkpoint and each published adapter.

    A training may go on meanwhile: what it removes in favour of newer ones is passed over.

    Raises
    ------
    FormatError   If ``path`` is a folder with nothing in it that `inspect` reads.
    OSError       If something cannot be read.
    """
    given = Path(path)
    parts = _parts(given) if given.is_dir() and not _is_adapter(given) else []
    if not parts:
        found = _resolve(given)
        yield Verdict(found, _problem(found))
        return
    some_left = False
    for part, number in parts:
        try:
            problem = _problem(part, number)
        except FileNotFoundError:
            continue
        some_left = True
        yield Verdict(part, problem)
    if not some_left:  # all replaced since they were listed
        yield from verify(given)


def _problem(part: Path, number: int | None = None) -> str | None:
    """Return what is wrong with a checkpoint, of which a folder has the ``number``, or an adapter; None if nothing is.

    FileNotFoundError if it is not there at all.
    """
    try:
        facts = _read(part).facts
        if not facts["finite"]:
            return "a weight is NaN or infinite"
        if number is not None and facts["generation"] != number:
            return f"generation must be {number}, as in its name, got {facts['generation']}"
        if match := PUBLISHED.fullmatch(part.name):
            digest = directory_digest({name: _digest(part / name) for name in os.listdir(part)})
            if digest[:8] != match["digest"]:
                return f"the files' hash must be {match['digest']}, as in the name, got {digest[:8]}: they were changed"
    except CyloraError as error:
        return str(error)
    except FileNotFoundError as error:
        if not os.path.lexists(part):
            raise
        return f"{error.filename} must be there, got nothing"
    return None


def _parts(folder: Path) -> list[tuple[Path, int | None]]:
    """Return the checkpoints in a run or another folder, with the numbers in their names, and the adapters."""
    folders = [one for one in (folder, folder / CHECKPOINTS, folder / ADAPTERS) if one.is_dir()]
    parts: list[tuple[Path, int | None]] = [(file, number) for one in folders for number, file in list_generations(one)]
    for one in folders:
        # Not those being written, whose names begin with a dot, and not `latest`, which is one of the others.
        names = sorted(name for name in os.listdir(one) if not name.startswith("."))
        parts += [(one / name, None) for name in names if _is_adapter(one / name) and not (one / name).is_symlink()]
    return parts


def _resolve(path: Path) -> Path:
    """Return the file, or the PEFT directory, that stands for ``path``: links followed, so that it stays the same."""
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if not path.is_dir():
        is_part = path.name in (CONFIG_NAME, TENSORS_NAME) and (path.parent / CONFIG_NAME).exists()
        return path.parent if is_part else path
    if _is_adapter(path):
        return path
    for folder in (path / CHECKPOINTS, path):
        if folder.is_dir() and (present := list_generations(folder)):
            return present[-1][1]
    for folder in (path / ADAPTERS / LATEST, path / LATEST):
        if _is_adapter(folder):
            return _resolve(folder)
    if (path / CHECKPOINTS).is_dir():
        raise FormatError(f"{path}: must hold a checkpoint or an adapter, got a run that has not saved any")
    raise FormatError(f"{path}: must be a run, a checkpoint or an adapter, got a folder with none of their files")


def _is_adapter(folder: Path) -> bool:
    """Return whether there is a PEFT directory, be it half of one."""
    return (folder / CONFIG_NAME).exists() or (folder / TENSORS_NAME).exists()


# ------------------------------------------------------------------ one file or directory


def _read(found: Path) -> Inspected:
    if found.is_dir():
        return _inspected("PEFT adapter", found, found / TENSORS_NAME, *read_peft(found))
    with os.fdopen(open_regular(found), "rb") as file:
        is_gguf = file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    if is_gguf:
        return _inspected("GGUF adapter", found, found, *read_gguf(found))
    saved = read_checkpoint(found)
    facts = saved.facts
    shown = {
        "cylora": facts.version,
        "generation": facts.generation,
        "steps": facts.total_steps,
        "skipped steps": facts.skipped_steps,
        "micro-batches pending": facts.accumulated,
        "optimizer state": facts.state_dtype or "none yet",
        "training": {key: _json_value(value) for key, value in facts.training.items()},
    }
    if saved.state.ema is None:
        return _inspected("checkpoint", found, found, saved.adapters, shown)
    shown["average"] = f"of the weights, with ema_decay {facts.training['ema_decay']:g}"
    average = saved.adapters.with_parameters(saved.state.ema)
    return _inspected("checkpoint", found, found, saved.adapters, shown)._replace(average=average)


def _inspected(
    kind: str, path: Path, file: Path, adapters: AdapterSet | LoraAdapter, facts: dict[str, Any]
) -> Inspected:
    members = adapters if isinstance(adapters, AdapterSet) else {"adapter": adapters}
    common = {
        "kind": kind,
        "path": str(path),
        "bytes": file.stat().st_size,
        "sha256": _digest(file).hex(),
        "parameters": adapters.param_count(),
        "finite": checks.first_nonfinite(adapters.flat.vector) is None,
    }
    described = {
        name: {
            "d_in": one.d_in,
            "d_out": one.d_out,
            "rank": one.rank,
            "alpha": one.alpha,
            "scaling": one.scaling,
            "norm A": _json_value(grad_norm([one.a_matrix])),
            "norm B": _json_value(grad_norm([one.b_matrix])),
        }
        for name, one in members.items()
    }
    return Inspected(kind, path, adapters, common | facts | {"adapters": described})


def _json_value(value: Any) -> Any:
    """Return ``value``, or its name if it is one of the numbers that JSON does not have."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _digest(file: Path) -> bytes:
    with os.fdopen(open_regular(file), "rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
