"""Logging of the server process: constant sentences with fields, as text or as JSON lines.

Text is for people and for journals; control characters in values are escaped, so that a job's name
cannot write to a terminal or forge a line.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z info  Sentence key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        words = [time.replace("+00:00", "Z"), f"{record.levelname.lower():7}", record.getMessage()]
        for key, value in _fields(record).items():
            text = str(value)
            is_plain = text.isprintable() and " " not in text and '"' not in text and text
            words.append(f"{key}={text if is_plain else json.dumps(text)}")
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        data: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        data |= _fields(record)
        if record.exc_info:
            data["traceback"] = self.formatException(record.exc_info)
        return json.dumps(data, default=str)


def set_up_logging(level: str, form: Literal["text", "json"]) -> None:
    """Log to standard error. Libraries speak at warning level and above only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("bacalhau", "bacalhau_controllers", "bacalhau_api"):
        logging.getLogger(name).setLevel(level.upper())
