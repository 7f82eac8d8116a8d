"""Where a run's numbers and pictures go: metrics.csv, the local report and W&B.  The only place that imports wandb."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal, get_args

import wandb
from pytorch_lightning.loggers import WandbLogger

from glassarmor.defenses.options import require_one_of
from glassarmor.interpret.storage import read_lines, read_numbers, write_atomic
from glassarmor.interpret.views.charts import Table
from glassarmor.interpret.views.draw.figures import to_array
from glassarmor.interpret.views.page.page import ReportPage
from glassarmor.interpret.views.view import View
from glassarmor.lightning_modules.run.doors import spelled

WandbMode = Literal["auto", "online", "offline", "disabled"]
HEALTH = "health.jsonl"
INIT_TIMEOUT = 30  # seconds to wait for a W&B server before a run is recorded offline
FINISH_TIMEOUT = 300  # seconds to wait at the end for uploads; without it W&B waits for a server that is gone for ever


class NotKept(RuntimeError):
    """A run that came to its end, but not all of it is on the disk.

    Args:
        lost: what could not be done, e.g. "write results.json", and why.
        folder: the run folder.
    """

    def __init__(self, lost: Mapping[str, str], folder: Path) -> None:
        what = "; ".join(f"could not {what} ({why})" for what, why in lost.items())
        go_on = shlex.join([*spelled("train"), f"resume={folder}"])
        super().__init__(f"the run ended, but {what}. Make room, then go on with  {go_on}")


class RunLog:
    """One run's record by epoch.

    Args:
        folder: the run folder; ``metrics.csv`` and ``report/`` live in it.
        page: the local report, or None.
        wandb_logger: Lightning's logger of the run, or None.
    """

    def __init__(self, folder: Path, page: ReportPage | None, wandb_logger: WandbLogger | None = None) -> None:
        self.folder = folder
        self.page = page
        self.wandb_logger = wandb_logger
        self.history: list[dict[str, float]] = []
        self.lost: dict[str, str] = {}  # what of the run folder could not be written, and has not been since: why
        metrics = folder / "metrics.csv"
        if metrics.exists():
            self.history = read_numbers(metrics)

    def keep(self, what: str, call: Callable[[], Any]) -> None:
        """Write something of the run folder; where that fails training goes on, and ``lost`` holds it until it succeeds."""
        self.lost.pop(what, None)
        if failed := survive(what, call):
            self.lost[what] = failed

    def resume_from(self, epoch: int) -> None:
        """Forget epochs that will be trained again."""
        self.history = [row for row in self.history if row["epoch"] < epoch]
        if self.page is not None:
            self.page.drop_from(epoch)

    def epoch(self, epoch: int, step: int, scalars: Mapping[str, float], views: Sequence[View]) -> None:
        """Record an epoch, or again the one that was recorded last; once in each place, W&B in a single call."""
        for view in views:
            scalars = {**scalars, **view.scalars}
        again = bool(self.history) and self.history[-1]["epoch"] == epoch
        self.history[len(self.history) - again :] = [{"epoch": epoch, "step": step, **scalars}]
        self.keep("write metrics.csv", self._write_csv)
        if self.page is not None:
            self.keep("write the report", lambda: self.page.write_epoch(epoch, step, scalars, views))  # type: ignore[union-attr]
        if self.wandb_logger is not None:
            survive("log an epoch to W&B", lambda: self._log_to_wandb(epoch, step, views))

    def _log_to_wandb(self, epoch: int, step: int, views: Sequence[View]) -> None:
        assert self.wandb_logger is not None
        # No step=: W&B would drop what arrives behind Lightning's own counter.
        payload: dict[str, Any] = {"epoch": epoch, "trainer/global_step": step}
        for view in views:
            payload.update(view.scalars)
            if view.drawing is not None:
                payload[f"dashboard/{view.name}"] = wandb.Image(to_array(view.drawing), caption=view.headline)
            if view.table is not None:
                rows = [list(row) for row in view.table.rows]
                payload[f"tables/{view.name}"] = wandb.Table(columns=list(view.table.columns), data=rows)
        if self.page is not None and views and epoch in self.page.epochs:
            # Our own page of the epoch, with no plotting library inside; inject would add W&B's style to it.
            payload["dashboard/page"] = wandb.Html(self.page.one_epoch(epoch), inject=False)
        self.wandb_logger.experiment.log(payload)

    def reading(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """One look at the run's health: a line of ``health.jsonl``, and W&B's curves ``health/…`` by step."""
        event = {"event": "reading", "epoch": epoch, "step": step, "values": dict(values)}
        self.keep("write health.jsonl", lambda: self._event(event))
        if self.wandb_logger is not None:
            payload = {"epoch": epoch, "trainer/global_step": step, **{f"health/{k}": v for k, v in values.items()}}
            survive("log a reading", lambda: self.wandb_logger.experiment.log(payload))  # type: ignore[union-attr]

    def alarm(self, epoch: int, step: int, kind: str, text: str, action: str, values: Mapping[str, float]) -> None:
        """Bad news: ``health.jsonl``, a mark on the page, an alert and the summary of W&B."""
        event = {"event": "alarm", "epoch": epoch, "step": step, "kind": kind, "text": text, "action": action}
        self.keep("write health.jsonl", lambda: self._event({**event, "values": dict(values)}))
        if self.page is not None:
            self.keep("write the report", lambda: self.page.add_alarm(epoch, step, text, action))  # type: ignore[union-attr]
        if self.wandb_logger is not None:
            run = self.wandb_logger.experiment
            level = "WARN" if action == "warned" else "ERROR"
            survive("send an alert", lambda: run.alert(text.split(":")[0], f"step {step}: {text} → {action}", level, 0))
            survive("note an alarm", lambda: run.summary.update({f"health/alarm/{kind}": step, "health/last_alarm": text}))

    def resume_from_step(self, step: int) -> None:
        """Forget readings and alarms after this step: they will be taken again."""
        if (self.folder / HEALTH).exists():
            events = [event for event in read_lines(self.folder / HEALTH) if event["step"] <= step]
            write_atomic(self.folder / HEALTH, "".join(json.dumps(event) + "\n" for event in events))
        if self.page is not None:
            self.page.drop_alarms(step)

    def _event(self, event: Mapping[str, Any]) -> None:
        """One line, in one write, on the disk when this returns: a reader never sees half of it."""
        handle = os.open(self.folder / HEALTH, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps(event) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def results(self, table: Table, records: Mapping[str, Any]) -> None:
        """The final comparison: ``results.json``, on top of the report, and in W&B's summary."""
        text = json.dumps(records, indent=2) + "\n"
        self.keep("write results.json", lambda: write_atomic(self.folder / "results.json", text))
        if self.page is not None:
            self.keep("write the report", lambda: self._finish_page(table))
        if self.wandb_logger is not None:
            survive("log the results to W&B", lambda: self._results_to_wandb(table))

    def _finish_page(self, table: Table) -> None:
        assert self.page is not None
        self.page.write_results(table)
        self.page.finish()  # one self-contained file from now on

    def _results_to_wandb(self, table: Table) -> None:
        assert self.wandb_logger is not None
        rows = [list(row) for row in table.rows]
        payload = {"tables/results": wandb.Table(columns=list(table.columns), data=rows)}
        self.wandb_logger.experiment.log(payload)

    def finish(self) -> None:
        """The page as one self-contained file, and the end of the W&B run."""
        if self.page is not None:
            self.keep("write the report", self.page.finish)
        self.close()

    def close(self) -> None:
        """End the W&B run, also after a failure: in a sweep the next run must not go on with it."""
        if self.wandb_logger is not None:
            survive("send all to W&B (it is kept on disk; send it later with: wandb sync DIRECTORY)", wandb.finish)

    def _write_csv(self) -> None:
        columns = list(dict.fromkeys(name for row in self.history for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_atomic(self.folder / "metrics.csv", text.getvalue())


_told: set[str] = set()


def log_tables(folder: Path, project: str, mode: WandbMode, tables: Mapping[str, Table], page: str) -> None:
    """A comparison as a W&B run of its own: its tables, and its page."""
    run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:10]
    logger = wandb_logger(folder, project, mode, run_id, folder.name, {}, ["comparison"])
    if logger is None:
        return
    payload: dict[str, Any] = {
        f"tables/{name}": wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        for name, table in tables.items()
    }
    payload["comparison/page"] = wandb.Html(page, inject=False)
    survive("log a comparison", lambda: logger.experiment.log(payload))
    survive("finish", wandb.finish)


def survive(what: str, call: Callable[[], Any]) -> str:
    """Records are guests: where one can't be written, training goes on, and the next one is tried.  Said once each.

    Returns why it failed, or an empty text.
    """
    try:
        call()
        return ""
    except Exception as error:
        # Without the name of the file, which differs each time.
        reason = f"{type(error).__name__}: {(isinstance(error, OSError) and error.strerror) or error}"
        message = f"could not {what} ({reason}); training goes on"
        if message not in _told:
            _told.add(message)
            warnings.warn(message, stacklevel=3)
        return reason


class _PatientWandbLogger(WandbLogger):
    """Lightning's logger, whose failures do not end a run."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        survive("log metrics to W&B", lambda: super(_PatientWandbLogger, self).log_metrics(metrics, step))

    def log_hyperparams(self, params: Any) -> None:
        survive("log the config to W&B", lambda: super(_PatientWandbLogger, self).log_hyperparams(params))


def open_log(folder: str | Path, project: str = "glassarmor", mode: WandbMode = "auto") -> RunLog:
    """A log for a training of one's own: the page, ``metrics.csv`` and W&B in a folder; the same folder goes on.

    Args:
        folder: made when missing; its name is the run's.
        mode: of W&B, see :func:`wandb_logger`.

    Example:
        >>> log = open_log("my-run", mode="disabled")  # doctest: +SKIP
    """
    check_wandb_mode(mode)
    folder = Path(folder)
    page = ReportPage(folder / "report", folder.resolve().name)
    run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:10]
    return RunLog(folder, page, wandb_logger(folder, project, mode, run_id, folder.resolve().name, {}))


def check_wandb_mode(mode: str) -> None:
    """Raises ValueError for an unknown mode."""
    require_one_of("wandb.mode", mode, get_args(WandbMode))


def wandb_logger(
    folder: Path,
    project: str,
    mode: WandbMode,
    run_id: str,
    name: str,
    config: Mapping[str, Any],
    tags: Sequence[str] = (),
) -> WandbLogger | None:
    """A W&B run whose files lie in the run folder.  Never prompts; without a key, or without a server, it is offline.

    Args:
        mode: "auto" is online where a key is configured, else offline; "disabled" gives None.
        run_id: the same id continues the same run.
    """
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ["WANDB_DATA_DIR"] = str(folder / "wandb")  # else images inside Tables land outside the run folder
    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    asked = os.environ.get("WANDB_MODE", "")
    offline = mode == "offline" or asked in ("offline", "dryrun") or not _has_key()
    if mode == "online" and offline:
        warnings.warn("wandb.mode=online, but no API key is configured: this run is recorded offline", stacklevel=2)
    for attempt_offline in dict.fromkeys((offline, True)):
        run_logger = _PatientWandbLogger(
            name=name,
            project=project,
            id=run_id,
            save_dir=str(folder),
            mode="offline" if attempt_offline else "online",  # Lightning's own offline=True would outlive the run
            resume="allow",
            tags=list(tags),
            config=dict(config),
            settings=wandb.Settings(
                silent=True, init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT, finish_timeout_raises=True
            ),
        )
        try:
            run_logger.experiment.define_metric("*", step_metric="trainer/global_step")
        except Exception as error:
            if attempt_offline:
                warnings.warn(f"W&B is unavailable ({error}); this run is recorded locally only", stacklevel=2)
                return None
            warnings.warn(f"W&B server not reached ({error}); this run is recorded offline", stacklevel=2)
            # Else its service holds the run id of the failed attempt; where that has crashed, there is none to end.
            survive("end W&B's service", wandb.teardown)
        else:
            return run_logger
    return None


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc(os.environ.get("NETRC")).hosts
    except (OSError, NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
