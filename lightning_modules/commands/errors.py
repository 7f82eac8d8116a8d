"""The last to hear of an error: what Hydra refuses, and a run that diverged, in one line instead of a stack trace."""

from __future__ import annotations

import errno
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from glassarmor.defenses.training.compiling import NotCompiled
from glassarmor.lightning_modules.callbacks.preemption import INTERRUPTED
from glassarmor.lightning_modules.classifier import Diverged
from glassarmor.lightning_modules.run.console import printable
from glassarmor.lightning_modules.run.log import NotKept
from glassarmor.lightning_modules.run.processes import is_echo
from glassarmor.lightning_modules.run.saved_config import named_targets

FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stopped(Exception):
    """An alarm ended the run before its time: no error, for all is on the disk, but the exit code tells."""


def run_command(command: Callable[[], Any], configs: Path, name: str, again: str) -> None:
    """Call a Hydra main on this process's arguments; exit code 2 for arguments that it refuses, 1 where it cannot go on.

    With ``debug=true``, or with ``HYDRA_FULL_ERROR=1`` around it, errors are left as they are.

    Args:
        configs, name: the folder and the name of its config.
        again: what the same command does when it was stopped, in words.
    """
    words = sys.argv[1:]
    if "debug=true" in words or os.environ.get("HYDRA_FULL_ERROR") == "1":
        command()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints what it catches, and ends the process
    try:
        command()
    except HydraException as error:
        said = " ".join(str(error).partition("Config search path")[0].split())
        _end(refusal(said, words, configs, name), 2)
    except (Diverged, NotCompiled, NotKept) as error:
        _end(str(error), 1)
    except Stopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        end_by_disk(error, again)
    except KeyboardInterrupt:
        _end(f"stopped; {again}", INTERRUPTED)
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)


def end_by_disk(error: OSError, again: str) -> None:
    """End with exit code 1 and one line where the disk is full; any other error goes on."""
    if error.errno not in FULL:
        raise error
    _end(f"{error.filename or 'a file'} could not be written ({error.strerror}); {again}", 1)


def require_class(config: DictConfig, key: str, expected: type) -> None:
    """Raises ValueError if this entry names another class, or none that there is: Hydra's own words name no key."""
    entry = OmegaConf.select(config, key)
    if not isinstance(entry, DictConfig) or not entry:
        return
    target, made = entry.get("_target_"), None
    with suppress(Exception):  # an import may fail in any way
        made = get_object(str(target))
    if not (isinstance(made, type) and issubclass(made, expected)):
        public = next(name for name in sorted(named_targets()) if name.endswith(f".{expected.__name__}"))
        raise ValueError(f"{key}._target_: expected {public}, found {target!r}")


def _end(line: str, code: int) -> None:
    if not is_echo():
        print(f"error: {printable(line)}\n(debug=true shows the stack trace)", file=sys.stderr)
    sys.exit(code)


def refusal(said: str, words: Sequence[str], configs: Path, name: str) -> str:
    """What Hydra said of these words; of a key or a choice that is not there, those that are.

    Hydra itself proposes to add it with "+": that is repeated only where the class that it configures knows the key.
    """
    if match := re.match(r"In '[^']+': Could not find '([^']+)/([^'/]+)' Available options in '[^']+': (.+)$", said):
        return f"{match[1]}: expected one of {', '.join(match[3].split())}; found {match[1]}={match[2]}"
    match = re.match(r"Could not override '([^']+)'", said)
    if match is None:
        return said
    key = match[1]
    found = next((word for word in words if word.startswith(f"{key}=")), key)
    groups = [w for w in words if (configs / w.partition("=")[0].partition("@")[0]).is_dir() and "," not in w]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            node: Any = compose(name, groups)
    except HydraException:
        return said
    place, leaf = "", key
    while "." in leaf and isinstance(inner := OmegaConf.select(node, leaf.partition(".")[0]), DictConfig):
        first, _, leaf = leaf.partition(".")
        node, place = inner, f"{place}.{first}" if place else first
    keys = [str(k) for k in node if k != "_target_"]
    group, _, last = key.rpartition(".")
    if group and not place and (configs / group).is_dir() and group not in node and last in keys:
        return f"{key}: nothing is chosen for {group} here; expected {last}=, which sets it whatever is; found {found}"
    choice = next((f" ({word})" for word in groups if word.partition("=")[0] == place), "")
    if not keys:
        return f"{key}: expected no key of {place}, which is empty here{choice}; found {found}"
    with suppress(Exception):  # no class, or one that tells no parameters
        if leaf in inspect.signature(get_object(node["_target_"])).parameters:
            return f"{key}: the config does not set it; expected a + in front, which adds it: +{found}; found {found}"
    of = f"a key of {place}{choice}" if place else "a key of the config"
    return f"{key}: expected {of}, one of {', '.join(keys)}; found {found}"
