"""Going on with a run: what a command line may change of it, and how that is recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from omegaconf import DictConfig, OmegaConf

from glassarmor.interpret.storage import write_atomic
from glassarmor.lightning_modules.run.changes import CHANGED, changes, flat
from glassarmor.lightning_modules.run.data_record import places_of, recorded
from glassarmor.lightning_modules.run.folder import ResumePoint, RunFolder
from glassarmor.lightning_modules.run.hardware import AUTO
from glassarmor.lightning_modules.run.saved_config import read_config

HERE: Final = ("resume", "trust", "debug", "hash_images", "hydra", "wandb", CHANGED)  # of this start, not of the run
FIXED: Final = {  # key of the config → what another value would be; with another it is another run
    "data": "other images, or another split of them",
    "threat": "another threat model",
    "budget": "another threat model",
    "network": "another network",
    "val_attack": "another choice of the best epoch",
    "select": "another choice of the best epoch",
    "probe": "other images on the dashboard",
    "ema": "other weights that are judged",
    "freeze": "other weights that learn",
    "lr_factors": "an optimiser of other groups",
    "output": "another network",
    "layouts": "other signals",
    "name": "another folder",
    "out": "another folder",
}
FREE: Final = (  # parts of them that may change
    *("data.path", "data.test_path", "data.root", "data.download", "data.batch_size", "data.eval_batch_size"),
    *("data.on_device", "data.augment", "probe.every_n_epochs"),
)


def resumed_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The saved config of a run folder, with the single values given on the command line, and their copies.

    Raises:
        ValueError: no run folder, an override of what the saved config does not hold, or one that makes another run.
    """
    saved = OmegaConf.create(read_config(RunFolder.existing(cfg.resume).config, "resume", bool(cfg.get("trust"))))
    copies = dict(_copies(saved))
    for place, found in places_of(saved.data, Path(cfg.resume)).items():
        saved.data[place] = found
    for override in overrides:
        word, _, value = override.partition("=")
        key = word.lstrip("+")  # what the run has, the defaults may lack
        if value == AUTO and key in ("trainer.precision", "channels_last"):
            continue  # decided when the run began
        if key not in HERE:
            _require_value(saved, key, copies)
        new = OmegaConf.from_dotlist([f"value={value}"]).value
        if key not in HERE and OmegaConf.select(saved, key) != new and (why := _another_run(key)):
            had = OmegaConf.select(saved, key)
            raise ValueError(
                f"resume: {key}: expected {had}, as the run has it; {new} makes {why}: start a new run for that"
            )
        for place in (key, *(f"{copy}{key[len(group) :]}" for copy, group in copies.items() if key.startswith(f"{group}."))):
            OmegaConf.update(saved, place, new)
    return saved


def _require_value(saved: DictConfig, key: str, copies: Mapping[str, str]) -> None:
    """Raises ValueError unless the key is a single value of the config, and not one that follows another key."""
    parent, _, leaf = key.rpartition(".")
    holder = OmegaConf.select(saved, parent) if parent else saved
    if not isinstance(holder, DictConfig) or leaf not in holder or OmegaConf.is_config(holder[leaf]):
        raise ValueError(f"resume: {key!r} is no single value of the saved config; allowed is e.g. trainer.max_epochs=50")
    for copy, group in copies.items():
        if key.startswith(f"{copy}."):
            raise ValueError(f"resume: {key} follows {group}{key[len(copy) :]}; change that")


def _another_run(key: str) -> str:
    """Why another value of this key would make another run; "" where it would not."""
    parts = key.split(".")
    if parts[-1] == "seed":
        return "other random numbers"
    if parts[-1] == "_target_":
        return "another class"
    if any(key == free or key.startswith(f"{free}.") for free in FREE):
        return ""
    return FIXED["threat"] if "threat" in parts else FIXED.get(parts[0], "")


def _copies(saved: DictConfig) -> Iterator[tuple[str, str]]:
    """Places deep in a saved config that interpolations made copies of a whole group, and the group."""
    groups = {str(key): value for key, value in saved.items() if isinstance(value, DictConfig) and len(value)}

    def within(node: DictConfig, place: str) -> Iterator[tuple[str, str]]:
        for key, value in node.items():
            if isinstance(value, DictConfig):
                here = f"{place}.{key!s}"
                same = [group for group, whole in groups.items() if value == whole and not here.startswith(f"{group}.")]
                yield from [(here, same[0])] if same else within(value, here)

    for name, group in groups.items():
        yield from within(group, name)


def note_changes(folder: RunFolder, cfg: DictConfig, point: ResumePoint) -> list[str]:
    """Write the config with which a run goes on, and what is changed from here, in one file and one write.

    Args:
        point: where it goes on; what was changed later than that, and is trained again, is changed there now.

    Returns:
        A sentence a change, new ones only.
    """
    saved, now = (_plain(each) for each in (OmegaConf.load(folder.config), cfg))
    places = (recorded(folder.path) or {}).get("places", {})  # a place is not changed by being spelt in full
    here = {"epoch": point.epoch, "step": point.step}
    before = [dict(entry) | (here if entry["step"] > point.step else {}) for entry in saved.get(CHANGED, [])]
    old, new = (flat({key: value for key, value in each.items() if key not in HERE}) for each in (saved, now))
    found = [
        {**here, "key": key, "from": old.get(key), "to": new.get(key)}
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and not (key.startswith("data.") and places.get(key[5:]) == new.get(key))
    ]
    if [*before, *found] != saved.get(CHANGED, []):
        whole = now | {key: saved[key] for key in HERE[:4] if key in saved}
        whole.pop(CHANGED, None)  # the last entry
        write_atomic(folder.config, OmegaConf.to_yaml(OmegaConf.create(whole | {CHANGED: before + found})))
    return changes({CHANGED: found})


def _plain(cfg: Any) -> dict[str, Any]:
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
