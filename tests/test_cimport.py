"""The loops from C, for another Cython package; and the choice of their instruction set, each in a fresh process."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cylora
from cylora.kernels import dispatch
from cylora.kernels._cpu import supports_x86_64_v3

PACKAGE = Path(__file__).parent / "data" / "cimport_package"
INSTALLED = Path(cylora.__file__).parent


def run_python(*arguments, path=None, isa=None, cwd=None):
    """Run this interpreter anew, with ``path`` first on its path and CYLORA_ISA as given or unset."""
    environment = {name: value for name, value in os.environ.items() if name not in {"CYLORA_ISA", "PYTHONPATH"}}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    if isa is not None:
        environment["CYLORA_ISA"] = isa
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Folder with the foreign package and compare.py, compiled against the cylora that these tests run on."""
    source = tmp_path_factory.mktemp("foreign") / "source"
    shutil.copytree(PACKAGE, source)
    built = source.parent / "built"
    done = run_python(
        "setup.py", "-q", "build_py", "--build-lib", built, "build_ext", "--build-lib", built, cwd=source
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copy(PACKAGE / "compare.py", built)  # beside the compiled package, not beside its source
    return built


@pytest.fixture(scope="module")
def comparisons(foreign):
    """What compare.py says under each instruction set that was built and that this CPU runs."""
    found = {}
    for isa in runnable():
        done = run_python("compare.py", isa=isa, cwd=foreign)
        assert done.returncode == 0, done.stderr
        found[isa] = json.loads(done.stdout)
    return found


def runnable():
    return [isa for isa in dispatch.variants if isa == "baseline" or supports_x86_64_v3()]


def test_cimport_gives_the_bits_of_the_python_entry_points(comparisons):
    """A foreign package gets other loops, or the loops without their floating-point state, if a digest differs."""
    for isa, comparison in comparisons.items():
        differing = [name for name, (theirs, ours) in comparison["work"].items() if theirs != ours]
        assert len(comparison["work"]) == 8 * 8 + 1
        assert differing == [], isa


def test_cimport_is_dispatched_by_the_same_choice(comparisons):
    assert {isa: comparison["isa"] for isa, comparison in comparisons.items()} == {isa: isa for isa in runnable()}


def test_cimport_gives_the_same_bits_on_every_instruction_set(comparisons):
    works = [comparison["work"] for comparison in comparisons.values()]
    assert all(work == works[0] for work in works)


def test_cimport_work_tells_different_inputs_apart(comparisons):
    """The digests would be worthless if they did not depend on what was computed."""
    theirs = [theirs for theirs, _ in comparisons["baseline"]["work"].values()]
    # Of the eight pieces of work at each size, two compute the same norm.
    assert len(set(theirs)) == 8 * (8 - 1) + 1


# ------------------------------------------------------------------ the choice

REPORT = """
import json, sys
from cylora import kernels, optimizer
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(json.dumps({
    "isa": kernels.isa, "variants": kernels.variants, "same": optimizer.isa == kernels.dispatch.isa == kernels.isa,
    "imported": sorted({"cylora.kernels._baseline", "cylora.kernels._x86_64_v3"} & sys.modules.keys()),
    "mapped": sorted(name for name in ("_baseline.", "_x86_64_v3.") if name in maps),
}))
"""
PRETEND = """
import sys, types
sys.modules["cylora.kernels._cpu"] = types.SimpleNamespace(supports_x86_64_v3=lambda: {supported})
"""


def report(**options):
    done = run_python("-c", options.pop("before", "") + REPORT, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def import_error(**options):
    """Return the message of the ImportError that the import must end with."""
    done = run_python("-c", options.pop("before", "") + REPORT, **options)
    assert done.returncode == 1
    assert done.stdout == ""
    name, _, message = done.stderr.splitlines()[-1].partition(": ")
    assert name == "ImportError"
    return message


@pytest.fixture
def without(tmp_path):
    """Make a copy of the installed package that lacks the compiled modules of ``stems``; return the folder it is in."""

    def copy(*stems):
        shutil.copytree(INSTALLED, tmp_path / "cylora", ignore=shutil.ignore_patterns("__pycache__"))
        for stem in stems:
            (library,) = (tmp_path / "cylora" / "kernels").glob(f"{stem}.*.so")
            library.unlink()
        return tmp_path

    return copy


@pytest.mark.parametrize("isa", [None, "", *runnable()])
def test_isa_imports_exactly_the_chosen_variant(isa):
    """Unset and empty mean: the best this CPU runs. The other variant's library is not even mapped."""
    chosen = isa or runnable()[-1]
    stem = dispatch.MODULES[chosen]
    found = report(isa=isa)
    assert found["isa"] == chosen
    assert found["same"]
    assert found["variants"] == list(dispatch.variants)
    assert found["imported"] == [f"cylora.kernels.{stem}"]
    assert found["mapped"] == ([f"{stem}."] if sys.platform == "linux" else [])


@pytest.mark.parametrize("isa", ["nonsense", "BASELINE", "x86_64_v3", " ", "_baseline"])
def test_isa_unknown_name_is_refused_with_the_choices(isa):
    assert import_error(isa=isa) == f"CYLORA_ISA must be one of baseline, x86-64-v3, got {isa!r}"


def test_isa_variants_are_all_of_the_architecture():
    """A build that lost a variant would be slow, or fail elsewhere."""
    expected = ("baseline", "x86-64-v3") if platform.machine().lower() in {"x86_64", "amd64"} else ("baseline",)
    assert dispatch.variants == expected


@pytest.mark.parametrize("isa", dispatch.variants)
def test_isa_forced_variant_that_is_missing_is_an_import_error(without, isa):
    others = [other for other in dispatch.variants if other != isa]
    message = import_error(path=without(dispatch.MODULES[isa]), isa=isa, before=PRETEND.format(supported=True))
    assert message == f"the kernels for {isa} were not built; built are: {', '.join(others) or 'none'}"


@pytest.mark.parametrize(("isa", "supported"), [("baseline", False), ("x86-64-v3", True)])
def test_isa_detected_variant_that_is_missing_is_no_silent_slow_path(without, isa, supported):
    stems = [dispatch.MODULES[isa]] if isa in dispatch.variants else []
    message = import_error(path=without(*stems), before=PRETEND.format(supported=supported))
    others = [other for other in dispatch.variants if other != isa]
    assert message == f"the kernels for {isa} were not built; built are: {', '.join(others) or 'none'}"


def test_isa_choice_tells_what_was_built_when_nothing_was(without):
    path = without(*(dispatch.MODULES[isa] for isa in dispatch.variants))
    message = import_error(path=path, isa="baseline")
    assert message == "the kernels for baseline were not built; built are: none"


def test_isa_lost_variant_does_not_stop_the_others(without):
    path = without(*(dispatch.MODULES[isa] for isa in dispatch.variants if isa != "baseline"))
    found = report(path=path, isa="baseline")
    assert (found["isa"], found["variants"]) == ("baseline", ["baseline"])


def test_isa_on_a_cpu_without_v3_never_imports_v3():
    """The module init of the v3 variant already contains AVX: to import it is to crash."""
    found = report(before=PRETEND.format(supported=False))
    assert found["isa"] == "baseline"
    assert found["imported"] == ["cylora.kernels._baseline"]
    assert found["mapped"] == (["_baseline."] if sys.platform == "linux" else [])
    assert found["variants"] == list(dispatch.variants)


def test_isa_forced_on_a_cpu_without_it_is_refused():
    message = import_error(isa="x86-64-v3", before=PRETEND.format(supported=False))
    assert message == "CYLORA_ISA is 'x86-64-v3', but this CPU or operating system cannot run it"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists the features")
def test_cpu_check_agrees_with_the_operating_system():
    """Linux clears the flags of what it does not save, as the check must."""
    lists = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")]
    flags = set(lists[0].split()) if lists else set()
    level = {
        "pni", "ssse3", "fma", "cx16", "sse4_1", "sse4_2", "movbe", "popcnt", "xsave", "avx", "f16c", "bmi1", "avx2",
        "bmi2", "lahf_lm", "abm",
    }  # fmt: skip
    assert supports_x86_64_v3() == (level <= flags)
