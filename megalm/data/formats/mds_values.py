"""The values of MDS columns as bytes: numbers, text, arrays, images.

Pickled columns are refused. The encodings are mosaicml-streaming's, byte for byte.
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np

IMAGES = ("pil", "jpeg", "png")
MODES = {
    "L": 1,
    "P": 1,
    "LA": 2,
    "RGB": 3,
    "YCbCr": 3,
    "HSV": 3,
    "LAB": 3,
    "RGBA": 4,
    "RGBX": 4,
    "CMYK": 4,
    "I": 4,
    "F": 4,
}
"""Bytes of a pixel in the modes of raw images that are read."""
_NAMES = [sign + name for sign in ("", "u") for name in ("int8", "int16", "int32", "int64")] + [
    "float16",
    "float32",
    "float64",
]
SCALARS: dict[str, np.dtype] = {name: np.dtype(name).newbyteorder("<") for name in _NAMES}
SCALARS["int"] = SCALARS["int64"]
ARRAY_CODES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32", 34: "float32",
    64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip


def _array_parts(encoding: str) -> tuple[str | None, tuple[int, ...] | None]:
    """`ndarray[:dtype[:d0,d1]]` -> (dtype, shape); None where each sample says it itself."""
    _, *parts = encoding.split(":")
    if len(parts) > 2 or (parts and parts[0] not in ARRAY_CODES.values()):
        raise ValueError(f"unknown encoding {encoding!r}")
    shape = tuple(int(side) for side in parts[1].split(",")) if len(parts) > 1 else None
    return (parts[0] if parts else None), shape


def find_fixed_size(encoding: str) -> int | None:
    """Bytes of a value of this encoding; None: they differ from sample to sample."""
    if encoding in SCALARS:
        return SCALARS[encoding].itemsize
    if encoding.startswith("ndarray"):
        dtype, shape = _array_parts(encoding)
        return np.dtype(dtype).itemsize * int(np.prod(shape)) if dtype and shape is not None else None
    if encoding in ("bytes", "str", "json", "str_int", "str_float", "str_decimal", *IMAGES):
        return None
    raise ValueError(
        f"encoding {encoding!r} is not supported (pickled columns are refused: reading them could run anything)"
    )


def encode_value(encoding: str, value: Any) -> bytes:
    """Encode the bytes of one value. Errors: ValueError if the value is not of the encoding."""
    if encoding == "bytes":
        return bytes(value)
    if encoding == "str":
        return value.encode("utf-8")
    if encoding == "json":
        return json.dumps(value).encode("utf-8")
    if encoding.startswith("str_"):
        return str(value).encode("utf-8")
    if encoding in SCALARS:
        return np.array(value, SCALARS[encoding]).tobytes()
    if encoding in IMAGES:
        return _encode_image(encoding, value)
    dtype, shape = _array_parts(encoding)
    array = np.asarray(value)
    if dtype is not None and array.dtype != np.dtype(dtype):
        raise ValueError(f"the array is {array.dtype}, the column {encoding}")
    if shape is not None:
        if array.shape != shape:
            raise ValueError(f"the array's shape is {array.shape}, the column's {shape}")
        return np.ascontiguousarray(array).tobytes()
    head = b"" if dtype else bytes([next(code for code, name in ARRAY_CODES.items() if name == array.dtype.name)])
    log2 = next(power for power in range(4) if max(array.shape, default=0) < 1 << (8 << power))
    sides = b"".join(int(side).to_bytes(1 << log2, "little") for side in array.shape)
    return head + bytes([array.ndim << 2 | log2]) + sides + np.ascontiguousarray(array).tobytes()


def decode_value(encoding: str, data: bytes) -> Any:
    """Decode the value of these bytes. Errors: ValueError if they are not a value of the encoding."""
    if encoding == "bytes":
        return data
    if encoding in ("str", "str_decimal"):
        return data.decode("utf-8")
    if encoding == "json":
        return json.loads(data)
    if encoding == "str_int":
        return int(data)
    if encoding == "str_float":
        return float(data)
    if encoding in SCALARS:
        if len(data) != SCALARS[encoding].itemsize:
            raise ValueError(f"{len(data)} bytes are not a value of {encoding}")
        return np.frombuffer(data, SCALARS[encoding])[0].item()
    if encoding in IMAGES:
        return _decode_image(encoding, data)
    return decode_array(encoding, data)


def decode_array(encoding: str, data: bytes | np.ndarray) -> np.ndarray:
    """Decode the array of these bytes, without a copy. Errors: ValueError if they are none of the encoding."""
    dtype, shape = _array_parts(encoding)
    at = 0
    if dtype is None:
        if not len(data) or int(data[0]) not in ARRAY_CODES:
            raise ValueError("the array does not say its type")
        dtype, at = ARRAY_CODES[int(data[0])], 1
    if shape is None:
        if at >= len(data):
            raise ValueError("the array does not say its shape")
        dimensions, width = int(data[at]) >> 2, 1 << (int(data[at]) & 3)
        ends = range(at + 1 + width, at + 1 + width * dimensions + 1, width)
        shape = tuple(int.from_bytes(bytes(data[end - width : end]), "little") for end in ends)
        at += 1 + width * dimensions
    elements = int(np.prod(shape, dtype=object)) if shape else 1
    if elements * np.dtype(dtype).itemsize != len(data) - at:
        raise ValueError(f"an array of shape {shape} does not fit {len(data) - at} bytes")
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), elements, at).reshape(shape)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ValueError("image columns need Pillow: pip install pillow") from None
    return Image


def _encode_image(encoding: str, value: Any) -> bytes:
    """pil: u32 width, height and length of the mode's name, the name, the pixels; jpeg, png: the file."""
    if not isinstance(value, _pillow().Image):
        raise ValueError(f"a {encoding} column takes a PIL image, not {type(value).__name__}")
    if encoding == "pil":
        mode = value.mode.encode("utf-8")
        return np.array([*value.size, len(mode)], "<u4").tobytes() + mode + value.tobytes()
    out = io.BytesIO()
    value.save(out, format=encoding.upper())
    return out.getvalue()


def _decode_image(encoding: str, data: bytes) -> Any:
    image = _pillow()
    try:
        if encoding == "pil":
            width, height, length = (int(side) for side in np.frombuffer(data[:12], "<u4"))
            mode = data[12 : 12 + length].decode("ascii")
            if mode not in MODES or width * height * MODES[mode] != len(data) - 12 - length:
                raise ValueError(f"{width} x {height} pixels of mode {mode!r} do not fit {len(data)} bytes")
            return image.frombytes(mode, (width, height), data[12 + length :])
        found = image.open(io.BytesIO(data), formats=[encoding.upper()])
        found.load()
        return found
    except (
        OSError,
        SyntaxError,
        ValueError,
        IndexError,
        EOFError,
        OverflowError,
        image.DecompressionBombError,
    ) as error:
        raise ValueError(f"not a {encoding} image ({error})") from error
