"""A run that watches its own health: readings on held-out images, and alarms that warn, stop, or ask for a rollback."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, get_args

import pytorch_lightning as pl
import torch
from torch import nn

from glassarmor.defenses.monitoring.alarms import (
    ABOUT_ATTACKS,
    CHECKS,
    GUESSING,
    KINDS,
    MEASURES,
    SELDOM,
    Alarm,
    Limits,
    better,
    guesses,
    indicators,
    judge,
    remedy,
    withstands,
)
from glassarmor.defenses.monitoring.readings import FEW, Images, Reading, measure
from glassarmor.defenses.options import require_whole
from glassarmor.defenses.threat import Threat
from glassarmor.defenses.training.terms import at_epoch
from glassarmor.interpret.observation import feature_layers
from glassarmor.interpret.views.panels.health import health_view
from glassarmor.interpret.views.view import View
from glassarmor.lightning_modules.callbacks.rollback import LEAST_TRIAL, SAYS, Rollback, end_with
from glassarmor.lightning_modules.run.console import console
from glassarmor.lightning_modules.run.log import RunLog

Action = Literal["warn", "stop", "rollback"]
LEAST_GRACE: Final = 50  # steps
DEFAULT: Final = Limits()
ACTIONS: Final[Mapping[str, Action]] = dict.fromkeys(("nonfinite", "catastrophic", "guessing"), "rollback")


class Health(pl.Callback):
    """Reads the training weights at the end of epochs, and every so many steps; alarms warn, stop, or roll back.

    What a rollback does, and when, is :class:`.Rollback`; this callback reads, judges and tells.  While the attack's ε
    climbs, the gap is read in the ball that training has reached.  Without an alarm the run ends in the same weights as
    without this callback.

    Put it after an average of the weights and before the dashboard.  In a distributed run the first process reads.

    Args:
        threat: the ball of the attacks that are read with.
        images: held out, that are read; None: 64, or all where there are fewer.
        background: training images that turning layers are measured against.
        every_n_epochs, every_n_steps: when; None: not so.
        steps: of the multi-step attack.
        thorough_every: each so many readings, the first included, also looks for masked gradients.
        grace: steps before a net that never did better than guessing raises an alarm; None: a tenth of the run, at least
            ``LEAST_GRACE``.  One that did and lost it raises it at once; the last reading of a run warns whatever the grace.
        limits: above which an alarm is raised.
        actions: by kind of alarm; "warn" for kinds that are left out.
        safer: safety measures, in this order, where they apply; when none is left, the learning rate is halved.
        most: rollbacks of a run; then they end, as where no measure is left.

    Raises:
        ValueError: an option out of its range; names the config key.
    """

    def __init__(
        self,
        threat: Threat,
        images: int | None = None,
        background: int = 128,
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        steps: int = 5,
        thorough_every: int = 10,
        grace: int | None = None,
        limits: Limits = DEFAULT,
        actions: Mapping[str, Action] = ACTIONS,
        safer: Sequence[str] = ("noise", "two_steps", "smaller_step"),
        most: int = 5,
    ) -> None:
        for key, count in {"background": background, "steps": steps, "thorough_every": thorough_every}.items():
            require_whole(f"health.{key}", count, 1)
        for key, some in {"images": images, "every_n_epochs": every_n_epochs, "every_n_steps": every_n_steps}.items():
            require_whole(f"health.{key}", some, 1, null=True)
        require_whole("health.most", most, 0)
        require_whole("health.grace", grace, 0, null=True)
        if every_n_epochs is None and every_n_steps is None:
            raise ValueError("health: every_n_epochs and every_n_steps are both null; to switch it off, say health=off")
        for key, given, expected, example in (
            ("threat", threat, Threat, "a ball of attacks, such as ${threat}"),
            ("limits", limits, Limits, "limits by name, such as health.limits.gap=0.2"),
            ("actions", actions, Mapping, "actions by kind of alarm, such as health.actions.masked=stop"),
            ("safer", safer, (list, tuple), "a list, such as health.safer=[noise]"),
        ):
            if not isinstance(given, expected):
                raise ValueError(f"health.{key}: expected {example}; found {given!r}")
        for kind, action in actions.items():
            if kind not in KINDS or action not in get_args(Action):
                raise ValueError(
                    f"health.actions.{kind}: expected one of {', '.join(KINDS)} and one of {', '.join(get_args(Action))}; "
                    f"found {action!r}"
                )
        for name in safer:
            if name not in MEASURES:
                raise ValueError(f"health.safer: expected any of {', '.join(MEASURES)}; found {name!r}")
        self.threat, self.images, self.background, self.steps = threat, images, background, steps
        self.every_n_epochs, self.every_n_steps, self.thorough_every = every_n_epochs, every_n_steps, thorough_every
        self.grace = grace
        self.limits, self.actions, self.rollback = limits, dict(actions), Rollback(safer, most)
        self.log_to: RunLog | None = None
        self.command = "python train.py"  # what trains this run: for proposed command lines
        self.watched: tuple[str, ...] = KINDS
        self.layers: tuple[str, ...] = ()
        self.known: Images | None = None
        self.regularizers: tuple[str, ...] = ()
        self.rate = 0.0
        self.trouble = ""  # what the module said of a loss that is not finite
        self.history: list[Reading] = []  # of the past that was not rolled back
        self.readings = 0
        self.latest: Reading | None = None
        self.present: tuple[str, ...] = ()  # kinds of the last reading's alarms
        self.verdict = ""
        self.waits = True  # for a net that never beat guessing: until the last reading
        self.stopped = ""  # why the run was stopped

    # ---- before training -----------------------------------------------------------------------------------------------

    def prepare(self, module: Any, images: Images) -> None:
        """Choose the layers, and take a reading of two images: what would fail later fails now.

        Raises:
            ValueError: a network or a threat that can't be read.
        """
        self.threat.check(tuple(images.x.shape[1:]))
        self.layers, self.known = feature_layers(module.net, images.x[:2]), images
        self.rollback.attack, self.rollback.images = module.defense.attack, len(images.y)
        self.regularizers = module.defense.regularizer_names
        self.watched = tuple(kind for kind in KINDS if module.defense.attack is not None or kind not in ABOUT_ATTACKS)
        few = Images(images.x[:2], images.y[:2], images.background)
        try:
            measure(module.net, few, self.threat, self.layers, steps=1, thorough=False)
        except Exception as error:
            raise ValueError(f"health: {error}; to go without, say health=off") from error

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [[reading.epoch, reading.step, dict(reading.values)] for reading in self.history],
            "latest": None if self.latest is None else [self.latest.epoch, self.latest.step, dict(self.latest.values)],
            **{name: getattr(self, name) for name in _KNOWN},
            "present": list(self.present),
            **self.rollback.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [Reading(*entry) for entry in state_dict["history"]]
        self.latest = None if state_dict["latest"] is None else Reading(*state_dict["latest"])
        for name in _KNOWN:
            if name in state_dict:  # older checkpoints lack some
                setattr(self, name, state_dict[name])
        self.present = tuple(state_dict.get("present", ()))
        self.rollback.load_state_dict(state_dict)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.world_size == 1:  # else the other processes would wait for a gradient that never comes
            pl_module.rescue = self._note
        self.rollback.arm(pl_module)
        steps = int(trainer.estimated_stepping_batches)
        self.grace = max(LEAST_GRACE, steps // 10) if self.grace is None else self.grace
        self.rollback.patience = max(LEAST_TRIAL, steps // 20)
        group = trainer.optimizers[0].param_groups[0]
        self.rate = float(group.get("initial_lr", group["lr"]))
        if self.log_to is not None and trainer.is_global_zero:
            self.log_to.resume_from_step(trainer.global_step)
        if self.rollback.healthy_step < 0 and not self.history:  # a place to go back to before the first reading
            reading = self._read(trainer, pl_module, {})
            if not reading.values["nonfinite"]:  # other signs say little of a net that has not been trained
                self.rollback.keep(trainer, {})

    def _note(self, message: str) -> bool:
        self.trouble = message
        return self.actions.get("nonfinite") == "rollback" and not self.rollback.ended

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """A loss that is not finite and ends the run is told as an alarm, too."""
        if self.trouble:
            reading = Reading(trainer.current_epoch, trainer.global_step, {"nonfinite": 1.0})
            self._judge(trainer, reading, self.trouble)
            self.trouble = ""

    # ---- readings ------------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trouble:
            reading = Reading(trainer.current_epoch, trainer.global_step, {"nonfinite": 1.0})
            self._judge(trainer, reading, self.trouble)
            self.trouble = ""
            return
        step, last = trainer.global_step, -1 if self.latest is None else self.latest.step
        if self.every_n_steps is not None and step % self.every_n_steps == 0 and step > last:
            self._judge(trainer, self._read(trainer, pl_module, {}))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        epoch, last = trainer.current_epoch, trainer.current_epoch + 1 == trainer.max_epochs
        if self.every_n_epochs is not None and not self.rollback.pending and (last or epoch % self.every_n_epochs == 0):
            known = {"robust": "val/robust_acc", "train_robust": "train/robust_acc"}
            metrics = {name: trainer.callback_metrics.get(key) for name, key in known.items()}
            self._judge(trainer, self._read(trainer, pl_module, {k: float(v) for k, v in metrics.items() if v is not None}))

    def _read(self, trainer: Any, pl_module: Any, more: Mapping[str, float]) -> Reading:
        assert self.known is not None, "Health.prepare was never called"
        values: dict[str, float] = {}
        if trainer.is_global_zero:
            final = _final(trainer)  # what stays on the page
            # What called for a rollback is measured before it is blamed again, and what collapsed until it has not.
            ringing = {alarm.kind for alarm in self._alarms(self.grace or 0)}
            owed = bool("masked" in ringing - set(self.present) or "catastrophic" in ringing or self.rollback.trial)
            thorough = final or owed or self.readings % self.thorough_every == 0
            share = at_epoch(pl_module.defense.eps_share, pl_module.defense.epoch)
            values = dict(more) | self.look(pl_module.net, pl_module.device, thorough, share)
        return Reading(int(trainer.current_epoch), int(trainer.global_step), trainer.strategy.broadcast(values))

    def look(self, net: nn.Module, device: torch.device, thorough: bool, eps_share: float = 1.0) -> dict[str, float]:
        """One reading's values; weights, buffers, gradients, modes and random numbers are as they were."""
        assert self.known is not None, "Health.prepare was never called"
        forked = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(forked), torch.autocast(device.type, enabled=False):
            images = self.known.to(device)
            suspect = None if self.limits.gap is None else self.limits.gap / 2
            more = {"thorough": thorough, "suspect": suspect, "eps_share": eps_share}
            return measure(net, images, self.threat, self.layers, steps=self.steps, **more)  # type: ignore[arg-type]

    # ---- alarms --------------------------------------------------------------------------------------------------------

    def _judge(self, trainer: Any, reading: Reading, said: str = "") -> None:
        """Judge a reading, tell of every alarm that was not there before, and act."""
        self.history = [*_best_so_far(self.history), reading]
        self.latest, self.readings = reading, self.readings + 1
        self.waits = not _final(trainer)
        alarms = self._alarms(self.grace or 0 if self.waits else None)
        fresh = [alarm for alarm in alarms if alarm.kind not in self.present]
        self.present = tuple(alarm.kind for alarm in alarms)
        self.verdict = "; ".join(alarm.text for alarm in alarms)
        if self.log_to is not None and trainer.is_global_zero:
            self.log_to.reading(reading.epoch, reading.step, reading.values)
        early = {alarm.kind for alarm in alarms} - {alarm.kind for alarm in self._alarms(self.grace or 0)}
        stands = {} if reading.values.get("nonfinite") else withstands(reading.values, self.limits)
        over = self.rollback.over(reading.step, last=not self.waits)
        actions = {a.kind: "warn" if a.kind in early else self.actions.get(a.kind, "warn") for a in alarms}
        acute = [a for a in alarms if a in fresh or (over and actions[a.kind] == "rollback")]
        asking = [a.kind for a in acute if actions[a.kind] == "rollback"]
        done = {"warn": "warned", "stop": "stopped", "rollback": ""}
        if asking:
            done["rollback"] = self.rollback.ask(trainer, asking, stands, last=not self.waits)
            if self.rollback.hopeless:
                self._stop(trainer, f"{self.verdict}; {self.rollback.hopeless}")
        elif over:
            self.rollback.helped()
        for alarm in acute:
            if actions[alarm.kind] == "stop":
                self._stop(trainer, f"{alarm.text} (health.actions.{alarm.kind}=stop)")
            self._tell(trainer, alarm, f"{alarm.text}{f' ({said})' if said else ''}", done[actions[alarm.kind]])
        well = not alarms and not guesses(reading.values, self.limits)
        # A net that collapsed is no healthy one, but may be the best there is.
        if well or (self.present == ("catastrophic",) and better(stands, self.rollback.healthy)):
            self.rollback.keep(trainer, stands)

    def _alarms(self, grace: int | None) -> tuple[Alarm, ...]:
        return judge(self.history, self.limits, self.watched, grace)

    def _stop(self, trainer: Any, why: str) -> None:
        trainer.should_stop, self.stopped = True, self.stopped or why

    def _tell(self, trainer: Any, alarm: Alarm, text: str, done: str) -> None:
        if trainer.is_global_zero:
            console.print(f"health: {text} → {done}  (epoch {alarm.epoch}, step {alarm.step})")
            if self.log_to is not None:
                self.log_to.alarm(alarm.epoch, alarm.step, alarm.kind, text, done, alarm.values)

    # ---- the way back --------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.rollback.pending:
            self._roll_back(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """An alarm of the last reading: no step follows, so the last checkpoint is given the healthy weights."""
        pl_module.rescue = lambda message: False
        if self.rollback.pending:
            restored = self._roll_back(trainer, pl_module)
            end_with(trainer, pl_module, restored, {self.state_key: self.state_dict()})

    def _roll_back(self, trainer: Any, pl_module: Any) -> dict[str, Any] | None:
        restored = self.rollback.roll_back(trainer, pl_module)
        self.present = ()
        if restored is not None:
            self.history = [reading for reading in self.history if reading.step <= self.rollback.healthy_step]
        return restored

    # ---- what is shown -------------------------------------------------------------------------------------------------

    def views(self) -> tuple[View, ...]:
        """The panel of the last reading, if there is one."""
        if self.latest is None:
            return ()
        history = self.history if self.latest in self.history else [*self.history, self.latest]
        values = indicators(history, self.grace or 0 if self.waits else None)
        limits = {check.name: self.limits.of(check.name) if check.kind in self.watched else None for check in CHECKS}
        in_force = ", then ".join(SAYS[name] for name in self.rollback.measures)
        held = {n: r.step for r in history for n in SELDOM if n in r.values and n not in self.latest.values}
        read = 0 if self.known is None else len(self.known.y)
        view = health_view(
            values,
            limits,
            self.verdict,
            self.latest.step,
            in_force,
            *self._remedy(),
            held=held,
            images=(read, min(read, FEW)),
            guesses=guesses(self.latest.values, self.limits),
        )
        return (view,)

    def _remedy(self) -> tuple[str, str]:
        """What to try against the alarms of the last reading, first things first, and the command that does it."""
        if "masked" in self.present:
            run = "RUN" if self.log_to is None else str(self.log_to.folder)
            look = shlex.join(["python", "evaluate.py", f"checkpoint={run}", "suite=fast"])
            return "see what stronger attacks and the sanity checks find", look
        for kind in self.present:
            said, words = remedy(kind, self.regularizers, self.rate)
            return said, f"{self.command} {words}"
        return "", ""


_KNOWN: Final = ("readings", "verdict", "stopped")  # of what a resumed run knows


def watch(health: Health | None, module: Any, data: Any) -> list[Health]:
    """The callbacks that ``health`` asks for, ready: none for health=off.

    Raises:
        ValueError: it is something else; as :meth:`Health.prepare`.
    """
    if not health:
        return []
    if not isinstance(health, Health):
        raise ValueError(f"health: expected health=default or health=off, found {health!r}")
    held_out = data.probe(min(64, len(data.val)) if health.images is None else health.images, key="health.images")
    health.prepare(module, Images(held_out.x, held_out.y, data.sample_training(health.background)))
    return [health]


def _best_so_far(history: Sequence[Reading]) -> list[Reading]:
    """What later readings are judged by: the last reading, and of those before what is compared with the best or stands."""
    names = ("robust", *GUESSING, *SELDOM)
    slim = [Reading(r.epoch, r.step, {name: r.values[name] for name in names if name in r.values}) for r in history[:-1]]
    return [*(reading for reading in slim if reading.values), *history[-1:]]


def _final(trainer: Any) -> bool:
    """No step follows in this run."""
    steps_done = 0 <= trainer.max_steps <= trainer.global_step
    return bool(steps_done or (trainer.current_epoch + 1 == trainer.max_epochs and trainer.is_last_batch))
