"""Somebody else's config runs nothing of theirs, whichever way it names it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from glassarmor.lightning_modules.run.saved_config import (
    CONFIGS,
    foreign_code,
    is_ours,
    named_targets,
    read_config,
    read_yaml,
)
from tests.composing import config

FOREIGN = {
    "a callable": {"data": {"_target_": "os.system", "command": "touch /tmp/x"}},
    "in a list": {"trainer": {"callbacks": [{"_target_": "subprocess.call"}]}},
    "our target that imports what it is told": {
        "network": {"_target_": "glassarmor.lightning_modules.networks.imported", "_partial_": True, "target": "os:system"}
    },
    "nested in ours": {
        "attack": {
            "_target_": "glassarmor.defenses.PGD",
            "threat": {"_target_": "glassarmor.defenses.Linf", "eps": {"_target_": "x.y"}},
        }
    },
    "through one of our modules": {"data": {"_target_": "glassarmor.defenses.masking.torch.hub.load"}},
    "a function of ours that writes files": {"data": {"_target_": "glassarmor.interpret.storage.write_atomic"}},
    "a class of ours that writes files": {"data": {"_target_": "glassarmor.defenses.FelledExamples", "path": "/etc/x"}},
    "Hydra's own": {"data": {"_target_": "hydra.utils.get_method", "path": "os.system"}},
    "no text": {"data": {"_target_": {"_target_": "os.getcwd"}}},
    "the environment": {"name": "${oc.env:HOME}"},
    "a resolver by another name": {"a": "oc.env", "name": "${${a}:HOME}"},
    "the environment in a list": {"layers": ["x ${oc.env:HOME}"]},
}


@pytest.mark.parametrize("values", FOREIGN.values(), ids=FOREIGN)
def test_foreign_code_is_refused_and_named(tmp_path: Path, values: dict[str, object]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(
        ValueError, match=r"^checkpoint: .* would run what is not part of this package: .*trust=true$"
    ) as error:
        read_config(path, "checkpoint")
    assert "\n" not in str(error.value)
    assert read_config(path, "checkpoint", trusted=True) == values


def test_the_message_lists_what_would_run(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**FOREIGN["our target that imports what it is told"], "x": {"_target_": "a.b"}}))
    with pytest.raises(ValueError, match=r"network\.target: os:system; x: a\.b"):
        read_config(path, "checkpoint")


@pytest.mark.parametrize("kind", sorted(path.name for path in CONFIGS.iterdir() if path.is_dir()))
def test_every_choice_of_ours_is_allowed(kind: str) -> None:
    """What the YAML files compose to, as a run would save it; a network of the user's own alone is not ours."""
    for path in sorted((CONFIGS / kind).glob("*.yaml")):
        values = yaml.safe_load(path.read_text()) or {}
        text = yaml.safe_dump(values).replace("${", "")  # a saved config is resolved
        found = [line for line in foreign_code(yaml.safe_load(text)) if path.stem != "imported"]
        assert found == [], path


def test_a_composed_config_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(config(), resolve=True))
    assert read_config(path, "resume")["defense"]["_target_"] in named_targets()


PUBLIC = ("glassarmor.defenses.DLR", "glassarmor.defenses.L2", "glassarmor.datamodules.SegmentationFolder")


@pytest.mark.parametrize("target", PUBLIC)
def test_public_parts_that_no_yaml_names_are_allowed(target: str) -> None:
    assert is_ours(target)


def test_a_bomb_is_refused_before_memory_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    for text, why in (
        ("\n".join(lines), "aliases"),
        ("[" * 100_000, ""),
        ("a: " + "x" * (2 << 20), "at most 1024 KiB, found 2048 KiB"),
        ("a: !!python/object/apply:os.system [ls]", "python/object"),
        ("\x00", ""),
    ):
        path.write_text(text)
        begun = time.process_time()
        with pytest.raises(ValueError, match=rf"^resume: {path} is no readable YAML .*{why}"):
            read_yaml(path, "resume")
        assert time.process_time() - begun < 5
    path.write_text("- 1")
    with pytest.raises(ValueError, match="expected keys with values, found list"):
        read_config(path, "resume")


def test_a_saved_config_fetches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"data": {"_target_": "datamodules.cifar.CIFAR10", "root": "x", "download": True}}))
    assert read_config(path, "checkpoint")["data"] == {
        "_target_": "glassarmor.datamodules.CIFAR10",
        "root": "x",
        "download": False,
    }
    assert read_config(path, "checkpoint", trusted=True)["data"]["download"]
