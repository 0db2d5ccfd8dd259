"""Every test starts from the same seeds, learns anew, and leaves nothing behind."""

import os
import random

import numpy as np
import pytest
import torch

os.environ["PARALLEL_DECODE_CACHE"] = "off"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed what draws from global generators; with another TEST_SEED a test may differ, but has to pass."""
    seed = int(os.environ.get("TEST_SEED", "0"))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
