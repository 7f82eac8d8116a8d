"""How a benchmark reads its words, where these are the overrides of a config and a few keys of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict

from glassarmor.lightning_modules.commands.errors import refusal


def help_if_asked(usage: str | None) -> None:
    """Print how to use a command, and end, if its words ask for that."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((usage or "").strip())
        sys.exit()


def composed(configs: Path, name: str, own: Mapping[str, Any]) -> tuple[DictConfig, dict[str, Any]]:
    """The config of this process's words, and the values of the ``own`` keys, which the words give with a + in front;
    null is the default.

    Args:
        configs, name: the folder and the name of the config.
        own: keys that the config does not hold, and their defaults.

    Raises:
        ValueError: what Hydra refuses, in one line; an own key without its +.
    """
    words = sys.argv[1:]
    for word in words:
        if word.partition("=")[0] in own:
            raise ValueError(f"{word.partition('=')[0]}: expected a + in front, +{word}; found {word}")
    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            cfg = compose(name, words)
    except HydraException as error:
        said = " ".join(str(error).partition("Config search path")[0].split())
        raise ValueError(refusal(said, words, configs, name)) from None
    with open_dict(cfg):
        given = {key: cfg.pop(key, None) for key in own}
    return cfg, {key: default if given[key] is None else given[key] for key, default in own.items()}
