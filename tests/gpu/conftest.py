"""Engine tests that need a GPU; everything in tests/engine runs there too."""

import pytest
import torch

from tests.engine.conftest import deepseek_model, glm_model  # noqa: F401


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
