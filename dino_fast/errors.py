"""Errors that are written for the person who meets them."""

from __future__ import annotations

import difflib
import errno
import shutil
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Something the user gave cannot be used. The command line prints the message without a traceback and exits 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`, or nothing when none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def make_folder(path: Path, option: str = "--out") -> None:
    """Makes the folder and those above it. Raises UserError, naming `option`, where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error, option) from error


def unwritable(path: Path, error: Exception, option: str = "--out") -> UserError:
    """The error for a place, given with `option`, that cannot be written to: it names the obstacle and the remedy."""
    place = next(p for p in (path, *path.absolute().parents) if p.exists())  # how far the path exists
    code, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
    full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in reason
    if full or (code is None and shutil.disk_usage(place).free < 1 << 16):  # torch.save does not tell why
        return UserError(f"{option} {path} cannot be written: its disk is full. Free some space, or give another disk")
    if place.is_file() and (place != path or code in (errno.EEXIST, errno.ENOTDIR)):
        why = f"{place} is a file, not a folder"
    elif code == errno.ENOENT or place == path:  # some file systems say "no such file" where nothing can be made
        why = f"{place} does not take it" + ("" if code == errno.ENOENT else f" ({reason})")
    else:
        why = f"nothing can be made in {place} ({reason})"
    return UserError(f"{option} {path} cannot be written: {why}. Give a place in a folder of your own")
