"""Compose configs in tests as the command line does."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = (
    "network.width=0.25",
    "data.train_limit=160",
    "data.test_limit=40",
    "data.batch_size=32",
    "trainer.accelerator=cpu",
    "probe.size=16",
)


def config(*overrides: str) -> DictConfig:
    """The training config with these command-line overrides, the caller's own."""
    return copy.deepcopy(_composed(overrides))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    """Composing takes an eighth of a second, a copy of it a hundredth."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides))


def without_guessing(patch: pytest.MonkeyPatch) -> None:
    """Epochs of a dozen steps, which teach next to nothing, can be the best."""
    patch.setattr("glassarmor.lightning_modules.selection.knows_nothing", lambda *_: False)


def options(group: str) -> list[str]:
    """Names of the YAML files of a group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("[!_]*.yaml"))
