"""What `kvtiers compare` has measured, kept as it comes."""

import json
from collections.abc import Sequence
from pathlib import Path

import attrs

from kvtiers import PolicyError
from kvtiers_transformers.compare_report import Row

ANY_SIZE = "any"
"""The budget of what attends everything: it is measured once, and stands in the tables of all budgets."""


@attrs.frozen(kw_only=True)
class Job:
    """One policy on one text. settings: what its name stood for. code: what `code_of` says of it. tasks: those of the
    text. on: what it was run on."""

    policy: str
    settings: str
    code: str
    budget: str
    tasks: str
    seed: int
    on: str

    @property
    def made_of(self) -> tuple[str, str]:
        """What a policy was whose name may have stood for others before."""
        return self.settings, self.code


class Results:
    """What was measured, in a file of one JSON line a text. A line that was not written whole is left out."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PolicyError(f"--out {folder} cannot be made: {error.strerror}; give another folder") from error
        self._rows: dict[Job, list[Row]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                said = json.loads(line)
                self._rows[Job(**said["job"])] = [Row(**row) for row in said["rows"]]
            except (ValueError, TypeError, KeyError):
                continue

    def __contains__(self, job: Job) -> bool:
        return job in self._rows

    def rows(self, jobs: Sequence[Job], budget: str) -> list[Row]:
        """What was measured of jobs under `budget`, and of other policies on the same texts.

        Where a name stood for other settings or other code before, only the newest count.
        """
        mine = [job for job in jobs if job.budget in (budget, ANY_SIZE)]
        known = [job for job in self._rows if job.budget in (budget, ANY_SIZE)]
        latest = {job.policy: job.made_of for job in (*known, *mine)}
        asked = {(job.tasks, job.seed, job.on) for job in jobs}
        others = [
            job
            for job in known
            if (job.tasks, job.seed, job.on) in asked and job.made_of == latest[job.policy] and job not in mine
        ]
        return [row for job in (*mine, *others) for row in self._rows.get(job, ())]

    def add(self, job: Job, rows: Sequence[Row]) -> None:
        """Keep results for good."""
        self._rows[job] = list(rows)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn)
            file.write(json.dumps({"job": attrs.asdict(job), "rows": [attrs.asdict(row) for row in rows]}) + "\n")
