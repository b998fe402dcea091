"""Who may import whom, read from the sources: modules, functions, and the cimports of the kernels."""

import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "cylora"

# Each part of the package and the parts it may import. Everything points downwards.
ALLOWED = {
    "errors": set(),
    "checks": {"errors"},
    "kernels": {"errors"},
    "patterns": {"errors"},
    "lora_config": {"errors", "checks", "patterns"},
    "config": {"errors", "checks", "patterns", "lora_config"},
    "overrides": {"checks", "config", "lora_config"},
    "early_stopping": {"errors", "checks"},
    "running_median": set(),
    "locks": {"errors"},
    "flat": {"errors", "checks"},
    "schedule": {"errors", "checks", "config"},
    "parts": {"errors", "config", "flat", "patterns"},
    "adapter": {"errors", "checks", "config", "flat"},
    "plotting": {"errors", "checks"},
    "history_text": {"errors"},
    "history": {"errors", "checks", "config", "plotting", "history_text"},
    "trackers": {"errors", "checks", "history"},
    "accumulation": {"errors", "checks", "flat"},
    "moments": {"errors", "checks", "config", "flat"},
    "good_state": {"errors", "checks", "flat", "moments"},
    "reporting": {"history"},
    "watch": {"errors", "checks", "config", "early_stopping", "history", "running_median"},
    "optimizer": {"errors", "checks", "config", "flat", "good_state", "kernels", "moments", "overrides", "parts"},
}
# Each of these has one that speaks for it.
INNER = {"kernels", "moments", "patterns", "lora_config", "running_median", "plotting", "history_text"}
NOT_FOR_STEPS = INNER | {"trackers"}
ALLOWED["state"] = {*ALLOWED} - NOT_FOR_STEPS
ALLOWED["trainer"] = {*ALLOWED} - NOT_FOR_STEPS
ALLOWED["many"] = {*ALLOWED} - NOT_FOR_STEPS
PUBLIC = {*ALLOWED} - INNER - {"checks", "accumulation", "good_state", "locks", "parts", "reporting", "state", "watch"}
ALLOWED["package"] = PUBLIC  # cylora/__init__.py
ABOVE = {*ALLOWED} - {"kernels"}  # what the parts above the trainer may use; "package" for the version
ALLOWED["formats"] = ABOVE
ALLOWED["serving"] = ABOVE | {"formats"}
ALLOWED["tasks"] = ABOVE
ALLOWED["cli"] = ABOVE | {"formats", "serving", "tasks"}
ALLOWED["integrations"] = ABOVE | {"formats", "serving"}

HEAVY = {"torch", "peft", "transformers", "mpi4py"}  # for integrations alone
# Anything else from outside must be asked for by name here.
OUTSIDE = {"numpy", "safetensors"}
# Extras, by the part that imports them where it needs them, by importlib.
OPTIONAL = {"formats": {"gguf"}, "plotting": {"matplotlib"}, "trackers": {"tensorboard"}}
# What would run what a file says, start a program, or fetch something.
DANGEROUS_MODULES = {
    "pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "yaml",
    "subprocess", "pty", "code", "codeop", "runpy", "imp", "socket", "ssl", "http", "urllib", "ftplib", "xmlrpc",
    "requests",
}  # fmt: skip
# But telling another server of a new version, at an address that its operator gives, is what this module is for.
SPEAKS_HTTP = {"serving/hooks.py": {"http", "urllib"}}
DANGEROUS_CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "posix_spawn", "posix_spawnp"}
DANGEROUS_CALLS |= {
    f"{verb}{how}" for verb in ("exec", "spawn") for how in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")
}


def part_of(path: Path, source: Path) -> str:
    """Return the part of the package that a file belongs to."""
    first = path.relative_to(source).parts[0].split(".")[0]
    if first == "__init__":
        return "package"
    return "cli" if first.startswith("_cli") else first


def imports_of(path: Path, source: Path) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of everything a file imports, wherever it does it."""
    if path.suffix in (".pyx", ".pxd", ".pxi"):
        text = re.sub(r'"""[\s\S]*?"""', lambda match: "\n" * match[0].count("\n"), path.read_text())
        for number, line in enumerate(text.splitlines(), 1):
            if match := re.match(r"\s*from\s+([\w.]+)\s+c?import\b", line):
                yield number, match[1]
            elif match := re.match(r"\s*c?import\s+(\w.*)", line):
                yield from ((number, name.split()[0]) for name in match[1].split(","))
            if match := re.search(r"import_module\(f?\"([\w.]+)", line):
                yield number, match[1].rstrip(".")
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports name the package in full"
            for alias in node.names:
                below = source.joinpath(*node.module.split(".")[1:], alias.name)
                is_module = node.module == "cylora" and (below.is_dir() or below.with_suffix(".py").exists())
                yield node.lineno, f"{node.module}.{alias.name}" if is_module else node.module
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") == "import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, node.args[0].value


def complaints(source: Path) -> list[str]:
    """Return what breaks the rules in a copy of the package."""
    found = []
    files = sorted(path for path in source.rglob("*") if path.suffix in (".py", ".pyx", ".pxd", ".pxi", ".pyi"))
    for path in files:
        part = part_of(path, source)
        if part not in ALLOWED:
            found.append(f"{path.name}: no rule for the part {part!r}")
            continue
        for line, name in imports_of(path, source):
            where, root = f"{path.relative_to(source)}:{line}", name.split(".")[0]
            if root == "cylora":
                target = name.split(".")[1] if "." in name else "package"
                target = "cli" if target.startswith("_cli") else target
                if target != part and target not in ALLOWED[part]:
                    found.append(f"{where}: {part} must not import {target}")
            elif root in HEAVY:
                if part != "integrations":
                    found.append(f"{where}: only integrations may import {root}")
            elif root in SPEAKS_HTTP.get(str(path.relative_to(source)), ()):
                continue
            elif root in DANGEROUS_MODULES:
                found.append(f"{where}: {root} is not used in this package")
            elif root in OPTIONAL.get(part, ()) and "import_module(" in path.read_text().splitlines()[line - 1]:
                continue
            elif (
                path.suffix == ".py" and root not in sys.stdlib_module_names | OUTSIDE and part not in ("tasks", "cli")
            ):
                found.append(f"{where}: {root} is no dependency")
        if path.suffix in (".py", ".pyi"):
            for node in ast.walk(ast.parse(path.read_text())):
                called = isinstance(node, ast.Call) and (getattr(node.func, "id", "") or getattr(node.func, "attr", ""))
                is_regex = isinstance(node, ast.Call) and getattr(getattr(node.func, "value", None), "id", "") == "re"
                if called in DANGEROUS_CALLS and not is_regex:
                    found.append(f"{path.relative_to(source)}:{node.lineno}: {called}() is not used in this package")
                if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                    found.append(
                        f"{path.relative_to(source)}:{node.value.lineno}: allow_pickle is not used in this package"
                    )
                if part == "formats" and (called in ("load", "memmap", "fromfile", "mmap", "open_memmap")):
                    found.append(f"{path.relative_to(source)}:{node.lineno}: formats read with read(), not {called}()")
        if part == "kernels" and re.search(r"(?m)^\s*(from\s+numpy\S*\s+cimport|cimport\s+numpy)", path.read_text()):
            found.append(f"{path.relative_to(source)}: kernels are built without numpy, so they import it only")
        if path.suffix not in (".py", ".pyi") and (
            match := re.search(r"\b(eval|exec|compile|system|popen)\s*\(", path.read_text())
        ):
            found.append(f"{path.relative_to(source)}: {match[1]}() is not used in this package")
    return found


def test_imports_point_downwards_only() -> None:
    assert complaints(SOURCE) == []


def test_the_rules_contain_no_cycle() -> None:
    seen: set[str] = set()
    while rest := {part for part in ALLOWED if part not in seen}:
        free = {part for part in rest if ALLOWED[part] <= seen}
        assert free, f"a cycle among {sorted(rest)}"
        seen |= free


def test_every_module_is_read() -> None:
    """A package that the walk missed could break every rule."""
    parts = {part_of(path, SOURCE) for path in SOURCE.rglob("*.py")}
    assert {"errors", "config", "flat", "kernels", "trainer", "cli", "tasks", "formats", "package"} <= parts
    assert {"integrations", "serving"} <= parts
    assert {name for _, name in imports_of(SOURCE / "kernels" / "adam.pyx", SOURCE)} >= {
        "cylora.kernels._loops", "cylora.kernels.buffers", "cylora.kernels.dispatch", "cylora.errors", "libc.stdint",
    }  # fmt: skip
    assert "cylora.kernels" in {name for _, name in imports_of(SOURCE / "optimizer.py", SOURCE)}


WRONG = [
    ("errors.py", "import cylora.config", "errors.py:.*: errors must not import config"),
    ("errors.py", "from cylora import checks", "errors must not import checks"),
    ("checks.py", "from cylora.flat import FlatBuffer", "checks must not import flat"),
    ("config.py", "from cylora import schedule", "config must not import schedule"),
    ("flat.py", "from cylora.adapter import LoraAdapter", "flat must not import adapter"),
    ("schedule.py", "from cylora.trainer import LoraTrainer", "schedule must not import trainer"),
    ("adapter.py", "from cylora.optimizer import Adam", "adapter must not import optimizer"),
    ("adapter.py", "from cylora.kernels import norm", "adapter must not import kernels"),
    ("history.py", "from cylora.flat import FlatBuffer", "history must not import flat"),
    ("accumulation.py", "from cylora.history import TrainingHistory", "accumulation must not import history"),
    ("optimizer.py", "from cylora.history import TrainingHistory", "optimizer must not import history"),
    ("trainer.py", "from cylora.kernels.adam import PreparedAdam", "trainer must not import kernels"),
    ("many.py", "from cylora.kernels.many import step_many", "many must not import kernels"),
    ("moments.py", "from cylora.optimizer import Adam", "moments must not import optimizer"),
    ("parts.py", "from cylora.adapter import AdapterSet", "parts must not import adapter"),
    ("watch.py", "from cylora.trainer import LoraTrainer", "watch must not import trainer"),
    ("state.py", "from cylora.trainer import LoraTrainer", "state must not import trainer"),
    ("early_stopping.py", "from cylora.history import TrainingHistory", "early_stopping must not import history"),
    ("patterns.py", "from cylora.config import LoraConfig", "patterns must not import config"),
    ("trainer.py", "from cylora.moments import Moments", "trainer must not import moments"),
    ("trainer.py", "from cylora.formats import peft", "trainer must not import formats"),
    ("trainer.py", "def f():\n    import cylora.cli", "trainer must not import cli"),
    ("formats/durable.py", "from cylora import cli", "formats must not import cli"),
    ("formats/durable.py", "from cylora.kernels import norm", "formats must not import kernels"),
    ("tasks/run.py", "import cylora._cli_train", "tasks must not import cli"),
    ("__init__.py", "from cylora.cli import main", "package must not import cli"),
    ("trainer.py", "def f():\n    import torch", "only integrations may import torch"),
    ("adapter.py", "from peft import LoraModel", "only integrations may import peft"),
    ("trainer.py", "import importlib\nimportlib.import_module('mpi4py')", "only integrations may import mpi4py"),
    ("history.py", "import pickle", "pickle is not used in this package"),
    ("cli.py", "from subprocess import run", "subprocess is not used in this package"),
    ("formats/durable.py", "from urllib.request import urlopen", "urllib is not used in this package"),
    ("serving/publisher.py", "import http.client", "http is not used in this package"),
    ("serving/hooks.py", "import socket", "socket is not used in this package"),
    ("serving/hooks.py", "from cylora import cli", "serving must not import cli"),
    ("serving/snapshot.py", "from cylora.kernels import norm", "serving must not import kernels"),
    ("formats/durable.py", "from cylora.serving import AdapterSnapshot", "formats must not import serving"),
    ("trainer.py", "from cylora import serving", "trainer must not import serving"),
    ("formats/container.py", "import socket", "socket is not used in this package"),
    ("formats/container.py", "np.load('x')", r"formats read with read\(\), not load\(\)"),
    ("formats/container.py", "np.memmap('x')", r"formats read with read\(\), not memmap\(\)"),
    ("formats/container.py", "np.lib.format.read_array(0, allow_pickle=True)", "allow_pickle is not used"),
    ("formats/strict_json.py", "import yaml", "yaml is not used in this package"),
    ("formats/durable.py", "os.execvp('true', [])", r"execvp\(\) is not used"),
    ("config.py", "eval('1')", r"eval\(\) is not used"),
    ("tasks/settings.py", "exec('x = 1')", r"exec\(\) is not used"),
    ("cli.py", "import os\nos.system('true')", r"system\(\) is not used"),
    ("config.py", "import pandas", "pandas is no dependency"),
    ("formats/durable.py", "import gguf", "gguf is no dependency"),
    ("config.py", "import importlib\nimportlib.import_module('gguf')", "gguf is no dependency"),
    ("history.py", "import importlib\nimportlib.import_module('matplotlib')", "matplotlib is no dependency"),
    ("plotting.py", "import matplotlib", "matplotlib is no dependency"),
    ("plotting.py", "from cylora.history import TrainingHistory", "plotting must not import history"),
    ("trackers.py", "from cylora.trainer import LoraTrainer", "trackers must not import trainer"),
    ("kernels/adam.pyx", "from cylora.flat import FlatBuffer", "kernels must not import flat"),
    ("kernels/_loops.pxi", "cimport numpy as np", "kernels are built without numpy"),
    ("kernels/_loops.pxi", "import math as m, torch.x", "only integrations may import torch"),
    (
        "kernels/buffers.pyx",
        "from cylora import config",
        "kernels must not import package|kernels must not import config",
    ),
    ("kernels/buffers.pyx", "import pickle", "pickle is not used"),
    ("integrations/adamw.py", "from cylora.kernels import PreparedTensors", "integrations must not import kernels"),
    ("integrations/adamw.py", "from cylora.tasks import run", "integrations must not import tasks"),
    ("trainer.py", "import cylora.integrations", "trainer must not import integrations"),
    ("cli.py", "from cylora.integrations.torch import CyloraAdamW", "cli must not import integrations"),
    ("newcomer.py", "", "no rule for the part 'newcomer'"),
]


@pytest.mark.parametrize(("file", "line", "complaint"), WRONG, ids=[f"{file}: {line}" for file, line, _ in WRONG])
def test_a_wrong_import_is_noticed(file: str, line: str, complaint: str, tmp_path: Path) -> None:
    """The rules on a copy of the package with one line added."""
    copy = tmp_path / "cylora"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__", "data"))
    target = copy / file
    target.write_text((target.read_text() if target.exists() else "") + f"\n{line}\n")
    found = complaints(copy)
    assert len(found) == 1
    assert re.search(complaint, found[0])
