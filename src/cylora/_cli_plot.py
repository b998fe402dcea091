"""`cylora plot`: draw runs over each other, from their folders, or from histories as JSON Lines or CSV."""

import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from cylora import plotting
from cylora._cli_files import reading, visible, writing
from cylora._cli_run_folder import HISTORY, MEASURES
from cylora.errors import FormatError, InputError
from cylora.formats.checkpoint import read_checkpoint
from cylora.formats.container import open_regular
from cylora.formats.durable import replace_file
from cylora.formats.generations import list_generations
from cylora.formats.inspection import CHECKPOINTS
from cylora.history_text import read_rows

__all__ = ["plot"]

MAX_RUNS = 24  # with more, colours and dashes repeat
MAX_BYTES = 2**30  # some seven million steps
MAX_LINE = 2**16
MAX_STEP = 2**53  # which float64, and so a picture, tells from the next
LONGEST_LABEL = 60


def plot(paths: Sequence[Path], output: Path, *, smooth: int | None, log: bool | None) -> int:
    """Draw the runs at ``paths`` into the file ``output``, print its name and return the exit code."""
    plotting.check_ending(output)
    if len(paths) > MAX_RUNS:
        raise InputError(f"at most {MAX_RUNS} runs can be told apart in one picture, got {len(paths)}")
    runs = [_curves(path, label) for path, label in zip(paths, _labels(paths), strict=True)]
    title = runs[0].label if len(runs) == 1 else ""
    content = plotting.rendered(plotting.draw(runs, title=title, smooth=smooth, log=log), output)
    with writing(output):
        replace_file(output, content)
    print(visible(output))
    return 0


def _labels(paths: Sequence[Path]) -> list[str]:
    """Call a run by its folder's name, or where that is another's too by the path as it was given."""
    # Not path.resolve(): in a loop of links Python 3.11 raises RuntimeError, where reading says what is wrong.
    places = [Path(os.path.realpath(path.parent if path.name == HISTORY else path)) for path in paths]
    names = [place.name for place in places]
    counts = Counter(names)
    labels = [visible(name if counts[name] == 1 else path) for name, path in zip(names, paths, strict=True)]
    return [label if len(label) <= LONGEST_LABEL else f"...{label[3 - LONGEST_LABEL :]}" for label in labels]


def _curves(path: Path, label: str) -> plotting.Curves:
    with reading(path):
        if not path.is_dir():
            return _from_text(path, label)
        history, measures, checkpoint = path / HISTORY, path / MEASURES, _newest_checkpoint(path)
        named = _read_measures(measures) if measures.exists() else []
        # A run writes its last checkpoint before its history: a newer one is of a run that goes on, or was killed.
        if checkpoint and not (history.exists() and checkpoint.stat().st_mtime_ns <= history.stat().st_mtime_ns):
            curves = read_checkpoint(checkpoint).state.history.curves(label, measures=named)
            return _with_steps(checkpoint, curves)
        if not history.exists():
            rule = f"a run's folder, or a file such as {HISTORY}"
            raise InputError(f"{path}: must be {rule}, got a folder without {HISTORY} and without checkpoints")
        return _from_text(history, label)._replace(measures=named)


def _newest_checkpoint(run: Path) -> Path | None:
    folder = run / CHECKPOINTS
    found = list_generations(folder) if folder.is_dir() else []
    return found[-1][1] if found else None


def _from_text(path: Path, label: str) -> plotting.Curves:
    """Read a history as JSON Lines or CSV, whole or from a later step on."""
    steps, flags, numbers = array("q"), array("b"), array("d")
    with _opened(path) as stream:
        form = "jsonl" if os.pread(stream.fileno(), 4096, 0).lstrip()[:1] == b"{" else "csv"
        try:
            for place, (step, *row, skipped) in read_rows(_lines(stream), form):
                least = steps[-1] + 1 if steps else 0
                if not least <= step < MAX_STEP:
                    raise FormatError(f"{place}: step must be in [{least}, {MAX_STEP}), got {step}")
                steps.append(step)
                flags.append(skipped)
                numbers.extend(row)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
    loss, rate, norm = np.frombuffer(numbers).reshape(-1, 3).T if numbers else np.empty((3, 0))
    skips = np.array(flags, np.bool_)
    return _with_steps(path, plotting.Curves(label, np.array(steps, np.int64) + 1, loss, norm, rate, skips))


def _with_steps(path: Path, curves: plotting.Curves) -> plotting.Curves:
    if not len(curves.steps):
        raise InputError(f"{path}: must have a step to draw, got none")
    return curves


def _read_measures(path: Path) -> list[tuple[int, dict[str, float]]]:
    found = []
    with _opened(path) as stream:
        try:
            for number, line in enumerate(_lines(stream), 1):
                found.append(_measures(f"line {number}", line))
        except UnicodeDecodeError as error:
            raise FormatError(f"{path}: must be text ({error})") from None
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
    return found


def _measures(place: str, line: str) -> tuple[int, dict[str, float]]:
    try:
        row: Any = json.loads(line)
        step = row.pop("step")
        values = {name: float(value) for name, value in row.items() if isinstance(value, (int, float))}
        if type(step) is int and 0 <= step < MAX_STEP and len(values) == len(row):
            return step, {
                visible(name): value if abs(value) <= plotting.LARGEST else math.nan for name, value in values.items()
            }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        pass
    raise FormatError(f"{place} must be a JSON object of a step and named numbers, got {line[:40]!r}")


def _opened(path: Path) -> IO[str]:
    descriptor = open_regular(path)
    size = os.fstat(descriptor).st_size
    if size > MAX_BYTES:
        os.close(descriptor)
        raise FormatError(f"{path}: must have at most {MAX_BYTES} bytes, got {size}")
    return os.fdopen(descriptor, encoding="utf-8", newline="")


def _lines(stream: IO[str]) -> Iterator[str]:
    """Yield the lines of a file that may be one endless line."""
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise FormatError(f"line {number} must have at most {MAX_LINE} characters, got more")
        yield line
