"""`cylora train`: settle what to do, train, save what was learned whatever happens, and sum up."""

import contextlib
import importlib
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from cylora import __version__
from cylora.config import thread_count
from cylora.errors import CyloraError, FormatError, InputError
from cylora.formats.adapter_file import save_adapters
from cylora.formats.durable import replace_file
from cylora.tasks.picture import draw
from cylora.tasks.progress import Progress
from cylora.tasks.protocol import CheckedTask, RunFailure, TaskFactory, load_factory, training_defaults
from cylora.tasks.run import TrainingRun
from cylora.tasks.settings import RunSettings, Tables, read_tables, resolve, task_tables

__all__ = ["train"]


def train(options: Tables, config_file: Path | None, output: Path | None, *, quiet: bool) -> int:
    """Do what `cylora train` was asked to do and return the exit code; a failure is raised.

    Parameters
    ----------
    options : the fields given on the command line, as tables.
    config_file : TOML file, or None.
    output : folder to write to, or None for a new one under ./runs.
    quiet : print only the folder.
    """
    _import_extras()
    settings, factory = _settle(options, config_file)
    thread_count(settings.config.threads)  # a wrong environment is the user's to mend, and no failure of the task
    folder = _RunFolder(output, settings.task)
    task = CheckedTask(settings.task, factory, settings.config.lora_config, settings.seed)
    folder.create()
    failure: CyloraError | None = None
    silent = quiet or sys.stderr is None  # closed by the caller, as in 2>&-
    with _Interrupt() as interrupt:
        with Progress(sys.stderr, settings.task, settings.config.max_steps, quiet=silent) as progress:
            run = TrainingRun(task, settings.config, eval_every=settings.eval_every, on_step=progress.log)
            try:
                run.evaluate()
                for record in run.steps():
                    progress.show(record)
                    if interrupt.requested:
                        break
            except CyloraError as error:
                failure = error
            except KeyboardInterrupt:  # a second Ctrl-C, or a first one where the task has its own handler
                if interrupt.requested:
                    folder.discard()
                    raise
        is_complete = failure is None and run.steps_done >= settings.config.max_steps
        if run.steps_done or is_complete:
            failure = _save(folder, run, settings, failure)
            print(folder.path if quiet else _summary(run, settings, folder))
        else:
            folder.discard()
    if failure is not None:
        raise failure
    return 0 if is_complete else 130


def _import_extras() -> None:
    """Import the optional packages now rather than fail after the training."""
    try:
        for module in ("tqdm", "matplotlib", "tomli_w"):
            importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"cylora train needs more packages ({error}): pip install 'cylora[train]'") from error


def _settle(options: Tables, config_file: Path | None) -> tuple[RunSettings, TaskFactory]:
    """Merge the layers of settings; the task's own come second but can only be asked for once its name is known."""
    layers = [("", options)]
    if config_file is not None:
        try:
            layers.insert(0, (f"{config_file}: ", read_tables(config_file)))
        except (OSError, ValueError) as error:
            if isinstance(error, CyloraError):
                raise
            raise FormatError(f"--config {config_file} cannot be read: {_reason(error)}") from error
    task = resolve(layers).task
    if ":" in task and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script, unlike python -m, does not look in the user's folder
    factory = load_factory(task)
    defaults = (f"task {task!r}: training_defaults: ", task_tables(task, training_defaults(task, factory)))
    return resolve([defaults, *layers]), factory


class _Interrupt:
    """While active, a first Ctrl-C only sets ``requested``; a second one raises KeyboardInterrupt, as ever."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = signal.SIG_IGN

    def __enter__(self) -> Self:
        # Not the main thread: Ctrl-C is not ours. Ignored (nohup, a background job): it stays so.
        with contextlib.suppress(ValueError):
            self._previous = signal.getsignal(signal.SIGINT)
            if self._previous is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not signal.SIG_IGN:
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if sys.stderr is not None:
            with contextlib.suppress(OSError):  # not through sys.stderr, whose buffer this signal may have interrupted
                os.write(2, b"\nstopping after this step and saving; Ctrl-C again aborts\n")


class _RunFolder:
    """The folder a run writes to: checked at once, made when training is about to begin."""

    def __init__(self, output: Path | None, task: str) -> None:
        self.files: list[str] = []
        self._made: list[Path] = []
        if output is None:
            started = time.strftime("%Y%m%d-%H%M%S")
            output = _unused(Path("runs") / f"{re.sub(r'[^A-Za-z0-9_.]+', '-', task)}-{started}")
        self.path = output
        with self._refusal():
            if output.is_symlink() and not output.exists():
                raise InputError(f"--output {output} must be a new or empty folder, got a broken link")
            if output.exists() and not output.is_dir():
                raise InputError(f"--output {output} must be a new or empty folder, got a file")
            if output.exists() and any(output.iterdir()):
                raise InputError(f"--output {output} must be a new or empty folder, got one with files in it")

    def create(self) -> None:
        """Make the folder and the missing ones above it."""
        with self._refusal():
            for folder in reversed([self.path, *self.path.parents]):
                if not folder.exists():
                    folder.mkdir()
                    self._made.append(folder)
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise InputError(f"--output {self.path} must be writable, got a folder that is not")

    def discard(self) -> None:
        """Remove what `create` made; nothing has been written."""
        with contextlib.suppress(OSError):
            for folder in reversed(self._made):
                folder.rmdir()

    def write(self, name: str, write: Callable[[Path], None]) -> RunFailure | None:
        """Write one file; return, not raise, what went wrong, so that the others are still written."""
        try:
            write(self.path / name)
        except (OSError, InputError) as error:
            return RunFailure(f"{self.path / name} was not written: {_reason(error)}")
        self.files.append(name)
        return None

    @contextlib.contextmanager
    def _refusal(self) -> Any:
        try:
            yield
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"--output {self.path} cannot be used: {_reason(error)}") from error


def _unused(path: Path) -> Path:
    """Return ``path``, with a number behind it if another run of this second has taken it."""
    number, candidate = 1, path
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _save(
    folder: _RunFolder, run: TrainingRun, settings: RunSettings, failure: CyloraError | None
) -> CyloraError | None:
    """Write everything, the weights before any more of the task's code runs; return the first failure."""
    history, config = io.StringIO(), importlib.import_module("tomli_w").dumps(settings.to_tables())
    run.history.write_jsonl(history)
    header = f"# cylora {__version__}. Once more: cylora train --config config.toml\n\n"
    problems: list[CyloraError | None] = [
        failure,
        folder.write("adapter.safetensors", lambda path: save_adapters(path, run.task.adapters, step=run.steps_done)),
        folder.write("history.jsonl", lambda path: replace_file(path, history.getvalue().encode())),
        folder.write("config.toml", lambda path: replace_file(path, (header + config).encode())),
    ]
    if failure is None:
        try:
            run.evaluate()
        except CyloraError as error:
            problems.append(error)
    if run.measures:
        lines = "".join(json.dumps({"step": step, **measures}) + "\n" for step, measures in run.measures)
        problems.append(folder.write("measures.jsonl", lambda path: replace_file(path, lines.encode())))
    picture = draw(run, f"{settings.task}, seed {settings.seed}", settings.config.max_grad_norm)
    problems.append(folder.write("picture.png", lambda path: replace_file(path, picture)))
    return next((problem for problem in problems if problem is not None), None)


def _summary(run: TrainingRun, settings: RunSettings, folder: _RunFolder) -> str:
    """Sum a run up for a person."""
    done, wanted = run.steps_done, settings.config.max_steps
    stopped = "" if done >= wanted else f" of {wanted:,}, stopped early"
    lines = [f"{settings.task}, seed {settings.seed}: {done:,} steps{stopped}", ""]
    if run.measures:
        (_, before), (last, after) = run.measures[0], run.measures[-1]
        width = max(map(len, before))
        lines.append(f"{'':{width}}  {'before':>10}  {'after' if last == done else f'at step {last}':>10}")
        lines.extend(f"{name:{width}}  {_number(before[name]):>10}  {_number(after[name]):>10}" for name in before)
        lines.append("")
    trainable, total = run.task.adapters.param_count(), run.task.total_parameters
    share = f" of {total:,} parameters ({100 * trainable / total:.1f} %)" if total else " parameters"
    lines.append(f"trained  {trainable:,}{share}")
    seconds = run.task_seconds + run.step_seconds
    if seconds:
        step_share = f"{100 * run.step_seconds / seconds:.1f} %"
        lines.append(f"speed    {done / seconds:,.0f} steps per second, {step_share} of the time in cylora's step")
    lines.append(f"written  {folder.path}: {', '.join(folder.files)}")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.4g}"


def _reason(error: Exception) -> str:
    """Return what the system says, without number and path, which the message names already."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
