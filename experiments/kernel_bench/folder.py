"""The folder of one run: a JSON file per part, so that a later call goes on where this one stopped."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.kernel_bench.operations import BenchError

_MUST_AGREE = ("dry_run", "device", "versions", "sources", "tables")


class Folder:
    """Reads and writes the parts; refuses to mix two machines, two sets of versions or two states of the kernels.

    Args:
      path: made if it is not there.
      facts: of `machine.facts`; each part is stored with them.

    Raises:
      BenchError: the folder holds parts that were measured under other circumstances.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path, self._facts = path, dict(facts)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BenchError(f"--out={path}: {error.strerror}; name a folder that can be made") from error
        for part_path in sorted(path.glob("part-*.json")):
            stored = self._load(part_path).get("machine", {})
            for key in _MUST_AGREE:
                if stored.get(key) != self._facts.get(key):
                    raise BenchError(
                        f"--out={path}: {part_path.name} was measured with {key}={stored.get(key)}, now it is "
                        f"{self._facts.get(key)}; give another folder"
                    )
        started = path / "running.json"
        if started.exists():  # the process that wrote it ended before it could take it away
            self._write(path / "crashed.json", [*self.crashed(), self._load(started)])
            started.unlink()

    def read(self, part: str) -> dict[str, Any] | None:
        """The part's record, None if it was never started."""
        path = self._file(part)
        return self._load(path) if path.exists() else None

    def is_done(self, part: str) -> bool:
        record = self.read(part)
        return record is not None and bool(record["complete"])

    def write(self, part: str, content: Mapping[str, Any], *, complete: bool) -> None:
        record = {"part": part, "complete": complete, "machine": self._facts, **content}
        self._write(self._file(part), record)

    @contextlib.contextmanager
    def running(self, part: str, contender: str, step: str) -> Iterator[None]:
        """Leaves a note while a contender runs for the first time; if it ends the process, the note is all there is.

        An exception leaves it too: what a contender raises is caught inside, unless the device is gone.
        """
        note = self.path / "running.json"
        self._write(note, {"part": part, "contender": contender, "step": step})
        yield
        note.unlink()

    def crashed(self) -> list[dict[str, str]]:
        """Part, contender and step of everything that ended an earlier process."""
        path = self.path / "crashed.json"
        return self._load(path) if path.exists() else []

    def _file(self, part: str) -> Path:
        return self.path / f"part-{part.replace('/', '.')}.json"

    def _load(self, path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BenchError(
                f"{path} cannot be read ({type(error).__name__}): delete it or give another --out"
            ) from error

    def _write(self, path: Path, content: Any) -> None:
        unfinished = path.with_suffix(".writing")
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
