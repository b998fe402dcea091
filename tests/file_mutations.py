"""Valid safetensors files and one change to them: to a token of the header, to the frame, or to any byte."""

import random
import re
import struct

from raw_container import one, raw

SEEDS = [
    raw("{}"),
    raw(one(), bytes(4)),
    raw(" " * 16 + one("\"BF16\"", "[2,0,3]", "[0,0]", "base_model.model.q_proj.lora_A.weight")),
    raw(
        '{"__metadata__":{"format":"pt","cylora":"{\\"step\\":7}"},'
        '"a":{"dtype":"F64","shape":[2,1],"data_offsets":[0,16]},"n":{"dtype":"I8","shape":[0],"data_offsets":[16,16]},'
        '"b\\u00e9":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]},"c":{"dtype":"BOOL","shape":[],'
        '"data_offsets":[22,23]}}  ',
        bytes(range(23)),
    ),
]  # fmt: skip
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9.eE+]+|[a-zA-Z]+|[][{}:,]')
TOKENS = [
    b"", b"0", b"1", b"2", b"3", b"4", b"8", b"16", b"22", b"23", b"-1", b"-0", b"1.0", b"1e0", b"1e999", b"NaN",
    b"true", b"null", b"2147483648", b"4294967296", b"9223372036854775807", b"9223372036854775808",
    b"18446744073709551616", b"1" * 50, b"Infinity", b'""', b'"a"', b'"b"', b'"\\u0061"', b'"\\ud800"',
    b'"\\ud83d\\ude00"', b'"\\u0000"', b'".."', b'"\xff"', b'"\xc3\xa9"', b'"\n"', b'"__metadata__"', b'"dtype"',
    b'"shape"', b'"data_offsets"', b'"F64"', b'"F32"', b'"F16"', b'"BF16"', b'"U8"', b'"U16"', b'"I64"', b'"BOOL"',
    b'"F8_E4M3"', b'"' + b"n" * 513 + b'"', b"[]", b"{}", b"[0]", b"[1,1]", b"[0,0]", b"[0,4]",
    b"[1,1,1,1,1,1,1,1,1]", b"[[[[[]]]]]", b"{", b"}", b"[", b"]", b",", b":", b" ", b"\n", b"\t", b"\x00",
    b"\xef\xbb\xbf", b"//", b"'",
]  # fmt: skip


def mutated(file: bytes, random_: random.Random) -> bytes:
    """Return ``file`` with one change; its length field follows a change of the header."""
    choice = random_.random()
    if choice < 0.7 and len(file) >= 8:
        (length,) = struct.unpack("<Q", file[:8])
        header, payload = file[8 : 8 + length], file[8 + length :]
        if choice < 0.55:
            header = _other_token(header, random_)
        elif choice < 0.62:
            header = _other_bytes(header, random_)
        else:
            payload = _other_bytes(payload, random_)
        return raw(header, payload)
    if choice < 0.8:
        return (
            struct.pack("<Q", random_.choice([0, 1, 2, 8, len(file) - 8, len(file), 2**23, 2**63, 2**64 - 8]) % 2**64)
            + file[8:]
        )
    return _other_bytes(file, random_)


def _other_token(header: bytes, random_: random.Random) -> bytes:
    tokens = [match.span() for match in TOKEN.finditer(header)] or [(0, 0)]
    start, stop = random_.choice(tokens)
    kind = random_.randrange(8)
    if kind < 4:
        new = random_.choice(TOKENS)
    elif kind == 4:  # twice
        new = header[start:stop] + random_.choice([b"", b" ", b","]) + header[start:stop]
    elif kind == 5:  # another token of this header in its place
        new = header[slice(*random_.choice(tokens))]
    elif kind == 6:  # space around, or something
        new = random_.choice([b" ", b"\n", b"\r\t", random_.choice(TOKENS)]) + header[start:stop]
    else:  # a part of the header again, a whole entry for example
        first, last = sorted(random_.choices(tokens, k=2))
        new = header[start:stop] + header[first[0] : last[1]]
    return header[:start] + new + header[stop:]


def _other_bytes(part: bytes, random_: random.Random) -> bytes:
    changed, at = bytearray(part), random_.randrange(len(part) + 1)
    kind = random_.randrange(5)
    if kind == 0 and at < len(part):
        changed[at] ^= 1 << random_.randrange(8)
    elif kind == 1:
        del changed[at:]
    elif kind == 2:
        del changed[at : at + random_.randrange(1, 9)]
    elif kind == 3:
        changed[at:at] = random_.randbytes(random_.randrange(1, 9))
    else:
        changed[at:at] = changed[at // 2 : at]
    return bytes(changed)
