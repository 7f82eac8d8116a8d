"""Free-AT: the published loop, one forward a step, and a δ and a loader that resume in the middle of a batch's replays."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from glassarmor.datamodules.loader import Replayed, TensorLoader
from glassarmor.defenses.attacks.free import Free
from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.threat import L2, Linf
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.regularizers import PSE, UnitSensitivity
from glassarmor.defenses.training.terms import AdversarialCE, CleanCE, NuclearNorm, Ramp, TradesKL
from glassarmor.defenses.training.weights import AWP
from glassarmor.lightning_modules.commands import train
from tests.composing import SMALL, config
from tests.reference.methods import free_training
from tests.reference.nets import batch, conv_bn, unchanged, untidy

BATCHES = [batch(n=n, seed=n)[::2] for n in (6, 6, 4)]  # the last one is smaller
BATCHES = [((x * 1.4 - 0.2).clamp(0, 1), y) for x, y in BATCHES]  # so that some pixels lie at the ends


def trained(defense: Defense, replays: int):
    net = conv_bn().train()
    x, y = BATCHES[0]
    defense.prepare(net, x[:2], y[:2])
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for x, y in BATCHES:
        for _ in range(replays):
            optimizer.zero_grad()
            defense(net, x, y).loss.backward()
            optimizer.step()
    return net


def test_equals_the_published_loop():
    attack = Free(Linf(0.05), replays=3)
    net = trained(Defense(attack, {"ce": AdversarialCE()}), 3)
    reference = conv_bn().train()
    optimizer = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9)
    delta = free_training(reference, BATCHES, 0.05, 3, optimizer)
    torch.testing.assert_close(attack.delta, delta, rtol=0, atol=1e-6)
    assert (delta == 0).any(), "at the ends of [0,1] no gradient arrives"
    for found, expected in zip(net.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.5)])
def test_images_lie_in_the_ball_and_delta_lives_on_from_batch_to_batch(threat):
    net = conv_bn().train()
    defense = Defense(Free(threat), {"ce": AdversarialCE()})
    moved = []
    for x, y in BATCHES:
        out = defense(net, x, y)
        distance = threat.distance(x, out.obs.adv.x.detach())
        assert (distance <= threat.eps + 1e-6).all()
        assert out.obs.adv.x.min() >= 0
        assert out.obs.adv.x.max() <= 1
        moved.append(distance.max().item())
        out.loss.backward()
    assert moved[0] == 0
    assert min(moved[1:]) > 0.8 * threat.eps


def test_a_gradient_that_is_not_finite_leaves_delta_usable():
    attack = Free(Linf(0.05))
    x, y = BATCHES[0]
    attack(conv_bn(), x, y)
    attack._climb(torch.full_like(x, torch.nan))
    assert torch.equal(attack.delta, torch.zeros_like(x))


def test_preparing_and_judging_move_nothing():
    attack = Free(Linf(0.05))
    defense = Defense(attack, {"ce": AdversarialCE()}, {"sensitivity": UnitSensitivity()})
    net = untidy(conv_bn())
    x, y = BATCHES[0]
    with unchanged(net):
        defense.prepare(net, x, y)
    assert attack.delta is None
    with torch.no_grad():
        defense(net, x, y)
    assert torch.equal(attack.delta, torch.zeros_like(x))


@pytest.mark.parametrize("options", [{"regularizers": {"pse": PSE(0.5)}}, {"awp": AWP(0.01)}])
def test_with_regularizers_and_moved_weights(options):
    attack = Free(Linf(0.05))
    net = trained(Defense(attack, {"ce": AdversarialCE()}, **options), 2)
    assert all(p.isfinite().all() for p in net.parameters())
    assert attack.delta.abs().max() == pytest.approx(0.05, abs=1e-6)


def test_delta_is_part_of_the_checkpoint():
    attack = Free(Linf(0.05))
    defense = Defense(attack, {"ce": AdversarialCE()})
    trained(defense, 2)
    fresh = Defense(Free(Linf(0.05)), {"ce": AdversarialCE()})
    fresh.load_state_dict(defense.state_dict())
    assert torch.equal(fresh.attack.delta, attack.delta)
    empty = Defense(Free(Linf(0.05)), {"ce": AdversarialCE()})
    fresh.load_state_dict(empty.state_dict())
    assert fresh.attack.delta is None


REFUSED = [
    ({"loss": {"ce": CleanCE(), "kl": TradesKL()}}, r"defense\.loss: Free-AT takes δ's gradient from the loss itself"),
    ({"loss": {"ce": AdversarialCE(), "nuclear": NuclearNorm()}}, r"one of x' alone"),
    ({"attack_batchnorm": "batch"}, r"defense\.attack_batchnorm: Free-AT's attack makes no pass of its own"),
    ({"eps_share": Ramp(0, 1, 5)}, r"defense\.eps_share: Free has no ball and steps that could follow a schedule"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Defense(Free(Linf(0.05)), **{"loss": {"ce": AdversarialCE()}, **options})


@pytest.mark.parametrize("replays", [0, 1.5, "2"])
def test_bad_replays(replays):
    with pytest.raises(ValueError, match=r"defense\.attack\.replays: expected a whole number >= 1"):
        Free(Linf(0.05), replays)


def loader() -> Replayed:
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1)
    return Replayed(TensorLoader(images, torch.arange(20), 6, shuffle=True, drop_last=True, seed=1), 3)


def test_each_batch_comes_several_times_and_resumes_at_any_replay():
    whole = loader()
    labels = [[y.tolist() for _, y in whole] for _ in range(2)]
    assert len(labels[0]) == len(whole) == 9
    assert all(labels[0][i] == labels[0][3 * (i // 3)] for i in range(9))
    assert len({tuple(y) for y in labels[0]}) == 3
    assert labels[0] != labels[1], "another order in each epoch"
    for stop in range(1, 10):
        cut, resumed = loader(), loader()
        batches = iter(cut)
        for _ in range(stop):
            next(batches)
        resumed.load_state_dict(cut.state_dict())
        assert resumed.state_dict() == cut.state_dict()
        left = [y.tolist() for _, y in resumed]
        assert left == (labels[0][stop:] if stop < 9 else labels[1])
        if stop < 9:
            assert [y.tolist() for _, y in resumed] == labels[1], "later passes are whole"


def fit(folder: Path, resume: Path | None = None) -> dict[str, torch.Tensor]:
    parts = train.build(config(*SMALL, "defense=free_at", "defense.attack.replays=3", "regularizers=[]", "panels=[]"))
    assert parts.data.replays == 3
    keep = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(parts.module, datamodule=parts.data, ckpt_path=resume, weights_only=True)
    assert trainer.global_step == 2 * 3 * 4
    return parts.module.state_dict()


@pytest.mark.long
def test_a_run_resumes_exactly_between_two_replays(tmp_path):
    """20 of 24 steps: in the second epoch, after the second of three replays."""
    whole = fit(tmp_path / "whole")
    assert whole["defense.attack._extra_state"].abs().max() > 0.05
    resumed = fit(tmp_path / "resumed", tmp_path / "whole" / "step=20.ckpt")
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    other = fit(tmp_path / "other", tmp_path / "whole" / "step=5.ckpt")
    assert [key for key in whole if not torch.equal(whole[key], other[key])] == []


def test_other_defenses_replay_nothing():
    assert Defense(PGD(Linf(0.05)), {"ce": AdversarialCE()}).replays == 1
