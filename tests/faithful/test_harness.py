"""The harness itself: bases load whole, adapters show, and a wrong merge is seen."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from faithful.harness import Workshop, assert_close, assert_visible, load_complete
from regraft import testing
from regraft.testing import zoo


def test_importing_the_testing_package_does_not_import_torch() -> None:
    code = "import sys, regraft.testing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_resolves() -> None:
    assert all(getattr(testing, name) is not None for name in testing.__all__)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_every_base_loads_whole(architecture: str, sharded: bool, workshop: Workshop) -> None:
    folder = workshop.base(architecture, sharded=sharded)
    assert (folder / "model.safetensors.index.json").exists() == sharded
    model = load_complete(folder, architecture).float()
    answers = zoo.logits(model, zoo.example_inputs(architecture))
    assert np.isfinite(answers).all()
    assert np.ptp(answers) > 0.5


def test_a_merge_that_does_nothing_is_seen() -> None:
    logits = np.linspace(-1.0, 1.0, 12).reshape(2, 6)
    with pytest.raises(AssertionError, match="moves the logits"):
        assert_visible(logits + 1e-4, logits)


def test_a_small_difference_is_seen() -> None:
    logits = np.linspace(-1.0, 1.0, 12).reshape(2, 6)
    assert_close(logits + 1e-5, logits)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_close(logits + 1e-3, logits)
