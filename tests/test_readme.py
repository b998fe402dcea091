"""What the README shows is what happens: its example runs, and its commands are those that .ci/run runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = ("install-and-train", "test")


def blocks(language):
    """Return the fenced blocks of one language in the README: their text by the name in the comment before them."""
    pattern = rf"^(?:<!-- ([\w-]+) -->\n)?```{language}\n(.*?)^```$"
    found = re.findall(pattern, README, re.MULTILINE | re.DOTALL)
    assert len({name for name, _ in found}) == len(found), f"two blocks of {language} with one name, or without any"
    return dict(found)


def test_readme_example_runs_without_a_word_on_stderr(tmp_path):
    """In an empty directory, with warnings as errors, and leaving no file behind."""
    example = blocks("python")["example"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-"], input=example, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_readme_files_example_writes_what_it_says(tmp_path):
    example = blocks("python")["files"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-"], input=example, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-adapter", "run.safetensors"]


def test_readme_has_no_other_python():
    """Another block of Python would be one that nothing runs."""
    assert list(blocks("python")) == ["example", "files"]


def test_readme_example_fits_the_first_screen():
    lines = [line for line in blocks("python")["example"].splitlines() if line.strip()]
    assert 5 <= len(lines) <= 14
    assert README[: README.index("<!-- example -->")].count("\n") < 40


def test_readme_commands_are_two_lines():
    commands = blocks("sh")
    assert tuple(commands) == COMMANDS
    for command in commands.values():
        assert command.count("\n") == 1


@pytest.mark.parametrize(("name", "words"), [("install-and-train", "cylora train"), ("test", "pytest")])
def test_readme_command_does_what_its_name_says(name, words):
    assert blocks("sh")[name].rstrip().endswith(words)


def test_ci_runs_the_readme_commands():
    """An extraction that misses a command, or changes it, would let the README drift."""
    done = subprocess.run(
        ["bash", ROOT / ".ci" / "run", "--commands"], capture_output=True, text=True, check=False, cwd=ROOT.parent
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(blocks("sh")[name] for name in COMMANDS)


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


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_inside_the_repository_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target]
    assert [target for target in targets if not (ROOT / target).exists()] == []
