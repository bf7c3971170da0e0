"""Find the members of a tar file by its headers alone, trusting none of them.

POSIX.1-2001 ustar and pax, and GNU tar: a header of 512 bytes, then the data, padded to 512. Names
are only read, never used as paths; the memory taken does not depend on what a header claims.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

BLOCK = 512
"""Bytes of a header, and what data are padded to."""

MAX_EXTENDED = 1 << 20
"""Largest pax header or GNU long name that is read, in bytes."""


class Member(NamedTuple):
    """A regular file inside a tar."""

    name: str
    """Name as stored."""
    offset: int
    """Where its data begin, in bytes."""
    size: int
    """Length of the data in bytes."""


def members(file: Any, where: str) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar in order.

    A file that is cut off inside its last member yields that member with its full size.

    Parameters
    ----------
    file
        Binary file with read and seek.
    where
        What to call it in messages.

    Raises
    ------
    ValueError
        When a header is damaged, or it is no tar.
    """
    offset = 0
    override: dict[str, str] = {}
    while True:
        header = _read(file, offset, BLOCK)
        if len(header) < BLOCK or header == bytes(BLOCK):
            if len(header) and header.strip(b"\0"):
                raise ValueError(f"{where}: cut off inside of the header at byte {offset}")
            return
        kind, name, size = _parse(header, where, offset)
        data = offset + BLOCK
        if kind in b"xgLK" and size > MAX_EXTENDED:
            raise ValueError(f"{where}: extended header of {size} bytes at byte {offset}")
        if kind in b"x":
            override.update(_pax(_read(file, data, size), where, offset))
        elif kind in b"L":
            override["path"] = _read(file, data, size).rstrip(b"\0").decode(errors="replace")
        elif kind not in b"gK":
            size = _number(override["size"], where, offset) if "size" in override else size
            if kind in b"0\0" and "GNU.sparse.major" not in override:
                yield Member(override.get("path", name), data, size)
            override = {}
        offset = data + -(-size // BLOCK) * BLOCK


def _read(file: Any, offset: int, length: int) -> bytes:
    file.seek(offset)
    data: bytes = file.read(length)
    return data


def _parse(header: bytes, where: str, offset: int) -> tuple[bytes, str, int]:
    """Return type, name and size of a header whose checksum fits."""
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    try:
        fits = int(header[148:156].strip(b" \0") or b"0", 8) == total
        field = header[124:136]
        if field[0] & 0x80:  # GNU: a big-endian number in place of octal digits
            size = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        else:
            size = int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        fits = False
    if not fits or not 0 <= size < 1 << 60:
        what = "not an uncompressed tar file" if not offset else "a damaged header"
        raise ValueError(f"{where}: {what} (at byte {offset})")
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return header[156:157], f"{prefix}/{name}" if prefix else name, size


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(errors="replace")


def _number(text: str, where: str, offset: int) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise ValueError(f"{where}: a damaged header (size {text[:20]!r} at byte {offset})")
    return int(text)


def _pax(data: bytes, where: str, offset: int) -> dict[str, str]:
    """Return what matters of a pax header: lines of length, key, ``=``, value."""
    found = {}
    start = 0
    while start < len(data) and data[start : start + 1] != b"\0":
        head, _, _ = data[start : start + 20].partition(b" ")
        length = int(head) if head.isdigit() else 0
        record = data[start + len(head) + 1 : start + length - 1]
        if length <= len(head) + 1 or start + length > len(data):
            raise ValueError(f"{where}: a damaged extended header at byte {offset}")
        key, _, value = record.partition(b"=")
        if key in (b"path", b"size", b"GNU.sparse.major"):
            found[key.decode()] = value.decode(errors="replace")
        start += length
    return found
