"""Our minimum-norm attacks against Foolbox's, and CAM-supported attacks against supports of the same size.

    python benchmarks/minimum_norm.py [--images 48] [--steps 100] [--search-steps 9]

Same nets (a small CNN on the embedded digits: trained as usual, and with PGD), same images (validation split, classified
rightly), same steps, step sizes and first c.  Medians count a failure as infinite.  Foolbox is no requirement of ours; to
have its rows, put it on the path: pip install --target DIR --no-deps foolbox==3.3.4 eagerpy typing-extensions requests
urllib3 idna charset-normalizer certifi GitPython gitdb smmap scipy, then PYTHONPATH=DIR.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glassarmor.datamodules.digits import Digits
from glassarmor.defenses.attacks.minimum_norm import CarliniWagner, ElasticNet, GroupSparse
from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.attacks.supported import Supported
from glassarmor.defenses.threat import Linf, norms
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.terms import AdversarialCE, CleanCE
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN

EPS = 0.06  # budget.linf of the digits


def train(data: Digits, defense: Defense, epochs: int = 15) -> nn.Module:
    """A small CNN after a plain training loop, in eval mode."""
    torch.manual_seed(0)
    x, y = data.train.images.float() / 255, data.train.labels
    net = SmallCNN(num_classes=10, in_channels=1, mean=data.mean, std=data.std, width=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=-(-len(x) // 128) * epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            loss = defense(net.train(), x[rows], y[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return net.eval()


def report(name: str, net: nn.Module, x: Tensor, y: Tensor, attack: Callable[[], Tensor]) -> None:
    """One row: success, median L2, L1 and number of changed pixels, seconds."""
    start = time.perf_counter()
    delta = attack() - x
    seconds = time.perf_counter() - start
    with torch.no_grad():
        success = net(x + delta).argmax(1) != y
    sizes = (norms(delta, 2), norms(delta, 1), (delta != 0).any(1).flatten(1).sum(1).float())
    l2, l1, pixels = (torch.where(success, size, torch.inf).median().item() for size in sizes)
    rate = 100 * success.float().mean().item()
    print(f"  {name:34s} {rate:6.1f} %  {l2:7.4f}  {l1:7.3f}  {pixels:6.0f}  {seconds:6.1f} s", flush=True)


def foolbox_rows(net: nn.Module, x: Tensor, y: Tensor, steps: int, search: int) -> None:
    import foolbox

    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    carlini_wagner = foolbox.attacks.L2CarliniWagnerAttack(search, steps)
    report("Foolbox C&W", net, x, y, lambda: carlini_wagner(model, x, y, epsilons=None)[1])
    for rule in ("EN", "L1"):
        ead = foolbox.attacks.EADAttack(search, steps, decision_rule=rule)
        report(f"Foolbox EAD, rule {rule}", net, x, y, lambda ead=ead: ead(model, x, y, epsilons=None)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--search-steps", type=int, default=9)
    args = parser.parse_args()
    steps, search = args.steps, args.search_steps
    data = Digits(batch_size=128)
    data.setup("fit")
    defenses = {
        "trained as usual": Defense(None, {"ce": CleanCE()}),
        "trained with PGD-5": Defense(PGD(Linf(EPS), steps=5), {"ce": AdversarialCE()}),
    }
    with_foolbox = importlib.util.find_spec("foolbox") is not None
    if not with_foolbox:
        print("foolbox is not importable: its rows are left out (see the top of this file)")
    for name, defense in defenses.items():
        net = train(data, defense)
        x, y = data.val.images.float() / 255, data.val.labels
        with torch.no_grad():
            right = net(x).argmax(1) == y
        x, y = x[right][: args.images], y[right][: args.images]
        print(f"net {name}, {len(x)} images, {search} × {steps} steps")
        print(f"  {'':34s}  success  med. L2  med. L1  pixels     time")
        if with_foolbox:
            foolbox_rows(net, x, y, steps, search)
        rows = {
            "ours C&W": CarliniWagner(steps, search),
            "ours EAD, rule EN": ElasticNet(steps=steps, search_steps=search),
            "ours EAD, rule L1": ElasticNet(rule="L1", steps=steps, search_steps=search),
            "ours group-sparse, not refined": GroupSparse(steps=steps, search_steps=search, refine=False),
            "ours group-sparse": GroupSparse(steps=steps, search_steps=search),
            f"PGD-20, L∞ {EPS}": PGD(Linf(EPS), steps=20),
            **{f"PGD-20 on {w} support": Supported(PGD(Linf(EPS), steps=20), where=w) for w in ("cam", "shifted", "random")},
            **{
                f"C&W on {w} support": Supported(CarliniWagner(steps, search), where=w) for w in ("cam", "shifted", "random")
            },
        }
        for row, attack in rows.items():
            report(row, net, x, y, partial(attack, net, x, y))


if __name__ == "__main__":
    main()
