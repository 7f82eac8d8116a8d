"""The way back of a run that an alarm asks to roll back: safety measures on trial, and the last healthy state restored."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pytorch_lightning as pl
import torch

from glassarmor.defenses.attacks.pgd import Attack
from glassarmor.defenses.monitoring.alarms import better, safer
from glassarmor.lightning_modules.callbacks.checkpointing import Checkpoints
from glassarmor.lightning_modules.run.console import console
from glassarmor.lightning_modules.run.folder import load_checkpoint, unreadable_because

LEAST_TRIAL: Final = 20  # steps
HOPELESS: Final = ("nonfinite", "guessing")  # kinds of alarm that leave nothing to go on with
SAYS: Final = {
    "noise": "one-step attack from noise of 2ε (N-FGSM)",
    "two_steps": "two attack steps instead of one",
    "smaller_step": "half the attack's step",
    "lower_rate": "half the learning rate",
}
_PLAIN: Final = ("rollbacks", "healthy_step", "ended")  # of what a resumed run knows
_COPIED: Final = ("measures", "failed", "pending", "trial", "healthy", "before")
_RESTORED: Final = ("current_model_state", "averaging_state", "state_dict", "optimizer_states")  # the last two: always there


class Rollback:
    """Puts safety measures (:func:`.safer`) in force, one after the other, and goes back where that is worth it.

    A rollback happens where the next step would begin: the next measure is in force from then on, also in a resumed run,
    and weights, BatchNorm statistics, optimiser, running estimates and the average of the weights become those of
    ``healthy.ckpt`` again, bit for bit, where that withstands more on the images read by more than a standard error, or
    where the present net or that one guesses; schedule, data order and step count go on.  ``healthy.ckpt`` is the latest
    state without an alarm, or one with an alarm that withstands more.

    ========  =======================  ==============================================  ==================================
    state     told by                  an alarm asks                                   ``until`` is reached, or the last
                                                                                       reading, and
    ========  =======================  ==============================================  ==================================
    free      none of those below      *young*, where nothing that withstands          –
                                       anything was kept, before step ``patience``;
                                       else *pending*
    young     a trial of measure ""    warned, the net is given until ``patience``     an alarm asks: *pending*;
                                                                                       none: *free*
    trial     a trial of a measure     warned, the measure is given until ``until``    an alarm asks: *pending*, and the
                                                                                       measure is undone unless the net
                                                                                       withstands more than before it;
                                                                                       none: *free*, the measure stays
    pending   ``pending``              –                                               –
    ended     ``ended``                warned                                          –
    ========  =======================  ==============================================  ==================================

    From *pending* the next step goes to *trial* of the next measure, for ``patience`` steps (a twentieth of the run,
    ``LEAST_TRIAL`` at least).  Where no measure is left, or ``most`` were tried, it goes to *ended*: a net that guesses or
    is not finite and never was better stops the run (``hopeless``), any other is trained on as configured, from the best
    state there was.  A loss or a weight that is not finite waits for no trial: it is *pending* at once.

    Args:
        measures: safety measures, in this order, where they apply; when none is left, the learning rate is halved.
        most: rollbacks of a run.
    """

    def __init__(self, measures: Sequence[str], most: int) -> None:
        self.safer, self.most = tuple(measures), most
        self.attack: Attack | None = None  # the defense's own, before any safety measure
        self.images = 0  # that a reading is of
        self.patience = LEAST_TRIAL  # steps that a measure is given
        self.rollbacks = 0
        self.measures: list[str] = []  # safety measures in force
        self.failed: list[str] = []  # those that did not help, undone
        self.trial: dict[str, Any] = {}  # the last measure: name, given until, withstood before, for which kinds
        self.pending: list[str] = []  # kinds of alarm that ask for a rollback before the next step
        self.healthy_step = -1  # global step of healthy.ckpt
        self.healthy: dict[str, float] = {}  # what it withstands, by multi-step attack; nothing of a net that guesses
        self.before: dict[str, float] = {}  # what the net withstands that is rolled back
        self.ended = ""  # why there are no more rollbacks
        self.hopeless = ""  # why the run is to be stopped
        self.last = False  # no step follows the reading that asked

    def state_dict(self) -> dict[str, Any]:
        return {name: copy.deepcopy(getattr(self, name)) for name in (*_PLAIN, *_COPIED)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in (*_PLAIN, *_COPIED):
            if name in state:  # older checkpoints lack some
                setattr(self, name, copy.deepcopy(state[name]))

    # ---- decisions -----------------------------------------------------------------------------------------------------

    def over(self, step: int, last: bool) -> bool:
        """Has what is on trial had its time?"""
        return bool(self.trial) and (step >= self.trial["until"] or last)

    def helped(self) -> None:
        """The trial is over and no alarm asks."""
        self.trial = {}

    def ask(self, trainer: Any, kinds: list[str], stands: Mapping[str, float], last: bool) -> str:
        """Have the run rolled back before the next step, where that may help; what is done, in words.

        Args:
            kinds: of the alarms that ask.
            stands: what the net withstands now (:func:`.withstands`).
            last: no step follows in this run.
        """
        self.last = last
        if self.ended:
            return f"warned: {self.ended}"
        if "nonfinite" not in kinds:
            over = self.over(int(trainer.global_step), last)
            if not self.trial and not self.healthy and trainer.global_step < self.patience and not last:
                self.trial = {"measure": "", "until": self.patience, "before": {}, "kinds": []}
            if self.trial and not over:
                given = SAYS[self.trial["measure"]] if self.trial["measure"] else "the net"
                return f"warned: {given} is given until step {self.trial['until']}"
        undone, self.pending, self.before = self._undo(trainer, kinds, stands), kinds, dict(stands)
        if self.rollbacks < self.most and self._next_measure():
            return undone + self._plan(*self._healthy(trainer))
        times = f"still so after {self.rollbacks} safety measure{'' if self.rollbacks == 1 else 's'}"
        self.ended = f"{times}, there are no more"
        if not last and set(kinds) & set(HOPELESS) and not self.healthy:
            self.pending, self.hopeless = [], times
            return f"{undone}stopped: {times}"
        return f"{undone}{self.ended}; {self._plan(*self._healthy(trainer))}"

    def _undo(self, trainer: Any, kinds: list[str], stands: Mapping[str, float]) -> str:
        """Take back the measure on trial if the net withstands no more than before it; what is undone, in words."""
        trial, self.trial = self.trial, {}
        if not trial or not trial["measure"] or better(stands, trial["before"]):
            return ""
        name = trial["measure"]
        kinds[:] = list(dict.fromkeys([*kinds, *trial["kinds"]]))  # it may be what did the rest
        if name == "lower_rate" and set(kinds) <= set(HOPELESS):
            return ""  # what still does not learn needs a smaller one
        self.measures.remove(name)
        self.failed.append(name)
        if name == "lower_rate":
            _scale_rate(trainer, 2.0)
        return f"{SAYS[name]} did not help and is undone; "

    def _goes_back(self) -> bool:
        """Is the state that was kept worth more than the one that is to be rolled back?

        Steps back are training lost, so luck with the images read is no reason; after the last step nothing is lost.
        """
        if "nonfinite" in self.pending:
            return True
        if not self.last and not (self.healthy and self.before):  # a net that guesses has nothing to lose
            return not better(self.before, self.healthy)
        return better(self.healthy, self.before, 0 if self.last else self.images)

    def _plan(self, state: dict[str, Any] | None, why: str) -> str:
        """What the rollback that is pending will do, with what :meth:`_healthy` found."""
        where = f"rolled back to step {self.healthy_step}"
        if state is None:
            where = f"no healthy state to go back to{f' ({why})' if why else ''}"
        elif not self._goes_back():
            where = f"stays where it is, for step {self.healthy_step} did not clearly withstand more"
        chosen = self._next_measure()
        return f"{where}; from here on: {SAYS[chosen] if chosen else 'no further measure'}"

    def _next_measure(self) -> str:
        """The safety measure that the pending rollback brings; "" where none is left."""
        if self.ended:
            return ""
        if "nonfinite" not in self.pending and self.pending != ["guessing"]:
            attack = self._armed()
            for name in self.safer:
                known = name in (*self.measures, *self.failed)
                if not known and (name == "lower_rate" or safer(attack, name) is not None):
                    return name
        return "" if "lower_rate" in self.failed else "lower_rate"

    # ---- deeds ---------------------------------------------------------------------------------------------------------

    def keep(self, trainer: Any, stands: Mapping[str, float]) -> None:
        """Write ``healthy.ckpt``, whole or not at all."""
        kept, before = _checkpoints(trainer), (self.healthy_step, self.healthy)
        if kept is not None:
            self.healthy_step, self.healthy = int(trainer.global_step), dict(stands)  # belongs into the file
            if not kept.written(trainer, kept.healthy):
                self.healthy_step, self.healthy = before

    def _healthy(self, trainer: Any) -> tuple[dict[str, Any] | None, str]:
        """What ``healthy.ckpt`` holds, or None and why a state that was kept can't be read: that ends no run."""
        kept = _checkpoints(trainer)
        if self.healthy_step < 0 or kept is None:
            return None, ""
        path = kept.healthy
        try:
            state = load_checkpoint(path)
            if missing := [key for key in _RESTORED[-2:] if key not in state]:
                raise ValueError(f"holds no {' and no '.join(missing)}")
            return state, ""
        except Exception as error:
            self.healthy_step, self.healthy = -1, {}
            return None, unreadable_because(path, error)

    def roll_back(self, trainer: Any, pl_module: Any) -> dict[str, Any] | None:
        """Restore what training changes, put the next safety measure in force; the checkpoint that was restored."""
        chosen, (healthy, why) = self._next_measure(), self._healthy(trainer)
        if why and trainer.is_global_zero:
            console.print(f"health: {self._plan(healthy, why)}")
        healthy = healthy if self._goes_back() else None
        kinds, self.pending = self.pending, []
        self.rollbacks += bool(chosen)
        if healthy is not None:
            _restore(trainer, pl_module, healthy)
        if chosen:
            self.measures.append(chosen)
            until = int(trainer.global_step) + self.patience
            self.trial = {"measure": chosen, "until": until, "before": self.before, "kinds": kinds}
        if chosen == "lower_rate":
            _scale_rate(trainer, 0.5)
        self.arm(pl_module)
        return healthy

    def _armed(self) -> Attack | None:
        """The defense's attack with all safety measures in force."""
        attack = self.attack
        for name in self.measures:
            attack = safer(attack, name) or attack
        return attack

    def arm(self, pl_module: Any) -> None:
        """Give the defense the attack that is in force."""
        if self.measures or self.failed:
            pl_module.defense.attack = self._armed()


def end_with(trainer: Any, pl_module: Any, restored: dict[str, Any] | None, states: Mapping[str, Any]) -> None:
    """After the last step: what was restored goes into ``last.ckpt`` and the average of the weights.

    Args:
        restored: the checkpoint that the run went back to; None: it did not.
        states: of callbacks, by their key, that the rollback changed.
    """
    for callback in _averages(trainer):
        callback.on_train_end(trainer, pl_module)
    checkpoints = _checkpoints(trainer)
    if restored is None or checkpoints is None or not trainer.is_global_zero:
        return
    last = checkpoints.last
    kept = torch.load(last, weights_only=True, map_location="cpu")
    kept |= {key: restored[key] for key in _RESTORED if key in restored}
    kept["callbacks"] |= states
    trainer.strategy.checkpoint_io.save_checkpoint(kept, last)


def _checkpoints(trainer: Any) -> Checkpoints | None:
    """What keeps the run's checkpoints."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)), None)


def _averages(trainer: Any) -> list[Any]:
    return [callback for callback in trainer.callbacks if isinstance(callback, pl.callbacks.WeightAveraging)]


def _restore(trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
    """Weights, buffers, running estimates, optimiser and average as saved; the schedule's rate stays."""
    sums = {key: value.clone() for key, value in pl_module.state_dict().items() if key.startswith("train_")}  # of this epoch
    pl_module.load_state_dict(checkpoint["state_dict"])
    for callback in _averages(trainer):
        callback.on_load_checkpoint(trainer, pl_module, checkpoint)  # loads the training weights, too
    pl_module.load_state_dict(sums, strict=False)
    rates = [
        [(group["lr"], group.get("initial_lr")) for group in optimizer.param_groups] for optimizer in trainer.optimizers
    ]
    trainer.strategy.load_optimizer_state_dict(checkpoint)
    for optimizer, known in zip(trainer.optimizers, rates, strict=True):
        optimizer.zero_grad()
        for group, (rate, initial) in zip(optimizer.param_groups, known, strict=True):
            group["lr"] = rate
            if initial is not None:
                group["initial_lr"] = initial


def _scale_rate(trainer: Any, factor: float) -> None:
    """The learning rate and the base that its schedule works from, times ``factor``; both are in every checkpoint."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= factor
            if "initial_lr" in group:
                group["initial_lr"] *= factor
    for config in trainer.lr_scheduler_configs:
        if hasattr(config.scheduler, "base_lrs"):
            config.scheduler.base_lrs = [base * factor for base in config.scheduler.base_lrs]
