"""Pattern: a value for some modules, chosen by a module's name or the end of it."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, Self, TypeVar

from cylora.errors import ConfigError

__all__ = ["LITERAL", "Pattern"]

Value = TypeVar("Value", int, float)
# PEFT takes a key as a regular expression. One from a file can keep a process busy for ever: only literal ones count.
LITERAL = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\\.)+\$?")


class Pattern(Mapping[str, Value], Generic[Value]):
    """A mapping of names to values, immutable and hashable, of which the first fitting key counts, as in PEFT.

    A key fits a module if it is the module's name or the end of it from a dot on: ``q_proj`` and ``layers.0.q_proj``
    both fit ``model.layers.0.q_proj``. After ``^`` it fits the whole name only. Looked up by the ends of a name, since
    there may be many keys and many modules.
    """

    __slots__ = ("_ends", "_items", "_whole")

    def __init__(self, pattern: Mapping[str, Value]) -> None:
        self._items: dict[str, Value] = dict(pattern)
        self._whole: dict[str, tuple[int, str]] = {}
        self._ends: dict[str, tuple[int, str]] = {}
        for place, key in enumerate(self._items):
            name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
            self._whole.setdefault(name, (place, key))
            if not key.startswith("^"):
                self._ends.setdefault(name, (place, key))

    @classmethod
    def checked(cls, field: str, pattern: Any, check: Callable[[str, Any], Value]) -> Self:
        """Return the pattern a config's ``field`` says, or raise ConfigError. ``check(name, x)`` judges a value."""
        if not isinstance(pattern, Mapping):
            raise ConfigError(f"{field} must be a mapping of module names to values, got {pattern!r:.120}")
        for key in pattern:
            if not isinstance(key, str) or not LITERAL.fullmatch(key):
                rule = "names of modules or their ends as keys, of letters, digits, '_', '-' and '.'"
                raise ConfigError(f"{field} must have {rule}, got {key!r:.120}")
        return cls({key: check(f"{field}[{key!r}]", value) for key, value in pattern.items()})

    def value(self, module: str, default: Value) -> Value:
        """Return what the pattern says of a module, or ``default``."""
        key = self.key(module)
        return default if key is None else self._items[key]

    def key(self, module: str) -> str | None:
        """Return the key that counts for a module, or None."""
        parts = module.split(".")
        found = [self._ends[end] for start in range(1, len(parts)) if (end := ".".join(parts[start:])) in self._ends]
        if module in self._whole:
            found.append(self._whole[module])
        return min(found)[1] if found else None

    def require_match(self, field: str, modules: Iterable[str]) -> None:
        """Raise ConfigError if a key counts for none of the modules: it would be a slip that nobody notices."""
        used = {self.key(module) for module in modules}
        for key in self._items:
            if key not in used:
                raise ConfigError(f"each key of {field} must count for a module, got {key!r}, which does for none")

    def __getitem__(self, key: str) -> Value:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        """Whether the other has the same items in the same order, which decides."""
        return isinstance(other, Mapping) and list(self._items.items()) == list(other.items())

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._items,)
