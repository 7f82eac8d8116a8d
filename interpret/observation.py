"""One record of what an attack did inside the network: made once a step, read by every loss, monitor and panel."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd

from glassarmor.interpret.inputs import answer, known_labels, typed
from glassarmor.interpret.modes import batch_statistics, evaluating, normalised_by, replaying, rng_state

Side = Literal["adv", "clean"]
Label = Literal["true", "target"]


@dataclass(frozen=True)
class Forward:
    """One pass, in graph: ``x`` (N, C, H, W) in [0,1], ``logits`` (N, K) fp32, ``acts`` layer name → activation."""

    x: Tensor
    logits: Tensor
    acts: Mapping[str, Tensor]


def find_layers(net: nn.Module, names: Sequence[str], key: str = "layers") -> dict[str, nn.Module]:
    """The submodules of these names.

    Raises:
        ValueError: an unknown name; says which key asked for it and which names come close.
    """
    modules = dict(net.named_modules())
    modules.pop("")
    found = {}
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{key}: expected names of layers, found {name!r}; in YAML quote names such as '1.1'")
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=5, cutoff=0.3) or list(modules)[:12]
            raise ValueError(f"{key}: the network has no layer {name!r}; close names: {', '.join(close)}")
        found[name] = modules[name]
    return found


@contextmanager
def record(net: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of named layers during the one forward made inside the block.

    Yields a dict that the forward fills, in execution order.  Hooks are removed in any case.

    Raises:
        ValueError: unknown layer; a layer that stayed silent, ran twice, or returned no tensor; an activation that an
            in-place operation overwrote after it was recorded.
    """
    modules = find_layers(net, layers)
    acts: dict[str, Tensor] = {}
    versions: dict[str, int] = {}

    def keep(name: str, output: object) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(f"layers: {name!r} returned {type(output).__name__}, expected one tensor")
        if name in acts:
            raise ValueError(f"layers: {name!r} ran twice in one forward; name a layer that runs once")
        if torch.is_grad_enabled() and output.is_floating_point() and not output.requires_grad:
            output.requires_grad_()  # below lies nothing that learns; the activation itself can still be asked
        acts[name] = output
        versions[name] = output._version

    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: keep(name, output))
        for name, module in modules.items()
    ]
    try:
        yield acts
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in layers if name not in acts]
    if silent:
        raise ValueError(
            f"layers: {', '.join(silent)} recorded nothing in this forward; "
            "was the layer skipped, or the network compiled after construction?"
        )
    overwritten = [name for name, act in acts.items() if act._version != versions[name]]
    if overwritten:
        raise ValueError(
            f"layers: {', '.join(overwritten)} overwritten by an in-place operation after recording; "
            "set inplace=False on the activation that follows"
        )


@dataclass(frozen=True)
class Observation:
    """The adversarial pass, the clean pass if one was asked for, and what the attack promotes.

    ``target`` (N,) is given for a targeted attack, else the strongest wrong class at x'.  All signals are in fp32.
    """

    y: Tensor
    target: Tensor
    adv: Forward
    clean_pass: Forward | None
    create_graph: bool = False
    joined: Forward | None = None  # the pass over [x; x'], where there was one: its activations lead to the logits
    _cache: dict[tuple[object, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    net: nn.Module | None = field(default=None, repr=False, compare=False)  # what was observed, for `look`
    x: Tensor | None = None  # the clean images, also where no clean pass was made

    def look(self, images: Tensor) -> Tensor:
        """Logits (N, K) of further images, fp32, in graph; a pass of its own, in eval mode, as attacks see the net.

        Modes and buffers are left as they were.

        Raises:
            ValueError: the observation was put together by hand, without its net.
        """
        if self.net is None:
            raise ValueError("this observation does not know its net; make it with observe(...)")
        with evaluating(self.net):
            logits: Tensor = self.net(images).float()
        return logits

    @property
    def clean(self) -> Forward:
        """The clean pass.

        Raises:
            ValueError: the observation was made with ``clean=False``.
        """
        if self.clean_pass is None:
            raise ValueError("this observation holds no clean pass; call observe(..., clean=True)")
        return self.clean_pass

    def side(self, side: Side) -> Forward:
        return self.adv if side == "adv" else self.clean

    def labels(self, label: Label | Tensor) -> Tensor:
        """Class of each sample, (N,): the true one, the target, or those that are given."""
        if isinstance(label, Tensor):
            return label
        return self.y if label == "true" else self.target

    def logit(self, label: Label | Tensor, side: Side = "adv") -> Tensor:
        """Logit of the true, the target or a given class of each sample, (N,)."""
        return self.side(side).logits.gather(1, self.labels(label)[:, None]).squeeze(1)

    def delta(self, layer: str) -> Tensor:
        """ΔA = A(x') − A(x) of a layer, fp32, computed once."""
        return self.once("delta", layer, lambda: self.adv.acts[layer].float() - self.clean.acts[layer].float())

    def once(self, name: str, layer: str, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` returns about a layer, computed for the first who asks by this name, in graph."""
        self._observed(layer)
        key = (name, layer)
        if key not in self._cache:
            with torch.enable_grad():  # a first reader under no_grad must not cut the graph of the next
                self._cache[key] = make()
        return self._cache[key]

    def _observed(self, layer: str) -> None:
        if layer not in self.adv.acts:
            raise ValueError(f"layers: {layer!r} was not observed; observed are {', '.join(self.adv.acts) or 'none'}")

    def layer_gradient(self, layer: str, side: Side = "adv", label: Label | Tensor = "true") -> Tensor:
        """∂Z_c/∂A of a layer, c the true, the target or a given class of each sample; the layer's shape, fp32.

        One backward serves this layer and all observed layers after it, is kept, and is differentiable if the observation
        was made with ``create_graph``.  So ask for early layers first, and for given classes (N,) with one and the same
        tensor: what is kept for it is found by identity.  Under batch statistics the samples of a batch are
        coupled by the BatchNorms above the layer; the gradient then holds their cross terms too.

        Raises:
            ValueError: the pass was made without a graph.
        """
        self._observed(layer)
        key = ("gradient", side, label, layer)
        if key not in self._cache:
            # In a joined pass a side's activation is a slice, not an ancestor of the logits: differentiate the whole.
            forward, labels = self.side(side), self.labels(label)
            if self.joined is not None:
                forward, labels = self.joined, labels.repeat(2)
            if not forward.logits.requires_grad:
                raise ValueError("this observation holds no graph; observe under enable_grad")
            # The backward passes the later layers anyway; the earlier ones would cost the rest of the network.
            names = list(forward.acts)[list(forward.acts).index(layer) :]
            with torch.enable_grad():
                gradients = torch.autograd.grad(
                    forward.logits.gather(1, labels[:, None]).sum(),
                    [forward.acts[name] for name in names],
                    create_graph=self.create_graph,
                    retain_graph=True,
                )
            for name, gradient in zip(names, gradients, strict=True):
                if self.joined is not None:
                    clean, adv = gradient.float().split(len(self.y))
                    self._cache["gradient", "clean", label, name] = clean
                    self._cache["gradient", "adv", label, name] = adv
                else:
                    self._cache["gradient", side, label, name] = gradient.float()
        return self._cache[key]


def observe(
    net: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    *,
    target: Tensor | None = None,
    layers: Sequence[str] = (),
    clean: bool = True,
    joined: bool = False,
    separate: bool = False,
    create_graph: bool = False,
) -> Observation:
    """Run the adversarial pass (and, if asked for, the clean one) in the net's own mode and record ``layers``.

    Args:
        net: maps images in [0,1], (N, C, H, W), to logits (N, K).
        x, x_adv: clean and adversarial images.  The same object twice stands for "no attack": one pass serves both.
        y: true labels (N,).
        target: what the attack promotes, (N,); by default the strongest wrong class at x'.
        layers: names as in ``net.named_modules()``.
        clean: whether any reader needs the clean pass.
        joined: one pass over [x; x'], so that both share batch statistics, which the pass also learns from.  Otherwise
            the clean pass reuses the statistics and the dropout masks of the adversarial pass, and updates nothing.
        separate: instead, two passes, first x and then x', each of which normalises by its own batch and learns from it, as
            published codes do.  Only where nobody compares activations: see below.
        create_graph: readers may differentiate :meth:`Observation.layer_gradient` again.

    Two separate train-mode passes would normalise x and x' apart, and the channel mean of ΔA after a BatchNorm would
    then vanish whatever the attack does (ours; tested).
    """
    clean_pass: Forward | None = None
    both: Forward | None = None
    same = x_adv is x
    x, y = typed(net, x, y)
    x_adv = x if same else typed(net, x_adv, y)[0]
    labels = known_labels(y)
    if same:
        adv = clean_pass = _run(net, x, layers, labels)
    elif not clean:
        adv = _run(net, x_adv, layers, labels)
    elif joined:
        both = _run(net, torch.cat([x, x_adv]), layers, labels)
        # The backward of a slice fills a map of zeros, in another memory layout, for each half; that of a split joins them.
        halves = {name: act.split(len(x)) for name, act in both.acts.items()}
        clean_pass, adv = (
            Forward(images, both.logits.split(len(x))[i], {name: half[i] for name, half in halves.items()})
            for i, images in enumerate((x, x_adv))
        )
    elif separate:
        clean_pass = _run(net, x, layers, labels)
        adv = _run(net, x_adv, layers, labels)
    else:
        masks = rng_state(x.device)
        statistics: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        with batch_statistics(net, statistics):
            adv = _run(net, x_adv, layers, labels)
        with replaying(masks, x.device), normalised_by(statistics):
            clean_pass = _run(net, x, layers, labels)
    if target is None:
        target = strongest_wrong(adv.logits, y)
    return Observation(y, target, adv, clean_pass, create_graph, both, net=net, x=x)


def _run(net: nn.Module, x: Tensor, layers: Sequence[str], labels: range) -> Forward:
    with record(net, layers) as acts:
        logits = answer(net, x, labels)
    return Forward(x, logits.float(), acts)


def strongest_wrong(logits: Tensor, y: Tensor) -> Tensor:
    """The wrong class with the largest logit, (N,)."""
    return logits.detach().scatter(1, y[:, None], -torch.inf).argmax(1)


def feature_layers(net: nn.Module, x: Tensor) -> tuple[str, ...]:
    """The stages of a convolutional net: the last, outermost layer at each spatial resolution, in execution order (ours).

    Args:
        x: a few images to run, (N, C, H, W); the net is left as it was.

    For a net with a pooled linear head the last of them is the layer whose CAM is exact.  Layers that end in a 1×1 map
    (the pooling itself) don't count.

    Raises:
        ValueError: no layer gives a feature map, e.g. in a fully connected net.
    """
    sizes: list[tuple[str, tuple[int, ...]]] = []
    calls: Counter[str] = Counter()

    def keep(name: str, module: nn.Module, output: object) -> None:
        calls[name] += 1
        # More channels than an image has: padding, resizing and normalising modules are not features.
        # Adaptive pooling belongs to the head: on small images it can even enlarge the map.
        if (
            isinstance(output, Tensor)
            and output.dim() == 4
            and output.shape[1] > max(3, x.shape[1])
            and not isinstance(module, _AdaptiveAvgPoolNd | _AdaptiveMaxPoolNd)
        ):
            sizes.append((name, tuple(output.shape[-2:])))

    handles = [
        module.register_forward_hook(lambda m, _i, output, name=name: keep(name, m, output))
        for name, module in net.named_modules()
        if name
    ]
    try:
        with torch.no_grad(), evaluating(net):
            net(x)
    finally:
        for handle in handles:
            handle.remove()
    last: dict[tuple[int, ...], str] = {}
    for name, size in sizes:
        if calls[name] == 1 and min(size) > 1:
            last.pop(size, None)  # so that the order is that of the last layers
            last[size] = name
    if not last:
        raise ValueError("layers: the network has no convolutional feature map; name the layers to observe")
    return tuple(last.values())
