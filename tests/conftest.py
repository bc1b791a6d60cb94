"""Settings of every test: one thread, fixed seeds, no display."""

from __future__ import annotations

import os

# Both are read once, when the library is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# The same examples on every run and machine, none kept on disk; no deadline, since the first call
# of a torch operator may take longer than all later ones together.
settings.register_profile(
    "edgeqdm", derandomize=True, database=None, deadline=None, max_examples=25
)
settings.load_profile("edgeqdm")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
