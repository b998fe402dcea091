"""Tenants' names as file names: one to one, whatever is in them, and nothing that a path means."""

import string
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cylora import InputError
from cylora.serving.tenant_names import MAX_BYTES, checked_name, file_name, tenant_of

TRICKS = [
    "..", ".", "../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "nul", "CON", "com1.txt", "a\0b", "\n", " ", "a ", "~",
    "*", "-rf", "%2e", "%", "a%00", "tenant-a", ".hidden", "x.safetensors", "store.lock", "latest", "é", "e\u0301",
    "用户", "🙂", "\u202e", "user@example.com", "Alice", "alice",
]  # fmt: skip


@pytest.mark.parametrize("tenant", TRICKS)
def test_name_with_a_trick_in_it_is_a_plain_file_name(tenant: str) -> None:
    name = file_name(tenant)
    assert set(name) <= set(string.ascii_lowercase + string.digits + "._@+-%")
    assert name.startswith("tenant-")
    assert name.endswith(".safetensors")
    assert tenant_of(name) == tenant
    assert checked_name(tenant) == tenant


def test_names_that_some_file_systems_take_for_one_are_two_files() -> None:
    pairs = [("Alice", "alice"), ("é", unicodedata.normalize("NFD", "é")), ("ß", "ss"), ("a", "a "), ("a", "a.")]
    for one, other in pairs:
        assert file_name(one) != file_name(other)
        assert file_name(one).lower() == file_name(one)


@given(st.text(min_size=1, max_size=22))
def test_any_text_is_a_name_and_comes_back(tenant: str) -> None:
    name = file_name(tenant)
    assert tenant_of(name) == tenant
    assert len(name) <= 255 - len(".1234567.0123456789abcdef.tmp")


@pytest.mark.parametrize(
    ("tenant", "message"),
    [
        ("", "tenant must be a non-empty str, got ''"),
        (None, "tenant must be a non-empty str, got None"),
        (b"a", "tenant must be a non-empty str, got b'a'"),
        (7, "tenant must be a non-empty str, got 7"),
        ("\ud800", r"tenant must be Unicode text, got '\\ud800' with half a surrogate pair"),
        ("a" * (MAX_BYTES + 1), r"tenant must take at most 200 bytes \(a-z .*\), got 'aaa.*, which takes 201"),
        ("A" * 67, "which takes 201"),
        ("用" * 23, "which takes 207"),
    ],
)
def test_name_that_cannot_be_is_refused(tenant: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        file_name(tenant)


def test_longest_names_are_taken() -> None:
    for tenant in ("a" * MAX_BYTES, "A" * 66, "用" * 22):
        assert tenant_of(file_name(tenant)) == tenant


@pytest.mark.parametrize(
    "name",
    [
        "store.lock", "a.safetensors", "tenant-.safetensors", "tenant-a.safetensors.bak", "tenant-A.safetensors",
        "tenant-%61.safetensors", "tenant-%FF.safetensors", "tenant-%ff.safetensors", "tenant-%2.safetensors",
        "tenant-a/b.safetensors", ".tenant-a.1.0123456789abcdef.tmp", f"tenant-{'a' * 201}.safetensors",
    ],
)  # fmt: skip
def test_file_that_no_tenant_has_is_nobodys(name: str) -> None:
    assert tenant_of(name) is None
