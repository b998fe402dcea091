"""What goes into the sdist and the wheel, which flags compile it, and what a build says that cannot work.

All builds run in a copy of the tree, with the setuptools and Cython of this environment. What a wheel contains and how
it is compiled is decided before any code is, so these wheels come from a compiler that notes its arguments and writes
empty files. CYLORA_DIST names a folder with a real sdist and the wheel built from it; then those are examined.
"""

import email
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import cylora

ROOT = Path(__file__).parents[1]
X86_64 = platform.machine().lower() in {"x86_64", "amd64"}
TOP_FILES = {
    "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py", ".ci/run",
    ".ci/interop.coveragerc", ".ci/stubtest.txt",
}  # fmt: skip
DEBRIS = shutil.ignore_patterns("*.so", "*.c", "*.py[co]", "__pycache__", "*.egg-info", ".benchmarks", ".*_cache")
MESSAGE_START = "cylora is a C extension and its compilation failed: "
MESSAGE_END = "CC=... chooses a compiler that is not called cc or gcc."

NOTING_COMPILER = """#!/bin/sh
echo "$@" >> "{log}"
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && : > "$2"
  shift
done
"""
COMPILER_WITHOUT_HEADERS = """#!/bin/sh
for argument do
  shift
  case $argument in -I*) ;; *) set -- "$@" "$argument" ;; esac
done
exec {compiler} "$@"
"""


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(*command, cwd, **environment):
    """Run a command of this Python, its output in one string; ``environment`` replaces variables, None removes one."""
    variables = {name: str(value) for name, value in (os.environ | environment).items() if value is not None}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def build(*arguments, cwd, **environment):
    done = run("-m", "build", "--no-isolation", *arguments, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout
    return done


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a clone contains, as far as a package is concerned."""
    copy = tmp_path_factory.mktemp("tree") / "with a space"
    for name in sorted(TOP_FILES):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for name in ("src", "tests", "bench", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=DEBRIS)
    return copy


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    """Folder of an sdist made in a tree full of debris, the wheel made from that sdist, and the compiler's log."""
    folder = tmp_path_factory.mktemp("built")
    littered = folder / "littered"
    shutil.copytree(tree, littered)
    debris = ["_loops.c", "_old.cpython-311-x86_64-linux-gnu.so", "__pycache__/adam.cpython-311.pyc", "_loops.pxi~"]
    for name in debris:
        path = littered / "src" / "cylora" / "kernels" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"debris")
    log = folder / "log"
    compiler = script(folder / "compiler", NOTING_COMPILER.format(log=log))
    build("--outdir", folder, cwd=littered, CC=compiler, LDSHARED=compiler, CFLAGS="-ffast-math", LDFLAGS="")
    return folder


@pytest.fixture(scope="module")
def archives(built):
    """The sdist and the wheel to examine."""
    folder = Path(os.environ.get("CYLORA_DIST") or built)
    (sdist,) = folder.glob("cylora-*.tar.gz")
    (wheel,) = folder.glob("cylora-*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def wheel_metadata(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(name))


@pytest.fixture(scope="module")
def compilations(built):
    """The arguments of each compilation (not of the links), by the module it is for."""
    lines = [line.split() for line in (built / "log").read_text().splitlines()]
    return {Path(line[line.index("-c") + 1]).stem: line for line in lines if "-c" in line}


def files(tree, *suffixes):
    """Return the names below src/ of the package's files with these suffixes."""
    found = {str(path.relative_to(tree / "src")) for path in (tree / "src").rglob("*") if path.suffix in suffixes}
    assert found
    return found


def modules(tree):
    """Return the compiled modules that this architecture must get."""
    stems = {path.stem for path in (tree / "src" / "cylora" / "kernels").glob("*.pyx")}
    return stems if X86_64 else stems - {"_x86_64_v3"}


# ------------------------------------------------------------------ contents


def test_sdist_holds_the_tree_and_nothing_else(tree, archives):
    """A file that MANIFEST.in misses breaks the build from the sdist; debris in it is shipped to everybody."""
    base = f"cylora-{cylora.__version__}/"
    with tarfile.open(archives[0]) as sdist:
        found = {member.name.removeprefix(base) for member in sdist if member.isfile()}
    generated = {name for name in found if name.startswith("src/cylora.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    expected = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    assert found - generated == expected
    assert {Path(name).suffix for name in found} >= {".py", ".pyi", ".pyx", ".pxd", ".pxi", ".typed"}


def test_wheel_holds_what_runs_and_nothing_else(tree, archives):
    """Importing, type checking and cimporting need these files; the sources of the kernels are not among them."""
    with zipfile.ZipFile(archives[1]) as wheel:
        found = set(wheel.namelist())
    info = f"cylora-{cylora.__version__}.dist-info/"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    expected = files(tree, ".py", ".pyi", ".pxd", ".typed")
    expected |= {f"cylora/tasks/data/{path.name}" for path in (tree / "src/cylora/tasks/data").iterdir()}
    expected |= {f"cylora/kernels/{module}{suffix}" for module in modules(tree)}
    expected |= {info + name for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")}
    expected |= {info + "licenses/LICENSE", info + "licenses/src/cylora/tasks/data/LICENSE"}
    assert found == expected


def test_every_compiled_module_has_a_stub_unless_it_is_a_variant(tree):
    stubs = {path.stem for path in (tree / "src" / "cylora" / "kernels").glob("*.pyi")}
    sources = {path.stem for path in (tree / "src" / "cylora" / "kernels").glob("*.pyx")}
    assert sources - stubs == {"_baseline", "_x86_64_v3"}
    assert stubs - sources == set()


def test_wheel_metadata_is_what_the_index_shows(wheel_metadata):
    assert wheel_metadata["Version"] == cylora.__version__
    assert wheel_metadata["License-Expression"] == "Apache-2.0"
    assert wheel_metadata.get_all("License-File") == ["LICENSE", "src/cylora/tasks/data/LICENSE"]
    assert wheel_metadata["Requires-Python"] == ">=3.11"
    assert wheel_metadata["Description-Content-Type"] == "text/markdown"
    assert not any(name.startswith("License ::") for name in wheel_metadata.get_all("Classifier"))


def test_wheel_needs_numpy_and_safetensors_only(wheel_metadata):
    """Everything else comes with an extra."""
    requirements = wheel_metadata.get_all("Requires-Dist")
    always = [re.match(r"[\w-]+", line)[0] for line in requirements if "extra ==" not in line]
    assert sorted(always) == ["numpy", "safetensors"]
    extras = "bench bench-peers examples gguf interop lint nightly plot tensorboard test torch train"
    assert sorted(wheel_metadata.get_all("Provides-Extra")) == extras.split()


def test_license_is_the_whole_apache_license():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert all(f"\n   {number}. " in text for number in range(1, 10))
    assert "END OF TERMS AND CONDITIONS" in text


def test_changelog_has_this_version():
    assert re.search(rf"^## \[{re.escape(cylora.__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


# ------------------------------------------------------------------ flags


def test_every_module_is_compiled_once(tree, compilations):
    assert compilations.keys() == modules(tree)


def test_only_the_v3_variant_is_compiled_for_a_newer_cpu(compilations):
    """A wheel must run on every CPU of its architecture."""
    choosing = ("-march", "-mcpu", "-mtune", "-mavx", "-mfma")
    newer = {module: [flag for flag in line if flag.startswith(choosing)] for module, line in compilations.items()}
    expected = {module: [] for module in compilations} | ({"_x86_64_v3": ["-march=x86-64-v3"]} if X86_64 else {})
    assert newer == expected


def test_flags_keep_ieee_arithmetic_whatever_cflags_says(compilations):
    """The build that is examined had CFLAGS=-ffast-math, which would cost the same bits everywhere."""
    for module, line in compilations.items():
        ours = line[line.index("-fno-fast-math") :]
        assert {"-O3", "-ffp-contract=off", "-fno-math-errno"} <= set(ours), module
        assert "-ffast-math" not in ours, module


# ------------------------------------------------------------------ builds that cannot work


def message_of(output):
    """Return the text between the two ends of the message that says what to install, and what follows it."""
    assert output.count(MESSAGE_START) == output.count(MESSAGE_END) == 1, output
    start, end = output.index(MESSAGE_START), output.index(MESSAGE_END) + len(MESSAGE_END)
    return output[start:end], output[end:]


def test_build_without_a_compiler_ends_with_what_to_install(tree, tmp_path):
    done = run("setup.py", "build_ext", "-b", tmp_path, "-t", tmp_path, cwd=tree, CC="/nonexistent/cc")
    assert done.returncode == 1
    message, rest = message_of(done.stdout)
    assert rest.strip() == ""
    assert "Traceback" not in done.stdout
    assert "'/nonexistent/cc'" in message
    for hint in ("apt install gcc python3-dev", "dnf install gcc python3-devel", "apk add gcc", "xcode-select"):
        assert hint in message


def test_build_with_an_empty_path_ends_with_what_to_install(tree, tmp_path):
    done = run("setup.py", "build_ext", "-b", tmp_path, "-t", tmp_path, cwd=tree, PATH=tmp_path, CC=None)
    assert done.returncode == 1
    message, rest = message_of(done.stdout)
    assert rest.strip() == ""
    assert "Traceback" not in done.stdout
    assert "No such file or directory" in message


def test_build_without_python_headers_ends_with_what_to_install(tree, tmp_path):
    """The compiler is there, Python.h is not: Debian's python3 without python3-dev."""
    compiler = sysconfig.get_config_var("CC").split()[0]
    crippled = script(tmp_path / "cc", COMPILER_WITHOUT_HEADERS.format(compiler=compiler))
    done = run("setup.py", "build_ext", "-b", tmp_path, "-t", tmp_path, cwd=tree, CC=crippled)
    assert done.returncode == 1
    message, rest = message_of(done.stdout)
    assert rest.strip() == ""
    assert "Traceback" not in done.stdout
    assert "Python.h" in done.stdout
    assert "the headers of this Python" in message


def test_pip_shows_what_to_install(tree, tmp_path):
    """Even a quiet pip: the message is among the last lines that a newcomer sees."""
    command = ("-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", tmp_path)
    done = run(*command, tree, cwd=tmp_path, CC="/nonexistent/cc", PIP_QUIET=None)
    assert done.returncode == 1
    _, rest = message_of(done.stdout)
    assert "Traceback" not in done.stdout
    assert len(rest.splitlines()) < 10
    assert list(tmp_path.iterdir()) == []
