"""Several processes, one run: one leader makes the run folder, draws, logs and judges; all agree on when to stop."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from lightning_fabric.plugins.collectives.torch_collective import default_pg_timeout
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torchmetrics import Metric

from glassarmor.defenses.training.defense import Defense
from glassarmor.interpret.modes import evaluating, undisturbed

PATIENCE: Final = timedelta(hours=6)  # that others wait while the leader draws or judges; trainer/ddp.yaml says the same


def is_leader() -> bool:
    """Whether this is the process of global rank 0, known before a Trainer exists.

    Lightning's own launcher, torchrun and SLURM tell a process its rank through the environment; where Lightning launches
    on several nodes, the first process of a further node knows only its ``NODE_RANK``.
    """
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank == 0 and ("RANK" in os.environ or int(os.environ.get("NODE_RANK", "0")) == 0)


def is_echo() -> bool:
    """Whether a process that was started beside this one, on this machine, meets the same errors in the configuration."""
    return int(os.environ.get("LOCAL_RANK" if "RANK" in os.environ else "SLURM_LOCALID", "0")) > 0


def launches(trainer: Any) -> bool:
    """Whether this trainer will start further processes, by running the command again."""
    environment = trainer._accelerator_connector.cluster_environment
    return trainer.world_size > 1 and not environment.creates_processes_externally


def be_patient(trainer: Any) -> None:
    """Let its processes wait for each other as long as under ``trainer=ddp``, where they would wait torch's half hour.

    That is where the config names a strategy by a word: auto, ddp, ddp_find_unused_parameters_true, …
    """
    if getattr(trainer.strategy, "_timeout", None) == default_pg_timeout:
        trainer.strategy._timeout = PATIENCE


def grouped() -> bool:
    """Whether processes can talk to each other now."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def together() -> None:
    """Wait until every process is here: what the leader wrote before is there after."""
    if grouped():
        dist.barrier()


def any_process(mine: bool) -> bool:
    """Whether any process says yes.  To be called on every process; waits for the slowest."""
    said = [mine]
    if grouped():
        said *= dist.get_world_size()
        dist.all_gather_object(said, mine)
    return any(said)


class Poll:
    """A question to all processes at every step, answered at the next: no process waits for its device, or for a slower one.

    Every process asks at the same places.  Alone, the answer comes at once.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._asked: tuple[Any, Tensor] | None = None

    def any(self, mine: bool) -> bool:
        """Whether any process said yes when this was last asked, the same on all of them.  After a yes it begins anew."""
        if not grouped():
            return mine
        if self._group is None:  # of its own, on the CPU, however gradients travel
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        if self._asked is not None:
            work, answer = self._asked
            self._asked = None
            work.wait()
            if answer.item():
                return True
        answer = torch.tensor(int(mine))
        self._asked = dist.all_reduce(answer, dist.ReduceOp.MAX, self._group, async_op=True), answer
        return False


@contextmanager
def summed(module: nn.Module) -> Iterator[None]:
    """Inside, running sums are those over all processes, so that a checkpoint of the leader's holds everybody's."""
    with ExitStack() as stack:
        for metric in _metrics(module):
            stack.enter_context(metric.sync_context())
        yield


def leave_sums_to_leader(module: nn.Module) -> None:
    """After a checkpoint made inside :func:`summed` was loaded everywhere: they are counted once."""
    if grouped() and not is_leader():
        for metric in _metrics(module):
            metric.reset()


def _metrics(module: nn.Module) -> list[Metric]:
    """Those that a checkpoint holds and that processes share."""
    found = [part for part in module.modules() if isinstance(part, Metric)]
    return [metric for metric in found if metric.sync_on_compute and any(metric._persistent.values())]


def check_same_step(began: Mapping[str, Any], processes: int, batch_size: int, accumulated: int) -> None:
    """With other processes than before, a resumed run's steps are over as many images as before.

    Args:
        began: ``run.json``, whose ``processes`` and ``images_a_step`` are those of the last start; older versions lack them.
        processes, batch_size, accumulated: those of now; a step is over their product.

    Raises:
        ValueError: other processes, and another number of images a step.
    """
    before, images = began.get("processes", processes), began.get("images_a_step", 0)
    if before == processes or images == processes * batch_size * accumulated:
        return
    other, rest = divmod(images, processes * accumulated)
    raise ValueError(
        f"trainer.devices: this run last had {before} processes and {images} images a step; found {processes} processes "
        f"and {processes * batch_size * accumulated} images; expected {before} processes"
        + ("" if rest else f", or data.batch_size={other}")
    )


def check_processes(trainer: Any, net: nn.Module, defense: Defense, x: Tensor, y: Tensor, batches: int) -> None:
    """What would fail with several processes, and only after the first step.

    Args:
        trainer: made from the config.
        net, defense: prepared.
        x, y: a few images and labels.
        batches: how many of ``data.batch_size`` the training images fill.

    Raises:
        ValueError: fewer batches than processes; SyncBatchNorm without a GPU; parameters that the loss does not reach, for
            whose gradients plain DDP waits for ever.
    """
    if trainer.world_size == 1:
        return
    if batches < trainer.world_size:
        raise ValueError(
            f"data.batch_size: is of one process; expected training images for {trainer.world_size} batches a step (one a "
            f"process), found them for {batches}"
        )
    if trainer.strategy._layer_sync is not None and trainer.strategy.root_device.type == "cpu":
        raise ValueError("trainer.sync_batchnorm: torch's SyncBatchNorm needs GPUs; expected false")
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or strategy._ddp_kwargs.get("find_unused_parameters"):
        return
    named = [(name, weight) for name, weight in net.named_parameters() if weight.requires_grad]
    attack, defense.attack = defense.attack, copy.copy(defense.attack)  # the real one keeps its place and its δ
    try:
        with undisturbed(net), evaluating(defense):
            for _, weight in named:
                weight.requires_grad_()
            loss = defense(net, x, y).loss
            found = torch.autograd.grad(loss, [weight for _, weight in named], allow_unused=True)
    finally:
        defense.attack = attack
    idle = [name for (name, _), gradient in zip(named, found, strict=True) if gradient is None]
    if idle:
        raise ValueError(
            f"trainer.strategy: this loss reaches {len(idle)} parameters not ({', '.join(idle[:3])}, …), and plain DDP "
            "would wait for their gradients; expected trainer.strategy=ddp_find_unused_parameters_true, or, with "
            "trainer=ddp, trainer.strategy.find_unused_parameters=true"
        )
