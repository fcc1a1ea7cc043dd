"""Output of executions on the terminal: whole lines, said where they are from, made safe."""

import sys
from typing import TYPE_CHECKING

from bacalhau.cli import exits
from bacalhau.cli.session import is_terminal
from bacalhau.cli.text import clean, clean_lines

if TYPE_CHECKING:
    from bacalhau.replies import LogRecord


class LogPrinter:
    """Writes records. With prefixes, only whole lines, so that those of several executions do not
    run into each other."""

    def __init__(self, *, with_prefix: bool, is_raw: bool) -> None:
        self._with_prefix = with_prefix
        self._is_raw = {
            "stdout": is_raw or not is_terminal(),
            "stderr": is_raw or not sys.stderr.isatty(),
        }
        self._rests: dict[tuple[str, str], str] = {}
        self._slots: dict[str, str] = {}
        self._attempts: dict[str, int] = {}
        self.has_shown = False

    def show(self, record: "LogRecord") -> None:
        """One record."""
        self.has_shown = self.has_shown or bool(record.notice or record.text)
        if record.notice:
            exits.note(f"[{record.execution or 'server'}] {record.notice}")
        if not record.text:
            return
        self._slots[record.execution] = record.slot
        self._note_attempt(record)
        if not self._with_prefix:
            self._write(record.stream, record.text)
            return
        key = (record.execution, record.stream)
        *lines, rest = (self._rests.pop(key, "") + record.text).split("\n")
        if rest:
            self._rests[key] = rest
        for line in lines:
            self._write(record.stream, f"{self._prefix(record.execution)}{line}\n")

    def _note_attempt(self, record: "LogRecord") -> None:
        """A slot's next attempt begins its output anew: said, so that two are not read as one. So
        is an earlier one that goes on, where two ran at the same time."""
        before = self._attempts.get(record.slot, record.attempt)
        self._attempts[record.slot] = record.attempt
        if record.attempt != before:
            exits.note(f"[{record.execution}] attempt {record.attempt + 1} of slot {record.slot}")

    def finish(self) -> None:
        """Write lines that had no end."""
        for (execution, stream), rest in self._rests.items():
            self._write(stream, f"{self._prefix(execution)}{rest}\n")
        self._rests.clear()

    def _prefix(self, execution: str) -> str:
        return f"[{clean(self._slots.get(execution, ''))}] "

    def _write(self, stream: str, text: str) -> None:
        file = sys.stderr if stream == "stderr" else sys.stdout
        safe = text if self._is_raw.get(stream, False) else clean_lines(text)
        # A log may hold what the terminal's encoding lacks.
        encoding = file.encoding or "utf-8"
        file.write(safe.encode(encoding, "replace").decode(encoding))
        file.flush()
