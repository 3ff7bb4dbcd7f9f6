"""Mutations of files, each determined by a random generator: raw bytes, and the structure of each format."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import yaml

Mutation = Callable[[random.Random, bytes], bytes]
_INTEGERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, 2**64, 10**30, -(2**63), 1e308, -0.0, 1e-320, 0.5),
    *(
        float("inf"),
        float("nan"),
        "",
        "x",
        "\0",
        "\n\nTraceback",
        "\ud800",
        "../../../etc/passwd",
        "1" * 5000,
        "ü" * 300,
    ),
    *([], {}, [[]], [1] * 1000, {"": 1}, {"format": 2}, ["a", 1, None], "2024-13-45", "1e400", [2**31, 2**31]),
)
_YAML_TOKENS = (
    *("&a [*a, *a]", "!!python/object/apply:os.system [true]", "!!int ''", "!!binary x", "2024-13-45", "? [a]\n: b"),
    *(
        "<<: {a: 1}",
        "- - - -",
        "[" * 3000,
        "{" * 3000,
        "\t",
        "%YAML 9.9\n---",
        "---\n...\n---",
        "0o17",
        "1_000",
        "0x",
        "~",
    ),
    *("!!set {a}", "'", '"\\x', "| \n  a", ">-", "\ufeff", "\x07", ": :", "a: b: c", "!<tag:x> 1", ".inf", "=", "1:30"),
)


def raw(draw: random.Random, content: bytes) -> bytes:
    """Flips, inserts, deletes, repeats or zeroes bytes, writes a nasty integer, or truncates; one to four times."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at, length = draw.randrange(len(data) + 1), draw.choice((1, 1, 2, 4, 8, 64, 1000))
        kind = draw.randrange(8)
        if kind <= 1 and data:
            data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 2:
            data[at:at] = draw.randbytes(length)
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length] * draw.choice((1, 2, 100))
        elif kind == 5:
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif kind == 6:
            size = draw.choice((1, 2, 4, 8))
            number = draw.choice(_INTEGERS) & ((1 << 8 * size) - 1)
            data[at : at + size] = number.to_bytes(size, draw.choice(("little", "big")))
        elif draw.random() < 0.3:
            del data[at:]
    return bytes(data)


def in_front(share: float) -> Mutation:
    """Raw mutations of the first part of a file only, where headers are."""

    def mutate(draw: random.Random, content: bytes) -> bytes:
        end = max(1, int(len(content) * share))
        return raw(draw, content[:end]) + content[end:]

    return mutate


def tree(draw: random.Random, root: Any) -> Any:
    """Replaces, removes, renames or repeats values in nested dicts and lists, one to three times; changes ``root``."""
    holder = [root]
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(_places(holder))
        parent, key = draw.choice(places)
        kind = draw.randrange(6)
        if kind <= 2 or parent is holder:
            parent[key] = draw.choice(NASTY)
        elif kind == 3:
            del parent[key]
        elif kind == 4 and isinstance(parent, dict):
            parent[draw.choice(("", "x", "\n", "k" * 500, key + "s"))] = parent.pop(key)
        else:
            other = draw.choice(places)
            parent[key] = other[0][other[1]] if other[0] is not holder else 1
        try:
            json.dumps(holder)
        except ValueError:  # a value now contains itself
            parent[key] = 0
    return holder[0]


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def json_tree(draw: random.Random, content: bytes) -> bytes:
    return json.dumps(tree(draw, json.loads(content)), indent=draw.choice((None, 2))).encode()


def yaml_tree(draw: random.Random, content: bytes) -> bytes:
    return yaml.safe_dump(tree(draw, yaml.safe_load(content)), allow_unicode=True).encode(errors="surrogatepass")


def yaml_tokens(draw: random.Random, content: bytes) -> bytes:
    lines = content.decode().splitlines()
    at = draw.randrange(len(lines))
    key, separator, _ = lines[at].partition(":")
    lines[at] = draw.choice((f"{key}{separator} ", "", lines[at] + "\n")) + draw.choice(_YAML_TOKENS)
    return "\n".join(lines).encode()


def lines(draw: random.Random, content: bytes) -> bytes:
    """Changes the lines of a text."""
    whole = content.split(b"\n")
    at = draw.randrange(len(whole))
    whole[at : at + draw.randrange(2)] = draw.choice(
        ([], [b""], [b"\xff\xfe"], [b"\0"], [b"x" * 100_000], [b"a"] * 5000, [b"\r"], [b"\x1b[31m"], [whole[at]] * 2)
    )
    return b"\n".join(whole)


def safetensors_header(draw: random.Random, content: bytes) -> bytes:
    """Changes the JSON header of a .safetensors file, or JSON inside its metadata, or the header's length."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    if metadata and draw.random() < 0.5:
        name = draw.choice(sorted(metadata))
        metadata[name] = json_tree(draw, metadata[name].encode()).decode()
    elif draw.random() < 0.5:
        entry = header[draw.choice(sorted(name for name in header if name != "__metadata__"))]
        entry[draw.choice(("dtype", "shape"))] = draw.choice(
            ("F8_E4M3", "F16", "I64", "BOOL", "F4", "C64", "F64", [], [2**62, 0], [2**40, 2**40], [1] * 40, [-1], [0])
        )
    else:
        header = tree(draw, header)
    text = json.dumps(header).encode()
    if draw.random() < 0.2:
        text = draw.choice((text + b" " * draw.randrange(5000), b"[" * 200_000, text[:-1]))
    size = draw.choice((len(text),) * 8 + (0, 2**63, len(text) + 8, 10**8 + 1))
    return struct.pack("<Q", size) + text + content[8 + length :]


def zipped(inner: Mutation) -> Mutation:
    """Changes one member of a zip file, which stays intact around it."""

    def mutate(draw: random.Random, content: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = draw.choice([each for each in members if each.endswith("data.pkl")] * 6 + list(members))
        members[name] = inner(draw, members[name])
        if draw.random() < 0.1:
            members[draw.choice(("x", "../x", name + "x", "\n"))] = members.pop(name)
        result = io.BytesIO()
        compression = draw.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))
        with zipfile.ZipFile(result, "w", compression) as archive:
            for each, data in members.items():
                archive.writestr(each, data)
        return result.getvalue()

    return mutate


def gzipped(inner: Mutation) -> Mutation:
    """Changes what is compressed."""

    def mutate(draw: random.Random, content: bytes) -> bytes:
        data = inner(draw, gzip.decompress(content))
        return gzip.compress(data + (bytes(1 << 26) if draw.random() < 0.05 else b""), 1)

    return mutate


def tar_members(draw: random.Random, content: bytes) -> bytes:
    """Changes the members of a tar file: names, sizes, types, labels and headers, with right checksums."""
    result = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as old, tarfile.open(fileobj=result, mode="w") as new:
        members = old.getmembers()
        chosen = draw.choice(members)
        for member in members:
            data = old.extractfile(member).read()  # type: ignore[union-attr]
            if member is chosen:
                data = _change_member(draw, member, data)
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
            if member is chosen and draw.random() < 0.2:
                new.addfile(member, io.BytesIO(data))
    return _change_header(draw, result.getvalue()) if draw.random() < 0.4 else result.getvalue()


def _change_member(draw: random.Random, member: tarfile.TarInfo, data: bytes) -> bytes:
    kind = draw.randrange(6)
    if kind == 0:
        member.name = draw.choice(("", "a\nb.cls", "ü" * 200 + ".jpg", "../0.cls", "0.CLS", "x.cls.jpg", "/", ".cls"))
    elif kind == 1:
        member.type = draw.choice(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE)
        )
        member.linkname = draw.choice(("", member.name, "/etc/passwd", "x"))
        return b""
    elif kind == 2:
        member.pax_headers = {
            draw.choice(("size", "path", "GNU.sparse.size", "GNU.sparse.map", "x")): draw.choice(
                ("-1", "x" * 100_000, "99999999999999", "", "\n", "1,2,3")
            )
        }
    elif kind <= 4:
        return draw.choice(
            (b"999999999", b"-1", b"", b" 1\n", b"1" * 5000, b"\xff", b"0x1", b"1e9", bytes(1 << 20), data[:20])
        )
    return data


def _change_header(draw: random.Random, content: bytes) -> bytes:
    """Writes a nasty field into a header, and the right checksum."""
    data = bytearray(content)
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    at = draw.choice(headers)
    field = draw.choice(
        (
            (124, b"\x80" + (2**63).to_bytes(11, "big")),
            (124, b"\xff" * 12),
            (124, b"77777777777\0"),
            (124, b"-0000000001\0"),
            (156, draw.choice((b"S", b"x", b"g", b"L", b"K", b"1", b"2", b"7", b"\0"))),
            (0, b"\xff\xfe\n" * 10),
            (257, b"GNUtar "),
        )
    )
    data[at + field[0] : at + field[0] + len(field[1])] = field[1]
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)
