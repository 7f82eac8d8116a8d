"""Train a robust classifier: compose the config → instantiate → fit → test → report.

python train.py defense=trades regularizers=[pse,sensitivity] data=digits
"""

from __future__ import annotations

import logging
import math
import shlex
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TextIO

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from glassarmor.datamodules.fingerprint import fingerprint
from glassarmor.datamodules.images import ImageDataModule, ProbeBatch
from glassarmor.defenses.monitoring.alarms import Limits
from glassarmor.defenses.options import require_whole
from glassarmor.interpret.views.page.page import ReportPage
from glassarmor.lightning_modules.callbacks.averaging import Averaging, averaging
from glassarmor.lightning_modules.callbacks.checkpointing import Checkpoints
from glassarmor.lightning_modules.callbacks.cost import Cost
from glassarmor.lightning_modules.callbacks.dashboard import Dashboard, check_every, net_inside
from glassarmor.lightning_modules.callbacks.health import Health, watch
from glassarmor.lightning_modules.callbacks.look import Look, ProbeSet
from glassarmor.lightning_modules.callbacks.preemption import Preemption, Unkept
from glassarmor.lightning_modules.callbacks.progress import ProgressBar
from glassarmor.lightning_modules.classifier import Diverged, RobustClassifier
from glassarmor.lightning_modules.commands.errors import Stopped, require_class, run_command
from glassarmor.lightning_modules.commands.resuming import note_changes, resumed_config
from glassarmor.lightning_modules.commands.starting import WarmStart, warm_start
from glassarmor.lightning_modules.commands.subject import network_of, renamed_keys
from glassarmor.lightning_modules.networks.build import make_network
from glassarmor.lightning_modules.run.console import clear_errors, console, note, show
from glassarmor.lightning_modules.run.data_record import compared, data_changes, note_data
from glassarmor.lightning_modules.run.doors import as_given, make_importable, spelled
from glassarmor.lightning_modules.run.folder import ResumePoint, RunFolder
from glassarmor.lightning_modules.run.hardware import resolve_auto, wandb_sweep
from glassarmor.lightning_modules.run.log import NotKept, RunLog, check_wandb_mode, wandb_logger
from glassarmor.lightning_modules.run.outcome import UNDEFENDED, Outcome
from glassarmor.lightning_modules.run.processes import be_patient, check_processes, check_same_step, is_leader, launches
from glassarmor.lightning_modules.run.saved_config import CONFIGS
from glassarmor.lightning_modules.selection import Select
from glassarmor.lightning_modules.study.records import write_correct

PRECISIONS: Final = ("32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")  # the last three as Lightning abbreviates them


@dataclass(frozen=True)
class Parts:
    """What a config instantiates to, checked."""

    data: ImageDataModule
    module: RobustClassifier
    panels: dict[str, Any]
    start: WarmStart


def build(cfg: DictConfig) -> Parts:
    """Instantiate everything that is trained, and check that it fits together, before anything is written."""
    require_whole("seed", cfg.seed, 0, null=True)
    require_whole("threads", cfg.threads, 1, null=True)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    data: ImageDataModule = instantiate(cfg.data, _convert_="all")
    data.setup("fit")
    net = make_network(network_of(cfg), data, cfg.channels_last)
    start = warm_start(cfg, net)
    defense = instantiate(cfg.defense, _convert_="all")
    if defense.attack is not None:
        defense.attack.threat.check(data.image_shape)
    data.replays = defense.replays
    few = data.probe(2)
    defense.prepare(net, few.x, few.y)
    module = RobustClassifier(
        net=net,
        defense=defense,
        val_attack=instantiate(cfg.val_attack, _convert_="all"),
        num_classes=data.num_classes,
        optimizer=instantiate(cfg.optimizer, _convert_="all"),
        scheduler=instantiate(cfg.scheduler, _convert_="all"),
        seed=cfg.seed,
        lr_factors=plain_value(cfg.get("lr_factors")),
    )
    check_optimizer(module)
    return Parts(data, module, instantiate(cfg.panels, _convert_="all"), start)


def plain_value(value: Any) -> Any:
    """Without the wrapper that OmegaConf puts around dicts and lists."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def check_optimizer(module: RobustClassifier) -> None:
    """Raises ValueError where the optimiser cannot be made, or would divide by what is no number."""
    try:
        rates = [group["lr"] for group in module.optimizer().param_groups]
    except (TypeError, ValueError) as error:
        raise error if str(error).startswith(("lr_factors", "net:")) else ValueError(f"optimizer: {error}") from error
    if not all(math.isfinite(rate) for rate in rates):
        raise ValueError(f"optimizer.lr: expected a finite number, found {rates[0]}")


def undefended(cfg: DictConfig) -> DictConfig:
    """The same run without defense, regularisers and panels."""
    twin = cfg.copy()
    OmegaConf.set_struct(twin, False)
    twin.regularizers, twin.panels = {}, {}
    twin.defense = OmegaConf.load(CONFIGS / "defense" / "none.yaml")
    twin.awp.gamma = 0
    return twin


@dataclass(frozen=True)
class Plan:
    """A run that passed every check; its folder is there, and held, and nothing was trained yet."""

    cfg: DictConfig
    parts: Parts
    attacks: Mapping[str, Any]  # of the final table
    probe: ProbeBatch
    look: Look  # rehearsed
    health: Sequence[Health]
    average: Sequence[Averaging]
    select: Select
    folder: RunFolder
    hold: TextIO
    point: ResumePoint | None
    leads: bool  # what another process would write or say goes nowhere

    @property
    def stopped(self) -> str:
        """Why an alarm ended the run; empty if none did."""
        return "; ".join(monitor.stopped for monitor in self.health if monitor.stopped)


def prepare(cfg: DictConfig, what: str, command: str) -> Plan:
    """Everything that can be refused is refused here, before anything is trained.

    Raises:
        ValueError: names the key of the config.
    """
    folder = RunFolder.existing(cfg.resume) if cfg.resume is not None else None
    select = checked_words(cfg)
    parts = build(cfg)
    data, module = parts.data, parts.module
    about = fingerprint(data, cfg.get("hash_images", False))
    known_start = parts.start.checked(folder)
    own = folder is not None and cfg.data == OmegaConf.load(folder.config).data
    differs = [] if folder is None else compared(folder.path, about, "resume", own)
    probe = probe_of(cfg, data)
    attacks = instantiate(cfg.test_attacks, _convert_="all")
    look = look_of(cfg, parts, probe)
    health = watch(instantiate(cfg.get("health"), _convert_="all"), module, data)
    average = averaging(cfg.ema)
    step = check_trainer(cfg, parts, attacks)
    if folder is not None:
        check_same_step(folder.info, *step)
    point = folder.resume_point(module) if folder is not None else None
    require_whole("checkpoint_every", cfg.get("checkpoint_every"), 1, null=True)
    many, leads = {"processes": step[0], "images_a_step": math.prod(step)}, is_leader()
    if not leads:
        console.quiet = True
        folder = RunFolder.scratch(what)
    elif folder is None:
        composed = OmegaConf.to_yaml(cfg, resolve=True)
        known = {"probe": probe.hash, "command": command, "data": about, **known_start, **many}
        folder = RunFolder.create(cfg.out, cfg.name, what, composed, **known)
    hold = folder.hold()
    folder.note(**many)
    for sentence in parts.start.sentences if leads else ():
        note(sentence)
    if point is not None and leads:
        for sentence in [*note_changes(folder, cfg, point), *differs]:
            note(sentence)
        note_data(folder, about, point)
    return Plan(cfg, parts, attacks, probe, look, health, average, select, folder, hold, point, leads)


def checked_words(cfg: DictConfig) -> Select:
    """What chooses the best epoch; refuses what needs no data to be refused."""
    require_class(cfg, "health", Health)
    require_class(cfg, "health.limits", Limits)
    chosen_by = None if cfg.get("select") is None else OmegaConf.to_container(cfg.select)
    select = Select.of(chosen_by, attacks=bool(cfg.defense.attack))  # type: ignore[arg-type]
    for key in ("enable_progress_bar", "enable_checkpointing"):
        if cfg.trainer.get(key, True) is not True:
            raise ValueError(f"trainer.{key}: expected true, for train.py brings its own; found {cfg.trainer[key]!r}")
    return select


def probe_of(cfg: DictConfig, data: ImageDataModule) -> ProbeBatch:
    """The images of the dashboard: as many as asked for, or all where there are fewer."""
    require_whole("probe.size", cfg.probe.size, 1)
    there = len(data.val)
    if cfg.probe.size > there:
        note(f"probe.size: all {there} validation images are shown, for there are fewer than {cfg.probe.size}")
    return data.probe(min(cfg.probe.size, there))


def look_of(cfg: DictConfig, parts: Parts, probe: ProbeBatch) -> Look:
    """The panels of the config, rehearsed."""
    attack = instantiate(cfg.probe.attack, _convert_="all")
    training = parts.data.sample_training(cfg.probe.training)
    shown = ProbeSet(probe.x, probe.y, tuple(probe.ids), tuple(parts.data.class_names), training)
    with renamed_keys(every_n_epochs="probe.every_n_epochs", layers="probe.layers"):
        check_every(cfg.probe.every_n_epochs)
        look = Look(parts.panels, shown, attack, tuple(cfg.probe.layers)).prepared(parts.module.net)
    look.rehearse(parts.module.net)
    return look


def check_trainer(cfg: DictConfig, parts: Parts, attacks: Mapping[str, Any]) -> tuple[int, int, int]:
    """Processes, images a process, and batches, that one optimiser step has; what the Trainer can't do is refused."""
    check_wandb_mode(cfg.wandb.mode)
    for key in ("max_epochs", "limit_train_batches", "limit_val_batches"):
        if not isinstance(cfg.trainer[key], int | float) or not cfg.trainer[key] > 0:
            raise ValueError(f"trainer.{key}: expected a number above 0, found {cfg.trainer[key]!r}")
    if str(cfg.trainer.precision) not in PRECISIONS:
        raise ValueError(
            f"trainer.precision: expected {', '.join(PRECISIONS)}, for weights and images are fp32 in any; "
            f"found {cfg.trainer.precision!r}"
        )
    if not attacks:
        raise ValueError("test_attacks: expected at least one attack for the final table, found none")
    # refuses bad values
    checked = instantiate(cfg.trainer, logger=False, callbacks=[ProgressBar(), Checkpoints(Path())])
    if checked.gradient_clip_val and "mixed" in str(cfg.trainer.precision) and cfg.optimizer.get("fused"):
        raise ValueError("optimizer.fused: Lightning cannot clip gradients of it in mixed precision; expected false")
    if launches(checked) and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ValueError(
            f"trainer.devices: a sweep cannot start the {checked.world_size} processes of a member itself; expected "
            "devices=1, or a launcher that starts each member by itself, e.g. hydra/launcher=submitit_slurm"
        )
    data, module = parts.data, parts.module
    few = data.probe(2)
    check_processes(checked, module.net, module.defense, few.x, few.y, len(data.train) // data.batch_size)
    if module.defense.replays > 1 and checked.accumulate_grad_batches > 1:
        raise ValueError("trainer.accumulate_grad_batches: each replay of Free-AT is an optimiser step; expected 1")
    return checked.world_size, data.batch_size, checked.accumulate_grad_batches


@dataclass(frozen=True)
class Records:
    """Where a run is written, and by whom each epoch."""

    log: RunLog
    dashboard: Dashboard
    kept: Checkpoints
    logger: Any  # W&B's, or None
    threat: str


def _since(change: Mapping[str, Any]) -> str:
    return f"from epoch {change['epoch']}, step {change['step']}, on"


def records_of(plan: Plan) -> Records:
    """Open the report, the log and W&B's run, and tell them to the callbacks."""
    cfg, folder, data = plan.cfg, plan.folder, plan.parts.data
    info = folder.info
    look = replace(plan.look, command=info.get("command", plan.look.command))
    meta = {
        "what": info["what"],
        "threat": str(look.attack.threat),
        "data": f"{len(data.train.images)} training, {len(data.val.images)} validation, {len(data.test.images)} test images",
        "probe": f"{len(plan.probe.ids)} validation images, hash {plan.probe.hash}",
        **({"other images": "; ".join(_since(each) for each in others)} if (others := data_changes(info)) else {}),
        "seed": cfg.seed,
        "commit": info["commit"],
        "started": info["started"],
        "command": look.command,
    }
    logger = wandb_logger(
        folder.path,
        cfg.wandb.project,
        cfg.wandb.mode if plan.leads else "disabled",
        info["wandb_id"],
        folder.path.name,
        OmegaConf.to_container(cfg, resolve=True),  # type: ignore[arg-type]
        list(cfg.wandb.tags),
    )
    log = RunLog(folder.path, ReportPage(folder.report, folder.path.name, meta), logger)
    for monitor in plan.health:
        monitor.log_to, monitor.command = log, look.command
    lead = plan.health[-1].views if plan.health else tuple
    net_of = plan.average[-1].net_of if plan.average else net_inside
    dashboard = Dashboard.of(look, cfg.probe.every_n_epochs, log, net_of, lead)
    kept = Checkpoints(folder.checkpoints, cfg.get("checkpoint_every"), plan.select)
    if plan.point is not None:
        console.print(f"resume      {plan.point}")
        log.resume_from(plan.point.epoch)
    return Records(log, dashboard, kept, logger, meta["threat"])


def fit(plan: Plan, records: Records, preemption: Preemption) -> pl.Trainer:
    """Train; returns the Trainer, which knows the device and the processes."""
    folder, point, kept = plan.folder, plan.point, records.kept
    console.print(
        f"run folder  {folder.path}\ndashboard   {folder.report / 'index.html'} (open it now: it grows while we train)"
    )
    watchers = [*plan.average, *plan.health, records.dashboard]
    trainer: pl.Trainer = instantiate(
        plan.cfg.trainer,
        logger=records.logger or False,
        callbacks=[*watchers, ProgressBar(), Cost(folder.path), kept, preemption],
        default_root_dir=str(folder.path),
    )
    be_patient(trainer)
    start = None if point is None or point.path is None else str(point.path)
    try:
        trainer.fit(plan.parts.module, datamodule=plan.parts.data, ckpt_path=start, weights_only=True)
    except Diverged as error:
        advice = "Try a lower optimizer.lr or trainer.gradient_clip_val=1"
        raise Diverged(f"{error}; {kept.holding(trainer.global_step)}. {advice}") from None
    return trainer


def test(plan: Plan, records: Records, trainer: pl.Trainer, preemption: Preemption) -> Outcome:
    """Judge what was trained on the test images, and the same network trained without defense where that is asked for."""
    cfg, module = plan.cfg, plan.parts.module
    found = Outcome(plan.parts.data, plan.attacks, trainer.strategy.root_device)
    for name, state in records.kept.final_states(module).items():
        module.load_state_dict(state)
        found.judge(f"defended, {name}", module.net)
    if cfg.compare_undefended:
        console.print("training the same network without defense, for comparison")
        plain = build(undefended(cfg))
        callbacks = [*averaging(cfg.ema), ProgressBar(), Unkept(preemption)]
        quiet = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
        try:
            instantiate(cfg.trainer, callbacks=callbacks, **quiet).fit(plain.module, datamodule=plain.data)
            found.judge(UNDEFENDED, plain.module.net)
        except Diverged as error:  # what is compared with it is not lost
            console.print(f"the network without defense is left out of the table: {error}")
    return found


def report(plan: Plan, records: Records, found: Outcome) -> None:
    """Say what came out and where it lies.

    Raises:
        NotKept: something could not be written.
        Stopped: an alarm ended the run before its time.
    """
    folder, kept = plan.folder, records.kept
    show(found.table(records.threat, kept.choice))
    for words in found.notes(plan.stopped):
        console.print(words)
    for what, path in folder.files().items():
        console.print(f"{what:<11}  {path}")
    if records.logger is not None:
        console.print(f"W&B          {folder.path / 'wandb'} (an offline run is sent with: wandb sync DIRECTORY)")
    if lost := records.log.lost | kept.lost:
        raise NotKept(lost, folder.path)
    if plan.stopped and HydraConfig.get().mode != RunMode.MULTIRUN:  # a sweep goes on with its next member
        raise Stopped(plan.stopped)


def train(cfg: DictConfig, what: str, command: str = "python train.py") -> float:
    """Train, test, report; returns the best held-out robust accuracy, for sweeps: the test set selects nothing."""
    with clear_errors(cfg.debug):
        plan = prepare(cfg, what, command)
    records = records_of(plan)
    log, kept = records.log, records.kept
    with closing(plan.hold), closing(log), Preemption(kept, plan.folder.path) as preemption:
        trainer = fit(plan, records, preemption)
        found = test(plan, records, trainer, preemption)
        if plan.leads:
            log.keep("write correct.json", lambda: write_correct(plan.folder.path, found.correct))
            threat, choice = records.threat, kept.choice
            log.results(found.table(threat, choice), found.results(threat, choice, plan.stopped))
    if plan.leads:
        report(plan, records, found)
    return kept.best_score or 0.0


def settle(cfg: DictConfig, shared: Path | None = None) -> None:
    """Write into the config what ``auto`` stands for on this hardware, or for the first member of a sweep, in ``shared``."""
    given = cfg.trainer.precision, cfg.channels_last, cfg.trainer.accelerator
    cfg.trainer.precision, cfg.channels_last = resolve_auto(*given, shared)


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(cfg: DictConfig) -> float:
    """Entry point; see ``python train.py --help`` for the groups."""
    as_given()
    choices, overrides = HydraConfig.get().runtime.choices, list(HydraConfig.get().overrides.task)
    regularizers = "".join(f"+{name}" for name in cfg.regularizers)
    what = f"{choices['data']}-{choices['network']}-{choices['defense']}{regularizers}-s{cfg.seed}"
    hydra_cfg = HydraConfig.get()
    with clear_errors(cfg.debug):
        if cfg.resume is not None:
            cfg = resumed_config(cfg, overrides)
        settle(cfg, Path(hydra_cfg.sweep.dir) if hydra_cfg.mode == RunMode.MULTIRUN else wandb_sweep(cfg.out))
    words = [word for word in overrides if not word.startswith(("name=", "resume="))]
    return train(cfg, what, shlex.join([*spelled("train"), *words]))


def run() -> None:
    """``python train.py``, ``glassarmor train``."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its hints are not about this run
    # torch's notice to Lightning 2.6, which a user can do nothing about
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    make_importable()
    run_command(main, CONFIGS, "train", "nothing was trained yet")
