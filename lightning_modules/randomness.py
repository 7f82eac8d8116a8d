"""States of all random number generators, as tensors and plain numbers, which load with ``weights_only``.

A step draws from its own seed (:class:`.RobustClassifier`); these are for networks and data of
a user's own, which may draw from anywhere.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def generator_states() -> dict[str, Any]:
    """Of Python, numpy, torch and every CUDA device in use."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (the state that others draw from)
    assert kind == "MT19937"
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_generator_states(states: dict[str, Any]) -> None:
    """Put back what :func:`generator_states` returned; CUDA's only where there are as many devices."""
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
