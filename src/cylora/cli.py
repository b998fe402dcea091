"""The `cylora` command: train adapters, look at files and convert them, draw, measure, describe.

Exit codes: 0 all is well; 1 the run failed (the task's own code raised, or a file could not be written), or `verify`
found damage; 2 an input is wrong; 130 stopped by Ctrl-C, with what was learned saved; 141 nobody reads the output any
more. Every failure is one line on stderr.
"""

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cylora import __version__
from cylora._cli_bench import bench
from cylora._cli_files import FORMATS, export, inspect, verify, visible
from cylora._cli_info import system_facts
from cylora._cli_plot import plot
from cylora._cli_train import resume, train
from cylora.config import DIVERGENCE_POLICIES, NONFINITE_POLICIES, SCHEDULES, STATE_DTYPES, WEIGHT_DECAY_MODES
from cylora.errors import CyloraError, InputError
from cylora.formats.weights import WEIGHT_DTYPES
from cylora.plotting import ENDINGS
from cylora.tasks.digits import DigitsTask
from cylora.tasks.protocol import RunFailure
from cylora.tasks.settings import FIELDS, NONE, Field, Tables

__all__ = ["main"]

HELP = {
    "task": "what to train: digits, or module:factory of your own (cylora.tasks.protocol shows how)",
    "seed": "decides every random choice of the run",
    "eval_every": "steps between two evaluations, 0 for before and after only; none: a twentieth of the run",
    "save_every": "steps between two checkpoints, 0 for one at the end only; none: a tenth of the run",
    "learning_rate": "peak learning rate",
    "weight_decay": "strength of the weight decay",
    "max_grad_norm": "global norm above which gradients are scaled down; inf: never",
    "warmup_steps": "steps over which the rate rises from 0",
    "max_steps": "steps to train",
    "log_every": "steps between two lines of progress where there is no terminal; 0: none",
    "beta1": "Adam's decay of the mean of gradients",
    "beta2": "Adam's decay of the mean of their squares",
    "eps": "Adam's epsilon, outside the root",
    "weight_decay_mode": " or ".join(WEIGHT_DECAY_MODES),
    "schedule": ", ".join(SCHEDULES[:-1]) + f" or {SCHEDULES[-1]}",
    "min_learning_rate": "where decaying schedules end",
    "decay_steps": "length of warmup_stable_decay's final decay; none: a tenth of max-steps",
    "nonfinite": f"what a NaN or infinite gradient does: {' or '.join(NONFINITE_POLICIES)}",
    "history_limit": "records to keep; none: all",
    "state_dtype": f"how Adam's moments are stored: {', '.join(STATE_DTYPES[:-1])} or {STATE_DTYPES[-1]}",
    "threads": "most threads a step may use; none: CYLORA_NUM_THREADS, or 1",
    "lora_plus_ratio": "LoRA+: B's rate over A's",
    "train_a": "no: LoRA-FA, which leaves A as it was drawn",
    "rate_pattern": "factors on the rate of some modules, 0 to freeze them, as q_proj=0.5,layers.0.q_proj=0",
    "weight_decay_pattern": "weight decays of some modules, as q_proj=0.1",
    "ema_decay": "average the weights with this decay, and evaluate and write the average; none: no average",
    "divergence": f"what a loss or norm far above its median does: {', '.join(DIVERGENCE_POLICIES)}",
    "divergence_factor": "how far above",
    "divergence_window": "applied steps whose median it is",
    "rollback_every": "applied steps between two states that rollback may go back to",
    "early_stopping_patience": "steps without a better loss after which the run ends; none: never",
    "early_stopping_min_delta": "how much better it must be",
    "rank": "rank of the adapters",
    "alpha": "scaling is alpha / rank",
    "dropout": "probability that an input of an adapter is dropped in training",
    "target_modules": "modules that get an adapter, separated by commas",
    "use_rslora": "scaling is alpha / sqrt(rank)",
    "rank_pattern": "ranks of some modules, as q_proj=4,layers.0.q_proj=16",
    "alpha_pattern": "alphas of some modules, likewise",
}
TITLES = {"run": "the run", "training": "training", "lora": "the adapters"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument ([^:]+): ", r"\1 ", message)
        raise InputError(f"{message} ({self.prog} --help shows what there is)")


def _converter(field: Field) -> Callable[[str], Any]:
    """Return the function that reads an option's text; what the value may be is for the configs to say."""

    def convert(text: str) -> Any:
        if text == NONE and (field.optional or field.kind is dict):
            return None if field.optional else {}
        if field.kind is tuple:
            return tuple(part.strip() for part in text.split(","))
        if field.kind is dict:
            return _pattern(text, field.item)
        try:
            return field.kind(text)
        except ValueError:
            kind = "an integer" if field.kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"must be {kind}{f' or {NONE}' if field.optional else ''}, got {text!r}"
            ) from None

    return convert


def _pattern(text: str, kind: type) -> dict[str, Any]:
    """Read name=value,name=value; an empty text is an empty pattern."""
    pattern: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = (word.strip() for word in part.partition("="))
        if name in pattern:
            raise argparse.ArgumentTypeError(f"must not repeat a name, got {name!r} twice")
        try:
            pattern[name] = kind(value)
        except ValueError:
            rule = f"must be NAME={'INTEGER' if kind is int else 'NUMBER'},..., got {part!r}"
            raise argparse.ArgumentTypeError(rule) from None
    return pattern


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None


def _default_text(field: Field) -> str:
    """Say the default, and where the digits task has its own, that one too."""
    own = DigitsTask.training_defaults
    own = own["lora_config"] if field.table == "lora" else own if field.table == "training" else {}

    def text(value: Any) -> str:
        if value is None or value == {}:
            return NONE
        if field.kind is bool:
            return "yes" if value else "no"
        return ",".join(value) if field.kind is tuple else str(value)

    digits = f"; digits: {text(own[field.name])}" if field.name in own else ""
    return f"(default: {text(field.default)}{digits})"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cylora", description="Train LoRA adapters on the CPU.", epilog="cylora train --help shows its options."
    )
    parser.add_argument("--version", action="version", version=f"cylora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    train = commands.add_parser(
        "train",
        help="train adapters and write them, their history, config and picture into a run folder",
        description="Train LoRA adapters. Without options: a frozen reader of upright digits learns turned ones.",
        epilog="Options go before the TOML file, the file before the task's defaults. Ctrl-C stops after the step and "
        "saves what was learned (exit code 130). Exit code 2: wrong input; 1: the run failed.",
        usage="cylora train [--task NAME] [--config FILE] [--output DIR] [OPTION ...]\n"
        "       cylora train --resume DIR [--fallback] [OPTION ...]",
        allow_abbrev=False,
    )
    train.add_argument("--config", metavar="FILE", type=Path, help="TOML file, as the run folder's config.toml")
    train.add_argument(
        "--output", metavar="DIR", type=Path, help="folder to write to, new or empty (default: a new one in ./runs)"
    )
    train.add_argument("--resume", metavar="DIR", type=Path, help="go on with the run in DIR from its last checkpoint")
    train.add_argument(
        "--fallback", action="store_true", help="with --resume: if the last checkpoint is damaged, take the one before"
    )
    train.add_argument(
        "--tensorboard", action="store_true", help="write event files for TensorBoard into the run folder"
    )
    train.add_argument("--quiet", action="store_true", help="print nothing but the folder written to")
    groups = {table: train.add_argument_group(title) for table, title in TITLES.items()}
    for field in FIELDS:
        option: dict[str, Any] = {
            "dest": f"{field.table}.{field.name}",
            "default": argparse.SUPPRESS,
            "help": f"{HELP[field.name]} {_default_text(field)}".replace("%", "%%"),
        }
        if field.kind is bool:
            option["action"] = argparse.BooleanOptionalAction
        else:
            option["type"] = _converter(field)
            option["metavar"] = {int: "N", float: "X", str: "NAME", tuple: "NAMES", dict: "NAME=X,..."}[field.kind]
        groups[field.table].add_argument(f"--{field.name.replace('_', '-')}", **option)
    _add_files(commands)
    _add_plot(commands)
    measure = commands.add_parser(
        "bench",
        help="measure a step on this machine against the same work in NumPy",
        description="Measure a step on this machine against the same work in NumPy, on one thread, in turns. "
        "Takes less than a minute. Each result is checked against float64 (exit code 1: one is wrong).",
        allow_abbrev=False,
    )
    measure.add_argument("--threads", metavar="N", type=_integer, help="cylora's (default: CYLORA_NUM_THREADS, or 1)")
    measure.add_argument("--json", metavar="FILE", type=Path, help="write every figure")
    measure.add_argument("--quick", action="store_true", help="small sizes and short turns only, for a first look")
    commands.add_parser("info", help="describe this installation", description="Describe this installation.")
    return parser


def _add_files(commands: Any) -> None:
    look = commands.add_parser(
        "inspect",
        help="show what a run, checkpoint or adapter holds",
        description="Show the adapters in a run's folder, a checkpoint, a PEFT directory or a GGUF file: names, "
        "shapes, ranks, norms, hash, and whether all weights are finite.",
        allow_abbrev=False,
    )
    look.add_argument("path", metavar="PATH", type=Path)
    look.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    check = commands.add_parser(
        "verify",
        help="check whether a run, checkpoint or adapter is whole",
        description="Read every checkpoint and adapter at PATH and check all of it. Exit code 0: whole; 1: damaged; "
        "2: there is nothing to check.",
        allow_abbrev=False,
    )
    check.add_argument("path", metavar="PATH", type=Path)
    convert = commands.add_parser(
        "export",
        help="write the adapters of a run as a PEFT directory or a GGUF file",
        description="Write the adapters of a run, a checkpoint or a PEFT directory for PEFT and most servers (peft), "
        "or for llama.cpp and what is built on it (gguf).",
        allow_abbrev=False,
    )
    convert.add_argument("path", metavar="PATH", type=Path)
    convert.add_argument("--format", choices=FORMATS, required=True)
    convert.add_argument("--output", metavar="PATH", type=Path, help="what to write (default: in the current folder)")
    convert.add_argument("--dtype", choices=WEIGHT_DTYPES, default="float32", help="of the weights (default: float32)")
    convert.add_argument(
        "--portable",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="peft: one rank and one alpha, which every server understands (default: yes)",
    )
    convert.add_argument("--base-model", metavar="NAME", help="peft: name or path of the base model, for the config")
    convert.add_argument("--task-type", metavar="NAME", help="peft: such as CAUSAL_LM, for the config")
    convert.add_argument("--base-config", metavar="FILE", type=Path, help="gguf: the base model's config.json")


def _add_plot(commands: Any) -> None:
    picture = commands.add_parser(
        "plot",
        help="compare runs in one picture",
        description="Draw loss, gradient norm, learning rate and evaluations of runs over each other. "
        "A run is its folder, or a file that TrainingHistory.write_jsonl or write_csv wrote.",
        allow_abbrev=False,
    )
    picture.add_argument("paths", metavar="RUN", type=Path, nargs="+")
    picture.add_argument(
        "--output", metavar="FILE", type=Path, default=Path("plot.png"),
        help=f"{', '.join(ENDINGS)}; replaced if it is there (default: plot.png)",
    )  # fmt: skip
    picture.add_argument(
        "--smooth", metavar="N", type=_integer, help="steps of the running mean, 0: none (default: a fiftieth of a run)"
    )
    picture.add_argument(
        "--log",
        action=argparse.BooleanOptionalAction,
        help="logarithmic axes for loss and norm (default: where all values are above 0)",
    )


def _options(arguments: argparse.Namespace) -> Tables:
    """Return the fields given on the command line, as tables."""
    tables: Tables = {table: {} for table in TITLES}
    for name, value in vars(arguments).items():
        table, dot, field = name.partition(".")
        if dot:
            tables[table][field] = value
    return tables


def _info() -> int:
    facts = system_facts()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's own) and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
    try:
        code = _run(argv)
        if sys.stdout is not None:  # closed by the caller, as in >&-
            sys.stdout.flush()
        return code
    except RunFailure as error:
        return _fail(error, 1)
    except CyloraError as error:
        return _fail(error, 2)
    except BrokenPipeError:
        # Python's own flush at exit would complain about the same pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments, unknown = _parser().parse_known_args(argv)
    except SystemExit:  # argparse has answered --help or --version; what is wrong, _Parser raises
        return 0
    if unknown:  # parse_args would name the command's parent, whose help does not list the command's options
        shown = f"cylora {arguments.command} --help"
        raise InputError(f"unrecognized arguments: {' '.join(unknown)} ({shown} shows what there is)")
    if arguments.command == "info":
        return _info()
    if arguments.command == "bench":
        return bench(arguments.json, arguments.threads, quick=arguments.quick)
    if arguments.command == "train":
        return _train(arguments)
    if arguments.command == "plot":
        return plot(arguments.paths, arguments.output, smooth=arguments.smooth, log=arguments.log)
    return _files(arguments)


def _files(arguments: argparse.Namespace) -> int:
    if arguments.command == "inspect":
        return inspect(arguments.path, as_json=arguments.json)
    if arguments.command == "verify":
        return verify(arguments.path)
    options = {name: getattr(arguments, name) for name in ("dtype", "portable", "base_model", "task_type")}
    return export(arguments.path, arguments.format, arguments.output, base_config=arguments.base_config, **options)


def _train(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    show = {"quiet": arguments.quiet, "tensorboard": arguments.tensorboard}
    if arguments.resume is None:
        if arguments.fallback:
            raise InputError("--fallback goes with --resume")
        return train(options, arguments.config, arguments.output, **show)
    for name in ("config", "output"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--resume goes on with a run as it is, got --{name} too")
    return resume(options, arguments.resume, fallback=arguments.fallback, **show)


def _fail(error: object, code: int) -> int:
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            print(f"cylora: error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
    return code
