"""Nothing loses a run: kills, signals, bad files, full disks and dead servers, for real, in processes of their own."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faulty import QUICK, assert_same_run, kill, run

EVERYTHING = (
    "defense=trades",
    "defense.attack.steps=1",
    "regularizers=[pse,sensitivity]",
    "regularizers.sensitivity.at=turning",
    "awp.gamma=0.005",
    "ema=0.8",
    "panels=[sensitivity]",
)
KINDS = {
    "TRADES, AWP, average, running sensitivities": EVERYTHING,
    "Free-AT, average": ("defense=free_at", "defense.attack.replays=3", "ema=0.8", "trainer.max_epochs=2"),
    "a network with random numbers of its own": (
        "network=imported",
        "network.target=tests.faulty:Restless",
        "~network.width",
    ),
    "N-FGSM, concepts, warm-up, AdamW, accumulation": (
        "defense=n_fgsm",
        "regularizers=[sensitivity]",
        "+regularizers.sensitivity.concepts={_target_:datamodules.concepts.DrawnConcepts,_partial_:true,count:24}",
        "defense.eps_share={_target_:defenses.terms.Ramp,start:0.2,end:1,epochs:2}",
        "optimizer=adamw",
        "+trainer.accumulate_grad_batches=2",
    ),
    "MART, CAM discrepancy, pictures": ("defense=mart", "regularizers=[cam_discrepancy]", "panels=[pse,cam]"),
}


def options(kind: str) -> list[str]:
    chosen = KINDS[kind]
    replaced = {entry.partition("=")[0].lstrip("+~") for entry in chosen}
    groups = {entry.partition("=")[0] for entry in chosen if "." not in entry.partition("=")[0]}
    kept = [q for q in QUICK if q.partition("=")[0] not in replaced and not clash(q, groups)]
    return [*kept, *(entry for entry in chosen if not entry.startswith("~"))]


def clash(setting: str, groups: set[str]) -> bool:
    return setting.split("=")[0].split(".")[0] in groups


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """By kind, an uninterrupted run, made when it is first asked for."""
    out, made = tmp_path_factory.mktemp("whole"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = out / f"run{len(made)}"
            assert run(out / "log", *options(kind), f"out={out}", f"name={made[kind].name}") == 0, (out / "log").read_text()
        return made[kind]

    return get


@pytest.mark.parametrize(
    "kind", [name if i < 3 else pytest.param(name, marks=pytest.mark.long) for i, name in enumerate(KINDS)]
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(kind, whole, tmp_path: Path) -> None:
    folder, log = tmp_path / "cut", tmp_path / "log"
    faults = [("step", 3), ("write", 2), ("log", 1), ("rename", 3)]
    for i, fault in enumerate(faults):
        arguments = [f"resume={folder}"] if i else [*options(kind), f"out={tmp_path}", "name=cut"]
        assert run(log, *arguments, plant=kill, details=fault) == -signal.SIGKILL, (fault, log.read_text())
    assert run(log, f"resume={folder}") == 0, log.read_text()
    assert_same_run(whole(kind), folder)
