"""Train a robust classifier: compose the config → instantiate → fit → test → report.

python train.py defense=trades regularizers=[pse,sensitivity] data=digits
"""

from __future__ import annotations

import logging
import math
import shlex
import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from glassarmor.datamodules.fingerprint import fingerprint
from glassarmor.datamodules.images import ImageDataModule
from glassarmor.defenses.monitoring.alarms import Limits
from glassarmor.interpret.views.page.page import ReportPage
from glassarmor.lightning_modules.callbacks.averaging import averaging
from glassarmor.lightning_modules.callbacks.checkpointing import Checkpoints
from glassarmor.lightning_modules.callbacks.cost import Cost
from glassarmor.lightning_modules.callbacks.dashboard import Dashboard
from glassarmor.lightning_modules.callbacks.health import Health, watch
from glassarmor.lightning_modules.callbacks.preemption import Preemption, Unkept
from glassarmor.lightning_modules.callbacks.progress import ProgressBar
from glassarmor.lightning_modules.classifier import Diverged, RobustClassifier
from glassarmor.lightning_modules.commands.errors import Stopped, require_class, run_command
from glassarmor.lightning_modules.commands.resuming import note_changes, resumed_config
from glassarmor.lightning_modules.networks.build import make_network
from glassarmor.lightning_modules.run.console import clear_errors, console, note, require_whole, show
from glassarmor.lightning_modules.run.data_record import compared, note_data
from glassarmor.lightning_modules.run.doors import as_given, make_importable, spelled
from glassarmor.lightning_modules.run.folder import RunFolder
from glassarmor.lightning_modules.run.hardware import resolve_auto, wandb_sweep
from glassarmor.lightning_modules.run.log import NotKept, RunLog, check_wandb_mode, wandb_logger
from glassarmor.lightning_modules.run.outcome import UNDEFENDED, Outcome
from glassarmor.lightning_modules.run.processes import be_patient, check_processes, check_same_step, is_leader, launches
from glassarmor.lightning_modules.run.saved_config import CONFIGS
from glassarmor.lightning_modules.selection import Select
from glassarmor.lightning_modules.study.records import write_correct


@dataclass(frozen=True)
class Parts:
    """What a config instantiates to, checked."""

    data: ImageDataModule
    module: RobustClassifier
    panels: dict[str, Any]


def build(cfg: DictConfig) -> Parts:
    """Instantiate everything that is trained, and check that it fits together, before anything is written."""
    require_whole(cfg, {"seed": 0, "threads": 1})
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    data: ImageDataModule = instantiate(cfg.data, _convert_="all")
    data.setup("fit")
    net = make_network(instantiate(cfg.network), data, cfg.channels_last)
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
    )
    try:
        rates = [group["lr"] for group in module.make_optimizer(net.parameters()).param_groups]
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer: {error}") from error
    if not all(math.isfinite(rate) for rate in rates):
        raise ValueError(f"optimizer.lr: expected a finite number, found {rates[0]}")
    return Parts(data, module, instantiate(cfg.panels, _convert_="all"))


def undefended(cfg: DictConfig) -> DictConfig:
    """The same run without defense, regularisers and panels."""
    twin = cfg.copy()
    OmegaConf.set_struct(twin, False)
    twin.regularizers, twin.panels = {}, {}
    twin.defense = OmegaConf.load(CONFIGS / "defense" / "none.yaml")
    twin.awp.gamma = 0
    return twin


def train(cfg: DictConfig, what: str, command: str = "python train.py") -> float:
    """Train, test, report; returns the best held-out robust accuracy, for sweeps: the test set selects nothing."""
    with clear_errors(cfg.debug):
        folder = RunFolder.existing(cfg.resume) if cfg.resume is not None else None
        require_class(cfg, "health", Health)
        require_class(cfg, "health.limits", Limits)
        chosen_by = None if cfg.get("select") is None else OmegaConf.to_container(cfg.select)
        select = Select.of(chosen_by, attacks=bool(cfg.defense.attack))  # type: ignore[arg-type]
        for key in ("enable_progress_bar", "enable_checkpointing"):
            if cfg.trainer.get(key, True) is not True:
                raise ValueError(f"trainer.{key}: expected true, for train.py brings its own; found {cfg.trainer[key]!r}")
        parts = build(cfg)
        data, module = parts.data, parts.module
        about = fingerprint(data, cfg.get("hash_images", False))
        own = folder is not None and cfg.data == OmegaConf.load(folder.config).data
        differs = [] if folder is None else compared(folder.path, about, "resume", own)
        probe = data.probe(cfg.probe.size)
        attacks = instantiate(cfg.test_attacks, _convert_="all")
        dashboard = Dashboard(
            parts.panels,
            probe.x,
            probe.y,
            probe.ids,
            instantiate(cfg.probe.attack, _convert_="all"),
            data.class_names,
            layers=list(cfg.probe.layers),
            every_n_epochs=cfg.probe.every_n_epochs,
            training=data.sample_training(cfg.probe.training),
        )
        dashboard.prepare(module.net)
        dashboard.rehearse(module.net)
        health = watch(instantiate(cfg.get("health"), _convert_="all"), module, data)
        average = averaging(cfg.ema)
        for callback in average:
            dashboard.net_of = callback.net_of
        check_wandb_mode(cfg.wandb.mode)
        for key in ("max_epochs", "limit_train_batches", "limit_val_batches"):
            if not isinstance(cfg.trainer[key], int | float) or not cfg.trainer[key] > 0:
                raise ValueError(f"trainer.{key}: expected a number above 0, found {cfg.trainer[key]!r}")
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
        few = data.probe(2)
        check_processes(checked, module.net, module.defense, few.x, few.y, len(data.train) // data.batch_size)
        if module.defense.replays > 1 and checked.accumulate_grad_batches > 1:
            raise ValueError("trainer.accumulate_grad_batches: each replay of Free-AT is an optimiser step; expected 1")
        step = checked.world_size, data.batch_size, checked.accumulate_grad_batches
        many = {"processes": step[0], "images_a_step": math.prod(step)}
        if folder is not None:
            check_same_step(folder.info, *step)
        point = folder.resume_point(module) if folder is not None else None
        require_whole({"checkpoint_every": cfg.get("checkpoint_every")}, {"checkpoint_every": 1})
        if not is_leader():  # one folder a run: what another process would write or say goes nowhere
            console.quiet, cfg.wandb.mode = True, "disabled"
            folder = RunFolder.scratch(what)
        elif folder is None:
            composed = OmegaConf.to_yaml(cfg, resolve=True)
            known = {"probe": probe.hash, "command": command, "data": about, **many}
            folder = RunFolder.create(cfg.out, cfg.name, what, composed, **known)
        hold = folder.hold()
        folder.note(**many)
        if point is not None and is_leader():
            for sentence in [*note_changes(folder, cfg, point), *differs]:
                note(sentence)
            note_data(folder, about, point)

    info = folder.info
    dashboard.command = info.get("command", dashboard.command)
    meta = {
        "what": info["what"],
        "threat": str(dashboard.attack.threat),
        "data": f"{len(data.train.images)} training, {len(data.val.images)} validation, {len(data.test.images)} test images",
        "probe": f"{len(probe.ids)} validation images, hash {probe.hash}",
        "seed": cfg.seed,
        "commit": info["commit"],
        "started": info["started"],
        "command": dashboard.command,
    }
    logger = wandb_logger(
        folder.path,
        cfg.wandb.project,
        cfg.wandb.mode,
        info["wandb_id"],
        folder.path.name,
        OmegaConf.to_container(cfg, resolve=True),  # type: ignore[arg-type]
        list(cfg.wandb.tags),
    )
    dashboard.log_to = log = RunLog(folder.path, ReportPage(folder.report, folder.path.name, meta), logger)
    for monitor in health:
        monitor.log_to, monitor.command, dashboard.lead = log, dashboard.command, monitor.views
    kept = Checkpoints(folder.checkpoints, cfg.get("checkpoint_every"), select)
    if point is not None:
        console.print(f"resume      {point}")
        log.resume_from(point.epoch)
    with closing(hold), closing(log), Preemption(kept, folder.path) as preemption:
        console.print(
            f"run folder  {folder.path}\ndashboard   {folder.report / 'index.html'} (open it now: it grows while we train)"
        )
        trainer: pl.Trainer = instantiate(
            cfg.trainer,
            logger=logger or False,
            callbacks=[*average, *health, dashboard, ProgressBar(), Cost(folder.path), kept, preemption],
            default_root_dir=str(folder.path),
        )
        be_patient(trainer)
        start = None if point is None or point.path is None else str(point.path)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
        except Diverged as error:
            advice = "Try a lower optimizer.lr or trainer.gradient_clip_val=1"
            raise Diverged(f"{error}; {kept.holding(trainer.global_step)}. {advice}") from None

        found = Outcome(data, attacks, trainer.strategy.root_device)
        for name, state in kept.final_states(module).items():
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
        if not is_leader():
            return kept.best_score or 0.0
        log.keep("write correct.json", lambda: write_correct(folder.path, found.correct))
        stopped = "; ".join(monitor.stopped for monitor in health if monitor.stopped)
        table = found.table(meta["threat"], kept.choice)
        log.results(table, found.results(meta["threat"], kept.choice, stopped))
    show(table)
    for words in found.notes(stopped):
        console.print(words)
    for what, path in folder.files().items():
        console.print(f"{what:<11}  {path}")
    if logger is not None:
        console.print(f"W&B          {folder.path / 'wandb'} (an offline run is sent with: wandb sync DIRECTORY)")
    if lost := log.lost | kept.lost:
        raise NotKept(lost, folder.path)
    if stopped and HydraConfig.get().mode != RunMode.MULTIRUN:  # a sweep goes on with its next member
        raise Stopped(stopped)
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
