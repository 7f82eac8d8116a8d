"""The dashboard on modules, trainers and batches that are not ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader

from glassarmor.defenses import PGD, Linf
from glassarmor.interpret.views import PSEPanel, ReportPage, UnitsPanel
from glassarmor.lightning_modules.callbacks import Dashboard
from glassarmor.lightning_modules.run.log import RunLog
from tests.reference.families import Recurrent, vit
from tests.reference.nets import conv_bn


class Theirs(pl.LightningModule):
    """Somebody's own module: plain cross-entropy, batches as a tuple or a dict."""

    def __init__(self, model: nn.Module, as_dict: bool = False) -> None:
        super().__init__()
        self.net, self.as_dict = model, as_dict

    def training_step(self, batch, batch_idx):
        x, y = (batch["image"], batch["label"]) if self.as_dict else batch
        return nn.functional.cross_entropy(self.net(x.to(self.dtype)).float(), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.0)  # never better: early stopping stops

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def images(shape: tuple[int, int, int] = (3, 8, 8), as_dict: bool = False) -> DataLoader:
    x, y = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 5
    rows = [{"image": a, "label": b} for a, b in zip(x, y, strict=True)] if as_dict else list(zip(x, y, strict=True))
    return DataLoader(rows, batch_size=4)


def followed(tmp_path: Path, shape: tuple[int, int, int] = (3, 8, 8), **options: object) -> Dashboard:
    x, y = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    log = RunLog(tmp_path, ReportPage(tmp_path / "report", "run"))
    panels = {"pse": PSEPanel(), "units": UnitsPanel()}
    names = tuple("abcde")
    return Dashboard(panels, x, y, ["1", "2", "3", "4"], PGD(Linf(0.05), 2), names, log=log, **options)


def fit(tmp_path: Path, module: pl.LightningModule, dashboard: Dashboard, loader: DataLoader, **options: object) -> None:
    callbacks = [dashboard, *options.pop("callbacks", [])]
    trainer = pl.Trainer(
        callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(module, loader, loader if "callbacks" in options or len(callbacks) > 1 else None)


def drawn(dashboard: Dashboard) -> list[int]:
    """Epochs that the page shows panels of."""
    return [entry["epoch"] for entry in dashboard.log_to.page._manifest["epochs"] if entry["headlines"]]


def headlines(dashboard: Dashboard, epoch: int = 0) -> list[str]:
    return [view["headline"] for view in dashboard.log_to.page._manifest["epochs"][epoch]["headlines"]]


@pytest.mark.parametrize("as_dict", [False, True])
def test_tuples_and_dicts(tmp_path, as_dict) -> None:
    dashboard = followed(tmp_path)
    fit(tmp_path, Theirs(conv_bn(), as_dict), dashboard, images(as_dict=as_dict), max_epochs=2)
    assert drawn(dashboard) == [0, 1]
    assert [row["epoch"] for row in dashboard.log_to.history] == [0, 1]
    dashboard.log_to.finish()
    assert (tmp_path / "report" / "index.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({"max_epochs": 6}, 5),
        ({"max_epochs": -1, "max_steps": 10}, 4),  # nobody knows the last epoch before it ends
        ({"max_epochs": 9, "callbacks": [EarlyStopping("val_loss", patience=2)]}, 2),
    ],
)
def test_every_few_epochs_and_the_last_whichever_it_is(tmp_path, options, last) -> None:
    dashboard = followed(tmp_path, every_n_epochs=4)
    fit(tmp_path, Theirs(conv_bn()), dashboard, images(), **options)
    assert drawn(dashboard) == sorted({0, 4, last} & set(range(last + 1)))
    assert [row["epoch"] for row in dashboard.log_to.history] == list(range(last + 1))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_any_precision(tmp_path, precision) -> None:
    dashboard = followed(tmp_path)
    fit(tmp_path, Theirs(conv_bn()), dashboard, images(), max_epochs=1, precision=precision)
    assert len(headlines(dashboard)) == 2
    assert not any("could not be drawn" in each for each in headlines(dashboard))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(vit, (3, 32, 32)), (lambda: Recurrent(nn.LSTM, True), (1, 16, 16)),
     (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5)), (3, 8, 8))],
)  # fmt: skip
def test_any_network(tmp_path, make, shape) -> None:
    dashboard = followed(tmp_path, shape)
    fit(tmp_path, Theirs(make()), dashboard, images(shape), max_epochs=1)
    assert not any("could not be drawn" in each for each in headlines(dashboard))


def test_what_would_fail_after_an_epoch_fails_before_it(tmp_path) -> None:
    module = Theirs(conv_bn())
    with pytest.raises(ValueError, match=r"^layers: the network has no layer 'nowhere'"):
        fit(tmp_path, module, followed(tmp_path, layers=["nowhere"]), images(), max_epochs=1)
    with pytest.raises(ValueError, match=r"^every_n_epochs: expected"):
        followed(tmp_path, every_n_epochs=0)
    dashboard = followed(tmp_path)
    dashboard.log_to = None
    with pytest.raises(ValueError, match=r"^log: expected a RunLog"):
        fit(tmp_path, module, dashboard, images(), max_epochs=1)
