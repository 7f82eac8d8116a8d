"""Nothing loses a run: kills, signals, bad files and full disks, for real, in processes of their own."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import wandb

from glassarmor.interpret.views.view import View
from glassarmor.lightning_modules.callbacks.checkpointing import Checkpoints
from glassarmor.lightning_modules.run.log import RunLog, _PatientWandbLogger, wandb_logger
from tests.faulty import DIE, QUICK, Plan, assert_same_run, assert_same_weights, raise_signal, run, start
from tests.wandb_log import records
from tests.wandb_server import Server

TRADES = "TRADES, AWP, average, running sensitivities"
FREE = "Free-AT, average"
RESTLESS = "a network with random numbers of its own"
KINDS = {
    TRADES: (
        "defense=trades",
        "regularizers=[pse,sensitivity]",
        "regularizers.sensitivity.at=turning",
        "awp.gamma=0.005",
        "ema=0.8",
        "panels=[sensitivity]",
    ),
    FREE: ("defense=free_at", "~defense.attack.steps", "defense.attack.replays=3", "ema=0.8", "trainer.max_epochs=2"),
    RESTLESS: ("network=imported", "~network.width", "network.target=tests.faulty:Restless"),
    "N-FGSM, concepts, warm-up, AdamW, accumulation": (
        "defense=n_fgsm",
        "~defense.attack.steps",
        "regularizers=[sensitivity]",
        "regularizers.sensitivity.concepts={_target_:glassarmor.datamodules.procedural_concepts,_partial_:true,count:24}",
        "defense.eps_share={_target_:glassarmor.defenses.Ramp,start:0.2,end:1,epochs:2}",
        "optimizer=adamw",
        "+trainer.accumulate_grad_batches=2",
    ),
    "MART, CAM discrepancy, pictures": ("defense=mart", "regularizers=[cam_discrepancy]", "panels=[pse,cam]"),
}


def options(kind: str) -> list[str]:
    """The quick settings, with those of the kind in their place; "~key" takes one away."""
    replaced = {entry.partition("=")[0].lstrip("~") for entry in KINDS[kind]}
    kept = [entry for entry in QUICK if entry.partition("=")[0] not in replaced]
    return [*kept, *(entry for entry in KINDS[kind] if not entry.startswith("~"))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By kind, the folder of an uninterrupted run, made when it is first asked for."""
    out = tmp_path_factory.mktemp("whole")
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = out / f"run{len(made)}"
            arguments = [*options(kind), f"out={out}", f"name={made[kind].name}"]
            assert run(out / "log", *arguments) == 0, (out / "log").read_text()
        return made[kind]

    return get


def held_step(folder: Path) -> int:
    return int(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])


OFTEN = (("step", 3), ("write", 2), ("log", 1), ("rename", 2))


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "places"),
    [(TRADES, (("write", 2), ("log", 2))), *(pytest.param(kind, OFTEN, marks=pytest.mark.long) for kind in KINDS)],
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(kind, places, whole, tmp_path: Path) -> None:
    folder, log = tmp_path / "cut", tmp_path / "log"
    for i, place in enumerate(places):
        arguments = [f"resume={folder}", "trust=true"] if i else [*options(kind), f"out={tmp_path}", "name=cut"]
        assert run(log, *arguments, plan={place: DIE}) == -signal.SIGKILL, (place, log.read_text())
    assert run(log, f"resume={folder}", "trust=true") == 0, log.read_text()
    assert_same_run(whole(kind), folder)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_kills_from_outside_at_random_moments(kind, whole, tmp_path: Path) -> None:
    began = time.monotonic()
    assert run(tmp_path / "log", *options(kind), f"out={tmp_path}", "name=timed") == 0
    took = time.monotonic() - began
    moments = random.Random(os.urandom(8).hex())
    for attempt in range(3):
        folder, log = tmp_path / f"cut{attempt}", tmp_path / f"log{attempt}"
        after = []
        for _ in range(20):
            arguments = (
                [f"resume={folder}", "trust=true"]
                if folder.exists()
                else [*options(kind), f"out={tmp_path}", f"name=cut{attempt}"]
            )
            process = start(log, *arguments)
            after.append(moments.uniform(0, 1.2 * took))
            process.join(after[-1])
            if process.exitcode is None:
                process.kill()
                process.join()
            elif process.exitcode == 0:
                break
            else:  # killed between the folder and its papers: there is nothing to go on from
                assert "expected a run folder" in log.read_text(), log.read_text()
                shutil.rmtree(folder)
        else:
            assert run(log, f"resume={folder}", "trust=true") == 0, log.read_text()
        print(f"{kind}: killed after {after[:-1]} s of {took:.1f}")
        assert_same_run(whole(kind), folder)


def test_signals_save_and_end_the_run_with_code_75(whole, tmp_path: Path) -> None:
    """In a step, in a validation while the average is swapped in, and in the last step of an epoch."""
    folder, log = tmp_path / "cut", tmp_path / "log"
    now = [entry for entry in options(FREE) if not entry.startswith("checkpoint_every")]  # 12 steps an epoch
    asked = [
        (("step", 5), signal.SIGTERM, 5),  # the step is finished
        (("validation", 1), signal.SIGUSR1, 11),  # the step before the epoch's last
        (("step", 1), signal.SIGUSR2, 11),  # the last of an epoch, resumed: stops in the validation that follows
    ]
    for i, (place, number, held) in enumerate(asked):
        arguments = [f"resume={folder}", "trust=true"] if i else [*now, f"out={tmp_path}", "name=cut"]
        assert run(log, *arguments, plan={place: partial(raise_signal, number)}) == 75, log.read_text()
        assert held_step(folder) == held
        last = log.read_text().strip().splitlines()[-1]
        assert (
            last
            == f"{number.name}: last.ckpt holds step {held}; go on with  python train.py resume={folder}  (exit code 75)"
        )
        assert "Traceback" not in log.read_text()
    assert run(log, f"resume={folder}", "trust=true") == 0, log.read_text()
    assert_same_run(whole(FREE), folder)


def test_a_signal_ends_a_sweep_with_its_member(tmp_path: Path) -> None:
    arguments = ["-m", *options(RESTLESS), "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep", f"out={tmp_path}/runs"]
    assert run(tmp_path / "log", *arguments, plan={("step", 2): partial(raise_signal, signal.SIGTERM)}) == 75
    assert len(list((tmp_path / "runs").iterdir())) == 1, "the second member was not begun"
    assert held_step(next((tmp_path / "runs").iterdir())) == 2


@pytest.mark.long
def test_a_bad_checkpoint_is_replaced_by_the_one_before_or_the_best(whole, tmp_path: Path) -> None:
    arguments = [*options(RESTLESS), f"out={tmp_path}", "name=cut"]
    assert run(tmp_path / "log", *arguments, plan={("log", 3): DIE}) == -signal.SIGKILL  # 11 steps held, two epochs judged
    shutil.copytree(tmp_path / "cut", tmp_path / "other")

    def resumed(name: str) -> str:
        log = tmp_path / f"log-{name}"
        assert run(log, f"resume={tmp_path / name}", "trust=true") == 0, log.read_text()
        assert_same_run(whole(RESTLESS), tmp_path / name)
        return " ".join(log.read_text().split())

    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    found = re.escape(str(last)) + r" is no readable checkpoint \(.+\); goes on from previous\.ckpt, epoch 2, step 10"
    assert re.search(found, resumed("cut"))

    kept = tmp_path / "other" / "checkpoints"
    data = bytearray((kept / "last.ckpt").read_bytes())
    for place in range(len(data) // 4, len(data) // 4 + 4096):
        data[place] ^= 255  # a bad sector
    (kept / "last.ckpt").write_bytes(data)
    (kept / "previous.ckpt").write_bytes(b"")
    said = resumed("other")
    assert f"{kept / 'last.ckpt'} is no readable checkpoint (wrong checksum" in said
    assert f"{kept / 'previous.ckpt'} is no readable" in said
    assert "goes on from best.ckpt, epoch" in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if done.returncode != 0:
        pytest.skip(f"no right to mount a small file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    """No byte is left."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size) == size:
                    pass


def check(folder: Path, step: int) -> None:
    """What was written before the disk was full is whole, and no half-written file lies beside it."""
    kept = {path.name: torch.load(path, weights_only=True)["global_step"] for path in (folder / "checkpoints").iterdir()}
    kept.pop("healthy.ckpt", None)  # from before the first step
    assert kept == {"last.ckpt": step, "previous.ckpt": step - 1}
    assert not list(folder.rglob("*.part"))


def check_and_free(folder: Path, run_folder: Path, step: int) -> None:
    check(run_folder, step)
    (folder / "filler").unlink()


def limit_files(size: int) -> None:
    """No file may grow beyond this."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def check_and_unlimit(run_folder: Path, step: int) -> None:
    check(run_folder, step)
    limit_files(resource.RLIM_INFINITY)


def survives(plan: Plan, out: Path, tmp_path: Path, whole: Path) -> None:
    log = tmp_path / "log"
    assert run(log, *options(RESTLESS), f"out={out}", "name=cut", plan=plan) == 0, log.read_text()
    for name in ("metrics.csv", "results.json"):
        assert (out / "cut" / name).read_text() == (whole / name).read_text()
    assert_same_weights(whole, out / "cut")
    said = " ".join(log.read_text().split())
    assert said.count("training goes on and tries again next time") == 1


def test_a_full_disk_ends_no_run(small_disk: Path, whole, tmp_path: Path) -> None:
    """From the third step to the second epoch's third; the epoch that fell between is in metrics.csv all the same."""
    plan = {("step", 3): partial(fill, small_disk), ("step", 7): partial(check_and_free, small_disk, small_disk / "cut", 2)}
    survives(plan, small_disk, tmp_path, whole(RESTLESS))


@pytest.mark.long
def test_files_that_may_not_grow_end_no_run(whole, tmp_path: Path) -> None:
    """What is left to test where nothing may be mounted: checkpoints are too large, other files are not."""
    plan = {("step", 3): partial(limit_files, 12_000), ("step", 7): partial(check_and_unlimit, tmp_path / "cut", 2)}
    survives(plan, tmp_path, tmp_path, whole(RESTLESS))


@pytest.mark.long
def test_a_disk_that_stays_full_is_told_at_the_end(small_disk: Path, tmp_path: Path) -> None:
    """With W&B's own files on it; the table is printed, what was written before is whole, and no other file is named."""
    log = tmp_path / "log"
    arguments = [entry for entry in options(TRADES) if not entry.startswith("wandb.mode")]
    plan = {("step", 7): partial(fill, small_disk)}
    assert run(log, *arguments, f"out={small_disk}", "name=cut", "wandb.mode=offline", plan=plan) == 1, log.read_text()
    assert held_step(small_disk / "cut") == 6
    assert len((small_disk / "cut" / "metrics.csv").read_text().splitlines()) == 2
    assert "defended, best epoch" in log.read_text()
    assert "defended, last epoch" in log.read_text()
    said = " ".join(log.read_text().split())
    assert "the run ended, but could not write metrics.csv" in said
    assert "could not write results.json" in said
    assert f"go on with python train.py resume={small_disk / 'cut'}" in said
    for path in re.findall(rf"{small_disk / 'cut'}/[\w./-]+\.\w+", said.rpartition("defended, last epoch")[2]):
        assert Path(path).is_file(), path


class _Broken:
    """A W&B run whose connection is gone."""

    asked = 0

    def __getattr__(self, name: str) -> object:
        type(self).asked += 1
        raise ConnectionError("server gone")


def test_a_record_that_fails_ends_nothing_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = _PatientWandbLogger(save_dir=str(tmp_path), mode="disabled")
    monkeypatch.setattr(type(logger), "experiment", _Broken())
    log = RunLog(tmp_path, None, logger)

    def record() -> None:
        for epoch in range(3):
            log.epoch(epoch, epoch, {"value": 1.0}, [])
            logger.log_metrics({"value": 1.0}, epoch)
            logger.log_hyperparams({"seed": 0})

    with pytest.warns(UserWarning, match="server gone") as said:
        record()
    assert sorted(str(w.message).split(" (")[0] for w in said) == [
        "could not log an epoch to W&B",
        "could not log metrics to W&B",
        "could not log the config to W&B",
    ]
    assert _Broken.asked == 9
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4


def test_a_wandb_server_lost_in_the_middle_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("glassarmor.lightning_modules.run.log.FINISH_TIMEOUT", 1)
    logger = wandb_logger(tmp_path, "glassarmor", "online", "abc123", "run", {})
    assert logger is not None
    assert server.asked["UpsertBucket"], "the run is online"
    server.stop()
    log = RunLog(tmp_path, None, logger)
    for epoch in range(3):
        log.epoch(epoch, epoch, {}, [View("one", "One", "", "", scalars={"value": float(epoch)})])
    began = time.monotonic()
    with pytest.warns(UserWarning, match="could not send all to W&B .*wandb sync"):
        log.close()
    assert time.monotonic() - began < 60, "W&B itself would wait for ever"
    (kept,) = (tmp_path / "wandb").glob("run-*/*.wandb")
    wandb.teardown()  # as at the end of the script
    rows = [r.history for r in records(kept) if r.WhichOneof("record_type") == "history"]
    assert len(rows) == 3


@pytest.mark.parametrize("every", [0, -1, 1.5, "often"])
def test_bad_intervals(every, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint_every: expected null or a whole number >= 1, found"):
        Checkpoints(tmp_path, every)


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(whole, tmp_path: Path) -> None:
    folder, log = tmp_path / "cut", tmp_path / "log"
    interrupt = partial(raise_signal, signal.SIGINT)
    arguments = [*options(RESTLESS), f"out={tmp_path}", "name=cut"]
    assert run(log, *arguments, plan={("step", 2): interrupt}) == 130, log.read_text()
    assert held_step(folder) == 2
    last = log.read_text().strip().splitlines()[-1]
    assert last == f"SIGINT: last.ckpt holds step 2; go on with  python train.py resume={folder}  (exit code 130)"
    assert run(log, f"resume={folder}", "trust=true") == 0, log.read_text()
    assert_same_run(whole(RESTLESS), folder)


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    stop = partial(raise_signal, signal.SIGSTOP)
    first = start(tmp_path / "first", *options(FREE), f"out={tmp_path}", "name=cut", plan={("step", 2): stop})
    while not (folder / "checkpoints" / "last.ckpt").is_file():
        assert first.is_alive(), (tmp_path / "first").read_text()
        time.sleep(0.05)
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    assert run(tmp_path / "second", f"resume={folder}") == 2
    said = f"error: resume: another process (number {first.pid}) trains in {folder}; expected a run that has ended"
    assert said in (tmp_path / "second").read_text()
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    first.kill()
    first.join()
    assert run(tmp_path / "third", f"resume={folder}") == 0, (tmp_path / "third").read_text()


CUT = {
    "run.json": b'{"what": "x"',
    "cost.json": b"[1]",
    "health.jsonl": b"{}\nnull\n",
    "metrics.csv": b"epoch,step\nx,1\n",
    "config.yaml": b"a: [",
    "report/data/manifest.js": b"GLASSARMOR.manifest({",
}


@pytest.mark.parametrize("name", [*CUT, "another width", "no optimiser"])
def test_a_bad_sidecar_is_one_line_with_its_name(name: str, whole, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole(RESTLESS), folder)
    if name in CUT:
        (folder / name).write_bytes(CUT[name])
    else:
        for path in (folder / "checkpoints").iterdir():
            state = torch.load(path, weights_only=True)
            if name == "no optimiser":
                state["optimizer_states"] = []
            else:
                state["state_dict"] = {key: value[..., :1] for key, value in state["state_dict"].items() if value.ndim}
            torch.save(state, path)
    assert run(tmp_path / "log", f"resume={folder}", "trust=true", "trainer.max_epochs=4") == 2
    lines = (tmp_path / "log").read_text().strip().splitlines()
    assert lines[-2].startswith(("error: resume: ", f"error: {folder}"))
    assert (name if name in CUT else "last.ckpt") in lines[-2]
    assert lines[-1] == "(debug=true shows the stack trace)"
    assert "Traceback" not in "".join(lines)
