"""Shared settings: one thread (the machines are small), reproducible Hypothesis, and a float64 switch for gradients."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two workers and their children share two cores

import pytest
import torch
import yaml
from hydra._internal.hydra import Hydra
from hypothesis import HealthCheck, settings

settings.register_profile(
    "glassarmor",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("glassarmor")


def _compose_faster() -> None:
    """Hundreds of tests start a command in this process, and each would read the same thirty YAML files three times.

    Hydra composes once to ask for ``hydra.mode``, which nothing here sets, and then again; and no file changes meanwhile.
    """
    parse, known = yaml.load, {}

    def load(stream: Any, Loader: Any) -> Any:
        text = stream.read() if hasattr(stream, "read") else stream
        key = (text, Loader.__name__)
        if Loader.__name__ != "OmegaConfLoader":
            return parse(text, Loader)
        if key not in known:
            known[key] = parse(text, Loader)
        return copy.deepcopy(known[key])

    yaml.load = load
    Hydra.get_mode = lambda self, config_name, overrides: None


_compose_faster()

LONG = (
    "test_run.py",
    "test_faults.py",
    "test_health_callback.py",
    "test_configs.py",
    "test_distributed.py",
    "test_evaluate.py",
    "test_attacks.py",
    "test_suite.py",
    "test_sanity.py",
    "test_suite_command.py",
    "test_browser.py",
    "test_minimum_norm.py",
    "test_study.py",
    "test_averaging.py",
    "test_free.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of whole runs first: two workers take files in turn, and the last one taken should be short."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals are cast to fp32 with ``.float()``; here that cast keeps float64, so that finite differences are sharp."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())
