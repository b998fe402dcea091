"""AdapterPublisher: hands whole, unchanging versions of adapters to readers while these adapters are trained."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from cylora import checks
from cylora.adapter import AdapterSet, LoraAdapter
from cylora.errors import ConfigError, InputError, PublishError, StateError
from cylora.flat import FloatArray
from cylora.formats.durable import check_name, last_version, publish_directory
from cylora.optimizer import grad_norm
from cylora.serving.announcing import Announcing, Hook, PublishMetrics
from cylora.serving.lending import Lending
from cylora.serving.snapshot import AdapterSnapshot
from cylora.serving.turns import Turns
from cylora.serving.version_files import BaseConfig, version_files
from cylora.state import TrainerState
from cylora.trainer import LoraTrainer

__all__ = ["AdapterPublisher", "checked_norm_ratio"]

_Result = TypeVar("_Result")


def checked_norm_ratio(value: float | None) -> float | None:
    """Return a ``max_norm_ratio``, or raise ConfigError."""
    if value is None:
        return None
    return checks.real("max_norm_ratio (if not None)", value, ">= 1", lambda x: x >= 1)


class AdapterPublisher:
    """Publish versions of adapters that are being trained: each whole, unchanging, and numbered upwards.

    Parameters
    ----------
    adapters : LoraAdapter or AdapterSet
        Read at every `publish`, never written. They stay private to their trainer.
    trainer : LoraTrainer, optional
        The one that steps them: `publish` copies between two of its steps. Without one the caller sees to it that
        nobody writes to ``adapters`` during `publish`.
    keep : int >= 1
        How many versions `get` and `rollback` can reach, the latest included.
    max_norm_ratio : float >= 1, optional
        A snapshot whose norm is more than this times the latest one's is refused. After a `rollback` the latest one is
        what was restored: adapters that have grown beyond that since are refused until they are written back, or this
        is set anew.
    name : str
        What versions are called on disk: letters, digits, ``.``, ``_`` and ``-``, at most 100.
    ema : bool
        Publish the trainer's average of the weights (``ema_decay`` in its config) instead of the weights.
    metrics : optional
        Told of each version (``published(name, version)``), before the hooks, and each refusal (``refused(name)``).
        What they raise is treated as what a hook raises.

    Attributes
    ----------
    latest : AdapterSnapshot or None
        The version to serve; None before the first. A plain attribute: reading it takes no lock and never waits. A
        reader takes it once for each request and keeps what it took.

    Raises
    ------
    ConfigError, InputError, StateError
        If a parameter breaks its rule or the trainer belongs to other adapters.

    Notes
    -----
    Any number of threads may publish; they take turns, each with its hooks. A forked child may go on publishing on its
    own, with versions that count on from those at the fork.
    """

    def __init__(
        self,
        adapters: LoraAdapter | AdapterSet,
        trainer: LoraTrainer | None = None,
        *,
        keep: int = 2,
        max_norm_ratio: float | None = None,
        name: str = "adapter",
        ema: bool = False,
        metrics: PublishMetrics | None = None,
    ) -> None:
        if not isinstance(adapters, (LoraAdapter, AdapterSet)):
            raise InputError(f"adapters must be a LoraAdapter or an AdapterSet, got {type(adapters).__name__}")
        if not isinstance(trainer, LoraTrainer | None):
            raise InputError(f"trainer must be a LoraTrainer or None, got {type(trainer).__name__}")
        if ema and (trainer is None or trainer.config.ema_decay is None):
            raise ConfigError("ema must be False without a trainer that has ema_decay in its config, got True")
        self._keep = checks.integer("keep", keep, 1)
        self.max_norm_ratio = max_norm_ratio
        self.name = check_name(name)
        self._adapters, self._trainer, self._ema = adapters, trainer, bool(ema)
        self._lending = Lending(adapters.flat.vector.size)
        self._kept: dict[int, AdapterSnapshot] = {}  # never changed, only replaced: readers look without a lock
        self._last_version = 0
        self._counts = dict.fromkeys(("published", "refused", "rolled_back"), 0)
        self._announcing = Announcing(self.name, metrics)
        self._turns = Turns()
        self.latest: AdapterSnapshot | None = None
        self._between_steps(lambda _: None, 10.0)

    # ------------------------------------------------------------------ publishing

    def publish(self, *, timeout: float = 10.0) -> AdapterSnapshot:
        """Copy the adapters as they are between two steps, make the copy the latest version, and return it.

        Parameters
        ----------
        timeout : float >= 0, seconds
            How long to wait for other threads that publish, or are in a hook, and then for a step under way, together.
            A step that another thread tries during the copy waits for its end; one that was just about to begin is
            refused as busy and changes nothing.

        Raises
        ------
        PublishError
            If a parameter is not finite or the norm jumped. The latest version stays.
        TrainerBusyError
            If the trainer or another thread that publishes was busy all the time. The latest version stays.
        StateError
            If a hook, metrics or a signal handler called this while this thread was publishing, or the process was
            forked during a step.
        """
        deadline = _deadline(timeout)

        def publish() -> AdapterSnapshot:
            snapshot = self._taken(deadline, self._last_version + 1)
            self._swap_in(snapshot)
            self._announcing.announce(snapshot, None)
            return snapshot

        return self._in_turn(publish, deadline)

    def publish_to(
        self,
        directory: str | os.PathLike[str],
        *,
        version: int | None = None,
        format: str = "peft",  # noqa: A002 - what everybody calls it
        dtype: str = "float32",
        base_config: BaseConfig | None = None,
        keep: int | None = None,
        timeout: float = 10.0,
    ) -> Path:
        """Publish as `publish` does, and to disk: ``directory/<name>@v<version>-<hash>``, to which ``latest`` points.

        The files are in place before the version is the latest in memory and the hooks are told of it. On an error it
        is neither; only if the sync of ``latest`` fails may that point to it all the same, until the next version.
        A new process counts on from the versions that are in the directory.

        Parameters
        ----------
        directory : an existing directory, for one publisher of each name.
        version : int, optional
            Write this kept version instead of a new one; after a `rollback`, say. If it is there already, ``latest``
            points to it again.
        format : "peft" or "gguf"
            What a PEFT directory holds, or ``adapter.gguf``. Both need an AdapterSet, whose names are those of modules.
        dtype : "float32", "float16" or "bfloat16"
        base_config : mapping or path
            Of the base model, as for `cylora.formats.save_gguf`; with "gguf" alone.
        keep : int >= 1, optional
            Remove all versions but the ``keep`` published last: keep more than are published while a server loads one.
            What cannot be removed is a warning to the logger ``cylora``.
        timeout : float >= 0, seconds
            As for `publish`. It does not bound the writing, for which publishers of other processes take turns, too.

        Returns
        -------
        Path
            The version's directory.

        Raises
        ------
        PublishError, TrainerBusyError, StateError
            As `publish` does.
        InputError, ConfigError, FormatError
            If an argument breaks its rule, or the adapters do not fit the format.
        OSError
            If it cannot be written.
        """
        deadline = _deadline(timeout)

        def publish() -> Path:
            if version is None:
                on_disk = last_version(directory, self.name)
                snapshot = self._taken(deadline, max(self._last_version, on_disk) + 1)
            else:
                snapshot = self.get(version)
            files = version_files(snapshot, format, dtype, base_config)
            # Even if writing fails halfway, no other content gets this number.
            self._last_version = max(self._last_version, snapshot.version)
            path = publish_directory(directory, self.name, snapshot.version, files, keep=keep)
            if version is None:
                self._swap_in(snapshot)
            self._announcing.announce(snapshot, path, is_new=version is None)
            return path

        return self._in_turn(publish, deadline)

    def rollback(self, version: int) -> AdapterSnapshot:
        """Publish the content of a kept version again, as a new version, and return that.

        A new number, since numbers only rise for readers and servers cache by name; `AdapterSnapshot.restored_from` has
        the old one. Nothing is copied, and the adapters that are being trained stay as they are: to train on from
        there, write ``snapshot.vector`` into them, within ``trainer.hold``, in which no publisher may be called. With a
        ``max_norm_ratio`` the next version's norm is compared with that of the restored one. It waits for other threads
        that publish as long as they take, and for no step.

        Raises
        ------
        InputError   If the version is not kept.
        """

        def restore() -> AdapterSnapshot:
            found = self.get(version)
            snapshot = replace(found, version=self._last_version + 1, restored_from=found.version)
            self._swap_in(snapshot)
            self._counts["rolled_back"] += 1
            self._announcing.announce(snapshot, None)
            return snapshot

        return self._in_turn(restore)

    # ------------------------------------------------------------------ reading

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions that are kept, oldest first."""
        return tuple(self._kept)

    def get(self, version: int) -> AdapterSnapshot:
        """Return a kept version; InputError if it is not kept."""
        kept = self._kept
        version = checks.integer("version", version, 0, error=InputError)
        if version not in kept:
            raise InputError(f"version must be one of those kept, {', '.join(map(str, kept)) or 'none'}, got {version}")
        return kept[version]

    @property
    def max_norm_ratio(self) -> float | None:
        """How many times the latest version's norm the next one's may be; None is no limit. May be set."""
        return self._max_norm_ratio

    @max_norm_ratio.setter
    def max_norm_ratio(self, value: float | None) -> None:
        self._max_norm_ratio = checked_norm_ratio(value)

    def counters(self) -> dict[str, int]:
        """Return how many versions were published (those of a rollback too), refused, rolled back; errors of hooks.

        ``hook_errors`` counts what metrics raised, too.
        ``buffers`` is how many vectors were ever made: at full rate it stays at ``keep`` and one, and one more for each
        version that readers hold beyond those.
        """
        return self._counts | {"hook_errors": self._announcing.errors, "buffers": self._lending.allocated}

    # ------------------------------------------------------------------ hooks

    def add_hook(self, hook: Hook) -> None:
        """Call ``hook(snapshot, path)`` after each version, in order; ``path`` is its directory or None.

        It runs in the thread that publishes, which waits for it; readers do not. What it raises is logged (logger
        ``cylora``), counted and kept as ``last_hook_error``: the version stands, and so do the other hooks. A hook must
        not publish.
        """
        self._in_turn(lambda: self._announcing.add(hook))

    def remove_hook(self, hook: Hook) -> None:
        """Call this hook no more; InputError if it was not added."""
        self._in_turn(lambda: self._announcing.remove(hook))

    @property
    def last_hook_error(self) -> str | None:
        """What metrics and hooks raised when the last version was announced; None if they raised nothing."""
        return self._announcing.last_error

    # ------------------------------------------------------------------ parts

    def _in_turn(self, function: Callable[[], _Result], deadline: float = math.inf) -> _Result:
        """Call ``function``, which changes things, while no other thread does."""
        if self._trainer is not None and self._trainer.is_held_here():
            raise StateError("a publisher must not be called within hold of its trainer, which publishers wait for")
        return self._turns.take(function, _left(deadline))

    def _taken(self, deadline: float, version: int) -> AdapterSnapshot:
        """Return a copy of the adapters that may be published."""
        memory = self._lending.take()

        def copy(state: TrainerState | None) -> int | None:
            average = state.ema if state is not None and self._ema else None  # before the first step it is the weights
            np.copyto(memory, self._adapters.flat.vector if average is None else average)
            return None if state is None else state.history.total_steps

        try:
            step = self._between_steps(copy, _left(deadline))
            norm = grad_norm([memory])
            self._check(memory, norm)
        except BaseException:
            self._lending.give_back(memory)
            raise
        return AdapterSnapshot(version, step, self._adapters.over(self._lending.lend(memory)), norm)

    def _between_steps(self, function: Callable[[TrainerState | None], _Result], timeout: float) -> _Result:
        """Call ``function`` while no step is under way, after waiting for one that is."""
        if self._trainer is None:
            return function(None)
        return self._trainer.hold(self._adapters, function, timeout=timeout)

    def _check(self, memory: FloatArray, norm: float) -> None:
        latest, limit = self.latest, self._max_norm_ratio
        stays = "none is published yet" if latest is None else f"version {latest.version} stays"
        if not math.isfinite(norm):
            index = checks.first_nonfinite(memory)
            name, place = self._adapters.flat.locate(index or 0)
            where = f"{memory[index]} at [{', '.join(map(str, place))}]"
            self._refuse(f"{name} must be finite to be published, got {where}; {stays}")
        if latest is not None and limit is not None and latest.norm > 0 and norm > limit * latest.norm:
            rule = f"the norm must be at most {limit:g} times that of version {latest.version}, {latest.norm:.9g}"
            self._refuse(f"{rule}, to be published, got {norm:.9g}; {stays}")

    def _refuse(self, message: str) -> NoReturn:
        self._counts["refused"] += 1
        self._announcing.refuse()
        raise PublishError(message)

    def _swap_in(self, snapshot: AdapterSnapshot) -> None:
        # In this order, whatever a reader takes as the latest is among those kept.
        kept = self._kept | {snapshot.version: snapshot}
        self._last_version, self._kept = snapshot.version, kept
        self.latest = snapshot
        self._kept = dict(list(kept.items())[-self._keep :])
        self._counts["published"] += 1

    def __reduce__(self) -> Any:
        raise TypeError("an AdapterPublisher is not copied or pickled: its readers are in this process")


def _deadline(timeout: float) -> float:
    """Return when a wait that begins now has to end."""
    return time.monotonic() + checks.real("timeout", timeout, ">= 0", lambda x: x >= 0, InputError)


def _left(deadline: float) -> float:
    """Return the seconds until then."""
    return max(0.0, deadline - time.monotonic())
