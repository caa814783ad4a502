"""Weights as GPTQModel, AutoAWQ and an older compressed-tensors read them: golden/generate.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from regraft.formats.files.reading import FilePool
from regraft.quant import registry
from regraft.testing.codecs import check_codec, stored

FILES = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_values_are_those_of_the_library(path: Path) -> None:
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        expected = file.get_tensor("expected").float().numpy()
    with FilePool() as files:
        place = stored([path], config, None, files)
        method, found = registry.find_weights(place)
        assert method == config["quant_method"]
        (weight,) = found.weights
        assert weight.name == "m.weight"
        assert place.read is not None
        check_codec(weight, expected, place.read)


def test_there_are_files_of_every_library() -> None:
    assert {path.name.partition("-")[0] for path in FILES} == {"gptq", "awq", "compressed"}
