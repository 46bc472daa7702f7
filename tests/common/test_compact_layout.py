"""docs/checkpoint.md is enough to read weights in 8 bits: a reader that knows only its words and the file format."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import read_weights, save_weights
from common.compact import compact

ROOT = Path(__file__).parents[2]
DTYPES = {
    "I8": np.int8,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_as_documented(path: Path) -> dict[str, np.ndarray]:
    """safetensors: 8 bytes of header length, a JSON header with dtype, shape and offsets, then the numbers."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    raw = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            dtype = np.uint16 if entry["dtype"] == "BF16" else DTYPES[entry["dtype"]]
            tensor = np.frombuffer(numbers[begin:end], dtype).reshape(entry["shape"])
            raw[name] = (
                (tensor.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else tensor
            )
    weights = {}
    for name, tensor in raw.items():
        if name.endswith(".int8_scale"):
            continue
        if f"{name}.int8_scale" in raw:
            scale = raw[f"{name}.int8_scale"]
            assert tensor.dtype == np.int8 and scale.shape == tensor.shape[:1]
            weights[name] = tensor.astype(np.float32) * scale.reshape(-1, *[1] * (tensor.ndim - 1))
        else:
            weights[name] = tensor.astype(np.float32) if tensor.dtype == np.float16 else tensor
    return weights


@pytest.mark.parametrize("folder", ["generator", "generator/image_tokenizer", "ranker"])
def test_the_released_weights(folder):
    directory = ROOT / "pretrained/goods-128" / folder
    expected, found = read_weights(directory), read_as_documented(directory / "model.safetensors")
    assert set(found) == set(expected)
    assert all(np.array_equal(found[n], expected[n].numpy()) for n in expected)


def test_every_kind_of_tensor(tmp_path):
    torch.manual_seed(0)
    weights = {
        "matrix": torch.randn(128, 256),
        "kernel": torch.randn(64, 32, 3, 3),
        "small": torch.randn(7),
        "ids": torch.arange(5),
    }
    weights["matrix"][3] = 0
    short = compact(weights, "int8")
    assert short["matrix.int8_scale"][3] == torch.tensor(1 / 127) and short["kernel"].min() >= -127
    save_weights(tmp_path / "model.safetensors", short)
    found = read_as_documented(tmp_path / "model.safetensors")
    assert set(found) == set(weights) and found["ids"].dtype == np.int64
    assert all(np.array_equal(found[n], t.numpy()) for n, t in read_weights(tmp_path).items())
    largest = weights["kernel"].abs().amax((1, 2, 3), keepdim=True).numpy()
    assert (np.abs(found["kernel"] - weights["kernel"].numpy()) <= largest / 254 + 1e-6).all()
