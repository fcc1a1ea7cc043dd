"""Seeing what is asked of the disk."""

import os
from pathlib import Path

import pytest


def record_fsyncs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file and directory that this process flushes from now on, in order."""
    flushed: list[Path] = []
    real = os.fsync

    def fsync(file: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{file}")))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    return flushed
