"""A folder in fp8 with a scale for each block is the model that it was made of, to fp8's own precision."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalm.config.errors import ConfigError
from megalm.convert.huggingface import open_folder, write_folder
from tests.convert.architectures import build

BLOCK = (16, 24)  # divides neither dim of most tensors


def quantize(weight):
    """(fp8, scales) with the largest number of each block at the largest of fp8."""
    rows, columns = (-(-size // block) for size, block in zip(weight.shape, BLOCK, strict=True))
    scales = torch.zeros(rows, columns)
    stored = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            part = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
            scales[i, j] = weight[part].abs().max() / 448
            stored[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return stored, scales


@pytest.fixture
def folder(tmp_path):
    build("deepseek-v3").save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    tensors = {}
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        if "_proj" in name:
            tensors[name], tensors[name + "_scale_inv"] = quantize(tensor)
        else:
            tensors[name] = tensor
    (tmp_path / "fp8").mkdir()
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    return tmp_path


def test_weights_are_those_that_were_quantized(folder):
    whole, source = open_folder(folder / "whole"), open_folder(folder / "fp8")
    assert any("fp8" in note for note in source.notes)
    assert source.weights.dtype("layers.0.attention.output.weight") == torch.bfloat16
    for name in whole.weights.names():
        expected, found = whole.weights.read(name), source.weights.read(name).float()
        # Three bits of mantissa in fp8, seven in bfloat16; small numbers of a block have an absolute error.
        torch.testing.assert_close(found, expected, rtol=2**-4 + 2**-8, atol=float(expected.abs().max()) / 448 / 2)
        assert (
            name.endswith(("norm.weight", "router.weight", "bias", "embedding.weight", "output.weight"))
            or (found != expected).any()
        )


def test_what_is_exported_is_not_quantized(folder):
    write_folder(open_folder(folder / "fp8"), folder / "out")
    config = json.loads((folder / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    again = load_file(folder / "out" / "model.safetensors")
    assert not any(name.endswith("_scale_inv") for name in again)
    assert again["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("change", ["scale", "weight", "block"])
def test_a_scale_without_a_weight_or_of_another_block_is_refused(folder, change):
    path = folder / "fp8" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.o_proj.weight"
    if change == "block":
        tensors[name + "_scale_inv"] = torch.ones(7, 7)
    else:
        del tensors[name + ("_scale_inv" if change == "scale" else "")]
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=name):
        open_folder(folder / "fp8").weights.read("layers.0.attention.output.weight")


def test_other_quantizations_are_refused_by_name(folder):
    config = json.loads((folder / "fp8" / "config.json").read_text())
    for settings in ({"quant_method": "mxfp4"}, {"quant_method": "fp8"}, {"quant_method": "awq", "bits": 4}):
        (folder / "fp8" / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        with pytest.raises(ConfigError, match="quantization_config=.* is not supported"):
            open_folder(folder / "fp8")
