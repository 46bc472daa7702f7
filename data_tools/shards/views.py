"""Codes of a token shard: the .npy member of a sample."""

import functools
import io
import math

import numpy as np


def read_views(data: bytes) -> np.ndarray:
    """(A, N) unsigned from the bytes of an .npy file. Raises ValueError.

    np.load spends ten times longer on the header than on the array, and all samples of a shard have the same one.
    """
    try:
        if data[:8] == b"\x93NUMPY\x01\x00":  # version 1.0, the only one that small arrays are written in
            begin = 10 + int.from_bytes(data[8:10], "little")
            shape, dtype = _npy_layout(data[:begin])
            views = np.frombuffer(data, dtype, math.prod(shape), begin).reshape(shape)
        else:
            views = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:  # NumPy's words for what is no array advise to unpickle it
        raise ValueError("ids.npy is damaged") from error
    if views.ndim != 2 or not len(views) or views.dtype.kind != "u":
        raise ValueError(f"ids.npy is {views.dtype} of {views.shape}, not views of unsigned codes")
    return views


@functools.lru_cache(maxsize=64)
def _npy_layout(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    file = io.BytesIO(header)
    np.lib.format.read_magic(file)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if is_fortran or dtype.hasobject:
        raise ValueError("its order or type is another than codes have")
    return shape, dtype
