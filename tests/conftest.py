"""Settings shared by all tests."""

import os

import torch
from hypothesis import settings

# One profile everywhere, so that a failure repeats, and no test is timed.
settings.register_profile("default", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Beside another worker of pytest-xdist, a second thread would only wait for a core.
torch.set_num_threads(min(1 if "PYTEST_XDIST_WORKER" in os.environ else 2, torch.get_num_threads()))
