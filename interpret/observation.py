"""One record of what an attack did inside the network: made once a step, read by every loss, monitor and panel."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd

from glassarmor.interpret.inputs import answer, known_labels, typed
from glassarmor.interpret.modes import (
    batch_statistics,
    evaluating,
    normalised_by,
    replaying,
    rng_state,
    twice_differentiable,
)
from glassarmor.interpret.network.axes import tensors_in
from glassarmor.interpret.network.layouts import Layout, layouts_of, plain_layout

Side = Literal["adv", "clean"]
Label = Literal["true", "target"]


class Activations(dict[str, Tensor]):
    """Layer name → activation (N, C, positions…), in execution order.

    ``layouts``: how each was read, where it is known.  ``sources``: what to differentiate by, where that is another tensor
    than the activation (the time steps of a cell).
    """

    def __init__(self, acts: Mapping[str, Tensor] | None = None, layouts: Mapping[str, Layout] | None = None) -> None:
        super().__init__(acts or {})
        self.layouts = dict(layouts or {})
        self.sources: dict[str, Tensor] = {}

    def differentiable(self, names: Sequence[str]) -> list[Tensor]:
        """What leads to the logits, in the shape of each activation."""
        return [self.sources.get(name, self[name]) for name in names]


@dataclass(frozen=True)
class Forward:
    """One pass, in graph: ``x`` (N, C, H, W) in [0,1], ``logits`` (N, K) fp32, ``acts`` layer name → activation.

    An activation is (N, C, positions…), whatever axes the layer itself uses: see :mod:`.layouts`.
    """

    x: Tensor
    logits: Tensor
    acts: Mapping[str, Tensor]

    def layout(self, layer: str) -> Layout:
        """How a layer's output was read; images first, units second where nothing else is known."""
        known = self.acts.layouts.get(layer) if isinstance(self.acts, Activations) else None
        return plain_layout(self.acts[layer]) if known is None else known


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
def record(net: nn.Module, layers: Sequence[str], layouts: Mapping[str, Layout] | None = None) -> Iterator[Activations]:
    """Record the outputs of named layers during the one forward made inside the block.

    Yields a dict that the forward fills, in execution order.  Hooks are removed in any case.  Of several outputs, the
    first tensor is recorded.

    Args:
        layouts: of the layers, from :func:`.layouts_of`: what is recorded is then (N, C, positions…), and the net goes on
            from it, so that logits can be differentiated by it; what the net overwrites it gets as a copy.  By default
            outputs are recorded as they are.

    Raises:
        ValueError: unknown layer; a layer that stayed silent, ran twice, or returned no tensor; an activation that an
            in-place operation overwrote after it was recorded.
    """
    modules = find_layers(net, layers)
    kept = _Recording(layouts or {})
    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: kept.keep(name, output))
        for name, module in modules.items()
    ]
    try:
        yield kept.acts
    finally:
        for handle in handles:
            handle.remove()
    kept.finish(layers)


class _Recording:
    """What the hooks of :func:`record` fill."""

    def __init__(self, layouts: Mapping[str, Layout]) -> None:
        self.layouts = layouts
        self.acts = Activations()
        self.versions: dict[str, int] = {}
        self.steps: dict[str, list[Tensor]] = {}

    def keep(self, name: str, output: object) -> object:
        layout = self.layouts.get(name)
        found = entry_of(output, layout)
        if found is None:
            raise ValueError(f"layers: {name!r} returned {type(output).__name__}, expected a tensor")
        if layout is not None and layout.recurrent:
            return replaced(output, found, self._step(name, found, layout))
        if name in self.acts:
            raise ValueError(f"layers: {name!r} ran twice in one forward; name a layer that runs once")
        act = found if layout is None else layout.view(found)
        if torch.is_grad_enabled() and act.is_floating_point() and not act.requires_grad:
            act.requires_grad_()  # below lies nothing that learns; the activation itself can still be asked
        self.acts[name] = act
        self.versions[name] = act._version
        if layout is None:
            return None
        self.acts.layouts[name] = layout
        if layout.overwritten:
            return replaced(output, found, layout.restore(act.clone(), found.shape))
        return None if layout.plain else replaced(output, found, layout.restore(act, found.shape))

    def _step(self, name: str, output: Tensor, layout: Layout) -> Tensor:
        """One call of a cell: a time step.  Logits are differentiated by zeros that are added to every step."""
        steps = self.steps.setdefault(name, [])
        if not steps and torch.is_grad_enabled():
            self.acts.sources[name] = output.new_zeros(*output.shape, layout.calls, requires_grad=True)
        steps.append(output)
        if len(steps) > layout.calls:
            raise ValueError(f"layers: {name!r} ran {len(steps)} times, expected {layout.calls}, as for the first images")
        if len(steps) == layout.calls:
            self.acts[name] = torch.stack(steps, -1)
            self.versions[name] = self.acts[name]._version
            self.acts.layouts[name] = Layout("NCT")
        source = self.acts.sources.get(name)
        return output if source is None else output + source[..., len(steps) - 1]

    def finish(self, layers: Sequence[str]) -> None:
        silent = [name for name in layers if name not in self.acts]
        if silent:
            raise ValueError(
                f"layers: {', '.join(silent)} recorded nothing in this forward; "
                "was the layer skipped, or the network compiled after construction?"
            )
        overwritten = [name for name, act in self.acts.items() if act._version != self.versions[name]]
        if overwritten:
            raise ValueError(
                f"layers: {', '.join(overwritten)} overwritten by an in-place operation after recording; "
                "set inplace=False on the activation that follows"
            )


def entry_of(output: object, layout: Layout | None) -> Tensor | None:
    """Of the tensors that a layer returned the one that is recorded: by default the first."""
    return next(itertools.islice(tensors_in(output), 0 if layout is None else layout.entry, None), None)


def replaced(output: object, found: Tensor, by: Tensor) -> object:
    """The layer's output with one of its tensors replaced."""
    if output is found:
        return by
    if isinstance(output, Mapping):
        changed = {key: replaced(value, found, by) for key, value in output.items()}
        return changed if type(output) is dict else type(output)(**changed)
    if not isinstance(output, (list, tuple)):
        return output
    items: list[Any] = [replaced(item, found, by) for item in output]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


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

    def layout(self, layer: str) -> Layout:
        """How the layer's output is read; see :class:`.Layout`."""
        self._observed(layer)
        return self.adv.layout(layer)

    def spatial(self, layer: str) -> bool:
        """Whether the layer's positions form a map over the image."""
        return self.layout(layer).spatial

    def maps(self, layer: str, values: Tensor, lead: int = 2) -> Tensor:
        """Values by position of a layer as maps, (…, h, w): see :meth:`.Layout.maps`.

        Raises:
            ValueError: the layer's positions form no map.
        """
        if not self.spatial(layer):
            shape = tuple(self.adv.acts[layer].shape)
            raise ValueError(f"layers: {layer!r} gives {shape}: no positions that form a map over the image")
        return self.layout(layer).maps(values, lead)

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
                raise ValueError(
                    f"this observation holds no graph that leads from {layer!r} to the logits; observe under enable_grad"
                )
            # The backward passes the later layers anyway; the earlier ones would cost the rest of the network.
            names = list(forward.acts)[list(forward.acts).index(layer) :]
            sources = forward.acts.differentiable(names) if isinstance(forward.acts, Activations) else None
            with torch.enable_grad():
                gradients = torch.autograd.grad(
                    forward.logits.gather(1, labels[:, None]).sum(),
                    sources or [forward.acts[name] for name in names],
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
    layouts = _layouts(net, x, layers, labels) if layers else {}

    def run(images: Tensor) -> Forward:
        with record(net, layers, layouts) as acts, twice_differentiable(create_graph):
            logits = answer(net, images, labels)
        return Forward(images, logits.float(), acts)

    if same:
        adv = clean_pass = run(x)
    elif not clean:
        adv = run(x_adv)
    elif joined:
        both = run(torch.cat([x, x_adv]))
        # The backward of a slice fills a map of zeros, in another memory layout, for each half; that of a split joins them.
        halves = {name: act.split(len(x)) for name, act in both.acts.items()}
        clean_pass, adv = (
            Forward(
                images,
                both.logits.split(len(x))[i],
                Activations({name: half[i] for name, half in halves.items()}, layouts),
            )
            for i, images in enumerate((x, x_adv))
        )
    elif separate:
        clean_pass = run(x)
        adv = run(x_adv)
    else:
        masks = rng_state(x.device)
        statistics: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        with batch_statistics(net, statistics):
            adv = run(x_adv)
        with replaying(masks, x.device), normalised_by(statistics):
            clean_pass = run(x)
    if target is None:
        target = strongest_wrong(adv.logits, y)
    return Observation(y, target, adv, clean_pass, create_graph, both, net=net, x=x)


def _layouts(net: nn.Module, x: Tensor, layers: Sequence[str], labels: range) -> dict[str, Layout]:
    find_layers(net, layers)
    try:
        return layouts_of(net, x, layers)
    except RuntimeError:
        answer(net, x, labels)  # says what is wrong with the net or with the images
        raise


def strongest_wrong(logits: Tensor, y: Tensor) -> Tensor:
    """The wrong class with the largest logit, (N,)."""
    return logits.detach().scatter(1, y[:, None], -torch.inf).argmax(1)


MOST_BLOCKS = 3  # of a run of equal blocks, as transformers have them, that are observed by default


def feature_layers(net: nn.Module, x: Tensor) -> tuple[str, ...]:
    """The stages of a net, in execution order (ours): what is observed where nobody names layers.

    The last, outermost layer at each spatial resolution.  Of blocks that keep one sequence of tokens, up to three spread
    over the depth; where a class token is read, the last block is not among them, because nothing reads its other tokens.
    A net without positions gives its hidden layers.

    Args:
        x: a few images to run, (N, C, H, W); the net is left as it was.

    For a net with a pooled linear head the last of them is the layer whose CAM is exact.  Layers that end in a 1×1 map
    (the pooling itself) don't count.

    Raises:
        ValueError: no layer can be observed.
    """
    layouts = layouts_of(net, x)
    seen: dict[str, tuple[int, ...]] = {}
    cells: dict[str, tuple[int, ...]] = {}
    hidden: dict[str, nn.Module] = {}

    def keep(name: str, module: nn.Module, output: object) -> None:
        layout = layouts.get(name)
        found = entry_of(output, layout)
        if found is None or layout is None or not name:
            return
        if layout.calls > 1:
            if layout.recurrent:
                cells[name] = (layout.calls,)
            return
        shape = layout.view(found).shape
        if len(shape) == 2 or isinstance(module, nn.RNNBase):
            hidden[name] = module
        # More channels than an image has: padding, resizing and normalising modules are not features.
        # Adaptive pooling belongs to the head: on small images it can even enlarge the map.
        pools = isinstance(module, _AdaptiveAvgPoolNd | _AdaptiveMaxPoolNd)
        mapped = layout.spatial or (len(shape) == 3 and layout.axes.endswith("C"))
        if len(shape) > 2 and mapped and shape[1] > max(3, x.shape[1]) and not pools and (min(shape[2:]) > 1):
            seen[name] = layout.grid if layout.spatial else tuple(shape[2:])

    handles = [
        module.register_forward_hook(lambda m, _i, output, name=name: keep(name, m, output))
        for name, module in net.named_modules()
    ]
    try:
        with torch.no_grad(), evaluating(net):
            net(x)
    finally:
        for handle in handles:
            handle.remove()
    stages: dict[tuple[int, ...], list[str]] = {}
    for name, places in (seen or cells).items():
        stages[places] = [*stages.pop(places, []), name]  # so that the order is that of the last layers
    modules = dict(net.named_modules())
    chosen = [
        name
        for names in stages.values()
        for name in (_blocks(names, modules, layouts) if len(layouts[names[-1]].axes) == 3 else names[-1:])
    ]
    chosen = chosen or _hidden_layers(hidden)
    if not chosen:
        raise ValueError(
            "layers: no layer of the network can be observed; name the layers to observe, or say with layouts= what the "
            "axes of one are"
        )
    return tuple(chosen)


def _blocks(names: Sequence[str], modules: Mapping[str, nn.Module], layouts: Mapping[str, Layout]) -> list[str]:
    """Of layers that give tokens: blocks of one kind side by side, spread over the depth; else the last layer."""
    runs: dict[tuple[str, type], list[str]] = {}
    for name in names:
        runs.setdefault((name.rpartition(".")[0], type(modules[name])), []).append(name)
    runs = {key: run for key, run in runs.items() if len(run) > 1 and any(True for _ in modules[run[0]].children())}
    if not runs:
        return [names[-1]]
    blocks = runs[min(runs, key=lambda key: key[0].count("."))]
    if layouts[blocks[-1]].prefix:
        blocks = blocks[:-1]
    count = min(MOST_BLOCKS, len(blocks))
    return [blocks[(i + 1) * len(blocks) // count - 1] for i in range(count)]


def _hidden_layers(hidden: Mapping[str, nn.Module]) -> list[str]:
    """Of layers without places: the activations; else states of recurrent layers; else linear layers but the last."""
    active = [name for name, module in hidden.items() if type(module).__module__ == "torch.nn.modules.activation"]
    states = [name for name, module in hidden.items() if isinstance(module, nn.RNNBase)]
    return active or states or [name for name, module in hidden.items() if isinstance(module, nn.Linear)][:-1]
