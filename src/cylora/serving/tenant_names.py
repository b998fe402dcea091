"""Tenants' names as file names, one to one, whatever is in them.

A name is the caller's: an address, a path, any script. In a file name only ``a-z 0-9 . _ @ + -`` stand for themselves;
every other byte of its UTF-8 form is ``%xx``, capital letters too. So two names never meet in one file, also where a
file system takes capital letters for small ones or composes accents; and behind ``tenant-`` no name is a directory, a
hidden file or a device.
"""

import re
from typing import Any

from cylora.errors import InputError

__all__ = ["MAX_BYTES", "checked_name", "file_name", "tenant_of"]

PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789._@+-")
MAX_BYTES = 200  # of the encoded name; with what stands around it a file's name may have 255
FILE = re.compile(r"tenant-(?P<encoded>[a-z0-9._@+%-]{1,200})\.safetensors")
ESCAPED = re.compile(rb"%([0-9a-f]{2})")


def checked_name(tenant: Any) -> str:
    """Return the name, or raise InputError."""
    file_name(tenant)
    return str(tenant)


def file_name(tenant: Any) -> str:
    """Return the name of a tenant's file.

    Raises
    ------
    InputError
        If ``tenant`` is not a str, is empty, is no Unicode text, or takes more than 200 bytes.
    """
    if not isinstance(tenant, str) or not tenant:
        raise InputError(f"tenant must be a non-empty str, got {tenant!r:.80}")
    try:
        raw = tenant.encode()
    except UnicodeEncodeError:
        raise InputError(f"tenant must be Unicode text, got {tenant!r:.80} with half a surrogate pair") from None
    encoded = "".join(chr(byte) if byte in PLAIN else f"%{byte:02x}" for byte in raw)
    if len(encoded) > MAX_BYTES:
        rule = f"tenant must take at most {MAX_BYTES} bytes (a-z 0-9 . _ @ + - take one, other bytes of UTF-8 three)"
        raise InputError(f"{rule}, got {tenant!r:.80}, which takes {len(encoded)}")
    return f"tenant-{encoded}.safetensors"


def tenant_of(name: str) -> str | None:
    """Return whose file this is; None if it is no tenant's."""
    match = FILE.fullmatch(name)
    if match is None:
        return None
    raw = ESCAPED.sub(lambda escaped: bytes([int(escaped[1], 16)]), match["encoded"].encode())
    try:
        tenant = raw.decode()
    except UnicodeDecodeError:
        return None
    return tenant if file_name(tenant) == name else None  # no second spelling of a name
