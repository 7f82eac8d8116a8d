"""Per-sample robust losses as pure functions of logits; each returns (N,) in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """−log p_y, (N,); with smoothing, against (1 − s)·onehot + s/K (Szegedy et al. 2016, 1512.00567, section 7)."""
    return F.cross_entropy(logits.float(), y, reduction="none", label_smoothing=label_smoothing)


def kl_divergence(clean: Tensor, adv: Tensor) -> Tensor:
    """KL(p(x) ‖ p(x')), (N,): the robust term of TRADES (Zhang et al. 2019, 1901.08573).

    Both sides in log space: the plain form gives NaN gradients when a probability underflows.
    """
    return F.kl_div(F.log_softmax(adv.float(), 1), F.log_softmax(clean.float(), 1), reduction="none", log_target=True).sum(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{c≠y} Z_c − Z_y, (N,): positive exactly when the sample is misclassified."""
    logits = logits.float()
    true = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - true


def boosted_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−log p_y − log(1 − max_{c≠y} p_c), (N,): BCE of MART (Wang et al. 2020), eq. 7.

    1 − p_c is summed from the other classes in log space, so that p_c → 1 gives a finite gradient.
    """
    log_p = F.log_softmax(logits.float(), 1)
    wrong = log_p.scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)
    rest = log_p.scatter(1, wrong, -torch.inf).logsumexp(1)
    return -log_p.gather(1, y[:, None]).squeeze(1) - rest


def mart_kl(clean: Tensor, adv: Tensor, y: Tensor) -> Tensor:
    """KL(p(x) ‖ p(x')) · (1 − p_y(x)), (N,): MART, eq. 9.  The gradient goes through the weight too, as published."""
    return kl_divergence(clean, adv) * (1 - F.softmax(clean.float(), 1).gather(1, y[:, None]).squeeze(1))


def logit_pairing(clean: Tensor, adv: Tensor) -> Tensor:
    """‖Z(x) − Z(x')‖², (N,): adversarial logit pairing (Kannan et al. 2018, 1803.06373)."""
    return (clean.float() - adv.float()).square().sum(1)


def nuclear_norm(clean: Tensor, adv: Tensor) -> Tensor:
    """‖Z(x') − Z(x)‖_* / N over the batch as one N × K matrix, (): NuAT (Sriramanan et al. 2021), divided by N as released.

    Through the singular values alone, whose gradient is finite at a matrix of any rank, zero included.
    """
    return torch.linalg.svdvals(adv.float() - clean.float()).sum() / len(adv)
