"""Pages of Markdown: their blocks of code in order, and how to run them as a reader would type them.

A comment on the line above a block says what is special about it; all others are run as they stand, or are the output
of the block before them.

    <!-- interop -->            it needs the extra "interop" and runs in that stage; as a page's first line: all of it
    <!-- file: NAME -->         the reader saves it as NAME
    <!-- not run: WHY -->       a command that is too dear for a test, or would install something
    <!-- output: COMMAND -->    a text that COMMAND prints, not the block before
    <!-- terminal: COMMAND -->  what stays on a terminal of 100 columns below COMMAND
    <!-- numbers vary -->       of an output only the words are the same everywhere
    <!-- NAME -->               a name by which .ci/run or a test finds it
"""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from screen import Screen, on_terminal

ROOT = Path(__file__).parents[1]
PLAYER = Path(__file__).parent / "play.py"
COMMENT = re.compile(r"<!-- (?P<key>interop|file|not run|output|terminal|numbers vary|[\w-]+)(?:: (?P<value>.+))? -->")
FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>.*)")
RUNNABLE = ("python", "sh")


@dataclass(frozen=True)
class Block:
    """One fenced block; ``line`` is the number of its first line in the page."""

    page: Path
    line: int
    language: str
    text: str
    marks: dict[str, str] = field(hash=False)

    @property
    def action(self) -> str:
        """Return what a reader does with it: run it, save it, or read it."""
        if "file" in self.marks:
            return "file"
        return self.language if self.language in RUNNABLE and "not run" not in self.marks else "read"

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Return every page that is read: the README and what is in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in their order."""
    found: list[Block] = []
    above: dict[str, str] = {}
    everywhere: dict[str, str] = {}
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if comment := COMMENT.fullmatch(line):
            above[comment["key"]] = comment["value"] or ""
            everywhere = dict(above) if number == 1 and comment["key"] == "interop" else everywhere
            continue
        if fence := FENCE.fullmatch(line):
            assert not fence["indent"], f"{page}:{number}: a block begins at the line's beginning"
            inside = []
            for _, text in lines:
                if text == fence["fence"]:
                    break
                inside.append(text + "\n")
            else:
                raise AssertionError(f"{page}:{number}: a block has no end")
            marks = everywhere | above
            found.append(Block(page, number + 1, fence["language"].strip(), "".join(inside), marks))
        above = {}
    return found


def prose_of(page: Path) -> str:
    """Return a page without the content of its fenced blocks."""
    return re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def stage(blocks: list[Block], *, interop: bool) -> list[Block]:
    """Return which blocks of a page a stage goes through: without the extra those that need none, with it all.

    A page that needs the extra nowhere is not the second stage's.
    """
    needing = [block for block in blocks if "interop" in block.marks]
    if interop:
        return blocks if needing else []
    return [block for block in blocks if block not in needing]


def play(blocks: list[Block], folder: Path) -> list[str]:
    """Go through blocks of one page in ``folder``, in order and in one namespace; return what each printed.

    Warnings are errors, and Python must print nothing on stderr; not where others' packages are used, who warn of each
    other.
    """
    is_strict = not any("interop" in block.marks for block in blocks)
    steps = [
        {"action": b.action, "text": b.text, "page": str(b.page), "line": b.line, "name": b.marks.get("file")}
        for b in blocks
    ]
    report = folder.parent / f"{folder.name}.json"
    done = subprocess.run(
        [sys.executable, "-W", "error" if is_strict else "ignore", PLAYER, report],
        input=json.dumps(steps),
        cwd=folder,
        env=os.environ | {"PATH": _path()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (is_strict and done.stderr), done.stderr
    printed: list[str] = json.loads(report.read_text(encoding="utf-8"))
    assert len(printed) == len(blocks)
    return printed


def left_on_terminal(command: str, folder: Path) -> str:
    """Return what ``command`` has left on a terminal, without colours."""
    environment = os.environ | {"PATH": _path(), "TERM": "xterm", "NO_COLOR": "1"}
    screen = Screen(100, 24)
    screen.write(on_terminal(shlex.split(command), environment, folder=folder))
    return "\n".join(screen.lines)


def _path() -> str:
    """Return where a reader finds commands: beside this Python first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def words_of(text: str) -> str:
    """Return a text with one sign for each number and each curve, and one space between words."""
    without_curves = re.sub("[▁-▏][▁-▏ ]*", "▁", text)
    without_hashes = re.sub(r"(?<=-)[0-9a-f]{8}\b", "#", without_curves)
    return " ".join(re.sub(r"-?\d[\d,.:]*(?:e[+-]?\d+)?", "#", without_hashes).split())


# ------------------------------------------------------------------ links


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", prose_of(page), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        while (unique := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(unique)
    return found


def links_of(page: Path) -> list[tuple[Path, str]]:
    """Return file and anchor of every link that leads into this repository."""
    without_code = re.sub(r"`(?:[^`\n]|\n(?!\n))+`", "code", prose_of(page))
    targets = re.findall(r"\]\(([^()\s]+)\)", without_code)
    inside = [target.partition("#") for target in targets if "://" not in target]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in inside]
