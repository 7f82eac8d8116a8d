"""Options of any defense: schedules of ε and step, whose statistics BatchNorm uses, NuAT's step; and what is refused."""

from __future__ import annotations

import copy
import re
from functools import partial
from math import inf, nan

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from glassarmor.defenses.attacks.minimum_norm import CarliniWagner
from glassarmor.defenses.attacks.objectives import KLToClean, NuclearCE
from glassarmor.defenses.attacks.pgd import FGSM, FGSMRS, NFGSM, PGD
from glassarmor.defenses.options import require_flag, require_number, require_one_of, require_whole
from glassarmor.defenses.threat import L2, Linf
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.regularizers import PSE, UnitSensitivity
from glassarmor.defenses.training.terms import AdversarialCE, CleanCE, LogitPairing, NuclearNorm, Ramp, TradesKL
from tests.reference.nets import batch, conv_bn, unchanged, untidy

BALL = Linf(0.08)
WARM = Ramp(0.25, 1.0, epochs=2)
KIN = {
    "pgd": lambda ball: PGD(ball, 3),
    "fgsm": FGSM,
    "fgsm_rs": FGSMRS,
    "n_fgsm": NFGSM,
    "kl": lambda ball: PGD(ball, 2, start="gaussian", objective=KLToClean()),
    "nuclear": lambda ball: PGD(ball, 1, start="bernoulli", objective=NuclearCE()),
}


@pytest.mark.parametrize("name", KIN)
@pytest.mark.parametrize("ball", [BALL, L2(0.6)])
def test_a_share_of_eps_is_the_same_attack_in_a_smaller_ball(name, ball):
    x, _, y = batch()
    defense = Defense(KIN[name](ball), {"ce": AdversarialCE()}, eps_share=WARM)
    for epoch, share in ((0.0, 0.25), (1.0, 0.625), (2.0, 1.0), (9.0, 1.0)):
        net = conv_bn().train()
        small = KIN[name](ball.scaled(share))
        small.reseed(5)
        expected = small(net, x, y)
        defense.at(epoch, 5)
        torch.testing.assert_close(defense(net, x, y).obs.adv.x, expected, rtol=0, atol=1e-6)
        assert defense.attack.calls == 6
        assert defense.attack.threat is not small.threat
        assert defense.attack.threat.eps == pytest.approx(KIN[name](ball).threat.eps)


def test_a_share_of_the_step_leaves_the_ball():
    x, _, y = batch()
    net = conv_bn().eval()
    defense = Defense(PGD(BALL, 1, step_size=0.04, start="none"), {"ce": AdversarialCE()}, step_share=0.5)
    moved = (defense(net, x, y).obs.adv.x - x).abs()
    assert moved.max() == pytest.approx(0.02, abs=1e-6)
    whole = Defense(PGD(BALL, 9, step_size=0.04), {"ce": AdversarialCE()}, step_share=0.5)(net, x, y).obs.adv.x
    assert (whole - x).abs().max() == pytest.approx(0.08, abs=1e-6)


def test_a_warm_up_from_0_begins_with_ordinary_training_and_whole_shares_are_absent():
    x, _, y = batch()
    defense = Defense(PGD(BALL, 3), {"ce": AdversarialCE()}, eps_share=Ramp(0, 1, 1))
    assert torch.equal(defense(conv_bn().train(), x, y).obs.adv.x, x)
    plain = Defense(PGD(BALL, 3), {"ce": AdversarialCE()})
    whole = Defense(PGD(BALL, 3), {"ce": AdversarialCE()}, eps_share=Ramp(1, 1, 1), step_share=1.0)
    for _ in range(2):  # the second call draws other numbers
        one, other = (d(conv_bn().train(), x, y).obs.adv.x for d in (plain, whole))
        assert torch.equal(one, other)


def trades(**options) -> Defense:
    attack = PGD(BALL, 2, start="gaussian", objective=KLToClean())
    return Defense(attack, {"ce": CleanCE(), "kl": TradesKL()}, **options)


def kl(z: torch.Tensor, z_adv: torch.Tensor) -> torch.Tensor:
    return (z.softmax(1) * (z.log_softmax(1) - z_adv.log_softmax(1))).sum(1).mean()


def norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


def test_separate_passes_are_those_of_the_published_codes():
    """Each of x and x' under its own statistics, which both move the running ones."""
    net, plain = conv_bn().train(), conv_bn().train()
    x, _, y = batch(n=6)
    output = trades(passes="separate")(net, x, y)
    output.loss.backward()
    z, z_adv = plain(x), plain(output.obs.adv.x)
    loss = F.cross_entropy(z, y) + 6 * kl(z, z_adv)
    loss.backward()
    torch.testing.assert_close(output.loss, loss)
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)
    for one, other in zip(norms(net), norms(plain), strict=True):
        torch.testing.assert_close(one.running_var, other.running_var)
        assert one.num_batches_tracked == 2


def test_shared_passes_learn_their_statistics_from_the_adversarial_images():
    net, plain = conv_bn().train(), conv_bn().train()
    x, _, y = batch(n=6)
    x_adv = trades(passes="shared")(net, x, y).obs.adv.x
    plain(x_adv)
    for one, other in zip(norms(net), norms(plain), strict=True):
        torch.testing.assert_close(one.running_mean, other.running_mean)
        assert one.num_batches_tracked == 1


def test_without_a_clean_pass_there_is_nothing_to_join():
    x, _, y = batch()
    outputs = [
        Defense(PGD(BALL, 2), {"ce": AdversarialCE()}, passes=passes)(conv_bn().train(), x, y).loss
        for passes in ("auto", "joined", "shared", "separate")
    ]
    assert all(torch.equal(outputs[0], output) for output in outputs)


def test_an_attack_on_batch_statistics_climbs_the_gradient_in_train_mode():
    net = conv_bn(dropout=0.3).train()
    x, _, y = batch(n=6)
    twin = copy.deepcopy(net)
    twin.drop.eval()  # the statistics are the batch's, dropout stays off
    images = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(twin(images), y, reduction="sum"), images)
    defense = Defense(FGSM(BALL), {"ce": AdversarialCE()}, attack_batchnorm="batch")
    found = defense._attacked(net, x, y)
    torch.testing.assert_close(found, (x + 0.08 * gradient.sign()).clamp(0, 1))
    running = Defense(FGSM(BALL), {"ce": AdversarialCE()})._attacked(net, x, y)
    assert not torch.allclose(found, running)


@pytest.mark.parametrize("name", KIN)
def test_it_leaves_the_net_as_it_was_and_frozen_norms_frozen(name):
    net = untidy(conv_bn(dropout=0.3))
    x, _, y = batch()
    defense = Defense(KIN[name](BALL), {"ce": AdversarialCE()}, attack_batchnorm="batch")
    with unchanged(net):
        defense._attacked(net, x, y)
    net.eval()  # nothing trains: both settings are one
    plain = Defense(KIN[name](BALL), {"ce": AdversarialCE()})
    defense.at(0, 0)
    assert torch.equal(defense._attacked(net, x, y), plain._attacked(net, x, y))


def test_an_attack_that_fails_leaves_the_net_as_it_was():
    net = untidy(conv_bn())
    x, _, y = batch()
    defense = Defense(PGD(BALL, 2), {"ce": AdversarialCE()}, attack_batchnorm="batch")
    with unchanged(net), pytest.raises(ValueError, match="expected one that runs in eval mode"):
        defense._attacked(net, x[:, :1], y)


def test_nuat_is_the_published_step():
    """Signs of ε/2, one step of ε up CE + λ·nuclear norm, projected; then CE(x) + λ·nuclear norm on the joined batch."""
    net, plain = conv_bn().train(), conv_bn().train()
    x, _, y = batch(n=8)
    attack = PGD(BALL, 1, step_size=0.08, start="bernoulli", objective=NuclearCE(2.0))
    output = Defense(attack, {"ce": CleanCE(), "nuclear": NuclearNorm(2.0)})(net, x, y)
    start = PGD(BALL, 1, step_size=0.0001, start="bernoulli")._begin(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close((start - x).abs(), torch.full_like(x, 0.04))
    assert (start > x).float().mean() == pytest.approx(0.5, abs=0.05)
    plain.eval()
    images = start.clone().requires_grad_()
    loss = F.cross_entropy(plain(images), y)
    loss = loss + 2.0 * torch.linalg.matrix_norm(plain(images) - plain(x).detach(), "nuc") / len(x)
    (gradient,) = torch.autograd.grad(loss, images)
    expected = (start + 0.08 * gradient.sign()).clamp(x - 0.08, x + 0.08).clamp(0, 1)
    torch.testing.assert_close(output.obs.adv.x, expected)
    plain.train()
    z, z_adv = plain(torch.cat([x, expected])).chunk(2)
    loss = F.cross_entropy(z, y) + 2.0 * torch.linalg.matrix_norm(z_adv - z, "nuc") / len(x)
    torch.testing.assert_close(output.loss, loss)


PGD_AT = {"attack": PGD(BALL, 2), "loss": {"ce": AdversarialCE()}}
REFUSED = [
    ({**PGD_AT, "passes": "apart"}, r"defense\.passes: expected auto, joined, shared or separate; found 'apart'"),
    ({**PGD_AT, "attack_batchnorm": "eval"}, r"defense\.attack_batchnorm: expected running or batch, found 'eval'"),
    ({**PGD_AT, "passes": "separate", "regularizers": {"pse": PSE()}}, r"defense\.passes: regularizers\.pse compares"),
    (
        {**PGD_AT, "passes": "separate", "regularizers": {"s": UnitSensitivity()}},
        r"separate passes normalise them apart, which hides every channel shift; expected auto, joined or shared",
    ),
    ({**PGD_AT, "passes": "separate", "regularizers": {"logits": LogitPairing()}}, r"regularizers\.logits compares"),
    ({**PGD_AT, "eps_share": 1.5}, r"defense\.eps_share: expected a share in \[0, 1\] or a Ramp of shares, found 1\.5"),
    ({**PGD_AT, "eps_share": Ramp(0, 2, 5)}, r"defense\.eps_share: expected a share .* found 2"),
    ({**PGD_AT, "step_share": "half"}, r"defense\.step_share: expected a share"),
    ({"attack": None, "loss": {"ce": CleanCE()}, "eps_share": 0.5}, r"defense\.eps_share: .*no attack"),
    ({"attack": None, "loss": {"ce": CleanCE()}, "attack_batchnorm": "batch"}, r"defense\.attack_batchnorm: .*no attack"),
    (
        {"attack": CarliniWagner(), "loss": {"ce": AdversarialCE()}, "eps_share": Ramp(0, 1, 5)},
        r"defense\.eps_share: CarliniWagner has no ball and steps that could follow a schedule; expected PGD",
    ),
    ({"attack": None, "loss": {"ce": CleanCE(), "n": NuclearNorm()}}, r"defense\.loss\.n: compares clean and adversarial"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_makes_no_sense_is_refused_with_a_reason(options, message):
    with pytest.raises(ValueError, match=message):
        Defense(**options)


@pytest.mark.parametrize("smoothing", [-0.1, 1, "a lot"])
@pytest.mark.parametrize("term", [AdversarialCE, CleanCE])
def test_label_smoothing_is_a_share(term, smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing: expected a share in \[0, 1\)"):
        term(label_smoothing=smoothing)


def test_restarts_cannot_choose_by_a_number_of_the_whole_batch():
    with pytest.raises(ValueError, match=r"attack\.restarts: .*the nuclear norm belongs to the batch"):
        PGD(BALL, restarts=2, objective=NuclearCE())


@pytest.mark.parametrize(
    ("check", "good", "bad", "says"),
    [
        (partial(require_whole, least=2), [2, 7], [1, 2.0, True, "2", None], "expected a whole number >= 2, found "),
        (
            partial(require_whole, least=0, null=True),
            [0, None],
            [-1, False],
            "expected null or a whole number >= 0, found ",
        ),
        (
            partial(require_number, interval="(0, 1]"),
            [1, 0.1],
            [0, 1.1, nan, True, "1"],
            r"expected a share in \(0, 1\], found ",
        ),
        (partial(require_number, interval="[0, inf)"), [0, 1e9], [-1, inf, nan], "expected a finite number >= 0, found "),
        (partial(require_number, interval="(0, inf)"), [1e-9], [0, -1, inf], "expected a finite number > 0, found "),
        (
            partial(require_number, interval="(-inf, inf)"),
            [-5, 0],
            [inf, -inf, nan, None],
            "expected a finite number, found ",
        ),
        (partial(require_number, interval="(1, 9)"), [2], [1, 9], r"expected a number in \(1, 9\), found "),
        (partial(require_one_of, allowed=("a", "b")), ["a", "b"], ["c", None, [1]], "expected a or b, found "),
        (partial(require_one_of, allowed=(1, 2, 3), null=True), [1, None], [4], "expected null, 1, 2 or 3; found "),
        (require_flag, [True, False], [0, 1, "true", None], "expected true or false, found "),
    ],
)
def test_an_option_out_of_its_range_is_refused_in_one_sentence(check, good: list, bad: list, says: str) -> None:
    for value in good:
        check("k", value)
    for value in bad:
        with pytest.raises(ValueError, match="k: " + says + re.escape(repr(value))):
            check("k", value)
