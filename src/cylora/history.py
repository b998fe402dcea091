"""TrainingStep and TrainingHistory: what each step was, kept in columns.

(a) A row is three float64 (loss, learning rate, gradient norm) and a flag: 25 bytes. The step's index follows from its
    place and perplexity from the loss, so neither is stored.
(b) Steps are recorded by the kernel that updates the weights, in the same uninterruptible call, straight into these
    arrays (`buffers`); `append` does the same from Python.
"""

import csv
import json
import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Self, overload

import numpy as np
from numpy.typing import NDArray

from cylora import checks, plotting
from cylora.errors import ConfigError, FormatError, InputError, StateError
from cylora.history_text import COLUMNS, read_rows

__all__ = ["TrainingHistory", "TrainingStep"]

STORED = ("loss", "learning_rate", "grad_norm", "skipped")
HF_NAMES = ("step", "loss", "learning_rate", "grad_norm")
FIRST_CAPACITY = 64


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _checked_names(names: str) -> str:
    if names not in ("cylora", "hf"):
        raise ConfigError(f"names must be 'cylora' or 'hf', got {names!r}")
    return names


def _json_number(value: float) -> float | str:
    """Strict JSON has no NaN or infinity: those become the strings "NaN", "Infinity", "-Infinity"."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class TrainingStep(NamedTuple):
    """What one step was: immutable, and a tuple of its fields.

    Attributes
    ----------
    step : int
        0-based index.
    loss : float
        As the caller gave it.
    learning_rate : float
        The rate this step used.
    grad_norm : float
        Global L2 norm over A and B together, before clipping.
    perplexity : float
        exp(loss); ``inf`` where that overflows.
    skipped : bool
        True if the gradient was not finite and the step changed nothing.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    perplexity: float
    skipped: bool = False

    def to_dict(self, names: str = "cylora") -> dict[str, int | float | bool]:
        """Return the fields by name.

        ``names="hf"`` gives what Hugging Face's ``Trainer.state.log_history`` has: step (counted from 1, as its
        ``global_step``), loss, learning_rate, grad_norm.
        """
        if _checked_names(names) == "cylora":
            return self._asdict()
        return dict(zip(HF_NAMES, (self.step + 1, self.loss, self.learning_rate, self.grad_norm), strict=True))

    def to_json(self) -> str:
        """Return one strict JSON object; NaN and infinities are the strings "NaN", "Infinity", "-Infinity"."""
        return json.dumps({k: _json_number(v) if isinstance(v, float) else v for k, v in self._asdict().items()})


class TrainingHistory(Sequence[TrainingStep]):
    """All steps of a training, oldest first, as a sequence of `TrainingStep`.

    Parameters
    ----------
    limit : int >= 1 or None
        Keep only the last ``limit`` records. Totals (`total_steps`, `average_loss`, `convergence_rate`,
        `skipped_steps`) are over all steps all the same.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = None if limit is None else checks.integer("limit (if not None)", limit, 1)
        self._count: NDArray[np.int64] = np.zeros(1, np.int64)
        self._sums: NDArray[np.float64] = np.zeros(3)  # losses, skipped steps, first loss
        self._rows: NDArray[np.float64] = np.zeros((0, 3))
        self._flags: NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._allocate(FIRST_CAPACITY if limit is None else min(FIRST_CAPACITY, limit))

    # ------------------------------------------------------------------ writing

    def _allocate(self, capacity: int) -> None:
        """Move to arrays of ``capacity`` rows, at least as many as before. A ring grows before it first wraps round."""
        rows: NDArray[np.float64] = np.zeros((capacity, 3))
        flags: NDArray[np.uint8] = np.zeros(capacity, np.uint8)
        used = len(self._flags)
        rows[:used], flags[:used] = self._rows, self._flags
        self._rows, self._flags = rows, flags

    def make_room(self, known: int = 0) -> bool:
        """Grow if the rows are used up and the limit allows; return whether `buffers` has other than ``known`` rows."""
        capacity = len(self._flags)
        if self.total_steps >= capacity and capacity != self.limit:
            self._allocate(2 * capacity if self.limit is None else min(2 * capacity, self.limit))
        return len(self._flags) != known

    def buffers(self) -> tuple[NDArray[Any], ...]:
        """Return the live arrays (rows, flags, sums, count) for a kernel that records into them."""
        return self._rows, self._flags, self._sums, self._count

    def append(self, *, loss: float, learning_rate: float, grad_norm: float, skipped: bool = False) -> TrainingStep:
        """Record one step and return it; its index is the number of steps before it."""
        named = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        row, flag = [checks.real(name, value, error=InputError) for name, value in named.items()], bool(skipped)
        self.make_room()
        slot = self.total_steps % len(self._flags)
        self._rows[slot], self._flags[slot] = row, flag
        if self.total_steps == 0:
            self._sums[2] = row[0]
        self._sums[:2] += row[0], flag
        self._count += 1
        return self[-1]

    # ------------------------------------------------------------------ totals

    @property
    def total_steps(self) -> int:
        """Steps ever recorded, whatever the limit dropped."""
        return int(self._count[0])

    def skipped_steps(self) -> int:
        """Return the number of steps ever recorded that changed nothing, their gradient not being finite."""
        return int(self._sums[1])

    def average_loss(self) -> float:
        """Mean of all losses in float64; 0.0 with none."""
        return float(self._sums[0]) / self.total_steps if self.total_steps else 0.0

    def convergence_rate(self) -> float | None:
        """(first loss - last loss) / first loss; None with fewer than two steps or a first loss of zero."""
        first = float(self._sums[2])
        if self.total_steps < 2 or first == 0:
            return None
        return (first - self[-1].loss) / first

    def last_step(self) -> TrainingStep | None:
        """Return the newest record, or None."""
        return self[-1] if len(self) else None

    # ------------------------------------------------------------------ reading

    def __len__(self) -> int:
        return self.total_steps if self.limit is None else min(self.total_steps, self.limit)

    def _order(self) -> NDArray[np.int64]:
        """Slots of the kept records, oldest first."""
        first = self.total_steps - len(self)
        return (first + np.arange(len(self), dtype=np.int64)) % len(self._flags)

    @overload
    def __getitem__(self, index: int) -> TrainingStep: ...
    @overload
    def __getitem__(self, index: slice) -> list[TrainingStep]: ...
    def __getitem__(self, index: int | slice) -> TrainingStep | list[TrainingStep]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index, kept = operator.index(index), len(self)
        place = index + kept if index < 0 else index
        if not 0 <= place < kept:
            raise IndexError(f"history index {index} is out of range: {kept} steps are kept")
        step = self.total_steps - kept + place
        slot = step % len(self._flags)
        loss, rate, norm = self._rows[slot].tolist()
        return TrainingStep(step, loss, rate, norm, _perplexity(loss), bool(self._flags[slot]))

    def __iter__(self) -> Iterator[TrainingStep]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TrainingHistory):
            return NotImplemented
        mine, theirs = self.state_dict(), other.state_dict()
        same_limit = mine.pop("limit") == theirs.pop("limit")
        return same_limit and all(np.array_equal(mine[key], theirs[key], equal_nan=True) for key in mine)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as of now, apart from a trainer that goes on writing into this one."""
        return type(self).from_state_dict, (self.state_dict(),)

    def __repr__(self) -> str:
        return f"TrainingHistory({self.total_steps} steps, {len(self)} kept, average loss {self.average_loss():.6g})"

    def column(self, name: str) -> NDArray[Any]:
        """Return one field of all kept steps, oldest first, as a read-only array.

        Names: "step" (int64), "loss", "learning_rate", "grad_norm", "perplexity" (float64), "skipped" (bool). Without a
        limit, loss, learning_rate and grad_norm share the history's memory; what they show never changes.
        """
        if name not in COLUMNS:
            raise ConfigError(f"column must be one of {', '.join(map(repr, COLUMNS))}, got {name!r}")
        kept = slice(0, len(self)) if self.limit is None else self._order()
        values: NDArray[Any]
        if name == "step":
            values = np.arange(self.total_steps - len(self), self.total_steps, dtype=np.int64)
        elif name == "skipped":
            values = self._flags[kept].astype(np.bool_)
        elif name == "perplexity":
            values = np.array([_perplexity(loss) for loss in self._rows[kept, 0].tolist()])
        else:
            values = self._rows[kept, STORED.index(name)]
        values.flags.writeable = False
        return values

    # ------------------------------------------------------------------ hand-over

    def to_dicts(self, names: str = "cylora") -> list[dict[str, int | float | bool]]:
        """Return a dict for each kept step: `TrainingStep.to_dict` with these ``names``."""
        _checked_names(names)
        return [step.to_dict(names) for step in self]

    def curves(self, label: str = "", **about: Any) -> plotting.Curves:
        """Return the kept steps as `cylora.plotting` draws them; ``about`` are the other fields of a Curves."""
        loss, rate, norm, skipped = map(self.column, STORED)
        return plotting.Curves(label, self.column("step") + 1, loss, norm, rate, skipped, **about)

    def plot(
        self,
        axes: Any = None,
        *,
        path: str | os.PathLike[str] | None = None,
        title: str = "",
        smooth: int | None = None,
        log: bool | None = None,
    ) -> Any:
        """Draw loss, gradient norm and learning rate over the kept steps, and return the matplotlib Figure.

        Steps are counted from 1; those that were skipped are marked. A long history is drawn as the lowest and highest
        value of each small range, so that no spike is lost. No window is opened and no backend chosen: a notebook shows
        the figure that is returned.

        Parameters
        ----------
        axes : None for a new figure; a matplotlib Axes for the loss alone; or three, for loss, norm and rate.
        path : file to write too: .pdf, .png or .svg. It is drawn before the file is opened.
        title : above everything.
        smooth : steps of the running mean that is drawn over the values; 0 for none, None for a fiftieth of them.
        log : whether loss and norm have logarithmic axes. None: where all values are above 0.

        Raises
        ------
        ConfigError   If an argument breaks its rule.
        InputError    If matplotlib is not there.
        """
        if path is not None:
            plotting.check_ending(path)
        figure = plotting.draw([self.curves()], title=title, smooth=smooth, log=log, axes=axes)
        if path is not None:
            Path(path).write_bytes(plotting.rendered(figure, path))
        return figure

    def write_jsonl(self, stream: IO[str]) -> None:
        """Write one JSON object a line for each kept step."""
        stream.writelines(step.to_json() + "\n" for step in self)

    def write_csv(self, stream: IO[str]) -> None:
        """Write a header and one row for each kept step (open the file with ``newline=""``)."""
        rows = csv.writer(stream)
        rows.writerow(COLUMNS)
        rows.writerows((*step[:5], int(step.skipped)) for step in self)

    @classmethod
    def read_jsonl(cls, stream: IO[str], limit: int | None = None) -> Self:
        """Read what `write_jsonl` wrote, blank lines aside. Anything wrong is a FormatError with its line.

        Totals are made from the rows, so what a limited history wrote after it dropped steps is refused.
        """
        return cls._read(stream, "jsonl", limit)

    @classmethod
    def read_csv(cls, stream: IO[str], limit: int | None = None) -> Self:
        """Read what `write_csv` wrote. Anything wrong is a FormatError with its line; limits as for `read_jsonl`."""
        return cls._read(stream, "csv", limit)

    @classmethod
    def _read(cls, stream: IO[str], form: str, limit: int | None) -> Self:
        history = cls(limit)
        for place, (step, *numbers, skipped) in read_rows(stream, form):
            if step != history.total_steps:
                expected = f"{history.total_steps} (0, then one more a row)"
                raise FormatError(f"{place}: step must be {expected}, got {step}")
            loss, rate, norm = numbers
            history.append(loss=loss, learning_rate=rate, grad_norm=norm, skipped=skipped)
        return history

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and arrays (copies), for `from_state_dict`."""
        return {
            "limit": self.limit,
            "total_steps": self.total_steps,
            "loss_sum": float(self._sums[0]),
            "skipped_steps": self.skipped_steps(),
            "first_loss": float(self._sums[2]),
            **{name: self.column(name).copy() for name in STORED},
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return the history that made ``state``. A state that does not hold together is a StateError."""
        keys = ("limit", "total_steps", "loss_sum", "skipped_steps", "first_loss", *STORED)
        limit, total, loss_sum, skipped, first_loss, *columns = checks.items("history", state, keys, StateError)
        limit = None if limit is None else checks.integer("history limit", limit, 1, error=StateError)
        history = cls(limit)
        total = checks.integer("history total_steps", total, 0, error=StateError)
        skipped = checks.integer("history skipped_steps", skipped, 0, total, StateError)
        loss_sum = checks.real("history loss_sum", loss_sum, error=StateError)
        first_loss = checks.real("history first_loss", first_loss, error=StateError)
        kept = total if limit is None else min(total, limit)
        for place, name in enumerate(STORED):
            dtype = np.bool_ if name == "skipped" else np.float64
            columns[place] = checks.array(f"history {name}", columns[place], dtype, (kept,), StateError)
        history._count[0] = total
        history._allocate(max(kept, len(history._flags)))
        first = (total - kept) % len(history._flags)
        head = min(kept, len(history._flags) - first)  # the rest of a ring goes on at its beginning
        for slots, part in ((slice(first, first + head), slice(head)), (slice(kept - head), slice(head, kept))):
            history._flags[slots] = columns[3][part]
            for place in range(3):  # one by one: all together would be copied first
                history._rows[slots, place] = columns[place][part]
        history._sums[:] = loss_sum, skipped, first_loss
        return history
