"""The parent run of a sweep in MLflow: found or made by the sweep's name, it holds the sweep's figure and table."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from data_pipeline.errors import UsageError
from mae_scale.config.sections import TrackingSection
from mae_scale.passwords import redacted
from mae_scale.tracking.mlflow_environment import quieten_loggers, reason, set_environment
from mae_scale.tracking.mlflow_uri import artifact_location, tracking_uri
from mae_scale.tracking.sqlite_database import new_sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

SWEEP_TAG = "mae_scale.sweep"
TASK_TAG, PARENT = "mae_scale.task", "sweep"
KEY_TAG, FOLDER_TAG = "mae_scale.sweep_key", "mae_scale.sweep_folder"
NOTE_TAG, OUR_NOTE_TAG = "mlflow.note.content", "mae_scale.note_digest"
PARENT_ID_TAG, TABLES_TAG = "mlflow.parentRunId", "mlflow.loggedArtifacts"
NOTE_LENGTH = 5000
NAME = re.compile(r"[\w.+\- ]+")
PER_PAGE = 1000
Tables = Mapping[str, Mapping[str, Sequence[Any]]]
"""{file name: {column: values}}"""


def check_name(name: str) -> None:
    """Raise UsageError for a name that cannot be searched for in MLflow."""
    if not NAME.fullmatch(name):
        raise UsageError(f"the sweep's name {name!r} is not possible: expected letters, digits, spaces and . _ + -")


def find_or_make_parent(client: MlflowClient, experiment_id: str, name: str) -> Run:
    """Return the parent run of a sweep; of several, which runs that start at once may make, the first stays.

    Raises what MLflow raises.
    """
    found = _parents(client, experiment_id, name)
    if found:
        return found[0]
    made = client.create_run(
        experiment_id,
        start_time=int(1000 * time.time()),
        tags={SWEEP_TAG: name, TASK_TAG: PARENT, "mlflow.source.name": "mae-scale"},
        run_name=name,
    )
    first = _parents(client, experiment_id, name)[0]
    if first.info.run_id != made.info.run_id:
        client.delete_run(made.info.run_id)
    return first


def join_sweep(client: MlflowClient, run: Run, name: str) -> None:
    """Make a run a child of the sweep's parent run."""
    parent = find_or_make_parent(client, run.info.experiment_id, name)
    for tag, value in ((SWEEP_TAG, name), (PARENT_ID_TAG, parent.info.run_id)):
        if run.data.tags.get(tag) != value:
            client.set_tag(run.info.run_id, tag, value)


def _parents(client: MlflowClient, experiment_id: str, name: str) -> list[Run]:
    where = f"tags.`{SWEEP_TAG}` = '{name}' and tags.`{TASK_TAG}` = '{PARENT}'"
    found = client.search_runs([experiment_id], where, max_results=10)
    return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))


@dataclass(frozen=True)
class SweepResults:
    """What the parent run shows."""

    description: str
    """Markdown."""
    figures: Sequence[Path]
    tables: Tables
    status: str
    """RUNNING, FINISHED or FAILED."""
    in_description: Sequence[Path] = ()
    """Figures that the description shows too: MLflow never makes them smaller, 760 px fit beside its column of tags."""


@dataclass
class MlflowSweep:
    """The side of a sweep's own command: its parent run, and which of its children MLflow has.

    A server that does not answer costs one warning; everything stays in the runs' folders, and the same command
    delivers it.
    """

    uri: str | None
    """None: tracking is off, and nothing is done."""
    experiment: str
    name: str
    key: str | None
    """Tells this sweep from another of its name; None: not known, any sweep of the name will do."""
    out: Path
    _answers: bool = field(default=True, init=False)

    @classmethod
    def of(cls, tracking: TrackingSection, out: Path, name: str, key: str | None) -> MlflowSweep:
        """Return the sweep of runs with these settings whose folders lie in `out`."""
        return cls(tracking_uri(tracking.uri, out / "run"), tracking.experiment, name, key, out)

    def claim(self) -> None:
        """Make the parent run, or find it. Raises UsageError when it is another sweep's."""
        self._reach(lambda client: self._own_parent(client))

    def children(self) -> dict[str, str] | None:
        """Return {run id: status} of the sweep's children that are not deleted; None when MLflow does not tell."""
        return self._reach(lambda client: {run.info.run_id: run.info.status for run in self._children(client)})

    def is_deleted(self, run_id: str | None) -> bool:
        """Return whether MLflow has a run as deleted."""
        return bool(self._reach(lambda client: run_id and client.get_run(run_id).info.lifecycle_stage == "deleted"))

    def publish(self, results: SweepResults) -> None:
        """Show the results on the parent run, in place of earlier ones."""
        self._reach(lambda client: self._publish(client, results))

    def add(self, figures: Sequence[Path], tables: Tables) -> None:
        """Show figures and tables on the parent run too."""
        self._reach(lambda client: _add(client, self._own_parent(client), figures, tables))

    def _reach(self, action: Callable[[MlflowClient], Any]) -> Any:
        if self.uri is None:
            return None
        set_environment()
        from mlflow import MlflowClient

        quieten_loggers()
        try:
            new_sqlite_file(self.uri, MlflowClient)
            found = action(MlflowClient(self.uri))
        except UsageError:
            raise
        except Exception as error:
            if self._answers:
                logger.warning(
                    "MLflow (%s) does not take the sweep %s: %s. The runs wait in %s; the same command delivers them",
                    redacted(self.uri),
                    self.name,
                    reason(error),
                    self.out,
                )
            self._answers = False
            return None
        self._answers = True
        return found

    def _experiment_id(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            assert self.uri is not None
            return str(client.create_experiment(self.experiment, artifact_location(self.uri, self.out / "run")))
        if found.lifecycle_stage != "active":
            raise UsageError(
                f"MLflow's experiment {self.experiment!r} is deleted; restore it or set tracking.experiment"
            )
        return str(found.experiment_id)

    def _own_parent(self, client: MlflowClient) -> Run:
        run = find_or_make_parent(client, self._experiment_id(client), self.name)
        tags = run.data.tags
        if self.key is None:
            return run
        if tags.get(KEY_TAG, self.key) != self.key:
            raise UsageError(
                f"MLflow's experiment {self.experiment!r} has a sweep {self.name!r} already, of "
                f"{tags.get(FOLDER_TAG)}; give this one a --name of its own, or go on with that --out"
            )
        for tag, value in ((KEY_TAG, self.key), (FOLDER_TAG, str(self.out.absolute()))):
            if tags.get(tag) != value:
                client.set_tag(run.info.run_id, tag, value)
        return run

    def _children(self, client: MlflowClient) -> list[Run]:
        experiment, where = self._experiment_id(client), f"tags.`{SWEEP_TAG}` = '{self.name}'"
        found: list[Run] = []
        token = None
        while True:
            page = client.search_runs([experiment], where, max_results=PER_PAGE, page_token=token)
            found += [run for run in page if run.data.tags.get(TASK_TAG) != PARENT]
            token = page.token
            if not token:
                return found

    def _publish(self, client: MlflowClient, results: SweepResults) -> None:
        run = self._own_parent(client)
        run_id, tags = run.info.run_id, run.data.tags
        for child in self._children(client):
            if child.data.tags.get(PARENT_ID_TAG) != run_id:  # that of a parent that was deleted
                client.set_tag(child.info.run_id, PARENT_ID_TAG, run_id)
        # A user's own text stays: only what was written here is replaced.
        note = _note(results, run_id)
        if NOTE_TAG not in tags or tags.get(OUR_NOTE_TAG) == _digest(tags[NOTE_TAG]):
            client.set_tag(run_id, NOTE_TAG, note)
            client.set_tag(run_id, OUR_NOTE_TAG, _digest(note))
        _add(client, run, results.figures, results.tables)
        if results.status == "RUNNING":
            client.update_run(run_id, "RUNNING")
        else:
            client.set_terminated(run_id, results.status)


def _note(results: SweepResults, run_id: str) -> str:
    """Return the description with its figures below it, where MLflow's server has them."""
    names = [figure.name for figure in results.in_description]
    figures = "".join(f"\n\n![{name}](get-artifact?path={quote(name)}&run_uuid={run_id})" for name in names)
    return redacted(results.description)[: NOTE_LENGTH - len(figures)] + figures


def _add(client: MlflowClient, run: Run, figures: Sequence[Path], tables: Tables) -> None:
    """Log figures and tables in place of those of the same names."""
    run_id = run.info.run_id
    for figure in figures:
        client.log_artifact(run_id, str(figure))
    for name, columns in tables.items():
        # As MLflow's log_table writes it, which would add to an earlier table instead of replacing it.
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        client.log_text(run_id, json.dumps({"columns": list(columns), "data": rows}), name)
    known = [table["path"] for table in json.loads(run.data.tags.get(TABLES_TAG, "[]"))]
    shown = [{"path": name, "type": "table"} for name in dict.fromkeys([*known, *tables])]
    client.set_tag(run_id, TABLES_TAG, json.dumps(shown))


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]
