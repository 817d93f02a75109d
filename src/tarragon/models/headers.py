"""Where each tensor of a checkpoint lies, from the files' headers alone.

A safetensors file is 8 bytes of little-endian header length, a JSON header that
gives each tensor its type, shape and byte range, and the tensors' bytes. All of
it is checked here, so that a file cut short by an interrupted copy is refused
with a sentence before any process maps it, not with a bus error afterwards.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import msgspec

HEADER_BYTES_MAX: Final = 100_000_000
"""The bound that the format itself sets."""

INDEX_NAME: Final = "model.safetensors.index.json"
PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt")

ITEM_BITS: Final = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


class ModelError(ValueError):
    """The folder is not a checkpoint that can be served; the message is one sentence that says why."""


class StoredTensor(msgspec.Struct, frozen=True):
    """One tensor of a safetensors file: ``nbytes`` bytes from byte ``start`` of ``file``."""

    file: str
    dtype: str
    """The format's own name, such as "BF16"."""
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object; raise ModelError if the file is absent, unreadable or no object."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{path} must hold a JSON object, but holds a {type(document).__name__}")
    return document


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Map every tensor name of the checkpoint in ``folder`` to where it lies.

    Raises ModelError when a shard that the index names is missing, a file is
    truncated or malformed, a tensor is not where the index says, two files hold
    the same tensor, or there are only pickle files.
    """
    index_path = folder / INDEX_NAME
    promised: dict[str, str] = {}
    if index_path.exists():
        promised = _read_index(index_path)
        files = sorted(set(promised.values()))
        for name in files:
            if not (folder / name).is_file():
                raise ModelError(f"{folder}: the shard {name} that {INDEX_NAME} names is missing")
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise ModelError(_why_no_weights(folder))
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        for tensor_name, stored in read_header(folder / name).items():
            if promised and promised.get(tensor_name) != name:
                continue
            if tensor_name in tensors:
                raise ModelError(f"{folder}: both {tensors[tensor_name].file} and {name} hold {tensor_name}")
            tensors[tensor_name] = stored
    for tensor_name, name in promised.items():
        if tensor_name not in tensors:
            raise ModelError(f"{folder}: the shard {name} lacks {tensor_name}, which {INDEX_NAME} promises")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} has no weight_map")
    for tensor_name, file in weight_map.items():
        # An index comes with the checkpoint: it must not lead out of its folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{path} puts {tensor_name} in {file!r}, which is no safetensors file beside it")
    return weight_map


def _why_no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{folder} holds its weights in pickle files ({pickles[0]}) only, which can run code when they "
            "are opened and are not read: convert it to safetensors"
        )
    return f"{folder} holds no safetensors files"


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read and check the header of one safetensors file; raise ModelError if it is truncated or malformed."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or (length <= HEADER_BYTES_MAX and 8 + length > size):
                raise ModelError(f"{path} is truncated: its header ends after its {size} bytes")
            if length > HEADER_BYTES_MAX:
                raise ModelError(f"{path} is not a safetensors file: it claims a header of {length} bytes")
            document = json.loads(file.read(length))
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not a safetensors file: its header is not JSON") from error
    if not isinstance(document, dict):
        raise ModelError(f"{path} is not a safetensors file: its header is not a JSON object")
    base = 8 + length
    return {
        name: _stored(path, name, entry, base, size)
        for name, entry in document.items()
        if name != "__metadata__"
    }


def _stored(path: Path, name: str, entry: Any, base: int, size: int) -> StoredTensor:
    """Check one header entry: known type, byte range inside the file, as many bytes as its shape needs."""
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        bits = math.prod(shape) * ITEM_BITS[dtype]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is malformed: its entry of {name} cannot be understood") from error
    if not whole or (end - begin) * 8 != bits:
        raise ModelError(f"{path} is malformed: {name} is {dtype} {list(shape)}, but has {end - begin} bytes")
    if base + end > size:
        raise ModelError(
            f"{path} is truncated: {name} ends at byte {base + end}, but the file has {size} bytes"
        )
    return StoredTensor(file=path.name, dtype=dtype, shape=shape, start=base + begin, nbytes=end - begin)
