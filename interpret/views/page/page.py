"""The local report: one page a run, opened straight from disk, that grows by an epoch at a time.

    report/index.html                the page: markup, style, program, colour tables
    report/data/manifest.js          what every epoch shares: numbers over epochs, headlines, colour scales, results
    report/data/epoch_00003.js       the maps and tables of one epoch, loaded when it is looked at

Data come as classic scripts because browsers refuse fetch and module scripts on file://.  Every file is replaced
atomically, data before the manifest that names them, so an open page never sees half an epoch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup

from glassarmor.interpret.storage import plain, to_json, write_atomic
from glassarmor.interpret.views.charts import Stored, Table, Trend
from glassarmor.interpret.views.draw import raster
from glassarmor.interpret.views.page.changes import changes
from glassarmor.interpret.views.page.encode import encode, in_base64
from glassarmor.interpret.views.view import View

SCHEMA: Final = 1
START: Final = Markup("GLASSARMOR.start();")
_MANIFEST_CALL, _EPOCH_CALL = "GLASSARMOR.manifest(", "GLASSARMOR.epoch("


@dataclass(frozen=True)
class KeyFigure:
    """A number of the overview, with its change since the previous and the first epoch."""

    key: str
    label: str
    unit: str = ""
    higher_is_better: bool | None = None  # None: a change is neither good nor bad


KEY_FIGURES: Final = (
    KeyFigure("val/robust_acc", "Robust accuracy, held out", "%", True),
    KeyFigure("val/clean_acc", "Clean accuracy, held out", "%", True),
    KeyFigure("train/robust_acc", "Robust accuracy, training", "%", True),
    KeyFigure("train/loss", "Training loss", "", False),
)
QUESTIONS: Final = (  # what a newcomer wants to know, in this order; panels answer
    ("trust", "Can this number be trusted?"),  # of an evaluation by a suite
    ("healthy", "Is this defense healthy?"),
    ("where", "Where in the net does the attack win?"),
    ("units", "Which units carry it?"),
    ("changed", "What changed?"),
    ("next", "What to try next?"),
)
OVERVIEW: Final = Trend(
    "Held-out accuracy over epochs", ("val/clean_acc", "val/robust_acc"), ("clean", "robust"), "%", limits=(0.0, 1.0)
)


class ReportPage:
    """Writes and extends the report of one run.  Opening an existing folder keeps its epochs.

    Args:
        folder: where ``index.html`` lives, made when missing.
        title: name of the run.
        meta: what the run was, shown in the overview in this order, e.g. dataset, defense, ε, seed, commit.
        key_figures, overview: the numbers and the trend of the overview; no trend suits a page of one moment.
        max_side: larger images and maps are stored as block means of at most this many pixels a side.

    Raises:
        ValueError: the folder holds a report of another format.
    """

    def __init__(
        self,
        folder: str | Path,
        title: str,
        meta: Mapping[str, object] | None = None,
        *,
        key_figures: Sequence[KeyFigure] = KEY_FIGURES,
        overview: Trend | None = OVERVIEW,
        max_side: int = 64,
    ) -> None:
        self.folder = Path(folder)
        self.data = self.folder / "data"
        self.data.mkdir(parents=True, exist_ok=True)
        self.max_side = max_side
        before = self._read_manifest()
        self._manifest: dict[str, Any] = {
            "schema": SCHEMA,
            "title": title,
            "meta": [[key, str(value)] for key, value in (meta or {}).items()],
            "keyFigures": [asdict(figure) for figure in key_figures],
            "questions": QUESTIONS,
            "overview": None if overview is None else encode(overview).chart,
            "results": before.get("results"),
            "complete": False,
            "epochs": before.get("epochs", []),
            "alarms": before.get("alarms", []),
        }
        self._write_index(inline=False)
        self._write_manifest()

    @property
    def index(self) -> Path:
        """The file to open."""
        return self.folder / "index.html"

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs the page holds."""
        return tuple(entry["epoch"] for entry in self._manifest["epochs"])

    def write_epoch(
        self, epoch: int, step: int, scalars: Mapping[str, float], views: Sequence[View], note: str = ""
    ) -> None:
        """Add an epoch, or replace the one of this number.  ``note`` is shown as a warning beside the headlines."""
        stored = {key: e["epoch"] for e in self._manifest["epochs"] if e["epoch"] < epoch for key in e["blobs"]}
        numbers = dict(scalars)
        limits: dict[str, list[float]] = {}
        blobs: dict[str, str] = {}
        needs: set[int] = set()
        shown = []
        for view in views:
            numbers.update(view.scalars)
            charts = []
            for i, chart in enumerate(view.charts):
                encoded = encode(chart, self.max_side)
                charts.append(encoded.chart)
                limits.update({f"{view.name}/{i}/{group}": values for group, values in encoded.limits.items()})
                for key, data in encoded.blobs.items():
                    if key in stored:
                        needs.add(stored[key])
                    else:
                        blobs[key] = data
            shown.append(
                {
                    "name": view.name,
                    "title": view.title,
                    "headline": view.headline,
                    "howToRead": view.how_to_read,
                    "charts": charts,
                }
            )
        body = packed({"epoch": epoch, "views": shown, "blobs": blobs})
        entry: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "note": note,
            "file": f"epoch_{epoch:05d}.js",
            "tag": hashlib.blake2b(body.encode(), digest_size=6).hexdigest(),  # a rewritten epoch is loaded afresh
            "needs": sorted(needs),
            "blobs": list(blobs),
            "scalars": numbers,
            "headlines": [{"name": v.name, "title": v.title, "headline": v.headline} for v in views],
            "limits": limits,
            "answers": [{**asdict(answer), "panel": view.name} for view in views for answer in view.answers],
        }
        write_atomic(self.data / entry["file"], f"{_EPOCH_CALL}{body});\n")
        # Later epochs may lean on the images of the epoch that is replaced, so they go: they are a past that is rewritten.
        kept = [e for e in self._manifest["epochs"] if e["epoch"] < epoch]
        for other in kept[:1] + kept[1:][-1:]:  # the first epoch and the one before
            if text := changes(other["scalars"], plain(numbers)):
                text = f"Since epoch {other['epoch']}: {text}."
                entry["answers"].append({"question": "changed", "text": text, "command": "", "panel": ""})
        self._replace_epochs([*kept, entry])

    def write_results(self, table: Table) -> None:
        """The final comparison, shown first in the overview from now on."""
        self._manifest["results"] = encode(table).chart
        self._write_manifest()

    def add_alarm(self, epoch: int, step: int, text: str, action: str = "") -> None:
        """A mark on every trend at this epoch, and a line in the overview: what was wrong, and what was done."""
        self._manifest["alarms"].append({"epoch": epoch, "step": step, "text": text, "action": action})
        self._write_manifest()

    def drop_alarms(self, step: int) -> None:
        """Forget the alarms after ``step``: a resumed run goes on from there."""
        self._manifest["alarms"] = [alarm for alarm in self._manifest["alarms"] if alarm["step"] <= step]
        self._write_manifest()

    def drop_from(self, epoch: int) -> None:
        """Forget every epoch ≥ ``epoch``: a resumed run will write them again."""
        self._replace_epochs([e for e in self._manifest["epochs"] if e["epoch"] < epoch])

    def finish(self, inline: bool = True) -> Path:
        """Mark the run as complete; with ``inline``, ``index.html`` then holds everything and can be sent alone."""
        self._manifest["complete"] = True
        self._write_manifest()
        self._write_index(inline)
        return self.index

    def one_epoch(self, epoch: int) -> str:
        """A page of this epoch alone, whole in itself: what W&B keeps of an epoch.

        Raises:
            ValueError: the page holds no such epoch.
        """
        entries = {e["epoch"]: e for e in self._manifest["epochs"]}
        if epoch not in entries:
            raise ValueError(f"epoch: expected one of {sorted(entries)}, found {epoch}")
        entry = entries[epoch]
        body = whole_epoch(self.data, entries, epoch)
        alone = {**self._manifest, "epochs": [{**entry, "needs": []}], "complete": True, "overview": None, "results": None}
        return self._render(alone, [(entry["file"], packed(body))])

    def _replace_epochs(self, entries: list[dict[str, Any]]) -> None:
        gone = {e["file"] for e in self._manifest["epochs"]} - {e["file"] for e in entries}
        self._manifest["epochs"] = entries
        self._write_manifest()
        for name in gone:
            (self.data / name).unlink(missing_ok=True)

    def _read_manifest(self) -> dict[str, Any]:
        path = self.data / "manifest.js"
        return read_manifest(path) if path.exists() else {}

    def _write_manifest(self) -> None:
        write_atomic(self.data / "manifest.js", f"{_MANIFEST_CALL}{to_json(self._manifest)});\n")

    def _write_index(self, inline: bool) -> None:
        bodies = [(e["file"], _script_body(self.data / e["file"])) for e in self._manifest["epochs"] if inline]
        write_atomic(self.index, self._render(self._manifest if inline else None, bodies))

    def _render(self, manifest: dict[str, Any] | None, bodies: Sequence[tuple[str, str]]) -> str:
        """The page, with this manifest and these epochs (file, JSON) inside, or with neither."""
        files = resources.files("glassarmor.interpret.views.page").joinpath("assets")
        environment = jinja2.Environment(autoescape=True, keep_trailing_newline=True)
        style = _trusted(files, "style.css")
        program = _trusted(files, "charts.js") + _trusted(files, "profiles.js") + _trusted(files, "app.js")
        return environment.from_string(files.joinpath("index.html").read_text(encoding="utf-8")).render(
            policy=policy((program, START), style, beside=manifest is None),
            title=self._manifest["title"],
            style=style,
            program=program,
            start=START,
            colours=_json_markup(colour_tables()),
            manifest=None if manifest is None else _json_markup(manifest),
            epochs=[(file, Markup(body.replace("<", "\\u003c"))) for file, body in bodies],
        )


def policy(programs: Sequence[str], style: str, beside: bool) -> str:
    """The page's content security policy: these programs and this style run, and nothing else, whatever a name holds.

    ``beside``: the data lie in scripts beside the page; else it needs no file and no server at all.
    """

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"

    scripts = " ".join([*map(digest, programs), *(["'self'"] if beside else [])])
    return (
        f"default-src 'none'; script-src {scripts}; style-src {digest(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _trusted(files: Traversable, name: str) -> Markup:
    return Markup(files.joinpath(name).read_text(encoding="utf-8"))


def _json_markup(value: Any) -> Markup:
    return Markup(to_json(value))


def colour_tables() -> dict[str, Any]:
    """The colours of :mod:`glassarmor.interpret.views.draw.raster` for the page, so that both draw alike."""
    return {
        "signed": in_base64(raster.DIVERGING),
        "positive": in_base64(raster.SEQUENTIAL),
        "noValue": raster.NO_VALUE.tolist(),
        "categories": raster.CATEGORIES,
        "series": raster.SERIES,
    }


def packed(epoch: Mapping[str, Any]) -> str:
    """An epoch as JSON, deflated: a third of its size, so that a hundred epochs fit into one file that can be sent."""
    body = base64.b64encode(zlib.compress(to_json(epoch).encode(), 9)).decode("ascii")
    return to_json({"epoch": epoch["epoch"], "deflated": body})


def read_manifest(path: Path) -> dict[str, Any]:
    """What all epochs of a report share, from its ``manifest.js``.

    Raises:
        ValueError: of another version, or damaged; names the file.
    """
    try:
        manifest: dict[str, Any] = read_script(path)
        if manifest["schema"] != SCHEMA:
            raise ValueError(f"schema {manifest['schema']}, expected {SCHEMA}")
        if not all(isinstance(manifest[name], list) for name in ("epochs", "alarms")):
            raise ValueError("epochs and alarms are no lists")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no report of this version ({error}); move the folder away") from error
    return manifest


def read_script(path: Path) -> Any:
    """The JSON inside one of the data scripts, that of an epoch unpacked."""
    body = json.loads(_script_body(path))
    return json.loads(zlib.decompress(base64.b64decode(body["deflated"]))) if "deflated" in body else body


def whole_epoch(data: Path, entries: Mapping[int, Mapping[str, Any]], epoch: int) -> dict[str, Any]:
    """An epoch with all the pictures it shows, those too that an earlier one holds."""
    body: dict[str, Any] = read_script(data / entries[epoch]["file"])
    pictures = set(re.findall(r'"blob":"(\w+)"', to_json(body["views"])))
    for number in entries[epoch]["needs"]:
        known = read_script(data / entries[number]["file"])["blobs"]
        body["blobs"] |= {key: known[key] for key in pictures & known.keys()}
    return body


def stored_charts(report: Path, epoch: int, view: str) -> tuple[Stored, ...]:
    """The charts of a view as a report holds them; none where it holds no such epoch or view."""
    if not (report / "data" / "manifest.js").is_file():
        return ()
    entries = {entry["epoch"]: entry for entry in read_script(report / "data" / "manifest.js")["epochs"]}
    if epoch not in entries:
        return ()
    body = whole_epoch(report / "data", entries, epoch)
    charts: list[dict[str, Any]] = next((v["charts"] for v in body["views"] if v["name"] == view), [])
    limits = entries[epoch]["limits"]
    return tuple(
        Stored(
            chart,
            body["blobs"],
            {k.removeprefix(f"{view}/{i}/"): v for k, v in limits.items() if k.startswith(f"{view}/{i}/")},
        )
        for i, chart in enumerate(charts)
    )


def _script_body(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return text[text.index("(") + 1 : text.rindex(")")]
