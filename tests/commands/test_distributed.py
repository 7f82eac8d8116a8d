"""Two real processes (gloo) are one run: the same weights, statistics and files, one leader, one end."""

from __future__ import annotations

import csv
import json
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.nn.functional import all_reduce

from glassarmor.defenses.evaluation.accuracy import correct_under
from glassarmor.defenses.training.weights import averaged
from glassarmor.interpret.observation import Observation, observe
from glassarmor.interpret.signals.pse import region_effects
from glassarmor.interpret.signals.running import ClassCentroids, KindShares, RunningSensitivity
from glassarmor.lightning_modules.callbacks.averaging import averaging
from glassarmor.lightning_modules.commands import train
from glassarmor.lightning_modules.run import processes
from glassarmor.lightning_modules.run.processes import PATIENCE, Poll, be_patient, check_processes, check_same_step
from glassarmor.lightning_modules.study.records import read_evaluations
from tests.composing import SMALL, config
from tests.faulty import raise_signal, run, start_two, train_here, wait_for
from tests.reference.nets import batch, conv_bn


def observations(sizes: tuple[int, ...]) -> list[tuple[Observation, tuple[torch.Tensor, ...]]]:
    net = conv_bn().eval()
    found = []
    for seed, n in enumerate(sizes):
        x, x_adv, y = batch(n, seed=seed)
        found.append((observe(net, x, x_adv, y, layers=["act1"]), (x, x_adv, y)))
    return found


def measure(rank: int, sizes: tuple[int, ...], world: int) -> dict[str, torch.Tensor]:
    net = conv_bn().eval()
    found = observations(sizes)
    units = found[0][0].adv.acts["act1"].shape[1]
    sensitivity, shares, centroids = RunningSensitivity(units), KindShares(), ClassCentroids(5, units)
    for obs, (x, x_adv, y) in found[rank::world]:
        sensitivity.update(obs, "act1")
        centroids.update(obs.clean.acts["act1"].mean((2, 3)), y)
        shares.update(region_effects(net, x, x_adv, y, regions=(2, 2)))
    return {"sensitivity": sensitivity.compute(), "shares": shares.compute(), "centroids": centroids.compute()}


def process(rank: int, sizes: tuple[int, ...], out: Path) -> None:
    dist.init_process_group("gloo")
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4, 1, 2))]
    mean = averaged({w: torch.full_like(w, 10.0 * index + rank) for index, w in enumerate(weights)})
    found = measure(rank, sizes, 2) | {f"gradient {index}": mean[w] for index, w in enumerate(weights)}
    poll = Poll()
    found["poll"] = torch.tensor([poll.any(step == 1 + 3 * rank) for step in range(7)])
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    sizes = (5, 2, 3)  # the first process sees 8 samples, the second 2: a mean of means would be wrong
    assert wait_for(start_two(tmp_path / "said", process, sizes, tmp_path), tmp_path / "said") == [0, 0]
    alone = measure(0, sizes, 1)
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(together["sensitivity"], alone["sensitivity"])
        torch.testing.assert_close(together["shares"], alone["shares"])
        torch.testing.assert_close(together["centroids"], alone["centroids"], equal_nan=True)
        assert torch.equal(together["gradient 0"], torch.full((2, 3), 0.5)), "the direction of AWP is everybody's"
        assert torch.equal(together["gradient 1"], torch.full((4, 1, 2), 10.5))
        # One process said yes at step 1, the other at step 4; all hear it at the step after, and once.
        assert together["poll"].tolist() == [step in (2, 5) for step in range(7)]
    own = measure(1, sizes, 2)  # outside a process group: one process's own part, to show that the parts differ
    assert not torch.allclose(own["sensitivity"], alone["sensitivity"], rtol=1e-3)


class Plain(nn.Module):
    """Without BatchNorm, so that nothing couples the images of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 12, 3, 2), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Idle(Plain):
    """With a head that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(12, 10)


class BothNorm(nn.BatchNorm2d):
    """BatchNorm over the images of both processes: what SyncBatchNorm does on GPUs, on CPUs, where torch has none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        count = 2 * x.numel() / x.shape[1]
        mean = all_reduce(x.mean((0, 2, 3))) / 2
        variance = all_reduce((x - mean[:, None, None]).square().mean((0, 2, 3))) / 2
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        normal = (x - mean[:, None, None]) / (variance[:, None, None] + self.eps).sqrt()
        return self.weight[:, None, None] * normal + self.bias[:, None, None]


class Normed(Plain):
    def __init__(self) -> None:
        super().__init__()
        first, second = (layer for layer in self.body if isinstance(layer, nn.Conv2d))
        self.body = nn.Sequential(first, BothNorm(8), nn.ReLU(), second, BothNorm(12), nn.ReLU())


# In an L2 ball from the image itself: no sign flips with the last bit, and no start that depends on the process.
SMOOTH = (
    *SMALL[1:],
    "network=imported",
    "network.target=tests.commands.test_distributed:Plain",
    "threat=l2",
    "threat.eps=0.5",
    "+val_attack.start=none",
    "val_attack.steps=2",
    "data.augment=null",
    "threads=1",
)
TERMS = {
    "PGD, AWP, PSE, running sensitivities": (
        "defense=pgd_at",
        "defense.attack.steps=2",
        "+defense.attack.start=none",
        "awp.gamma=0.01",
        "regularizers=[pse,sensitivity]",
        "regularizers.sensitivity.weight=1e-12",  # divides by the spread within a process's batch; kept running here
    ),
    "MART, BatchNorm over both": (
        "network.target=tests.commands.test_distributed:Normed",
        "defense=mart",
        "defense.attack.steps=2",
        "+defense.attack.start=none",
        "regularizers=[pse]",
    ),
    "Free-AT": ("defense=free_at", "defense.attack.replays=2", "regularizers=[]"),
}


def fit(rank: int, out: Path, kind: str, world: int) -> None:
    """Two epochs of three batches of 48 images; what each process ends with."""
    parts = train.build(config(*SMOOTH, *TERMS[kind], f"data.batch_size={48 // world}"))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        max_epochs=2,
        callbacks=averaging(0.8),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(parts.module, datamodule=parts.data)
    state = {"weights": parts.module.net.state_dict(), "terms": parts.module.defense.terms.state_dict()}
    torch.save(state | {"metrics": dict(trainer.callback_metrics)}, out / f"{rank}.pt")


@pytest.mark.parametrize("kind", TERMS)
def test_two_processes_train_as_one_with_both_batches(kind, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    fit(0, tmp_path / "alone", kind, 1)
    alone = torch.load(tmp_path / "alone" / "0.pt", weights_only=True)
    assert wait_for(start_two(tmp_path / "said", fit, tmp_path, kind, 2), tmp_path / "said") == [0, 0]
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert {"val/robust_acc", "train/robust_acc", "train/loss"} <= alone["metrics"].keys()
    fresh = train.build(config(*SMOOTH, *TERMS[kind])).module.net.state_dict()
    moved = max(float((alone["weights"][key] - value).abs().max()) for key, value in fresh.items())
    assert moved > 1e-2, "or there is nothing to compare"
    for rank, found in enumerate(both):
        torch.testing.assert_close(found["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["terms"], alone["terms"], rtol=1e-4, atol=1e-5)
        for name in alone["metrics"]:
            # Of the last batch of one process alone, or divided by a spread within it.
            if name.endswith(("_step", "signal/sensitivity", "signal_gap/sensitivity")):
                continue
            torch.testing.assert_close(found["metrics"][name], alone["metrics"][name], rtol=1e-4, atol=1e-6, msg=name)
        for key, value in found["weights"].items():
            assert torch.equal(value, both[1 - rank]["weights"][key]), "bit for bit on every process"


class Draws(pl.Callback):
    """The leader is long over its pictures; then all are asked something, as at every step."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.poll = seconds, Poll()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.poll.any(False)
        if trainer.is_global_zero and trainer.current_epoch == 0:
            time.sleep(self.seconds)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.poll.any(False)

    def on_train_batch_end(self, *_: object) -> None:
        self.poll.any(False)


def wait_for_drawing(rank: int, out: Path, patience: bool) -> None:
    """Two seconds stand for torch's half hour, wherever nobody says otherwise, and four for a drawing that takes longer."""
    short = timedelta(seconds=2)
    distributed_c10d.default_pg_timeout = processes.default_pg_timeout = short  # type: ignore[attr-defined]
    parts = train.build(config(*SMOOTH, *TERMS["Free-AT"], "data.batch_size=24", "val_attack.steps=1"))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(timeout=short),
        max_epochs=2,
        limit_train_batches=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=[Draws(4)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if patience:
        be_patient(trainer)
    trainer.fit(parts.module, datamodule=parts.data)
    (out / f"{rank}.done").touch()


@pytest.mark.long
@pytest.mark.parametrize("patience", [True, pytest.param(False, marks=pytest.mark.long)])
def test_others_wait_while_the_leader_draws(patience, tmp_path: Path) -> None:
    codes = wait_for(start_two(tmp_path / "said", wait_for_drawing, tmp_path, patience), tmp_path / "said")
    assert (codes == [0, 0]) is patience, [(tmp_path / "said" / f"{rank}").read_text()[-1500:] for rank in range(2)]
    assert len(list(tmp_path.glob("*.done"))) == 2 * patience


def test_a_strategy_named_by_a_word_waits_as_long_as_trainer_ddp() -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": 2}
    assert train.instantiate(config("trainer=ddp").trainer.strategy)._timeout == PATIENCE
    for strategy in ("auto", "ddp_find_unused_parameters_true"):
        trainer = pl.Trainer(strategy=strategy, **quiet)
        be_patient(trainer)
        assert trainer.strategy._timeout == PATIENCE
    own = pl.Trainer(strategy=DDPStrategy(timeout=timedelta(minutes=5)), **quiet)
    be_patient(own)
    assert own.strategy._timeout == timedelta(minutes=5)
    be_patient(pl.Trainer(**{**quiet, "devices": 1}))


def test_a_resumed_run_has_as_many_images_a_step() -> None:
    began = {"processes": 2, "images_a_step": 64}
    for same in ((2, 32, 1), (1, 64, 1), (4, 16, 1), (1, 32, 2), (2, 16, 1)):  # the last: the config says so
        check_same_step(began, *same)
    check_same_step({}, 4, 32, 1)  # of an older version
    for now, rest in (((1, 32, 1), ", or data.batch_size=64$"), ((4, 32, 1), ", or data.batch_size=16$"), ((3, 32, 1), "$")):
        found = f"found {now[0]} processes and {now[0] * now[1]} images; expected 2 processes{rest}"
        with pytest.raises(ValueError, match=rf"^trainer\.devices: this run last had 2 processes and 64 .* a step; {found}"):
            check_same_step(began, *now)


WHOLE = (
    *SMALL[:3],
    "trainer.accelerator=cpu",
    "probe.size=4",
    "probe.training=100",
    "probe.attack.steps=2",
    "defense=pgd_at",
    "defense.attack.steps=1",
    "val_attack.steps=2",
    "test_attacks.PGD-20.steps=2",
    "data.eval_batch_size=16",  # 3 batches of the 40 test images: the processes have 2 and 1
    "awp.gamma=0.005",
    "ema=0.8",
    "trainer.max_epochs=2",
    "threads=1",
)
TWO = ("data.batch_size=16", "trainer.devices=2", "trainer=ddp")


def together(out: Path, *arguments: str, plans: tuple = ({}, {})) -> list[int | None]:
    return wait_for(start_two(out / "said", train_here, arguments, plans), out / "said")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run in one process and in two."""
    out = tmp_path_factory.mktemp("runs")
    common = (*WHOLE, "panels=[training,pse]", "compare_undefended=false", f"out={out}", "wandb.mode=offline")
    assert run(out / "log", *common, "data.batch_size=32", "name=one") == 0, (out / "log").read_text()
    assert together(out, *common, *TWO, "name=two") == [0, 0], (out / "said" / "0").read_text()
    return out / "one", out / "two"


def files(folder: Path) -> set[str]:
    """Those of a run, W&B's as how many of each kind there are."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    ours = {name for name in found if not name.startswith("wandb/")}
    return ours | {f"{sum(name.endswith('.wandb') for name in found)} W&B runs"}


def test_a_run_of_two_processes_leaves_what_a_run_of_one_leaves(runs) -> None:
    one, two = runs
    assert files(two) == files(one)
    assert {"results.json", "correct.json", "metrics.csv", "health.jsonl", "report/index.html", "1 W&B runs"} <= files(two)
    assert sorted(path.name for path in two.parent.iterdir() if path.is_dir()) == ["one", "said", "two"]
    info = [json.loads((folder / "run.json").read_text()) for folder in runs]
    assert info[0]["probe"] == info[1]["probe"]
    rows = [list(csv.DictReader((folder / "metrics.csv").open())) for folder in runs]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == ["4", "8"]
    said = [(two.parent / "said" / f"{rank}").read_text() for rank in range(2)]
    assert "run folder" in said[0]
    assert "Accuracy on the test set" in said[0]
    assert "run folder" not in said[1]
    assert "Accuracy" not in said[1]
    for text in said:
        assert "could not" not in text, "every panel was drawn, everything was written"


def test_the_final_table_counts_every_test_image_as_one_process_would(runs) -> None:
    _, two = runs
    cfg = config(*WHOLE)
    parts = train.build(cfg)
    attacks = train.instantiate(cfg.test_attacks, _convert_="all")
    kept = read_evaluations(two)
    results = json.loads((two / "results.json").read_text())
    for name, file in (("defended, best epoch", "best"), ("defended, last epoch", "last")):
        state = torch.load(two / "checkpoints" / f"{file}.ckpt", weights_only=True)["state_dict"]
        parts.module.load_state_dict(state)
        alone = correct_under(parts.module.net, parts.data.whole_test(), attacks, torch.device("cpu"))
        for attack, right in alone.items():
            assert len(right) == 40
            assert right.tolist() == kept[name].correct[attack].tolist(), (name, attack)
            assert results[name][attack] == pytest.approx(float(right.double().mean()))


@pytest.mark.long
def test_a_signal_to_the_leader_ends_both_and_both_go_on_where_they_were(runs, tmp_path: Path) -> None:
    _, two = runs
    plans = ({("step", 1): partial(raise_signal, signal.SIGTERM)}, {})
    arguments = (*WHOLE, *TWO, "panels=[]", "compare_undefended=false", "wandb.mode=disabled", f"out={tmp_path}", "name=cut")
    assert together(tmp_path, *arguments, plans=plans) == [75, 0], "the leader's code is the run's"
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2, "all stop at the step after"
    said = [(tmp_path / "said" / f"{rank}").read_text() for rank in range(2)]
    assert "SIGTERM: last.ckpt holds step 2" in said[0]
    assert (tmp_path / "cut" / "stopped").read_text() == "SIGTERM: last.ckpt holds step 2\n", "what a SLURM job asks"
    assert "Traceback" not in said[0] + said[1]
    assert together(tmp_path, f"resume={tmp_path / 'cut'}") == [0, 0], (tmp_path / "said" / "0").read_text()
    assert not (tmp_path / "cut" / "stopped").exists()
    states = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (two, tmp_path / "cut")]
    for key, value in states[0].items():
        if key.startswith("net."):
            assert torch.equal(value, states[1][key]), key
    rows = [list(csv.DictReader((folder / "metrics.csv").open())) for folder in (two, tmp_path / "cut")]
    for row, other in zip(*rows, strict=True):
        for name, value in other.items():  # sums of an epoch that was cut in its middle: those of both processes
            assert bool(row[name]) == bool(value), name
            assert not value or float(row[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-7), name


def test_one_process_does_not_go_on_with_half_the_images(runs, tmp_path: Path) -> None:
    _, two = runs
    assert run(tmp_path / "log", f"resume={two}", "trainer.devices=1") == 2
    assert "error: trainer.devices: this run last had 2 processes and 32 images a step" in (tmp_path / "log").read_text()


def test_an_error_in_the_configuration_is_said_once(tmp_path: Path) -> None:
    arguments = (*WHOLE, *TWO, f"out={tmp_path}", "data.batch_size=100")
    assert together(tmp_path, *arguments) == [2, 2]
    said = [(tmp_path / "said" / f"{rank}").read_text() for rank in range(2)]
    assert said[0].count("error: ") == 1
    assert "data.batch_size" in said[0]
    assert "error" not in said[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said"], "nothing was made"


def check(overrides: tuple[str, ...], **trainer: object) -> None:
    parts = train.build(config(*SMALL[1:], "defense=pgd_at", "defense.attack.steps=1", *overrides))
    few = parts.data.probe(2)
    made = pl.Trainer(**{"accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False} | trainer)
    check_processes(made, parts.module.net, parts.module.defense, few.x, few.y, 4)


def test_what_ddp_would_wait_for_is_refused_before_training() -> None:
    check(("regularizers=[pse,sensitivity]",))
    idle = ("network=imported", "network.target=tests.commands.test_distributed:Idle", "regularizers=[]")
    with pytest.raises(
        ValueError, match=r"^trainer\.strategy: this loss reaches 2 parameters not .*second\.weight.*find_unused_parameters"
    ):
        check(idle)
    check(idle, strategy="ddp_find_unused_parameters_true")
    check(idle, devices=1)
    with pytest.raises(ValueError, match=r"^trainer\.sync_batchnorm: .*GPU"):
        check(("regularizers=[]",), sync_batchnorm=True)
    with pytest.raises(ValueError, match=r"^data\.batch_size: .* for 8 batches .* found them for 4"):
        check(("regularizers=[]",), devices=8)
