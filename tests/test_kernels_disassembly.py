"""The machine code of the kernels: nothing that rounds differently from IEEE 754, and the vector loops are there.

Read with objdump, which comes with the compiler (binutils). Without it these tests fail: then nobody has looked.
"""

import platform
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import pytest

from cylora.optimizer import variants

MODULES = {"baseline": "_baseline", "x86-64-v3": "_x86_64_v3"}
OTHERS = ("_cpu", "dispatch", "buffers", "arrays", "threads", "task", "adam", "many", "owned")
X86_64 = platform.machine().lower() in ("x86_64", "amd64")

# Fused multiply-add (x86: vfmadd132ps, vfnmsub231sd, ...; ARM: fmla, fmadd) and estimates of 1/x and 1/sqrt(x).
FORBIDDEN = re.compile(
    r"v?fn?m(add|sub)\w*|vfmaddsub\w*|vfmsubadd\w*|v?rcp(14|28)?[ps][sdh]|v?rsqrt(14|28)?[ps][sdh]"
    if X86_64
    else r"fn?m(add|sub|la|ls)\w*|fmlal\w*|frecp\w*|frsqrt\w*|bfm\w*"
)
# The one exception, in the functions that add up a norm: a float32 squared is exact in float64, so x * x + sum is
# rounded once, fused or not. (AT&T order: both factors, then the sum.)
EXACT_SQUARE = re.compile(r"(%ymm\d+),\1,%ymm\d+")
# What the loops must contain: packed division and square root in float32 (the update), packed product and sum in
# float64 (the norm, fused where that exists), packed product in float32 (scaling). (mnemonic, operand), the latter a
# regular expression.
ON_X86 = ("divps", "sqrtps", "mulpd", "addpd", "mulps", "subps", "cvtps2pd")
VECTORS = {
    "baseline": [(name, "%xmm") for name in ON_X86]
    if X86_64
    else [(f"f{name}", r"v\d+\.(4s|2d)") for name in ("div", "sqrt", "mul", "add", "sub")],
    "x86-64-v3": [(f"v{name}", "%ymm") for name in (*ON_X86, "fmadd231pd") if name not in ("mulpd", "addpd")],
}


class Instruction(NamedTuple):
    """One of a function's instructions."""

    address: int
    function: str
    name: str
    operands: str


@cache
def listing(module: str) -> list[Instruction]:
    """Return all instructions of a compiled module, in order."""
    spec = find_spec(f"cylora.kernels.{module}")
    assert spec is not None, f"cylora.kernels.{module} was not built"
    assert spec.origin is not None
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", spec.origin], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    found, function = [], ""
    for line in listing.splitlines():
        if label := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            function = label[1]
        elif code := re.fullmatch(r"\s+([0-9a-f]+):\s+(.+)", line):
            words = code[2].split()
            while words[0] in ("bnd", "rep", "repz", "repnz", "lock", "notrack", "data16", "cs", "ds"):
                words = words[1:] or ["nop"]
            found.append(Instruction(int(code[1], 16), function, words[0], " ".join(words[1:])))
    assert len(found) > 50, f"objdump saw {len(found)} instructions in {spec.origin}"
    return found


def instructions(module: str) -> list[tuple[str, str, str]]:
    """Return (function, mnemonic, operands) for every instruction of a compiled module."""
    return [instruction[1:] for instruction in listing(module)]


def innermost_loops(module: str) -> Iterator[list[Instruction]]:
    """Yield what lies between each backward jump and its target, but for ranges with another such range inside."""
    code = listing(module)
    place = {instruction.address: i for i, instruction in enumerate(code)}
    ranges = []
    for i, (address, function, name, operands) in enumerate(code):
        target = re.match(r"[0-9a-f]+", operands) if name.startswith("j") else None
        start = place.get(int(target[0], 16)) if target else None
        if start is not None and code[start].address <= address and code[start].function == function:
            ranges.append((start, i))
    for start, end in ranges:
        if not any((a, b) != (start, end) and start <= a and b <= end for a, b in ranges):
            yield code[start : end + 1]


def unpacks(name: str, *of: str) -> bool:
    return any(re.fullmatch(f"vpmovzx{kind}", name) for kind in of)


def form_of(loop: list[Instruction]) -> tuple[str, int] | None:
    """Return which form's update a loop is, by how it reads moments, and comparisons for each root; None: no update.

    Two roots share a division. Of float32 moments it stores three vectors for each root; to bfloat16 it packs; codes it
    unpacks.
    """
    wide = [x for x in loop if "%ymm" in x.operands]
    roots = sum(x.name == "vsqrtps" for x in wide)
    quotients = sum(x.name == "vdivps" for x in wide)
    if roots == 0 or 2 * quotients != roots or any(x.name in ("vsqrtss", "vdivss") for x in loop):
        return None
    compared = sum(re.match(r"vp?cmp|vp?min|vp?max", x.name) is not None for x in wide)
    if any(unpacks(x.name, "bd", "bw") for x in wide):
        return "8bit", compared // roots
    if any(unpacks(x.name, "wd") for x in wide):
        packs = any(re.match("vpack|vpshufb", x.name) for x in loop)
        return ("bfloat16", compared // roots) if packs else None
    # To the stack goes what registers have no room for; where a function keeps its place in %rbp, by that.
    bases = [found[1] for x in wide if (found := re.fullmatch(r"%ymm\d+,.*\((%\w+).*\)", x.operands))]
    is_whole = any(sum(base not in stack for base in bases) == 3 * roots for stack in (("%rsp",), ("%rsp", "%rbp")))
    return ("float32", compared // roots) if is_whole else None


def squares_exactly(function: str, name: str, operands: str) -> bool:
    in_norm = function.endswith(("_square_blocks", "_norm_add"))
    return in_norm and name == "vfmadd231pd" and EXACT_SQUARE.fullmatch(operands) is not None


@pytest.mark.parametrize("module", [*(MODULES[name] for name in variants), *OTHERS])
def test_machine_code_has_no_fused_or_estimated_arithmetic(module: str) -> None:
    """-ffp-contract=off dropped, -ffast-math or -mrecip added: each would put one of these in."""
    found = [instruction for instruction in instructions(module) if FORBIDDEN.fullmatch(instruction[1])]
    assert [instruction for instruction in found if not squares_exactly(*instruction)] == []


@pytest.mark.parametrize("isa", variants)
def test_machine_code_of_the_update_asks_for_memory_early(isa: str) -> None:
    """GCC may find that a function which only prefetches has no effect, and leave its calls out."""
    prefetch = "prefetcht0" if X86_64 else "prfm"
    found = [name for function, name, _ in instructions(MODULES[isa]) if function.endswith("_update_blocks")]
    assert found.count(prefetch) >= 5


@pytest.mark.parametrize("isa", variants)
def test_machine_code_has_the_vector_loops(isa: str) -> None:
    """-fno-math-errno or -O3 dropped: the square root would not vectorise and a step take eight times as long."""
    code = instructions(MODULES[isa])
    for mnemonic, operand in VECTORS[isa]:
        count = sum(name == mnemonic and re.search(operand, operands) is not None for _, name, operands in code)
        assert count > 0, f"{isa} has no {mnemonic} on {operand}"
    for _, name, operands in code:
        assert "call" not in name or "sqrt" not in operands, f"{isa} calls the C library's square root: {operands}"


@pytest.mark.skipif("x86-64-v3" not in variants, reason="only there are registers of 8 floats")
@pytest.mark.parametrize("form", ["float32", "bfloat16", "8bit"])
def test_machine_code_has_each_forms_update_in_vectors(form: str) -> None:
    """The loop of chunks with a gradient compares nothing; with l2 decay, up to three times for the gradient's bound.

    Those of chunks without a gradient compare in other numbers. A loop that GCC left scalar has no packed root; one
    that is scalar in part has single roots beside those.
    """
    loops = [form_of(loop) for loop in innermost_loops("_x86_64_v3")]
    assert (form, 0) in loops, f"{form}: no vector loop of the decoupled step among {loops}"
    assert (form, 2) in loops or (form, 3) in loops, f"{form}: no vector loop of the l2 step among {loops}"


@pytest.mark.skipif(not X86_64, reason="AVX exists on x86-64 alone")
@pytest.mark.parametrize("module", ["_baseline", *OTHERS])
def test_machine_code_outside_the_variant_runs_on_every_processor(module: str) -> None:
    """Only the module that is imported after the check of the processor may hold AVX."""
    found = [(where, name) for where, name, operands in instructions(module) if re.search("%[yz]mm", operands)]
    assert found == []
    names = {name for _, name, _ in instructions(module)}
    assert [name for name in names if re.fullmatch(r"v(mov|add|mul|sub|div|sqrt|cvt)\w+", name)] == []


def test_machine_code_of_v3_stays_within_v3() -> None:
    """AVX-512 would fault on half of the processors that pass the check, and is slower on unaligned arrays."""
    if "x86-64-v3" in variants:
        wide = re.compile(r"%zmm|%[xy]mm(1[6-9]|[23]\d)")
        assert [name for _, name, operands in instructions("_x86_64_v3") if wide.search(operands)] == []
    else:
        assert not X86_64


@pytest.mark.parametrize("name", ["vfmadd231ps", "vfnmsub213sd", "rcpps", "vrsqrt14ps", "rsqrtss", "vfmadd132ss"])
def test_forbidden_pattern_knows_its_instructions(name: str) -> None:
    assert not X86_64 or FORBIDDEN.fullmatch(name)


@pytest.mark.parametrize(
    ("operands", "is_exact"),
    [("%ymm1,%ymm1,%ymm0", True), ("%ymm1,%ymm2,%ymm0", False), ("(%rax),%ymm1,%ymm0", False)],
)
def test_exact_square_is_one_register_times_itself(operands: str, is_exact: bool) -> None:
    assert squares_exactly("variant_square_blocks", "vfmadd231pd", operands) == is_exact
    assert not squares_exactly("variant_update_blocks", "vfmadd231pd", operands)
    assert not squares_exactly("variant_square_blocks", "vfmadd231ps", operands)


@pytest.mark.parametrize("name", ["mulps", "vmulps", "vsqrtps", "fmul", "vsubps", "vfpclassps"])
def test_forbidden_pattern_spares_the_others(name: str) -> None:
    assert not FORBIDDEN.fullmatch(name)
