"""The data that a run was about: recorded in its run.json, found again from any folder, and compared before it is used."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from glassarmor.interpret.storage import read_object
from glassarmor.lightning_modules.run.folder import ResumePoint, RunFolder

Fingerprint = Mapping[str, Any]  # of glassarmor.datamodules.fingerprint
UNKNOWN: Final = "the run is from before runs recorded their data: neither classes nor images are compared with it"


def recorded(run: Path) -> Fingerprint | None:
    """The fingerprint in the run.json of a run folder; None where it says none.

    Raises:
        ValueError: the file, or the record in it, cannot be read.
    """
    file = run / "run.json"
    found = read_object(file, "runs").get("data") if file.is_file() else None
    if found is None:
        return None
    try:
        whole = other_classes(found, found) == "" and other_images(found, found) == []
        whole = whole and all(isinstance(place, str) for place in found["places"].values())
    except (AttributeError, IndexError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{file}: the record of the run's data is damaged; expected places, classes, sources and splits")
    checked: Fingerprint = found
    return checked


def places_of(data: Mapping[str, Any], run: Path) -> dict[str, str]:
    """Entries of a run's data config that say where its data lies, in full, the same from any folder; not what is gone."""
    known = (recorded(run) or {}).get("places", {})
    return {key: place for key, place in known.items() if data.get(key) and _is_there(place)}


def _is_there(place: str) -> bool:
    return Path(place).exists() or bool(glob.glob(place))


def compared(run: Path, now: Fingerprint, key: str, own: bool = True) -> list[str]:
    """What to say of how the data at hand differs from that of a run; nothing where it is the same.

    Args:
        run: the run folder.
        key: of the config, by which the run was named.
        own: the data was taken from the run, not named beside it.

    Raises:
        ValueError: other classes, or another order of them; other data in the place of a run's own that is gone.
    """
    before = recorded(run)
    if before is None:
        return [f"{key}: {UNKNOWN}"]
    if why := other_classes(before, now):
        raise ValueError(
            f"{key}: {run} was trained on other data than this, {why}; the same outputs would mean other things"
        )
    differ = other_images(before, now)
    if differ and own and (gone := [place for place in before["places"].values() if not _is_there(place)]):
        raise ValueError(
            f"{key}: the data of {run} lay at {gone[0]}, where nothing is now, and what its config names from here is other "
            f"data ({differ[0]}); name the data itself, e.g. data=image_folder data.path=…"
        )
    return [f"{key}: the images differ from those of {run}, {words}" for words in differ]


def note_data(folder: RunFolder, now: Fingerprint, point: ResumePoint) -> None:
    """Keep the record of a resumed run's data; what it was about before is kept beside it, with the step of the change."""
    before = recorded(folder.path)
    changed = before is None or bool(other_images(before, now))
    if before is not None and not changed:  # what was asked for once, the hash of the whole, stays
        splits = {name: {**before["splits"][name], **found} for name, found in now["splits"].items()}
        now = {**now, "splits": splits}
    if before == now:
        return
    here = {"step": point.step, "epoch": point.epoch, "data": before}
    earlier = [*folder.info.get("earlier_data", []), *([here] if changed else [])]
    folder.note(data=now, **({"earlier_data": earlier} if earlier else {}))


def data_changes(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Changes of a run's images while it was trained, as entries of ``changed`` in a config."""
    return [
        {"epoch": each["epoch"], "step": each["step"], "key": "data", "from": "images", "to": "other images"}
        for each in info.get("earlier_data", [])
        if each["data"] is not None
    ]


def other_classes(before: Fingerprint, now: Fingerprint) -> str:
    """Why a network's outputs would be read as other classes than it was trained on; "" where they would not."""
    old, new = before["classes"], now["classes"]
    if old != new:
        kind = "the same classes in another order" if sorted(old) == sorted(new) else "other classes"
        differ = [i for i in range(max(len(old), len(new))) if old[i : i + 1] != new[i : i + 1]]
        few = slice(max(0, differ[0] - 1), differ[0] + 4)
        return f"{kind}: expected {_listed(old, few)}, found {_listed(new, few)}"
    for source, was in before["sources"].items():
        prints, found = was["by_class"], now["sources"].get(source, {}).get("by_class", [])
        for label, (one, other) in enumerate(zip(prints, found, strict=False)):
            if other is not None and other != one and other in prints:
                return f"the {source} images of class {old[prints.index(other)]!r} are now those of {old[label]!r}"
    return ""


def other_images(before: Fingerprint, now: Fingerprint) -> list[str]:
    """How the images of each split differ, a sentence each; empty for the same."""
    found = []
    for split, was in before["splits"].items():
        here = now["splits"][split]
        if was["n"] != here["n"]:
            found.append(f"{split}: {here['n']} images where there were {was['n']}")
        elif any(was[key] != here[key] for key in ("sample", "whole") if key in was and key in here):
            found.append(f"{split}: other images or labels, {here['n']} as before")
    if found:
        return found
    for source, was in before["sources"].items():
        if (here := now["sources"].get(source)) is None:
            found.append(f"{source} images: they lay in a folder of their own before")
            continue
        if was["by_class"] != here["by_class"]:
            found.append(f"{source} images: others among those that these splits leave out or that were not compared")
        elif was["files"] != here["files"]:
            found.append(f"{source} files: other names or sizes, though the images that were compared are the same")
    return found


def _listed(names: Sequence[str], part: slice) -> str:
    dots = "… " * (part.start > 0), " …" * (part.stop < len(names))
    return f"{dots[0]}{', '.join(names[part])}{dots[1]} ({len(names)})"
