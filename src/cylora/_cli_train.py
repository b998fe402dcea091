"""`cylora train`: settle what to do, train, save what was learned whatever happens, and sum up."""

import contextlib
import importlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from cylora import LoraTrainer, __version__
from cylora._cli_board import Board
from cylora._cli_run_folder import CONFIG, HISTORY, MEASURES, RunFolder, reason
from cylora.config import thread_count
from cylora.errors import CyloraError, FormatError, InputError
from cylora.formats.durable import LATEST, content_digest, publish_directory, published, replace_file
from cylora.formats.generations import list_generations, load_generation, save_generation
from cylora.formats.inspection import ADAPTERS, CHECKPOINTS
from cylora.formats.peft import peft_files
from cylora.formats.trainer_state import TRAINER_STATE, save_trainer_state
from cylora.parts import parts_of
from cylora.tasks.picture import draw
from cylora.tasks.progress import Progress
from cylora.tasks.protocol import CheckedTask, TaskFactory, load_factory, training_defaults
from cylora.tasks.run import TrainingRun
from cylora.tasks.settings import RunSettings, Tables, read_tables, resolve, task_tables
from cylora.trackers import EVENT_WRITER, all_of

__all__ = ["resume", "train"]

# What may differ when a run goes on: the rest decides its bits.
RESUMABLE = {"run": ("save_every",), "training": ("max_steps", "log_every", "threads")}


def train(options: Tables, config_file: Path | None, output: Path | None, *, quiet: bool, tensorboard: bool) -> int:
    """Do what `cylora train` was asked to do and return the exit code; a failure is raised.

    Parameters
    ----------
    options : the fields given on the command line, as tables.
    config_file : TOML file, or None.
    output : folder to write to, or None for a new one under ./runs.
    quiet : print only the folder.
    tensorboard : write event files too.
    """
    _import_extras(tensorboard=tensorboard)
    settings, factory = _settle(options, config_file)
    folder = RunFolder.new(output, settings.task)
    task = _task(settings, factory)
    folder.create()
    with folder.held():
        try:
            replace_file(folder.path / CONFIG, _config_text(settings))
        except OSError as error:
            folder.discard()
            raise InputError(f"--output {folder.path} cannot be used: {reason(error)}") from error
        return _Session(settings, task, folder, quiet=quiet, tensorboard=tensorboard).train(None)


def resume(options: Tables, path: Path, *, fallback: bool, quiet: bool, tensorboard: bool) -> int:
    """Go on with the run in the folder ``path`` where its last checkpoint is, to the bits of an uninterrupted run.

    Parameters
    ----------
    options : fields given on the command line; only some may be.
    fallback : take the checkpoint before the last where the last is damaged.
    quiet : print only the folder.
    tensorboard : write event files too.
    """
    _import_extras(tensorboard=tensorboard)
    for table, values in options.items():
        for name in values:
            if name not in RESUMABLE.get(table, ()):
                allowed = ", ".join(f"--{n.replace('_', '-')}" for names in RESUMABLE.values() for n in names)
                got = f"--{name.replace('_', '-')}"
                raise InputError(f"a run goes on with its own settings: only {allowed} may be given, got {got}")
    folder = RunFolder.existing(path)
    settings, factory = _settle(options, path / CONFIG)
    task = _task(settings, factory)
    folder.create()
    with folder.held():
        return _Session(settings, task, folder, quiet=quiet, tensorboard=tensorboard).train(fallback)


class _Session:
    """One call of the command: a run from its beginning or its last checkpoint to its end or Ctrl-C."""

    def __init__(
        self, settings: RunSettings, task: CheckedTask, folder: RunFolder, *, quiet: bool, tensorboard: bool
    ) -> None:
        self._settings, self._task, self._folder, self._quiet = settings, task, folder, quiet
        self._tensorboard = tensorboard
        self._loaded_steps = -1

    def train(self, fallback: bool | None) -> int:
        """Train, save and sum up; ``fallback`` is None for a run that begins."""
        wanted = self._settings.config.max_steps
        failure: CyloraError | None = None
        silent = self._quiet or sys.stderr is None  # closed by the caller, as in 2>&-
        progress = Progress(sys.stderr, self._settings.task, wanted, quiet=silent)
        board = Board(self._folder, progress.warn, wanted=self._tensorboard)
        with _Interrupt() as interrupt, board:
            with progress:
                interrupt.before_message = progress.before_message
                run = self._begin(progress, board, fallback)
                progress.follow(run)
                try:
                    if not run.steps_done:
                        run.evaluate()
                    for record in run.steps():
                        progress.show(record)
                        board.show(run.measures)
                        if self._is_due(run):
                            self._save_checkpoint(run, progress)
                        if interrupt.requested:
                            break
                except CyloraError as error:
                    failure = error
                except KeyboardInterrupt:  # a second Ctrl-C, or a first one where the task has its own handler
                    if interrupt.requested:
                        self._folder.discard()
                        raise
            interrupt.before_message = b"\n"  # the view is closed
            is_complete = failure is None and run.trainer.is_complete()
            if run.steps_done or is_complete:
                failure = self._save(run, failure)
                board.show(run.measures)  # the last evaluation came after everything was saved
                print(self._folder.path if self._quiet else _summary(run, self._settings, self._folder))
            else:
                self._folder.discard()
        if failure is not None:
            raise failure
        return 0 if is_complete else 130

    def _begin(self, progress: Progress, board: Board, fallback: bool | None) -> TrainingRun:
        config, checkpoints = self._settings.config, self._folder.path / CHECKPOINTS
        on_step = all_of(progress.log, board.log)
        if fallback is None or not (list_generations(checkpoints) or self._folder.has_outputs):
            return TrainingRun(self._task, LoraTrainer(config, on_step=on_step), self._settings.eval_every)
        saved = load_generation(checkpoints, fallback=fallback, on_step=on_step, **config.to_dict())
        if saved.trainer.total_steps() > config.max_steps:
            got = f"{config.max_steps} for a run that has done {saved.trainer.total_steps()}"
            raise InputError(f"max_steps must not be below the steps that are done, got {got}")
        for number, path in list_generations(checkpoints):
            if number > saved.generation:  # passed over: it must not count as one of the two that are kept
                path.rename(path.with_suffix(".damaged"))
        if saved.adapters.flat.layout != self._task.adapters.flat.layout:
            got = f"{saved.adapters!r} for {self._task.adapters!r}"
            raise FormatError(f"{checkpoints}: the adapters must be those of task {self._settings.task!r}, got {got}")
        self._task.adapters.flat.vector[...] = saved.adapters.flat.vector
        run = TrainingRun(self._task, saved.trainer, self._settings.eval_every)
        try:
            run.restore(saved.extra)
        except FormatError as error:
            raise FormatError(f"{checkpoints}: generation {saved.generation}: {error}") from error
        replace_file(self._folder.path / CONFIG, _config_text(self._settings))  # now that all fits together
        self._loaded_steps = run.steps_done
        return run

    def _is_due(self, run: TrainingRun) -> bool:
        every = self._settings.save_every
        return bool(every) and run.steps_done % every == 0 and not run.trainer.is_complete()

    def _save_checkpoint(self, run: TrainingRun, progress: Progress) -> None:
        """Write a checkpoint; where that fails, the training is worth more than it."""
        problem = self._write_checkpoint(run)
        if problem is not None:
            progress.warn(f"{problem}; the training goes on")

    def _write_checkpoint(self, run: TrainingRun) -> CyloraError | None:
        return self._folder.write(
            CHECKPOINTS, lambda path: save_generation(path, run.trainer, self._task.adapters, extra=run.progress())
        )

    def _save(self, run: TrainingRun, failure: CyloraError | None) -> CyloraError | None:
        """Write everything, the weights before any more of the task's code runs; return the first failure."""
        folder, settings, history = self._folder, self._settings, io.StringIO()
        run.history.write_jsonl(history)
        problems: list[CyloraError | None] = [failure]
        if run.steps_done != self._loaded_steps:  # else it is saved already, and an older generation would go for it
            problems.append(self._write_checkpoint(run))
        problems.append(folder.write(ADAPTERS, lambda path: self._publish(run, path)))
        problems.append(folder.write(HISTORY, lambda path: replace_file(path, history.getvalue().encode())))
        if failure is None:
            try:
                run.evaluate()
            except CyloraError as error:
                problems.append(error)
        if run.measures:
            lines = "".join(json.dumps({"step": step, **measures}) + "\n" for step, measures in run.measures)
            problems.append(folder.write(MEASURES, lambda path: replace_file(path, lines.encode())))
        problems.append(folder.write(TRAINER_STATE, lambda path: self._write_trainer_state(run, path)))
        picture = draw(run, f"{settings.task}, seed {settings.seed}", settings.config.max_grad_norm)
        problems.append(folder.write("picture.png", lambda path: replace_file(path, picture)))
        return next((problem for problem in problems if problem is not None), None)

    def _write_trainer_state(self, run: TrainingRun, path: Path) -> None:
        settings, config = self._settings, self._settings.config
        save_trainer_state(
            run.history,
            path,
            max_steps=config.max_steps,
            logging_steps=config.log_every or 1,
            eval_steps=settings.eval_every,
            save_steps=settings.save_every,
            measures=run.measures,
        )

    def _publish(self, run: TrainingRun, path: Path) -> None:
        """Publish under the next number: the same step may come again with other settings, or another cylora."""
        versions = [int(one.name.partition("@v")[2].partition("-")[0]) for one in published(path, "adapter")]
        files = peft_files(run.served_adapters(), step=run.steps_done)
        if self._folder.has_outputs and os.readlink(path / LATEST).endswith(f"-{content_digest(files)[:8]}"):
            return  # as they are already; what may be older than the checkpoint, when a run was killed, is not
        publish_directory(path, "adapter", max(versions, default=0) + 1, files, keep=2)


def _task(settings: RunSettings, factory: TaskFactory) -> CheckedTask:
    """Make the task; ConfigError if the settings train none of its adapters, or name one that it does not have."""
    task = CheckedTask(settings.task, factory, settings.config.lora_config, settings.seed)
    parts_of(task.adapters.flat.layout, settings.config)
    return task


def _config_text(settings: RunSettings) -> bytes:
    header = f"# cylora {__version__}. Once more: cylora train --config config.toml\n\n"
    text: str = importlib.import_module("tomli_w").dumps(settings.to_tables())
    return (header + text).encode()


def _import_extras(*, tensorboard: bool) -> None:
    """Import the optional packages now rather than fail after the training."""
    extras = {"train": ("tqdm", "matplotlib", "tomli_w"), "tensorboard": (EVENT_WRITER,) if tensorboard else ()}
    for extra, modules in extras.items():
        try:
            for module in modules:
                importlib.import_module(module)
        except ImportError as error:
            raise InputError(f"cylora train needs more packages ({error}): pip install 'cylora[{extra}]'") from error


def _settle(options: Tables, config_file: Path | None) -> tuple[RunSettings, TaskFactory]:
    """Merge the layers of settings; the task's own come second but can only be asked for once its name is known."""
    layers = [("", options)]
    if config_file is not None:
        try:
            layers.insert(0, (f"{config_file}: ", read_tables(config_file)))
        except (OSError, ValueError) as error:
            if isinstance(error, CyloraError):
                raise
            raise FormatError(f"--config {config_file} cannot be read: {reason(error)}") from error
    task = resolve(layers).task
    if ":" in task and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script, unlike python -m, does not look in the user's folder
    factory = load_factory(task)
    defaults = (f"task {task!r}: training_defaults: ", task_tables(task, training_defaults(task, factory)))
    settings = resolve([defaults, *layers])
    thread_count(settings.config.threads)  # a wrong environment is the user's to mend, and no failure of the task
    return settings, factory


class _Interrupt:
    """While active, a first Ctrl-C only sets ``requested``; a second one raises KeyboardInterrupt, as ever."""

    def __init__(self) -> None:
        self.requested = False
        self.before_message = b"\n"
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
                os.write(2, self.before_message + b"stopping after this step and saving; Ctrl-C again aborts\n")


def _summary(run: TrainingRun, settings: RunSettings, folder: RunFolder) -> str:
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
