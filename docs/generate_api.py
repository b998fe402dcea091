"""Write docs/api.md from the signatures and docstrings in src/: python docs/generate_api.py.

(a) The sources are parsed, not imported: signatures stand as they were written, on every version of Python, whatever is
    installed, and what a class inherits from a compiled one stays out.
(b) Only the standard library is needed. numpydoc would bring Sphinx, and neither it nor griffe reads the one-line forms
    of "Raises" and "Parameters" that these docstrings use.
(c) Every name in an ``__all__`` that is published must be in a section below, or nothing is written.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
TARGET = Path(__file__).parent / "api.md"

# Heading, module to import from, names. The order is the page's.
SECTIONS = (
    ("Configuration", "cylora", "LoraConfig LoraTrainingConfig"),
    ("Adapters and gradients", "cylora", "LoraAdapter AdapterSet Gradients GradientPair FlatBuffer"),
    ("Training", "cylora", "LoraTrainer AdamParams EarlyStopping step_many TrainingStep TrainingHistory"),
    ("Only the numerics", "cylora", "Adam grad_norm clip_grad_norm_"),
    ("Schedules", "cylora.schedule", "Schedule constant linear cosine warmup_stable_decay"),
    (
        "Errors",
        "cylora",
        "CyloraError ConfigError InputError NonFiniteGradientError DivergenceError StateError TrainerBusyError "
        "PublishError StoreError DeadlineError DroppedError FormatError TaskError",
    ),
    ("Adapter files", "cylora.formats", "save_peft load_peft peft_files save_gguf gguf_bytes"),
    (
        "Checkpoints",
        "cylora.formats",
        "save_checkpoint load_checkpoint Checkpoint save_generation load_generation list_generations",
    ),
    ("Publishing", "cylora.formats", "publish_directory published replace_file"),
    ("Serving", "cylora.serving", "AdapterPublisher AdapterSnapshot AdapterStore vllm_hook"),
    ("Training inside a server", "cylora.serving", "OnlineTrainer Ticket StepTarget ServingMetrics"),
    ("Looking at files", "cylora.formats", "inspect verify"),
    ("What they return", "cylora.formats.inspection", "Inspected Verdict"),
    ("The log for Hugging Face's tools", "cylora.formats", "save_trainer_state trainer_state"),
    ("Trackers", "cylora.trackers", "log_to TensorBoardLogger all_of Tracker scalars"),
    ("torch and PEFT", "cylora.integrations.torch", "CyloraAdamW wrap_peft_model wrap_peft_gradients"),
    ("Tasks for `cylora train`", "cylora.tasks.protocol", "Task TaskFactory"),
)
# Every name in their __all__ must be above.
COMPLETE = ("cylora", "cylora.formats", "cylora.serving", "cylora.integrations.torch")
# Not underscored because other modules of cylora call them; nobody else should.
INTERNAL = {
    "Adam": {"for_training", "keep_good", "overridden", "refusal", "state", "to_loss", "to_rate", "too_fast"},
    "LoraConfig": {"for_modules", "require_one_shape"},
    "LoraTrainer": {"adopt", "bound_optimizer", "is_held_here", "prepared_step"},
    "TrainingHistory": {"buffers", "curves", "make_room"},
}
KERNELS = ("dispatch", "_loops", "_fpenv", "threads")  # what other Cython packages may cimport

HEAD = """# API reference

<!-- Written by docs/generate_api.py from the sources: do not edit. -->

In signatures, `FloatArray` is `NDArray[np.float32]`, `Mask` is `NDArray[np.bool_]`, `Content` is bytes or a sequence of
buffers, `OnStep` is a function of a [`TrainingStep`](#trainingstep), and `Any` in the place of an array is anything
whose buffer holds what the text says. What a "Raises" lists is raised before anything is written, unless it says
otherwise.
"""


class Definition(NamedTuple):
    """A public class, function or alias: its name, and its statement in the source."""

    name: str
    node: ast.stmt


# ------------------------------------------------------------------ finding what is public


def module_file(module: str) -> Path:
    """Return the source of a module or package."""
    path = SOURCE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def parsed(module: str) -> ast.Module:
    """Return a module's syntax tree."""
    return ast.parse(module_file(module).read_text(encoding="utf-8"))


def exported(module: str) -> set[str]:
    """Return the names in a module's ``__all__``."""
    for statement in parsed(module).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return set(ast.literal_eval(statement.value))
    raise SystemExit(f"{module} must have an __all__, got none")


def exports_module(module: str, other: str) -> bool:
    """Return whether ``other`` is a module that ``module`` has in its ``__all__``, as cylora has trackers."""
    return other.startswith(f"{module}.") and other.removeprefix(f"{module}.") in exported(module)


def definition(module: str, name: str) -> Definition:
    """Find a name where it is defined, through the import that publishes it."""
    for statement in parsed(module).body:
        if isinstance(statement, ast.ImportFrom) and name in [alias.asname or alias.name for alias in statement.names]:
            return definition(str(statement.module), name)
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)) and statement.name == name:
            return Definition(name, statement)
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return Definition(name, statement)
    raise SystemExit(f"{module} must define {name}, got no such class, function or alias")


def members(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Yield the public methods and properties of a class, in the source's order."""
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
            decorators = {ast.unparse(decorator) for decorator in member.decorator_list}
            is_described = ast.get_docstring(member) and f"{member.name}.setter" not in decorators
            if is_described and member.name not in INTERNAL.get(node.name, ()):
                yield member


# ------------------------------------------------------------------ signatures


def signature(name: str, node: ast.stmt) -> str:
    """Return how a thing is called, a long one with a parameter a line."""
    if isinstance(node, ast.Assign):
        return ast.unparse(node)
    if isinstance(node, ast.FunctionDef):
        return _laid_out(name, _parameters(node.args), node.returns)
    assert isinstance(node, ast.ClassDef)
    bases = [ast.unparse(base) for base in node.bases]
    maker = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    if "Protocol" in bases or any(base.endswith("Error") or base == "Exception" for base in bases):
        return f"class {name}({', '.join(bases)})"
    if maker is not None:
        return _laid_out(name, _parameters(maker.args))
    fields = [ast.unparse(one) for one in node.body if isinstance(one, ast.AnnAssign)]
    return _laid_out(name, fields if "NamedTuple" in bases else ["*", *fields])


def _parameters(arguments: ast.arguments) -> list[str]:
    """Return the parameters as written, without self and cls."""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    shown = [_with_default(one, value) for one, value in zip(plain, defaults, strict=True)]
    if arguments.posonlyargs:
        shown.insert(len(arguments.posonlyargs), "/")
    if plain and plain[0].arg in ("self", "cls"):
        del shown[0]
    if arguments.vararg:
        shown.append(f"*{ast.unparse(arguments.vararg)}")
    elif arguments.kwonlyargs:
        shown.append("*")
    for one, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        shown.append(_with_default(one, value))
    if arguments.kwarg:
        shown.append(f"**{ast.unparse(arguments.kwarg)}")
    return shown


def _with_default(argument: ast.arg, default: ast.expr | None) -> str:
    equals = " = " if argument.annotation else "="
    return ast.unparse(argument) + (f"{equals}{ast.unparse(default)}" if default else "")


def _laid_out(name: str, parameters: list[str], returns: ast.expr | None = None) -> str:
    result = f" -> {ast.unparse(returns)}" if returns else ""
    # As in the source: annotations without the quotes that put off their evaluation, strings in double quotes.
    shown = [re.sub(r"^([^=]*: )'([^']*)'", r"\1\2", one) for one in parameters]
    shown = [re.sub(r"field\(default_factory=(\w+)\)", r"\1()", one).replace("'", '"') for one in shown]
    result = result.replace("'", "")
    line = f"{name}({', '.join(shown)}){result}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {one},\n" for one in shown) + f"){result}"


# ------------------------------------------------------------------ docstrings


class Names:
    """Where the page has which name, for links."""

    def __init__(self, places: set[str]) -> None:
        self.places = places

    def linked(self, text: str, owner: str) -> str:
        """Return a docstring's text as Markdown: code as code, and names that the page has as links."""
        parts = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL)
        return "".join(self._part(part, owner) for part in parts)

    def _part(self, part: str, owner: str) -> str:
        if part.startswith("``"):
            return f"`{' '.join(part[2:-2].split())}`"
        if not part.startswith("`"):
            return re.sub(r"\*(?=\S)|(?<=\S)\*|<", lambda match: "\\" + match[0], part)
        name = part[1:-1]
        short = re.sub(r"^cylora\.(formats\.)?", "", name)
        for candidate in (f"{owner}.{short}", short):
            if candidate in self.places:
                return f"[`{name}`](#{anchor(candidate)})"
        return part


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def described(docstring: str, names: Names, owner: str) -> list[str]:
    """Return a numpydoc docstring as lines of Markdown."""
    lines = inspect.cleandoc(docstring).splitlines()
    sections: list[tuple[str, list[str]]] = [("", [])]
    for number, line in enumerate(lines):
        below = lines[number + 1] if number + 1 < len(lines) else ""
        if line and below and set(below) == {"-"}:
            sections.append((line, []))
        elif not (line and set(line) == {"-"}):
            sections[-1][1].append(line)
    out: list[str] = []
    for title, body in sections:
        if title:
            out += [f"**{title}**", ""]
        if title in ("Parameters", "Attributes", "Returns", "Raises"):
            out += [*_entries(body, title, names, owner), ""]
        else:
            out += _prose(body, names, owner)
    return out


def _prose(body: list[str], names: Names, owner: str) -> list[str]:
    """Return paragraphs; what is indented after a ``::`` is a literal block, other indented text a list.

    A session of the interpreter, lines after ``>>>``, is one too: Markdown would take them for quotations.
    """
    out: list[str] = []
    paragraph: list[str] = []
    literal: list[str] = []
    is_literal = False

    def close() -> None:
        nonlocal is_literal
        if literal:
            out.extend(["```", *inspect.cleandoc("\n" + "\n".join(literal)).splitlines(), "```", ""])
            is_literal = False
        elif paragraph and paragraph[0].startswith(">>> "):
            out.extend(["```pycon", *(line.removesuffix("# doctest: +SKIP").rstrip() for line in paragraph), "```", ""])
        elif paragraph:
            text = "\n".join(paragraph)
            is_literal = text.endswith("::")
            text = text[:-1] if is_literal else text
            out.extend([names.linked(re.sub(r"^``(.+?)``$", r"- ``\1``", text, flags=re.M), owner), ""])
        paragraph.clear()
        literal.clear()

    for line in [*body, "", "end"]:
        if is_literal and (line.startswith(" ") or not line):
            literal.append(line)
            continue
        if not line or literal:
            close()
        if line and line != "end":
            paragraph.append(line)
    return out


def _entries(body: list[str], title: str, names: Names, owner: str) -> list[str]:
    """Return the list of a section: names with their types, or errors with their conditions."""
    entries: list[tuple[str, list[str]]] = []
    for line in body:
        if line and not line.startswith(" "):
            head, *rest = re.split(r" {2,}", line, maxsplit=1)
            entries.append((head, rest))
        elif line:
            entries[-1][1].append(line.strip())
    out = []
    for head, text in entries:
        name, colon, kind = head.partition(" : ")
        if title == "Raises":
            shown = ", ".join(names.linked(f"`{one}`", owner) for one in name.split(", "))
        elif title == "Returns" or not (colon or all(one.lstrip("*").isidentifier() for one in name.split(", "))):
            shown = names.linked(name, owner)
        else:
            shown = ", ".join(f"`{one}`" for one in name.split(", "))
        shown += f" : {names.linked(kind, owner)}" if colon else ""
        joined = names.linked(" ".join(text), owner)
        goes_on = kind.endswith(".") or not joined[:1].isupper()  # a sentence, not a type and its description
        out.append(f"- {shown}{' ' if goes_on else ' — '}{joined}".rstrip())
    return out


# ------------------------------------------------------------------ the page


def reference() -> str:
    """Return the whole page."""
    for module in COMPLETE:
        listed = {name for _, origin, names in SECTIONS for name in names.split() if origin == module}
        listed |= {origin.removeprefix(f"{module}.") for _, origin, _ in SECTIONS if exports_module(module, origin)}
        if listed != exported(module):
            differing = sorted(listed ^ exported(module))
            raise SystemExit(f"SECTIONS must have the names of {module}.__all__, got a difference in {differing}")
    found = [(title, module, [definition(module, name) for name in names.split()]) for title, module, names in SECTIONS]
    places = {one.name for _, _, definitions in found for one in definitions}
    for _, _, definitions in found:
        for name, node in definitions:
            places |= {f"{name}.{member.name}" for member in members(node)} if isinstance(node, ast.ClassDef) else set()
    names = Names(places)
    lines = [HEAD]
    for title, module, definitions in found:
        links = ", ".join(f"[`{one.name}`](#{anchor(one.name)})" for one in definitions)
        lines += [f"- [{title}](#{anchor(title)}) (`{module}`): {links}"]
    lines += ["- [Kernels for other Cython packages](#kernels-for-other-cython-packages) (`cylora.kernels`)", ""]
    for title, module, definitions in found:
        lines += [f"## {title}", "", f"Import from `{module}`.", ""]
        if module_file(module).stem != "__init__":
            lines += described(ast.get_docstring(parsed(module)) or "", names, "")
        for one in definitions:
            lines += entry(one, names)
    return "\n".join([*lines, *kernels()]).rstrip("\n") + "\n"


def entry(one: Definition, names: Names) -> list[str]:
    """Return the part of the page about one public name and its members."""
    lines = [f"### `{one.name}`", "", "```pyi", signature(one.name, one.node), "```", ""]
    if isinstance(one.node, ast.Assign):
        return lines
    assert isinstance(one.node, (ast.ClassDef, ast.FunctionDef))
    lines += described(ast.get_docstring(one.node) or "", names, one.name)
    if isinstance(one.node, ast.ClassDef):
        for member in members(one.node):
            decorators = {ast.unparse(decorator) for decorator in member.decorator_list}
            full = f"{one.name}.{member.name}"
            shown = signature(full, member)
            if "property" in decorators:
                shown = f"{full}: {ast.unparse(member.returns)}" if member.returns else full
            lines += [f"#### `{full}`", "", "```pyi", shown, "```", ""]
            lines += described(ast.get_docstring(member) or "", names, one.name)
    return lines


def kernels() -> list[str]:
    """Return the declarations that other Cython packages cimport, as they stand."""
    lines = ["## Kernels for other Cython packages", ""]
    lines += ["[NumPy and native hosts](numpy-hosts.md#cython-calling-the-loops-without-the-gil) has an example.", ""]
    for name in KERNELS:
        text = (SOURCE / "cylora" / "kernels" / f"{name}.pxd").read_text(encoding="utf-8")
        lines += [f"### `cylora.kernels.{name}`", "", "```cython", text.strip(), "```", ""]
    return lines


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
