"""What the benchmarks report, on cases whose answer is known."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections import Counter

import pytest
import torch
from torch import nn

from benchmarks import compiling, gpu, recommend, strength, throughput, timing
from benchmarks.attacks import Found
from benchmarks.compiling import AS_IT_IS, Compared, compare
from benchmarks.extras import BASES, DATA, Given, Peak
from benchmarks.processes import messages, volume
from benchmarks.throughput import passes
from benchmarks.timing import line, paired, positive, ratio, rows
from glassarmor.defenses.training.compiling import NotCompiled
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.regularizers import PSE
from glassarmor.lightning_modules.networks.resnet import ResNet

ONE_LINE = r"[^\n]+"
HOW = r"\(debug=true shows the stack trace\)"


def test_nothing_is_measured_no_times_or_on_no_images(monkeypatch, capsys):
    for option in ("--batch", "--rounds", "--steps"):
        monkeypatch.setattr(sys, "argv", ["throughput.py", option, "0"])
        with pytest.raises(SystemExit):
            throughput.main()
        assert f"error: argument {option}: expected a whole number of at least 1, found '0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "checkpoint: expected a run folder or a file of weights, e.g. checkpoint=runs/NAME; found none"),
        (["checkpoint=runs/nowhere"], "checkpoint: expected a run folder or a file of weights, found none at runs/nowhere"),
        (["+steps=0"], "steps: expected a whole number >= 1, found 0"),
        (["steps=3"], r"steps: expected a \+ in front, \+steps=3; found steps=3"),
        (["network=foo"], rf"network: expected one of {ONE_LINE}; found network=foo"),
    ],
)
def test_the_strength_of_no_checkpoint_is_an_error_of_one_line(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["strength.py", *arguments])
    with pytest.raises(SystemExit) as end:
        strength.main()
    assert end.value.code == 2
    assert re.fullmatch(rf"error: {words}\n{HOW}\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["network=foo"], rf"network: expected one of {ONE_LINE}; found network=foo"),
        (["data=arrays", "data.path=/nowhere"], rf"{ONE_LINE}/nowhere{ONE_LINE}"),
        (["rounds=3"], r"rounds: expected a \+ in front, \+rounds=3; found rounds=3"),
        (["+rounds=0"], "rounds: expected a whole number >= 1, found 0"),
        (["+rounds=x"], "rounds: expected a whole number >= 1, found 'x'"),
        (["+images=0"], "images: expected null or a whole number >= 1, found 0"),
        (["+compile=maybe"], "compile: expected true or false, found 'maybe'"),
        (["channels_last=maybe"], "channels_last: expected true, false or auto, found 'maybe'"),
        (["seed=x"], "seed: expected null or a whole number >= 0, found 'x'"),
        (["--multirun"], ONE_LINE),
    ],
)
def test_what_cannot_be_recommended_is_an_error_of_one_line(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recommend.py", *arguments])
    with pytest.raises(SystemExit) as end:
        recommend.main()
    assert end.value.code == 2
    assert re.fullmatch(rf"error: {words}\n{HOW}\n", capsys.readouterr().err)


@pytest.mark.parametrize("command", [recommend, strength])
def test_help_says_how_a_command_is_used(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert not end.value.code
    assert f"python benchmarks/{command.__name__.rpartition('.')[2]}.py" in capsys.readouterr().out


def test_a_line_is_found_with_its_fit():
    slope, intercept, r2 = line([1, 2, 3, 4], [5, 7, 9, 11])
    assert (slope, intercept, r2) == pytest.approx((2, 3, 1))
    _, _, bent = line([0, 1, 2], [0, 0, 3])
    assert bent == pytest.approx(0.75)


def test_rounds_alternate_and_ratios_are_taken_round_by_round(monkeypatch):
    order: list[str] = []
    clock = itertools.count()
    monkeypatch.setattr(timing, "seconds", lambda run: run() or next(clock))
    times = paired({name: (lambda name=name: order.append(name)) for name in "ab"}, 3)
    assert "".join(order) == "abbaab"
    assert times == {"a": [0, 3, 4], "b": [1, 2, 5]}
    drifting = {"slow": [2.0, 20.0, 200.0], "fast": [1.0, 10.0, 100.0]}
    assert ratio(drifting, "slow", "fast") == 2
    assert "| fast | 10.000 | 1.000–100.000 | 6.4 | 0.50 | 0.50–0.50 |" in rows(drifting, "slow", 64)


def test_no_round_begins_after_its_time(monkeypatch):
    clock = itertools.count(step=10)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(timing, "seconds", lambda run: 1.0)
    assert len(paired({"a": lambda: None}, 9, limit=25)["a"]) == 3
    assert len(paired({"a": lambda: None}, 9)["a"]) == 9


def test_compiling_is_advised_where_it_pays_and_says_when():
    times = {AS_IT_IS: [2.0, 2.2], "inductor": [1.0, 1.1], "cudagraphs": [1.98, 2.15]}
    found = Compared(times, {AS_IT_IS: 3.0, "inductor": 62.0, "cudagraphs": 4.0})
    assert found.best == "inductor"
    assert found.repaid == 57  # (62 - 3) / (2.1 - 1.05), rounded up
    assert "+defense.compile_attack=inductor" in found.advice()
    del times["inductor"]
    assert found.best is None
    assert "does not pay" in found.advice()


def test_a_way_that_fails_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(timing, "seconds", lambda run: run() or 1.0)
    done: list[str | None] = []

    def make(way):
        def run():
            if way == "bad":
                raise RuntimeError("no\nkernel")
            done.append(way)

        return run

    found = compare(make, ["bad", "good"], 2)
    assert found.failed == {"bad": "no kernel"}
    assert list(found.times) == list(found.first) == [AS_IT_IS, "good"]
    assert done.count("good") == done.count(None) == 3 + 2
    with pytest.raises(RuntimeError):
        compare(lambda way: make("bad"), [], 1)
    assert set(compiling.ways(torch.device("cuda"))) > set(compiling.ways(torch.device("cpu")))


def test_a_later_call_goes_on_with_what_is_left_and_repeats_no_failure(tmp_path):
    out, record, ran = tmp_path / "gpu.json", {"of": {}, "found": {}}, []
    works = {"memory": False}

    def item(name, found):
        def run():
            ran.append(name)
            if name == "large" and not works["memory"]:
                raise RuntimeError("out of\nmemory")
            if name == "compiled":
                raise NotCompiled("defense.compile_attack: torch cannot")
            return found

        return run

    names = {"small": 1, "large": 2, "compiled": 3, "stopped": None}
    items = {name: item(name, found) for name, found in names.items()}
    assert gpu.measure(items, record, out, time.perf_counter() + 60) == ["stopped"]
    kept = json.loads(out.read_text())
    assert kept["found"] == {"small": 1}
    reasons = {"large": "RuntimeError: out of memory", "compiled": "NotCompiled: defense.compile_attack: torch cannot"}
    assert kept["failed"] == reasons
    assert gpu.measure(items, kept, out, time.perf_counter()) == ["stopped"]  # no time
    works["memory"] = True
    assert gpu.measure(items, json.loads(out.read_text()), out, time.perf_counter() + 60) == ["stopped"]
    assert ran == ["small", "large", "compiled", "stopped", "stopped"]
    assert gpu.measure(items, json.loads(out.read_text()), out, time.perf_counter() + 60, again=True) == ["stopped"]
    assert ran[5:] == ["large", "compiled", "stopped"]
    kept = json.loads(out.read_text())
    assert kept["found"] == {"small": 1, "large": 2}
    assert list(kept["failed"]) == ["compiled"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "foo"], "argument --device: expected cuda, cuda:N or cpu, found 'foo'"),
        (["--device", "mps"], "argument --device: expected cuda, cuda:N or cpu, found 'mps'"),
        (["--device", "cuda:99"], f"argument --device: torch finds {ONE_LINE}, found cuda:99; {ONE_LINE}"),
        (["--data", "/nowhere"], f"argument --data: {ONE_LINE}/nowhere{ONE_LINE}"),
        (["--target", "1"], "argument --target: expected a number above 0 and below 1, found '1'"),
        (["--target", "half"], "argument --target: expected a number above 0 and below 1, found 'half'"),
        (["--minutes", "0"], "argument --minutes: expected a number above 0 and below inf, found '0'"),
        (["--out", "broken.json"], rf"argument --out: broken.json is no JSON \({ONE_LINE}\); delete it or {ONE_LINE}"),
        (["--out", "list.json"], f"argument --out: list.json is no record of this command; {ONE_LINE}"),
        (["--out", "other.json"], rf"argument --out: other.json was measured with {{}}, now {ONE_LINE}"),
        (["--out", "."], r"argument --out: expected a file in a folder that is there, found \."),
        (["--out", "no/gpu.json"], "argument --out: expected a file in a folder that is there, found no/gpu.json"),
    ],
)
def test_what_a_gpu_cannot_be_asked_is_an_error_of_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in (("broken", "{"), ("list", "[]"), ("other", '{"of": {}, "found": {}}')):
        (tmp_path / f"{name}.json").write_text(text)
    monkeypatch.setattr(gpu, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small", *arguments])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2
    assert re.search(rf"\n{sys.argv[0]}: error: {words}\n$", capsys.readouterr().err)


def test_other_rounds_targets_and_epochs_are_other_answers(tmp_path, monkeypatch):
    asked: list[set[str]] = []
    monkeypatch.setattr(gpu, "measure", lambda items, record, *_: asked.append(set(items)) or record.update(failed={}) or [])
    common = ["--device", "cpu", "--small", "--out", str(tmp_path / "gpu.json"), "--only", "epochs", "time_to"]
    for more in ([], ["--rounds", "5"], ["--target", "0.4"]):
        gpu.main([*common, *more])
    first, rounds, target = asked
    assert {name.split(",")[0] for name in first - rounds} == {"epochs"}
    assert {name.split(",")[0] for name in first - target} == {"time_to"}


def test_a_failure_alone_ends_with_exit_code_1(tmp_path, monkeypatch):
    def failing(*_: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr(gpu, "dashboards", failing)
    common = ["--device", "cpu", "--small", "--out", str(tmp_path / "gpu.json"), "--only", "dashboards"]
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            gpu.main(common)
        assert end.value.code == 1
    with pytest.raises(SystemExit) as end:
        gpu.main([*common, "--again", "--minutes", "1e-9"])
    assert end.value.code == 75


class Off(ResNet):
    """Its logits are larger by a factor, as those of a device with a bug might be."""

    factor: float

    def forward(self, x):
        return super().forward(x) * self.factor


def test_a_device_that_computes_otherwise_is_seen():
    def make(factor):
        made = itertools.count()

        def net():
            result = Off((1, 1), (4, 8), **DATA)
            result.factor = factor ** next(made)
            return result

        return net

    x, y = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    found = gpu.correctness(make(1.0), x, y, torch.device("cpu"))
    assert found["right"]
    assert found["TRADES"]["bare, fp32"]["cosine"] == pytest.approx(1)
    assert not gpu.correctness(make(1.3), x, y, torch.device("cpu"))["right"]


def test_the_peak_of_live_tensors_is_counted():
    kept = torch.zeros(1000)  # 4 kB
    with Peak([kept]) as peak:
        first = kept + 1  # 8 kB
        view = first[:500]
        second = first * 2  # 12 kB
        del second
        third = view + 1  # 10 kB
        del first, view, third
        fourth = kept + kept  # 8 kB
    assert peak.most == 12_000
    assert peak.now == 8_000
    del fourth
    assert peak.now == 4_000


def test_what_autograd_keeps_counts_as_long_as_it_keeps_it():
    weight = torch.ones(1000, requires_grad=True)
    with Peak([weight]) as peak:
        loss = (weight.exp().exp()).sum()  # both results are kept for the backward
        assert peak.now == 4_000 + 2 * 4_000 + 4
        loss.backward()
        del loss
    assert peak.now == 2 * 4_000  # the weight and its gradient
    assert peak.most >= 4 * 4_000


def test_a_shared_clean_pass_keeps_about_as_much_as_the_pass_itself():
    """In low precision, where copies in fp32 for the backward would weigh twice what they were copied from."""
    x, y = torch.rand(32, 3, 16, 16), torch.arange(32) % 10
    kept = []
    for extra in ({}, {"pse": PSE()}):
        net = ResNet((2, 2), (8, 16), **DATA).train()
        defense = Defense(Given(x.flip(0)), BASES["PGD-AT"](), extra)
        defense.prepare(net, x[:2], y[:2])
        with Peak([*net.parameters(), x, y]) as peak, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = defense(net, x, y).loss
        assert loss.requires_grad
        kept.append(peak.now)
    assert 1.5 < kept[1] / kept[0] < 2.3


def test_passes_count_the_products_of_a_linear_net():
    net = nn.Linear(30, 20, bias=False)
    forward, inputs, weights = passes(net, torch.rand(8, 30))
    assert forward == inputs == weights == 2 * 8 * 30 * 20


def test_the_profilers_operators_are_told_apart_by_kind():
    expected = {
        "convolutions, forward and backward": ("mkldnn_convolution", "convolution_backward", "ConvolutionBackward0"),
        "BatchNorm, forward and backward": ("native_batch_norm", "batch_norm", "NativeBatchNormBackward0"),
        "ReLU, forward and backward": ("relu_", "threshold_backward", "clamp_min"),
        "sums": ("add", "add_", "AddBackward0"),
        "all others": ("addmm", "copy_", "clamp", "AddmmBackward0"),
    }
    for name, operators in expected.items():
        assert {timing.kind(f"aten::{operator}") for operator in operators} == {name}
    spent = {"a": {"aten::conv2d": 30.0, "aten::add": 10.0}, "b": {"aten::relu": 5.0, "ConvolutionBackward0": 15.0}}
    table = timing.shares(spent)
    assert "| convolutions, forward and backward | 30 | 75.0 % | 15 | 75.0 % |" in table
    assert "| sums | 10 | 25.0 % | 0 | 0.0 % |" in table


def test_a_profile_of_a_net_has_all_kinds():
    net = ResNet((1,), (4,), **DATA).eval()
    spent = timing.traced({"net": lambda: net(torch.rand(2, 3, 8, 8)).sum().backward()}, repeats=1)
    assert {timing.kind(name) for name in spent["net"]} == {*timing.KINDS, "all others"}


def test_few_gradients_are_timed_on_nets_that_are_folded(monkeypatch):
    monkeypatch.setattr(throughput, "FEW", ((1, 1),))
    spent = {}

    def clock(run):
        run()
        return spent.setdefault(run, 1.0 + len(spent) % 2)

    monkeypatch.setattr(timing, "seconds", clock)
    seen = []
    real = throughput.folded
    monkeypatch.setattr(throughput, "folded", lambda *arguments: seen.append(len(arguments)) or real(*arguments))
    table = throughput.few({"net": ResNet((1,), (4,), **DATA)}, 1)
    assert len(seen) == 2 * 2  # in fp32 and bf16, warmed up and timed
    values, weights = 3 * 4 * 32 * 32, 3 * 4 * 9 + 2 * 4 * 4 * 9
    assert f"| {values:,}, {weights:,} |" in table
    assert "| 1 gradient of 1 image | 2.00 / 2.00 |" in table


def test_agreement_and_who_alone_fells_are_counted_over_all_seeds():
    """Of four images: both fell one, one stands against both, and each fells one that the other leaves."""
    ours = Found([torch.tensor([False, True]), torch.tensor([False, True])], [], 2.0)
    theirs = Found([torch.tensor([False, True]), torch.tensor([True, False])], [], 3.0)
    assert theirs.row(ours) == "50.00 % | 50.0, 50.0 | 50.0 % | 1 | 1 | 3.0"
    assert ours.row(ours) == "50.00 % | 50.0, 50.0 |  |  |  | 2.0"
    near, far = (Found([torch.ones(3).bool()], [torch.tensor(lengths)]) for lengths in ([1.0, 2, 3], [2.0, 2, 9]))
    assert far.row(near).startswith("100.00 %, median L2 2.0000 | 100.0 | 100.0 %; ours shorter on 67 %")


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_counts_begin_at_one(text):
    assert positive("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
        positive(text)


def test_messages_of_a_step_a_checkpoint_and_the_rest_are_told_apart():
    """Two epochs of three steps: gradients at each, before the last a checkpoint's sum, between the epochs a question."""

    def call(name: str, kind: str, *shape: int) -> tuple[str, dict[str, list[object]]]:
        return f"gloo:{name}", {"Input type": [kind], "Input Dims": [list(shape)]}

    step = [("[Strategy]DDPStrategy.backward", {}), call("all_reduce", "float", 10, 5)]
    checkpoint = [call("all_gather", "double"), ("gloo:barrier", {})]
    epoch = [*step, *step, *checkpoint, *step]
    buckets = step[0], call("all_reduce", "float", 60), call("broadcast", "int", 3)  # of the first step alone
    order = [*buckets, *epoch, call("broadcast", "unsigned char", 4), *epoch]
    found = messages([{"ts": at, "name": name, "args": args} for at, (name, args) in enumerate(order)])
    summed, asked = ("all_gather", "double", 1), ("broadcast", "unsigned char", 4)
    assert found[0] == Counter({("all_reduce", "float", 50): 1})
    assert found[1] == Counter({summed: 1, ("barrier", "", 0): 1})
    assert found[2] == Counter({summed: 2, ("barrier", "", 0): 2, asked: 1})
    assert [volume(part) for part in found] == [200, 8, 20]
