"""Settings that every test runs under: no network, one thread, reproducible examples."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

_common = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("default", max_examples=40, **_common)
# pytest --hypothesis-profile=thorough
settings.register_profile("thorough", max_examples=1000, **_common)
settings.load_profile("default")
