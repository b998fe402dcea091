"""A terminal's screen: what is to be seen after a program has written, and where the cursor is."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

TOKEN = re.compile(r"\x1b\[(\d*)([A-Za-z])|([\s\S])")


class Screen:
    """Understands carriage return, line feed, the cursor up, clearing to the end of line and screen, and colours.

    Anything else that begins with ESC shows up as text, and fails the test that looks at it.
    """

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.row = self.column = 0
        self._lines = [""]
        self.colours: set[str] = set()
        self.wraps = 0

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._lines]

    def write(self, text: str) -> None:
        for number, command, character in TOKEN.findall(text):
            if command == "A":
                top = max(len(self._lines) - self.rows, 0)  # what has scrolled out is out of reach
                self.row = max(self.row - int(number or 1), top)
            elif command == "K":
                self._lines[self.row] = self._lines[self.row][: self.column]
            elif command == "J":
                self._lines[self.row] = self._lines[self.row][: self.column]
                del self._lines[self.row + 1 :]
            elif command == "m":
                self.colours.add(number)
            elif command:
                raise AssertionError(f"unknown sequence {number}{command}")
            elif character == "\r":
                self.column = 0
            elif character == "\n":
                self._down()
            else:
                self._put(character)

    def _down(self) -> None:
        self.row, self.column = self.row + 1, 0  # as terminals are set to: a line feed goes to the line's beginning
        if self.row == len(self._lines):
            self._lines.append("")

    def _put(self, character: str) -> None:
        if self.column == self.columns:
            self.wraps += 1
            self._down()
        line = self._lines[self.row].ljust(self.column)
        self._lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
        self.column += 1


def on_terminal(
    command: list[str], environment: dict[str, str], *, columns: int = 100, folder: Path | None = None
) -> str:
    """Run a command with its stderr on a terminal and return what was written there."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=end, stdin=subprocess.DEVNULL, env=environment, cwd=folder
    )
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux reports the closed other end as EIO
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    return shown.decode()
