"""View: two networks, the same images, one evidence axis.  Standard against robust, say, or two architectures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from glassarmor.interpret.profiles.profiles import ActivationProfiles, Comparison, compare
from glassarmor.interpret.views.charts import Lines, Table
from glassarmor.interpret.views.draw.flow import flow_figure
from glassarmor.interpret.views.panels.profiles import Measured, ProfilesPanel
from glassarmor.interpret.views.rows import numpy, percent
from glassarmor.interpret.views.view import Answer, Probe, View


def versus_view(names: tuple[str, str], probes: tuple[Probe, Probe], panel: ProfilesPanel) -> View:
    """The profiles of two networks on one axis.

    Args:
        names: of the networks; the second gets a mark where they are the same.
        probes: the same images in each network, each under an attack of its own.
        panel: measures both.

    Raises:
        ValueError: other images, as far as their classes tell.
    """
    first, second = names
    names = (first, second if second != first else f"{second} (2)")
    measured = [panel.measure(probe) for probe in probes]
    a, b = (m.found for m in measured)
    both = compare(a, b)
    title = headline(names, measured)
    drawing = flow_figure(title, names, (a, b))
    return View(
        name="versus",
        title="Two networks on one axis",
        headline=title,
        charts=(
            paths(names, a, b, both),
            table(names, probes, measured),
            *(replace(m.chart, title=name) for m, name in zip(measured, names, strict=True)),
        ),
        drawing=drawing,
        scalars={f"versus/turned/{key}": float(count) for key, count in both.turned.items()},
        how_to_read="0 is the centre of an image's true class among training images, 1 that of what the attack on that "
        "network promotes; each network has a background of its own, so that positions compare. The earlier a line crosses "
        "½ for good, the earlier the attack has won. The dashed lines of the Flow View are the other network's.",
        answers=(Answer("where", title),),
    )


def headline(names: Sequence[str], measured: Sequence[Measured]) -> str:
    return "; ".join(_fate(name, m.found) for name, m in zip(names, measured, strict=True)) + "."


def _fate(name: str, found: ActivationProfiles) -> str:
    turned = found.turning[found.turning >= 0]
    if not len(turned):
        return f"{name}: none of {len(found.turning)} attacked images crosses over"
    counts = torch.bincount(turned, minlength=len(found.layers))
    most = int(counts.argmax())
    return (
        f"{name}: {len(turned)} of {len(found.turning)} attacked images cross over, most often at {found.layers[most]} "
        f"({int(counts[most])})"
    )


def paths(names: Sequence[str], a: ActivationProfiles, b: ActivationProfiles, pair: Comparison) -> Lines:
    """Median and middle half of the attacked images in both networks, layer by layer."""
    levels = torch.tensor([0.25, 0.5, 0.75], device=pair.adv.device)
    low, median, high = numpy(pair.adv.nanquantile(levels, dim=2)).tolist()  # each (2, G)
    longer = a.layers if len(a.layers) >= len(b.layers) else b.layers
    return Lines(
        "Attacked images on one axis: 0 true class, 1 target; median and middle half",
        tuple(float(i) for i in range(len(longer))),
        "layer, input to output" if a.layers == b.layers else "depth, in layers of the longer network",
        tuple(names),
        tuple(tuple(line) for line in median),
        x_names=longer,
        spread=tuple((tuple(lower), tuple(upper)) for lower, upper in zip(low, high, strict=True)),
    )


def table(names: Sequence[str], probes: Sequence[Probe], measured: Sequence[Measured]) -> Table:
    """What can be said of each network in numbers, side by side."""

    def column(probe: Probe, m: Measured) -> list[str]:
        found, obs = m.found, probe.obs
        layer = int(found.divergence.mean(1).argmax())
        return [
            percent(float((obs.clean.logits.argmax(1) == obs.y).float().mean())),
            percent(float((obs.adv.logits.argmax(1) == obs.y).float().mean())),
            percent(float((found.turning >= 0).float().mean())),
            f"{float(found.adv[-1].nanmedian()):.2f}".replace("-", "−"),
            f"{found.layers[layer]} ({float(found.divergence[layer].mean()):.2f})",
            percent(float(found.coverage.min())),
        ]

    what = (
        "accuracy, clean",
        "accuracy under attack",
        "images that turn",
        "median position of the attacked images at the last layer",
        "layer that the attack moves most, ‖ΔA‖ / ‖A‖",
        "images that the background covers, least over layers",
    )
    columns = [column(probe, m) for probe, m in zip(probes, measured, strict=True)]
    return Table("In numbers", ("", *names), list(zip(what, *columns, strict=True)), open=True)
