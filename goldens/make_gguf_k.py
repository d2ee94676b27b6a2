"""Measures what llama.cpp's own quantizer loses with the types that the gguf package does not encode.

    python goldens/make_gguf_k.py           (llama-cpp-python 0.3.36, numpy, safetensors)

crates/retune-quant/tests/goldens/gguf_k.safetensors: <TYPE>.errors (float64 [rows]), the sums of squared errors of rows that the test makes
anew from the same seed.
"""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from safetensors.numpy import save_file

ROWS, COLUMNS = 24, 1024
TYPES = [Type.Q4_K, Type.Q5_K, Type.Q6_K]
FOLDER = Path(__file__).resolve().parent.parent / "crates" / "retune-quant" / "tests" / "goldens"


def uniform(n, state=1):
    """Between -1 and 1, by the linear congruential generator of the tests."""
    values = np.empty(n, np.float32)
    for i in range(n):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        values[i] = np.float32(state >> 40) / np.float32(1 << 23) - np.float32(1)
    return values


def rows():
    """Nearly normal rows; then rows of even spread, of one sign, with outliers, tiny, huge and of zeros."""
    draws = uniform(4 * ROWS * COLUMNS).reshape(ROWS, COLUMNS, 4)
    values = ((draws[..., 0] + draws[..., 1]) + draws[..., 2]) + draws[..., 3]
    values *= np.float32(0.02)
    values[12:14] = draws[12:14, :, 0]
    values[14] = abs(values[14])
    values[15] = -abs(values[15]) - np.float32(0.25)
    values[16, ::100] *= np.float32(32)
    values[17] *= np.float32(2.0**-6)
    values[18] *= np.float32(2.0**10)
    values[19] = 0
    values[20, :512] = 0
    return values


def main():
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    values = rows()
    tensors = {}
    for kind in TYPES:
        block, size = GGML_QUANT_SIZES[kind]
        out = np.zeros((ROWS, COLUMNS // block * size), np.uint8)
        pointer = lambda array: array.ctypes.data_as(ctypes.c_void_p)
        written = library.ggml_quantize_chunk(ctypes.c_int(kind), pointer(values), pointer(out), ctypes.c_int64(0), ctypes.c_int64(ROWS),
                                              ctypes.c_int64(COLUMNS), None)
        assert written == out.size
        errors = quants.dequantize(out, kind).astype(np.float64) - values
        tensors[f"{kind.name}.errors"] = (errors**2).sum(axis=1)
        print(kind.name, tensors[f"{kind.name}.errors"])
    save_file(tensors, FOLDER / "gguf_k.safetensors")


if __name__ == "__main__":
    main()
