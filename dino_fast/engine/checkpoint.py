"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is a folder, written under a temporary name, flushed to the disk and renamed:

    checkpoints/step-00001234/tensors.safetensors    every tensor, named by its path: `student/backbone.cls_token`
                              state.json             everything else, and the size and CRC-32 of the tensors
    checkpoints/best                           symbolic link to the best one, which stays while it is that

Both files are plain data: loading one reads numbers and text and can execute nothing.

The check is CRC-32 because it is the fastest at hand (500 MB: 0.21 s; SHA-256 0.33 s, BLAKE2b 0.47 s) and finds every
damage of up to 32 neighbouring bits and all but 2^-32 of the rest. It guards against accidents, not against forgery.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import threading
import time
import uuid
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from dino_fast.errors import UserError

FORMAT = 1
TENSORS, STATE, BEST = "tensors.safetensors", "state.json", "best"
_CHUNK = 1 << 23  # bytes written at a time; large enough that the call costs nothing
# `.old-` is what a checkpoint that is replaced by another of the same step is called for an instant.
_STEP = re.compile(r"(?:\.old-)?step-(\d{8,})")
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save(directory: Path, step: int, state: dict[Any, Any], keep: int = 3) -> Path:
    """Write `directory/step-<step>` and drop all but the last `keep` checkpoints.

    `state` is a nested dict, list or tuple of tensors (any dense dtype, device, stride, shared or not) and of int,
    float (inf and nan too), str, bool and None; dict keys are str or int. Tensors that share memory are written one by
    one and come back separate. Raises UserError where the disk is full (the earlier checkpoints stay), TypeError for
    any other kind of value, naming where it is.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least the newest checkpoint must stay (keep >= 1)")
    directory = Path(directory)
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, "", tensors)
    need = sum(t.numel() * t.element_size() for t in tensors.values())
    directory.mkdir(parents=True, exist_ok=True)
    _tidy(directory)
    temporary = directory / f".tmp-step-{step:08d}-{uuid.uuid4().hex[:8]}"
    final = directory / f"step-{step:08d}"
    try:
        temporary.mkdir()
        size, crc = _write_tensors(temporary / TENSORS, tensors)
        body = {"format": FORMAT, "step": step, "tensors_bytes": size, "tensors_crc32": crc, "state": tree}
        _write_json(temporary / STATE, {"crc32": _crc(body), **body})
        _sync(temporary)
        _put(temporary, final)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(_disk_full(directory, step, need)) from error
        raise
    _prune(directory, step, keep)
    return final


def load(directory: Path) -> tuple[int, dict[Any, Any]] | None:
    """The step and state (CPU tensors) of the newest complete checkpoint below `directory`; None when there is none.

    Each checkpoint is verified; a damaged one is named in a `UserWarning` and the one before it is tried. Raises
    UserError naming what is wrong with each where all are damaged. Reading changes nothing on the disk, so a run may be
    read while it writes.
    """
    damaged: list[str] = []
    for _, folder in _checkpoints(Path(directory)):
        try:
            newest = read(folder)
        except _Damaged as error:
            damaged.append(f"checkpoint {folder} is damaged ({error})")
        except FileNotFoundError:
            continue  # pruned between listing and reading, by a run that is still writing
        else:
            for text in damaged:
                warnings.warn(f"{text}; trying the one before it", stacklevel=2)
            return newest
    if damaged:
        raise UserError(
            f"there is no whole checkpoint in {directory}, and nothing was changed: {'; '.join(damaged)}. Put a copy "
            f"back if there is one; to start anew, give another --out, or delete {directory} and --resume"
        )
    return None


def read(folder: Path) -> tuple[int, dict[Any, Any]]:
    """Step and state of one checkpoint folder, verified. Raises `UserError` naming what is wrong with it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    body = _read_json(folder / STATE)
    tensors = folder / TENSORS
    if not tensors.is_file():
        raise _Damaged(f"{TENSORS} is missing")
    size = tensors.stat().st_size
    if size != body["tensors_bytes"]:
        raise _Damaged(f"{TENSORS} has {size} bytes, {body['tensors_bytes']} were written")
    if _file_crc(tensors) != body["tensors_crc32"]:
        raise _Damaged(f"the checksum of {TENSORS} does not match")
    try:
        # cloned, since the loader maps the file and the file may be deleted or moved while the run goes on
        stored = {name: tensor.clone() for name, tensor in load_file(tensors).items()}
        return body["step"], _decode(body["state"], stored)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _Damaged(f"its contents do not fit together: {error}") from error


def mark_best(directory: Path, step: int) -> Path:
    """Make `directory/best` a symbolic link to the checkpoint of `step`, or a copy where the file system has no links.

    Raises FileNotFoundError where that checkpoint is not there, UserError where the disk is full.
    """
    directory = Path(directory)
    source, temporary = directory / f"step-{step:08d}", directory / f".tmp-best-{uuid.uuid4().hex[:8]}"
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not there; save step {step} before it is marked as the best")
    _tidy(directory)
    try:
        _link(source, temporary)
        _put(temporary, directory / BEST)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(_disk_full(directory, step, (source / TENSORS).stat().st_size)) from error
        raise
    return directory / BEST


class AsyncCheckpointer:
    """Writes checkpoints in a thread, one at a time, or at once if not `background`.

    In the background `save` must be given tensors that nobody changes afterwards. An error of the thread is raised by
    the next `poll`, `save` or `wait`. `seconds` is how long the last checkpoint took.
    """

    def __init__(self, background: bool) -> None:
        self.background = background
        self.seconds = 0.0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, directory: Path, step: int, state: dict[str, Any], keep: int, best: bool) -> None:
        """Starts writing a checkpoint after waiting for the previous one; with `best` it becomes the best one."""
        self.wait()
        # Not a daemon: an interpreter that exits finishes the checkpoint first.
        self._thread = threading.Thread(
            target=self._write, args=(directory, step, state, keep, best), name="checkpoint"
        )
        self._thread.start()
        if not self.background:
            self.wait()

    def poll(self) -> None:
        """Raises the error of a checkpoint that has ended; does not wait for one that is still being written."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint is on the disk; raises its error if there was one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, directory: Path, step: int, state: dict[str, Any], keep: int, best: bool) -> None:
        began = time.monotonic()
        try:
            save(directory, step, state, keep=keep)
            if best:
                mark_best(directory, step)
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - began


class _Damaged(UserError):
    """A checkpoint that is not what was written."""


# ---- nested state <-> JSON and a flat dict of tensors ----


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for `value`; tensors go to `tensors` under their path. What JSON lacks is an object with one `$` key."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise TypeError(
                f"{path or 'state'}: only dense tensors with data can be saved, got {value.layout} {value.device}"
            )
        name = path
        while name in tensors:  # {"a/b": x, "a": {"b": y}}
            name += "'"
        tensors[name] = value.detach()
        if value.dtype in _DTYPES:
            return {"$tensor": name}
        return {"$tensor": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, dict):
        items = [(key, _encode(item, f"{path}/{key}" if path else str(key), tensors)) for key, item in value.items()]
        if all(type(key) is str and not key.startswith("$") for key, _ in items):
            return dict(items)
        for key, _ in items:
            if type(key) not in (str, int):
                raise TypeError(f"{path or 'state'}: a key is {key!r} ({type(key).__name__}); keys are str or int")
        return {"$dict": [[key, item] for key, item in items]}
    if isinstance(value, list | tuple):
        entries = [_encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return entries if isinstance(value, list) else {"$tuple": entries}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{path or 'state'} is a {type(value).__name__}; a checkpoint holds tensors, int, float, str, bool, None and "
        "dicts, lists and tuples of them. Turn it into one of these first"
    )


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        tensor = tensors[value["$tensor"]]
        return tensor.view(getattr(torch, value["dtype"])).reshape(value["shape"]) if "dtype" in value else tensor
    if "$float" in value:
        return float(value["$float"])
    if "$tuple" in value:
        return tuple(_decode(item, tensors) for item in value["$tuple"])
    if "$dict" in value:
        return {key: _decode(item, tensors) for key, item in value["$dict"]}
    return {key: _decode(item, tensors) for key, item in value.items()}


# ---- files ----


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's elements as a flat uint8 tensor in memory of the host, copied only where it must be."""
    flat = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8, device="cpu")


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Write a safetensors file; returns its size in bytes and CRC-32.

    Written here rather than by the library's `save_file`, which refuses tensors that share memory, needs a contiguous
    copy of all of them at once, reports a full disk as text, and would have to be read back for the checksum.
    """
    # Widest elements first, as the library orders them: every tensor is aligned in the mapped file.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        known = tensor.dtype in _DTYPES
        shape = list(tensor.shape) if known else [end - start]
        header[name] = {"dtype": _DTYPES.get(tensor.dtype, "U8"), "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    crc = 0
    with open(path, "wb") as file:
        for block in _blocks(len(text).to_bytes(8, "little") + text, order, tensors):
            _write_block(file, block)
            crc = zlib.crc32(block, crc)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), crc


def _blocks(head: bytes, order: list[str], tensors: dict[str, torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(head)
    for name in order:
        data = _bytes(tensors[name]).numpy().data
        for start in range(0, len(data), _CHUNK):
            yield data[start : start + _CHUNK]


def _write_block(file: IO[bytes], block: memoryview) -> None:
    file.write(block)


def _write_json(path: Path, body: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(body, file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise _Damaged(f"{STATE} is missing") from None
    except ValueError as error:
        raise _Damaged(f"{STATE} is not whole: {error}") from error
    if not isinstance(body, dict) or not {"crc32", "format", "step"} <= body.keys():
        raise _Damaged(f"{STATE} is not a checkpoint's")
    if _crc({key: item for key, item in body.items() if key != "crc32"}) != body["crc32"]:
        raise _Damaged(f"the checksum of {STATE} does not match")
    if body["format"] != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {body['format']!r}; this version of dino-fast reads format {FORMAT}. "
            "Use the version that wrote it, or train anew with another --out"
        )
    return body


def _crc(body: dict[str, Any]) -> int:
    # A parsed JSON text prints as the same text again (floats by their shortest exact form), so this is repeatable.
    return zlib.crc32(json.dumps(body).encode())


def _file_crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(_CHUNK):
            crc = zlib.crc32(block, crc)
    return crc


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, so that names survive a power cut as well as contents do."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(folder: Path, link: Path) -> None:
    """Make `link` a symbolic link to `folder` beside it, or a copy of it (FAT, some network and container disks)."""
    try:
        os.symlink(folder.name, link)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copytree(folder, link)
        for path in (*link.iterdir(), link):
            _sync(path)


def _put(temporary: Path, final: Path) -> None:
    """Give a finished folder or link its name, in place of what has it.

    In one step where the name is free or a link's. A folder is moved aside first, to where `load` finds it, too.
    """
    if os.path.lexists(final) and not (final.is_symlink() and temporary.is_symlink()):
        old = final.with_name(f".old-{final.name}")
        os.rename(final, old)
        os.rename(temporary, final)
        _remove(old)
    else:
        os.replace(temporary, final)
    _sync(final.parent)


def _checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything named like a checkpoint, newest first."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _STEP.fullmatch(path.name))]
    return sorted(found, key=lambda entry: (entry[0], entry[1].name), reverse=True)


def _tidy(directory: Path) -> None:
    """Remove what a killed writer left. Called by writers alone: a reader could meet a folder that is being written."""
    for path in directory.glob(".tmp-*"):
        _remove(path)
    for path in directory.glob(".old-*"):
        named = path.with_name(path.name.removeprefix(".old-"))
        if os.path.lexists(named):
            _remove(path)
        else:
            os.rename(path, named)


def _prune(directory: Path, step: int, keep: int) -> None:
    """Keep `step`, just written, the `keep - 1` newest whole ones before it, and the best one.

    Later steps stay: they are what a fallback passed over, and the run replaces or passes them as it goes on.
    """
    earlier = [path for number, path in _checkpoints(directory) if number < step]
    whole = [path for path in earlier if _looks_whole(path)]
    for path in set(earlier) - {*whole[: keep - 1], (directory / BEST).resolve()}:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder or a link, if it is there and the system lets it."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _looks_whole(folder: Path) -> bool:
    try:
        return bool((folder / TENSORS).stat().st_size == _read_json(folder / STATE)["tensors_bytes"])
    except (OSError, UserError):
        return False


def _disk_full(directory: Path, step: int, need: int) -> str:
    mount = directory.resolve()
    while not mount.is_mount():
        mount = mount.parent
    free = shutil.disk_usage(directory).free
    return (
        f"no space for the checkpoint of step {step} in {directory}: it needs {need / 1e6:.1f} MB and the disk mounted "
        f"at {mount} (or your quota on it) has {free / 1e6:.1f} MB left. The earlier checkpoints are intact: free some "
        "space and continue with --resume, or move the run directory to another disk and name it with --out"
    )
