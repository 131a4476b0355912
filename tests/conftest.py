"""Settings shared by all tests."""

import os

import torch
from hypothesis import settings

# One profile everywhere, so that a failure repeats, and no test is timed.
settings.register_profile("default", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(min(2, torch.get_num_threads()))
