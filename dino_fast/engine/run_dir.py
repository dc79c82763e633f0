"""The directory of a run, complete in itself.

config.yaml       the configuration as it was used
metrics.jsonl     one JSON object a step, flushed at once
log.txt           messages and warnings with their time
events.out.*      TensorBoard
checkpoints/      see `dino_fast.engine.checkpoint`
export/           the trained backbone
.lock             held by the process that writes here; see `dino_fast.engine.run_lock`
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from dino_fast.atomic import atomic_write
from dino_fast.engine.config import with_present_names
from dino_fast.engine.distributed import SINGLE_PROCESS, DistContext
from dino_fast.engine.run_lock import RunLock
from dino_fast.errors import UserError, unwritable

# A directory with any of these is a run. One that holds only other files may become one.
MARKS = ("config.yaml", "metrics.jsonl", "checkpoints")

# TensorBoard groups curves by what comes before the slash.
_TAGS = {
    "lr": "schedule/lr",
    "weight_decay": "schedule/weight_decay",
    "momentum": "schedule/momentum",
    "teacher_temp": "schedule/teacher_temp",
    "images_per_second": "speed/images_per_second",
    "data_wait": "speed/data_wait",
    "memory": "speed/memory",
    "tokens_per_second": "speed/tokens_per_second",
    "tflops": "speed/tflops",
    "mfu": "speed/mfu",
    "knn": "eval/knn_teacher",
    "knn_student": "eval/knn_student",
}
_UNPLOTTED = {"step"}


def open_run(
    out: Path | None,
    config: dict[str, Any],
    resume: bool,
    context: DistContext = SINGLE_PROCESS,
    check: Callable[[Path], None] | None = None,
) -> RunDir:
    """Make or reopen a run directory, lock it, and write `config` (plain values) to its config.yaml.

    `out` None makes `runs/<date-time>` below the working directory. With `resume` the run in `out` is continued, or
    begun where there is none. `check` is called with the directory before a file of the run changes and may refuse it
    with a UserError. Raises `UserError` for an `out` that holds a run (without `resume`; one without a step and a
    checkpoint, which a start that failed leaves, is used again), that another process writes to, is a file, or cannot
    be written to; nothing is changed then. Of several processes the first makes it, and alone writes to it.
    """
    locks: list[RunLock] = []
    path = context.run_on_rank0(lambda: _make_run(out, config, resume, locks, check))
    return RunDir(path, writes=context.first, lock=locks[0] if locks else None)


def run_marks(path: Path) -> list[str]:
    """The files and folders in a directory that make it a run."""
    return [name for name in MARKS if (path / name).exists()]


def _make_run(
    out: Path | None,
    config: dict[str, Any],
    resume: bool,
    locks: list[RunLock],
    check: Callable[[Path], None] | None,
) -> Path:
    if out is None:
        if resume:
            raise UserError("--resume needs the run's directory: add --out DIR" + _newest_run())
        path = _fresh(Path("runs"))
    else:
        path = Path(out)
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path} is a file; give a directory, new or empty")
        _refuse_taken(path, resume)
    with _writable(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(path)
    try:
        _refuse_taken(path, resume)  # another process may have begun one since
        if check is not None:
            check(path)
        with _writable(path):
            for folder in (path / "checkpoints", path / "export"):
                folder.mkdir(parents=True, exist_ok=True)
            RunDir(path)._write_config(config)
    except BaseException:
        lock.release()
        raise
    locks.append(lock)
    return path


def _refuse_taken(path: Path, resume: bool) -> None:
    marks = run_marks(path)
    if marks and not resume and not _is_unused(path):
        raise UserError(
            f"--out {path} already holds a run ({', '.join(marks)}). Continue it with --resume, "
            "or give another --out to start a new one"
        )


def _is_unused(path: Path) -> bool:
    """Whether this is what a start that failed leaves: the folders of a run without a step and a checkpoint."""
    metrics, checkpoints = path / "metrics.jsonl", path / "checkpoints"
    began = metrics.exists() and metrics.stat().st_size > 0
    ours = (path / "config.yaml").exists() and checkpoints.is_dir() and (path / "export").is_dir()
    return ours and not began and not any(checkpoints.iterdir())


class RunDir:
    """An open run directory. `path`, `checkpoints` and `export` are its folders. Close it, or use it in a `with`.

    Without `writes` (ranks other than 0), metrics are dropped; messages still go to log.txt. `lock` is held until it is
    closed.
    """

    def __init__(self, path: Path, writes: bool = True, lock: RunLock | None = None) -> None:
        self.writes, self._lock = writes, lock
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.export = path / "export"
        self._metrics: IO[str] | None = None
        self._board: Any = None
        self._wandb: Any = None
        self._purge: int | None = None

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and the numbers to TensorBoard.

        Values are numbers (also one-element tensors), strings, booleans or None; `step` is required. inf and NaN become
        null, since JSON has neither. The line is handed to the system at once: a killed process loses nothing.
        """
        if not self.writes:
            return
        row = {name: _plain(value) for name, value in metrics.items()}
        if type(row.get("step")) is not int:
            raise ValueError(f"metrics need an integer `step`, got {metrics.get('step')!r}")
        with _writable(self.path):
            if self._metrics is None:
                self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
            self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
            self._metrics.flush()
        self._plot(row)
        if self._wandb is not None:
            self._wandb.log(
                {_TAGS.get(name, f"train/{name}"): x for name, x in row.items() if name != "step"}, step=row["step"]
            )

    def init_wandb(self, project: str, config: dict[str, Any]) -> None:
        """Log to Weights & Biases as well; a run that is continued goes on under the name of its directory.

        Raises UserError where the package is not installed.
        """
        if not self.writes:
            return
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb needs the package of that name: pip install 'dino-fast[wandb]'") from None
        identity = f"{self.path.resolve().name}-{zlib.crc32(str(self.path.resolve()).encode()):08x}"
        plain = {name: _yaml_value(value) for name, value in config.items()}
        self._wandb = wandb.init(
            project=project, name=self.path.name, id=identity, resume="allow", dir=str(self.path), config=plain
        )

    def truncate_metrics(self, step: int) -> None:
        """Drop every metrics line beyond `step` and a torn last one, so that a resumed run has each step once."""
        if not self.writes:
            return
        self._close_metrics()
        path = self.path / "metrics.jsonl"
        if path.exists():
            rows = [row for row in read_metrics(path) if row["step"] <= step]
            with atomic_write(path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._close_board()
        self._purge = step + 1

    def log_text(self, text: str) -> None:
        """Append a message with the time to log.txt."""
        log = self.path / "log.txt"  # names of files may hold what UTF-8 cannot
        with _writable(self.path), open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n")

    def close(self) -> None:
        """Closes metrics.jsonl, TensorBoard and W&B."""
        self._close_metrics()
        self._close_board()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_config(self, config: dict[str, Any]) -> None:
        import yaml

        path = self.path / "config.yaml"
        plain = {name: _yaml_value(value) for name, value in config.items()}
        if path.exists():
            try:
                before = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError):
                before = None  # cut off by a crash; it is written anew
            before = with_present_names(before if isinstance(before, dict) else {})
            names = [name for name in {**before, **plain} if before.get(name) != plain.get(name)]
            for name in names:
                self.log_text(f"resumed with {name}: {plain.get(name)!r} (was {before.get(name)!r})")
        with atomic_write(path) as temporary:
            temporary.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def _plot(self, row: dict[str, Any]) -> None:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter  # a second to import, so not before the first step

            self._board = SummaryWriter(str(self.path), purge_step=self._purge, flush_secs=10)
        for name, value in row.items():
            if name not in _UNPLOTTED and isinstance(value, int | float) and not isinstance(value, bool):
                self._board.add_scalar(_TAGS.get(name, f"train/{name}"), value, row["step"])

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl (or of the run directory it lies in); a torn last line is left out.

    Raises `UserError` naming the line for damage elsewhere.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path} is not there; give a run directory or its metrics.jsonl") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = {}
        if row is None:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        elif number < len(lines):  # whole lines end in a newline, so only a torn one is last
            raise UserError(f"{path}, line {number} is not a line of metrics: {line[:60]!r}. Delete this line")
    return rows


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # tensors and NumPy numbers
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a metric is a number, string, boolean or None, got {type(value).__name__}")


def _yaml_value(value: Any) -> Any:
    """What YAML can hold without tags: paths as text, tuples as lists."""
    if isinstance(value, dict):
        return {str(key): _yaml_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_yaml_value(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def _fresh(parent: Path) -> Path:
    """`parent/<date-time>`, with -2, -3 ... where it is taken. Made here, so that two runs cannot share it."""
    name = f"{datetime.now():%Y-%m-%d-%H%M%S}"
    with _writable(parent):
        parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = parent / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1


def _newest_run() -> str:
    runs = sorted(path for path in Path("runs").glob("*") if (path / "config.yaml").exists())
    return f" (the newest here is {runs[-1]})" if runs else ""


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Turn what the system says about a directory that takes no files into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk of {path} is full; free some space and continue with --resume") from error
        raise unwritable(path, error) from error
