"""The net that an attack sees in training, compiled by torch for one batch size and run again and again."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from glassarmor.interpret.modes import logits_in

MODES: Final = ("reduce-overhead", "max-autotune")  # of inductor: CUDA graphs, and kernels chosen by timing them, too


class NotCompiled(ValueError):
    """The net, or this machine, is not one that torch can compile for; the message names the config key."""


def ways() -> list[str]:
    """What ``compile_attack`` may be: torch's backends, e.g. inductor, or cudagraphs alone; or a mode of inductor."""
    return sorted({*torch._dynamo.list_backends(None), *MODES})


class Compiled(nn.Module):
    """``net`` with a compiled forward: the same logits up to rounding, the same modules and weights.

    Only the forward is compiled.  Hooks on the net itself run as ever, outside of it: a hook that counts passes would be
    traced and compiled anew for each count, until torch gives up.  The first pass compiles, for a minute or more.

    Args:
        net: maps images (N, C, H, W) to logits (N, K).
        way: one of :func:`ways`.

    Raises:
        NotCompiled: in the first pass, where torch can't, e.g. as there is no C++ compiler.
    """

    def __init__(self, net: nn.Module, way: str) -> None:
        super().__init__()
        self._orig_mod = net  # as torch calls it, for those who look through the wrapper
        self.way = way
        how = {"mode": way} if way in MODES else {"backend": way}
        self.run = torch.compile(net.forward, dynamic=False, **how)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        attributes = self._orig_mod.__dict__
        before = {"forward": attributes["forward"]} if "forward" in attributes else {}
        attributes["forward"] = self.run
        try:
            logits: Tensor = logits_in(self._orig_mod(x))
        except torch._dynamo.exc.TorchDynamoException as error:
            said = " ".join(str(error).split())[:200]
            raise NotCompiled(
                f"defense.compile_attack: torch cannot compile {type(self._orig_mod).__name__} here with {self.way}; "
                f"expected null, or another way. It says: {said}"
            ) from error
        finally:
            del attributes["forward"]
            attributes.update(before)
        return logits.clone()  # a CUDA graph writes those of the next pass into the same memory
