"""Is an attack in low precision, on a folded net, as strong?  Robust accuracy of a trained net, always judged in fp32.

    python benchmarks/strength.py checkpoint=runs/NAME [+count=2000] [+batch=250] [+steps=20]

The same images, starts and steps: fp32 on the net as it is, fp32 folded, bf16 on the net as it is, bf16 folded.  Takes what
evaluate.py takes to find data, network and threat.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hydra.utils import instantiate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.composing import composed, help_if_asked
from benchmarks.throughput import Unfolded
from benchmarks.timing import machine
from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.options import require_whole
from glassarmor.lightning_modules.commands.subject import completed, located
from glassarmor.lightning_modules.networks.build import load_weights, make_network
from glassarmor.lightning_modules.run.console import clear_errors
from glassarmor.lightning_modules.run.saved_config import CONFIGS


def main() -> None:
    help_if_asked(__doc__)
    with clear_errors(debug="debug=true" in sys.argv):
        cfg, given = composed(CONFIGS, "evaluate", {"count": 2000, "batch": 250, "steps": 20})
        for key, value in given.items():
            require_whole(key, value, 1)
        count, batch, steps = given.values()
        weights, run = located(cfg.checkpoint)
        cfg = completed(cfg, run)
        data = instantiate(cfg.data, _convert_="all")
        data.setup("fit")
        net = make_network(instantiate(cfg.network), data, bool(cfg.get("channels_last")))
        load_weights(net, weights)
        threat = instantiate(cfg.threat, _convert_="all")
    net.eval()
    images = data.test.images[:count].float() / 255, data.test.labels[:count]
    print(f"{machine()}; {weights}, {len(images[1])} test images, PGD-{steps}, {threat}\n")
    print("| attack | robust accuracy, judged in fp32 | images decided otherwise than by the first |\n|---|---|---|")
    first = None
    for low in (False, True):
        for name, kind in (("as it is", Unfolded), ("folded", PGD)):
            attack = kind(threat, steps, seed=3)
            held = []
            for index, (x, y) in enumerate(zip(*(part.split(batch) for part in images), strict=True)):
                attack.reseed(index)
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    x_adv = attack(net, x, y)
                with torch.no_grad():
                    held.append(net(x_adv).argmax(1) == y)
            found = torch.cat(held)
            first = found if first is None else first
            accuracy, changed = 100 * float(found.float().mean()), int((found != first).sum())
            print(f"| {'bf16' if low else 'fp32'}, net {name} | {accuracy:.2f} % | {changed} |", flush=True)


if __name__ == "__main__":
    main()
