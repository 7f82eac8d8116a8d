"""Two real processes (gloo): running statistics, and the direction of AWP, are those of all the data, not of one process."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from defenses.weights import averaged
from interpret.metrics import ClassCentroids, KindShares, RunningSensitivity
from interpret.observation import Observation, observe
from interpret.pse import region_effects
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


def process(rank: int, sizes: tuple[int, ...], port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4, 1, 2))]
    mean = averaged({w: torch.full_like(w, 10.0 * index + rank) for index, w in enumerate(weights)})
    found = measure(rank, sizes, 2) | {f"gradient {index}": mean[w] for index, w in enumerate(weights)}
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    sizes = (5, 2, 3)  # the first process sees 8 samples, the second 2: a mean of means would be wrong
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, (sizes, port, str(tmp_path)), nprocs=2)
    alone = measure(0, sizes, 1)
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(together["sensitivity"], alone["sensitivity"])
        torch.testing.assert_close(together["shares"], alone["shares"])
        torch.testing.assert_close(together["centroids"], alone["centroids"], equal_nan=True)
        assert torch.equal(together["gradient 0"], torch.full((2, 3), 0.5)), "the direction of AWP is everybody's"
        assert torch.equal(together["gradient 1"], torch.full((4, 1, 2), 10.5))
    own = measure(1, sizes, 2)  # outside a process group: one process's own part, to show that the parts differ
    assert not torch.allclose(own["sensitivity"], alone["sensitivity"], rtol=1e-3)
