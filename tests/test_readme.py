"""The README's first screen, and that its commands are those that .ci/run runs. That its blocks work: test_docs.py."""

import subprocess

import pytest
from pages import ROOT, Block, blocks_of, play

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = ("install-and-train", "test")


def block(name: str) -> Block:
    """Return the block of the README that has this name."""
    (found,) = (one for one in blocks_of(ROOT / "README.md") if name in one.marks)
    return found


def test_readme_example_leaves_no_file_behind(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    play([block("example")], folder)
    assert list(folder.iterdir()) == []


def test_readme_example_fits_the_first_screen():
    lines = [line for line in block("example").text.splitlines() if line.strip()]
    assert 5 <= len(lines) <= 14
    assert README[: README.index("<!-- example -->")].count("\n") < 40


@pytest.mark.parametrize(("name", "words"), [("install-and-train", "cylora train"), ("test", "pytest")])
def test_readme_command_is_a_line_that_does_what_its_name_says(name, words):
    command = block(name).text
    assert command.count("\n") == 1
    assert command.rstrip().endswith(words)


def test_ci_runs_the_readme_commands():
    """An extraction that misses a command, or changes it, would let the README drift."""
    done = subprocess.run(
        ["bash", ROOT / ".ci" / "run", "--commands"], capture_output=True, text=True, check=False, cwd=ROOT.parent
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(block(name).text for name in COMMANDS)


@pytest.mark.parametrize("lost", [*COMMANDS, "```sh"])
def test_ci_refuses_a_readme_without_its_commands(tmp_path, lost):
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    (tmp_path / "README.md").write_text(README.replace(lost, "gone"), encoding="utf-8")
    done = subprocess.run(
        ["bash", tmp_path / ".ci" / "run", "--commands"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "README.md must have one line of shell after" in done.stderr
