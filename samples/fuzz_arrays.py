"""Mutated .npz and .npy files for samples/fuzz_bytes.py: of the arrays, their headers, the zip."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from fuzz_protobuf import damaged, flipped
from numpy.typing import NDArray

Rng = np.random.Generator
Array = NDArray[Any]

DTYPES = (
    *("f2", "f8", "i1", "u1", "i4", "i8", "?", "c8", "U3", "S3", "V5", "M8[s]", "m8[ns]", "O"),
    ">f4",
)
DESCRIPTIONS = (
    *("<f4", "|O", "<f8", "<i8", ">f4", "<U4", "<c8", "<M8[s]", "|V4", "|V0", "<f2", "|b1", "<f16"),
    *("", "nope", "<f4,<f4", "(2,)<f4", "<f99", "<U99999999999", "|S0", "<i0"),
)
SHAPES = (
    *("()", "(0,)", "(-1,)", "(-1, 1, 8, 8)", "(2**70,)", "(1180591620717411303424,)", "(4,)"),
    *("(9223372036854775807, 1, 8, 8)", "(4294967296, 4294967296, 1, 1)", "(1e9,)", "(4.0, 1)"),
    *("None", "4", "'x'", "(True, 1, 8, 8)", "(4, 1, 8, 8, 0)", f"({'1, ' * 70})", "((4,),)"),
    *("(3, 1, 8, 8)", "(5, 1, 8, 8)", "(400, 1, 8, 8)", "(4, 1, 8, -8)", "(4, 0, 8, 8)"),
)
NAMES = ("", "labels", "a\nb", "../x", "x" * 300, "é", "image ", "observations")


def one_of(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def mutated_npz(rng: Rng, arrays: Mapping[str, Array]) -> tuple[bytes, str]:
    """The bytes of a file, and what was done."""
    arrays = dict(arrays)
    kind = int(rng.integers(10))
    if kind < 3:
        how = _change_arrays(rng, arrays)
        return zipped(rng, {name: npy(array) for name, array in arrays.items()}), how
    members = {name: npy(array) for name, array in arrays.items()}
    name = one_of(rng, list(members))
    if kind < 6:
        members[name], how = with_header(rng, arrays[name])
        return zipped(rng, members), how
    if kind == 6:
        members[name] = damaged(rng, members[name])
        return zipped(rng, members), "a member's bytes"
    whole = zipped(rng, members)
    if kind == 7:
        return _with_sizes(rng, whole), "sizes in the zip"
    return damaged(rng, whole), "the zip's bytes"


def mutated_npy(rng: Rng, array: Array) -> tuple[bytes, str]:
    """As `mutated_npz`, of one array."""
    kind = int(rng.integers(3))
    if kind == 0:
        arrays = {"": array}
        how = _change_arrays(rng, arrays)
        return npy(next(iter(arrays.values()), array)), how
    if kind == 1:
        return with_header(rng, array)
    return damaged(rng, npy(array)), "the bytes"


def npy(array: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def zipped(rng: Rng, members: Mapping[str, bytes]) -> bytes:
    """At times with a member twice, or a member that is no array."""
    stream = io.BytesIO()
    method = one_of(rng, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                member.write(data)
        if rng.random() < 0.05:
            archive.writestr("readme.txt", "none")
    return stream.getvalue()


def _change_arrays(rng: Rng, arrays: dict[str, Array]) -> str:
    """What NumPy itself might write, and what does not fit."""
    name = one_of(rng, list(arrays))
    array = arrays[name]
    kind = int(rng.integers(11))
    if kind == 0:
        dtype = one_of(rng, DTYPES)
        with np.errstate(all="ignore"):
            arrays[name] = array.astype(dtype) if dtype != "V5" else np.zeros(array.shape, dtype)
        return f"dtype {dtype}"
    if kind < 3 and array.dtype.kind == "f" and array.size:
        value = one_of(rng, (np.nan, np.inf, -np.inf, 3e38, 1e-45, -0.0))
        array = array.copy()
        array.reshape(-1)[slice(None) if rng.random() < 0.3 else rng.integers(array.size)] = value
        arrays[name] = array
        return f"value {value}"
    changed = (
        lambda: array.reshape(-1)[:0],
        lambda: array[0] if array.ndim and len(array) else array,
        lambda: array[None],
        lambda: array[..., :-1] if array.ndim else array,
        lambda: np.asfortranarray(array),
        lambda: array[:-1] if array.ndim else array,
        lambda: np.array(None),
    )
    if kind < 10:
        arrays[name] = np.asarray(changed[kind - 3]())
        return f"shape {arrays[name].shape}"
    arrays[one_of(rng, NAMES)] = (
        arrays.pop(name) if rng.random() < 0.5 else np.atleast_1d(array)[:1]
    )
    return "a name"


def with_header(rng: Rng, array: Array) -> tuple[bytes, str]:
    """An .npy with a header that NumPy would not write."""
    header = {
        "'descr'": repr(array.dtype.str),
        "'fortran_order'": "False",
        "'shape'": repr(array.shape),
    }
    key = one_of(rng, list(header))
    header[key] = {
        "'descr'": lambda: one_of(rng, (*map(repr, DESCRIPTIONS), "[('a', '<f4')]", "3", "[]")),
        "'fortran_order'": lambda: one_of(rng, ("True", "None", "1", "'x'")),
        "'shape'": lambda: one_of(rng, SHAPES),
    }[key]()
    how = f"header {key}: {header[key][:40]}"
    if rng.random() < 0.1:
        del header[key]
    text = "{" + ", ".join(f"{k}: {v}" for k, v in header.items()) + ", }"
    if rng.random() < 0.1:
        text = one_of(rng, (text + "  # é", "", "{", "x" * 70_000, "[" * 3000, "0", text[:-3]))
    version = one_of(rng, ((1, 0),) * 6 + ((2, 0), (3, 0), (0, 0), (9, 9)))
    encoded = text.encode("utf-8") + b"\n"
    length = len(encoded)
    if rng.random() < 0.1:
        length = one_of(rng, (0, 1, length - 5, length + 7, 65535))
    size = struct.pack("<H", min(max(length, 0), 65535))
    if version >= (2, 0):
        size = struct.pack("<I", max(length, 0))
    return b"\x93NUMPY" + bytes(version) + size + encoded + array.tobytes(), how


def _with_sizes(rng: Rng, whole: bytes) -> bytes:
    """Sizes, offsets or flags of an entry of the zip changed, in its header or in the directory."""
    changed = bytearray(whole)
    signature, first, last = one_of(rng, ((b"PK\x03\x04", 4, 30), (b"PK\x01\x02", 4, 46)))
    start = whole.find(signature)
    field = start + int(rng.integers(first, last - 4))
    if start < 0:
        return flipped(rng, whole)
    number = one_of(rng, (0, 1, 2**16, 2**31 - 1, 2**32 - 1))
    changed[field : field + 4] = struct.pack("<I", number)
    return bytes(changed)
