"""A git repository for tests."""

import os
import subprocess
from pathlib import Path


class Repo:
    """A work tree under `root`. Each command is given `seconds`, hooks included."""

    def __init__(self, root: Path, *, bare: bool = False, seconds: float = 30) -> None:
        self.root = root
        self._seconds = seconds
        root.mkdir(parents=True, exist_ok=True)
        self.git("init", "-q", "-b", "main", *(["--bare"] if bare else []))

    def git(self, *words: str) -> str:
        """Run git; its output."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", *who, *words],
            cwd=self.root,
            env={**clean, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"},
            check=True,
            capture_output=True,
            text=True,
            timeout=self._seconds,
        )
        return done.stdout.strip()

    def write(self, **files: str) -> None:
        """Files by name; `__` stands for a slash, `.yaml` is put behind."""
        for name, text in files.items():
            self.put(f"{name.replace('__', '/')}.yaml", text)

    def put(self, path: str, text: str) -> None:
        """One file."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def commit(self, message: str = "change") -> str:
        """Commit everything; its id."""
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")
