"""Says what an image shows, by the C runtime and Python alone: python example.py LIBRARY MODEL.spnet IMAGE.ppm ...

LIBRARY is the runtime as a shared library: c++ -std=c++17 -O3 -march=native -pthread -shared -fPIC spnet.cpp -o
libspnet.so
"""

from __future__ import annotations

import ctypes
import re
import sys

FIELD = re.compile(rb"(?:\s|#[^\n]*\n)*([^\s#]+)")  # a field of the header, after blanks and comments


def pixels(path: str, shape: tuple[int, ...]) -> bytes:
    """The bytes (H, W, C) of a binary PPM or PGM file."""
    channels, height, width = shape
    with open(path, "rb") as file:
        data, at = file.read(), 0
    header: list[bytes] = []
    while len(header) < 4 and (field := FIELD.match(data, at)):
        header.append(field[1])
        at = field.end()
    size = channels * height * width
    found = data[at + 1 : at + 1 + size]
    if header != [b"P5" if channels == 1 else b"P6", b"%d" % width, b"%d" % height, b"255"] or len(found) < size:
        sys.exit(f"{path}: an image of {width}x{height} pixels and {channels} channels is expected, as PPM or PGM")
    return found


def main(library: str, model: str, *images: str) -> None:
    runtime = ctypes.CDLL(library)
    for name in ("spnet_error", "spnet_name"):
        getattr(runtime, name).restype = ctypes.c_char_p
    runtime.spnet_outputs.restype = ctypes.c_int64
    network, shape = ctypes.c_void_p(), (ctypes.c_int64 * 3)()
    if runtime.spnet_open(model.encode(), ctypes.byref(network)):
        sys.exit(f"{model}: {runtime.spnet_error().decode()}")
    runtime.spnet_shape(network, shape)
    outputs = (ctypes.c_float * runtime.spnet_outputs(network))()
    for image in images:
        if runtime.spnet_run_bytes(network, pixels(image, tuple(shape)), ctypes.c_int64(1), outputs):
            sys.exit(runtime.spnet_error().decode())
        best = max(range(len(outputs)), key=outputs.__getitem__)
        print(f"{image}: {runtime.spnet_name(network, ctypes.c_int64(best)).decode()}")
    runtime.spnet_close(network)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
