"""Changed files, thousands of them: only documented errors, and what we accept the library understands alike."""

import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import safetensors
from file_mutations import SEEDS, mutated
from raw_container import open_descriptors

from cylora.errors import FormatError
from cylora.formats.container import TensorFile

HARNESS = Path(__file__).parent / "fuzz" / "fuzz_files.py"


def read(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    with TensorFile(path) as opened:
        return {name: (t.dtype, list(t.shape), opened.read(name).tobytes()) for name, t in opened.tensors.items()}


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_seeds_are_valid(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(SEEDS[seed])
    assert read(path) == {
        n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in safetensors.deserialize(SEEDS[seed])
    }


@pytest.mark.parametrize(
    ("count", "rules_met"), [(1_000, 16), pytest.param(20_000, 23, marks=pytest.mark.nightly)], ids=str
)
def test_one_change_to_a_valid_file(count: int, rules_met: int, tmp_path: Path) -> None:
    random = Random(0)
    path = tmp_path / "file"
    accepted, rules = 0, set()
    before = open_descriptors()
    for number in range(count):
        file = mutated(SEEDS[number % len(SEEDS)], random)
        path.write_bytes(file)
        try:
            found = read(path)
        except FormatError as error:
            message = str(error).removeprefix(f"{path}: ").split(", got ")[0]
            rules.add(re.sub(r"'.*'|[0-9]+|of [A-Z].*", "", message))
            continue
        library = {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in safetensors.deserialize(file)}
        assert found == library, file
        accepted += 1
    assert open_descriptors() == before
    assert 0.05 * count < accepted < 0.5 * count
    assert len(rules) >= rules_met, "\n".join(sorted(rules))  # else it tries little


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("target", "runs"),
    [
        ("container", 500_000),
        ("json", 250_000),
        ("checkpoint", 100_000),
        ("peft", 50_000),
        ("peft config", 50_000),
        ("settings", 50_000),
    ],
)
def test_fuzzer_finds_nothing(target: str, runs: int, tmp_path: Path) -> None:
    command = [sys.executable, str(HARNESS), target, f"-runs={runs}", "-seed=1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"stat::number_of_executed_units: {runs}" in result.stderr
    assert list(tmp_path.iterdir()) == []
