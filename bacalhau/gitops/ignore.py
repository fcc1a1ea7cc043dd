"""Which files of a directory count: manifests by their suffix, not hidden, not ignored."""

from collections.abc import Sequence
from typing import Final

from pathspec import GitIgnoreSpec

from bacalhau_api.errors import InvalidError, Problem

SUFFIXES: Final = (".yaml", ".yml", ".json")
IGNORE_FILE: Final = ".bacalhauignore"


class Selection:
    """Patterns as in .gitignore: those of the ignore file, then those of the source."""

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        try:
            self._spec = GitIgnoreSpec.from_lines(patterns)
        except ValueError as error:
            hint = "write patterns as in .gitignore"
            raise InvalidError([Problem(IGNORE_FILE, str(error)[:300], hint=hint)]) from error
        self._is_plain = not patterns

    def takes(self, path: str) -> bool:
        """Whether a file counts, by its path relative to the directory."""
        name = path.rpartition("/")[2]
        if not name.lower().endswith(SUFFIXES) or is_hidden(path):
            return False
        return self._is_plain or not self._spec.match_file(path)

    def enters(self, path: str) -> bool:
        """Whether a directory is looked into."""
        if is_hidden(path):
            return False
        # With `!`, a file may count though its directory does not.
        return self._is_plain or not self._spec.match_file(f"{path}/")


def is_hidden(path: str) -> bool:
    """Whether a file or one of its directories has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.split("/"))


def ignore_lines(data: bytes) -> list[str]:
    """The patterns of an ignore file."""
    return data.decode("utf-8", "replace").splitlines()
