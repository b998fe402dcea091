"""`cylora inspect`, `cylora verify` and `cylora export`: look at runs, checkpoints and adapters, and convert them."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cylora._cli_run_folder import reason
from cylora.adapter import AdapterSet
from cylora.errors import InputError
from cylora.formats import durable, gguf, inspection, peft

__all__ = ["FORMATS", "export", "inspect", "reading", "verify", "visible", "writing"]

FORMATS = ("peft", "gguf")
# What the user can mend by giving another path; a full disk, say, is another matter.
WRONG_PATH = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def inspect(path: Path, *, as_json: bool) -> int:
    """Print what is at ``path``: a table for people, or one JSON object. Return the exit code."""
    with reading(path):
        facts = inspection.inspect(path).facts
    if as_json:
        print(json.dumps(facts, indent=1, allow_nan=False))
        return 0
    members = facts.pop("adapters")
    training = facts.pop("training", {})
    facts["parameters"] = f"{facts['parameters']:,}"
    facts["finite"] = "yes" if facts["finite"] else "NO: a weight is NaN or infinite"
    if training:
        training["schedule"] = training["schedule"] or "a function"
        names = ("learning_rate", "schedule", "warmup_steps", "max_steps", "max_grad_norm", "weight_decay")
        facts["training"] = ", ".join(f"{name} {training[name]}" for name in names if name in training)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {visible(value)}")
    print()
    columns = {"adapter": [visible(name) for name in members]} | {
        key: [_cell(member[key]) for member in members.values()] for key in next(iter(members.values()))
    }
    widths = {key: max(map(len, [key, *cells])) for key, cells in columns.items()}
    for row in zip(*([key, *cells] for key, cells in columns.items()), strict=True):
        name, *numbers = (
            f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths.values(), strict=True))
        )
        print("  ".join([name, *numbers]))
    return 0


def _cell(value: float | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def visible(value: object) -> str:
    """Return text with what could move a terminal's cursor, or is no text, as escapes: files and names may hold any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def verify(path: Path) -> int:
    """Print for everything at ``path`` whether it is whole; return 0 if all is, else 1."""
    code = 0
    verdicts = inspection.verify(path)
    while True:
        with reading(path):  # not around print, which can fail for reasons of its own
            verdict = next(verdicts, None)
        if verdict is None:
            return code
        if verdict.problem is None:
            print(f"ok       {visible(verdict.path)}")
        else:
            problem = " ".join(verdict.problem.removeprefix(f"{verdict.path}: ").split())
            print(f"DAMAGED  {visible(verdict.path)}: {visible(problem)}")
            code = 1


def export(path: Path, kind: str, output: Path | None, *, base_config: Path | None, **options: Any) -> int:
    """Write the adapters at ``path`` as a PEFT directory or a GGUF file, and print where."""
    with reading(path):
        found = inspection.inspect(path)
    adapters = found.adapters if found.average is None else found.average
    if found.kind == "GGUF adapter" or not isinstance(adapters, AdapterSet):
        got = found.kind if isinstance(adapters, AdapterSet) else "a lone adapter, which no module's name goes with"
        raise InputError(f"{path}: only runs, checkpoints and PEFT adapters with names can be exported, got {got}")
    if (kind == "gguf") != (base_config is not None):
        rule = "--base-config goes with --format gguf, and only with it: the base model's config.json"
        raise InputError(f"{rule}, got {'none' if base_config is None else base_config}")
    name = path.resolve().name.removesuffix(".safetensors")
    if kind == "peft":
        output = output or Path(f"{name}-peft")
        with writing(output):
            peft.save_peft(adapters, output, step=found.facts.get("steps"), **options)
    else:
        given = [f"--{key.replace('_', '-')}" for key in ("base_model", "task_type") if options.pop(key) is not None]
        if given or not options.pop("portable"):
            raise InputError(f"{', '.join(given) or '--no-portable'} goes with --format peft only")
        output = output or Path(f"{name}.gguf")
        assert base_config is not None
        with reading(base_config):
            base = gguf.BaseModel(base_config)
        content = gguf.gguf_bytes(adapters, base, **options)
        with writing(output):
            if os.path.lexists(output):
                raise FileExistsError
            durable.replace_file(output, content)
    print(visible(output))
    return 0


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of what cannot be read that the input is wrong."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {reason(error)}") from error


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Say of an output that another path would mend that the input is wrong."""
    try:
        yield
    except FileExistsError:
        raise InputError(f"--output {output} must not exist yet, or be an empty folder for PEFT") from None
    except WRONG_PATH as error:
        raise InputError(f"--output {output} cannot be written: {reason(error)}") from error
