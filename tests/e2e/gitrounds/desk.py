"""A person at a work tree: edits, branches, merges, rebases, mistakes. All that is random follows
from the seed."""

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.e2e.gitrounds.truth import IGNORE_FILE, documents, manifest_files
from tests.support.repo import Repo

KEPT = 3
NAMES = 9
BROKEN = ("", "kind: [", "kind: Job\nmetadata: {name: ", "<<<<<<< HEAD\na: b\n=======\n", "{}\n")
HOOK = "#!/bin/sh\nfind . -name '*.yaml' -not -path './.git/*' -exec touch {} +\n"


def manifest(name: str, value: str, team: str) -> str:
    """A job that ends at once. A run depends on `value`, not on `team`."""
    return (
        "apiVersion: bacalhau.org/v1\nkind: Job\n"
        f"metadata: {{name: {name}, labels: {{team: {team}}}}}\n"
        "spec:\n  type: batch\n  tasks:\n"
        f"    - {{name: main, engine: {{type: noop}}, env: {{VALUE: {value}}}}}\n"
    )


class Desk:
    """Works in `repo`. The jobs `PREFIX-keep-N` are declared on every branch, always to run the
    same, whatever else happens. `note` is called whenever the files lie still."""

    def __init__(
        self, repo: Repo, prefix: str, rng: random.Random, note: Callable[[], None]
    ) -> None:
        self.repo = repo
        self.root = repo.root
        self.prefix = prefix
        self.kept = frozenset(f"{prefix}-keep-{n}" for n in range(KEPT))
        self._rng = rng
        self._note = note
        self._values = 0
        for name in sorted(self.kept):
            self.repo.put(f"keep/{name}.yaml", manifest(name, "k", "a"))
        for n in range(NAMES):
            self.repo.put(f"jobs/{n % 4}.yaml", "")
            self._put(f"jobs/{n % 4}.yaml", [*self._read(f"jobs/{n % 4}.yaml"), self._job(n)])
        self.repo.commit("begin")
        for kind in ("post-checkout", "post-merge", "post-rewrite"):
            hook = self.root / ".git" / "hooks" / kind
            hook.parent.mkdir(exist_ok=True)
            hook.write_text(HOOK)
            hook.chmod(0o755)

    def operations(self) -> list[tuple[int, Callable[[], None]]]:
        """What the person may do, and how often against the others."""
        return [
            (8, self.edit_value),
            (6, self.edit_label),
            (4, self.add_job),
            (3, self.drop_job),
            (1, self.drop_file),
            (4, self.move_job),
            (3, self.move_file),
            (3, self.save_slowly),
            (3, self.save_as_editors_do),
            (2, self.break_file),
            (3, self.mend_files),
            (1, self.ignore_file),
            (1, self.lift_and_put_back),
            (5, self.commit),
            (2, self.amend),
            (3, self.new_branch),
            (5, self.switch),
            (4, self.merge),
            (3, self.rebase),
            (1, self.revert),
            (2, self.reset),
            (2, self.stash),
            (2, self.cherry_pick),
            (1, self.collect_garbage),
        ]

    # -- files -----------------------------------------------------------------------------------

    def edit_value(self) -> None:
        """Another command: the job is to run again."""
        if (at := self._pick()) is not None:
            path, jobs, n = at
            jobs[n] = (jobs[n][0], self._value(), jobs[n][2])
            self._put(path, jobs)

    def edit_label(self) -> None:
        """Nothing that a run depends on."""
        if (at := self._pick(with_kept=True)) is not None:
            path, jobs, n = at
            jobs[n] = (*jobs[n][:2], self._rng.choice("abcdef"))
            self._put(path, jobs)

    def add_job(self) -> None:
        """A job that is not there, in any file."""
        there = {job[0] for path in self._files() for job in self._read(path)}
        free = [n for n in range(NAMES) if f"{self.prefix}-{n}" not in there]
        if free:
            path = f"jobs/{self._rng.randrange(6)}.yaml"
            self._put(path, [*self._read(path), self._job(self._rng.choice(free))])

    def drop_job(self) -> None:
        """One job less."""
        if (at := self._pick()) is not None:
            path, jobs, n = at
            self._put(path, [*jobs[:n], *jobs[n + 1 :]])

    def drop_file(self) -> None:
        """All jobs of a file less."""
        if paths := self._files():
            (self.root / self._rng.choice(paths)).unlink()

    def move_job(self) -> None:
        """From one file to another: first there, then not here any more."""
        if (at := self._pick()) is not None:
            path, jobs, n = at
            there = f"jobs/sub/{self._rng.randrange(3)}.yaml"
            self._put(there, [*self._read(there), jobs[n]])
            self._put(path, [*jobs[:n], *jobs[n + 1 :]])

    def move_file(self) -> None:
        """A rename, with git or without."""
        if paths := self._files():
            path = self._rng.choice(paths)
            there = f"jobs/moved-{self._rng.randrange(4)}.yaml"
            if not (self.root / there).exists():
                (self.root / path).rename(self.root / there)

    def save_slowly(self) -> None:
        """In place, with nothing and then a half of it there for a moment."""
        if (at := self._pick()) is not None:
            path, jobs, n = at
            jobs[n] = (jobs[n][0], self._value(), jobs[n][2])
            text = "---\n".join(manifest(*job) for job in jobs)
            with (self.root / path).open("w") as file:
                file.flush()
                time.sleep(0.03)
                file.write(text[: text.index("team") - 1])
                file.flush()
                time.sleep(0.03)
                file.write(text[text.index("team") - 1 :])

    def save_as_editors_do(self) -> None:
        """A swap file, a probe, a copy of the old; then the new one takes its place."""
        if (at := self._pick()) is not None:
            path, jobs, n = at
            jobs[n] = (jobs[n][0], self._value(), jobs[n][2])
            file = self.root / path
            swap, probe = file.with_name(f".{file.name}.swp"), file.with_name("4913")
            swap.write_bytes(b"b0VIM")
            probe.touch()
            probe.unlink()
            file.with_name(f"{file.name}~").write_bytes(file.read_bytes())
            fresh = file.with_name(f".{file.name}.new")
            fresh.write_text("---\n".join(manifest(*job) for job in jobs))
            time.sleep(0.02)
            fresh.replace(file)
            swap.unlink()
            file.with_name(f"{file.name}~").unlink()

    def break_file(self) -> None:
        """A mistake."""
        if paths := self._files():
            (self.root / self._rng.choice(paths)).write_text(self._rng.choice(BROKEN))

    def mend_files(self) -> None:
        """What cannot be read goes; what is declared twice stays once; what is never to go is put
        back as it was to be."""
        seen: set[str] = set()
        (self.root / IGNORE_FILE).unlink(missing_ok=True)
        for path in list(manifest_files(self.root)):
            jobs = documents((self.root / path).read_text())
            if path.startswith("keep/"):
                name = Path(path).stem
                if jobs is None or [job[0] for job in jobs] != [name]:
                    self.repo.put(path, manifest(name, "k", "a"))
                continue
            once = list({job[0]: job for job in jobs or [] if job[0] not in seen}.values())
            seen |= {job[0] for job in once}
            if once != jobs:
                self._put(path, once)

    def ignore_file(self) -> None:
        """Named in the ignore file: as if it were not there."""
        if paths := self._files():
            (self.root / IGNORE_FILE).write_text(f"/{self._rng.choice(paths)}\n")

    def lift_and_put_back(self) -> None:
        """The whole directory is somewhere else for a moment."""
        away = self.root.with_name(f"{self.root.name}.away")
        self.root.rename(away)
        time.sleep(self._rng.uniform(0, 0.6))
        away.rename(self.root)

    # -- git -------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Everything."""
        self._try("add", "-A")
        self._try("commit", "-q", "--allow-empty", "-m", f"change {self._values}")

    def amend(self) -> None:
        """The last commit is another."""
        self._try("commit", "-q", "-a", "--amend", "--allow-empty", "-m", "amended")

    def new_branch(self) -> None:
        """From here."""
        self._try("checkout", "-q", "-B", f"b{self._rng.randrange(4)}")

    def switch(self) -> None:
        """To another branch, with what was changed thrown away or kept."""
        self.commit()
        self._try("checkout", "-q", "-f", self._branch())

    def merge(self) -> None:
        """Another branch; conflicts lie there for a while, then one side wins or it is given up."""
        self.commit()
        if not self._try("merge", "-q", "--no-edit", self._branch()):
            self._rest()
            self._resolve()
            if not self._try("commit", "-q", "--no-edit"):
                self._try("merge", "--abort")

    def rebase(self) -> None:
        """Onto another branch, through its conflicts."""
        self.commit()
        done = self._try("rebase", "-q", self._branch())
        for _ in range(6):
            if done:
                return
            self._rest()
            self._resolve()
            done = self._try("-c", "core.editor=true", "rebase", "--continue")
        self._try("rebase", "--abort")

    def revert(self) -> None:
        """The last commit, taken back."""
        self.commit()
        if not self._try("revert", "--no-edit", "HEAD~1"):
            self._try("revert", "--abort")

    def reset(self) -> None:
        """A few commits back."""
        self._try("reset", "-q", "--hard", f"HEAD~{self._rng.randrange(3)}")

    def stash(self) -> None:
        """Put away, and got again."""
        if self._try("stash", "-q", "-u"):
            self._rest()
            if not self._try("stash", "pop", "-q"):
                self._try("reset", "-q", "--hard")
                self._try("stash", "drop", "-q")

    def cherry_pick(self) -> None:
        """One commit of another branch."""
        self.commit()
        if not self._try("cherry-pick", "--allow-empty", self._branch()):
            self._rest()
            self._try("cherry-pick", "--abort")

    def collect_garbage(self) -> None:
        """Packs and prunes."""
        self._try("gc", "-q", "--prune=now")

    def tidy(self) -> None:
        """Nothing half done is left: neither files nor a merge."""
        for word in ("merge", "rebase", "cherry-pick", "revert"):
            self._try(word, "--abort")
        (self.root / ".git" / "index.lock").unlink(missing_ok=True)
        self.mend_files()
        self._try("checkout", "-q", "-B", f"b{self._rng.randrange(4)}")
        self.commit()

    # -- odds and ends ---------------------------------------------------------------------------

    def _resolve(self) -> None:
        side = self._rng.choice(("--ours", "--theirs"))
        self._try("checkout", side, "--", ".")
        self._try("add", "-A")

    def _rest(self) -> None:
        """As it lies there now it may be seen."""
        self._note()
        time.sleep(self._rng.choice((0.0, 0.0, 0.5, 1.0)))

    def _branch(self) -> str:
        out = self.repo.git("for-each-ref", "--format=%(refname:short)", "refs/heads")
        return self._rng.choice(out.split())

    def _try(self, *words: str) -> bool:
        try:
            self.repo.git(*words)
        except subprocess.CalledProcessError:
            return False
        return True

    def _value(self) -> str:
        self._values += 1
        return f"{self.prefix}{self._values}"

    def _job(self, n: int) -> tuple[str, str, str]:
        return (f"{self.prefix}-{n}", self._value(), "a")

    def _files(self) -> list[str]:
        return [p for p in manifest_files(self.root) if not p.startswith("keep/")]

    def _read(self, path: str) -> list[tuple[str, str, str]]:
        file = self.root / path
        return (documents(file.read_text()) or []) if file.is_file() else []

    def _pick(
        self, *, with_kept: bool = False
    ) -> tuple[str, list[tuple[str, str, str]], int] | None:
        """One job: its file, what that declares, and its place therein."""
        paths = [p for p in manifest_files(self.root) if with_kept or not p.startswith("keep/")]
        found = [(p, jobs, n) for p in paths for jobs in [self._read(p)] for n in range(len(jobs))]
        return self._rng.choice(found) if found else None

    def _put(self, path: str, jobs: list[tuple[str, str, str]]) -> None:
        """Whole at once, as careful tools write."""
        file = self.root / path
        if not jobs:
            file.unlink(missing_ok=True)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_name(f".{file.name}.{os.getpid()}")
        fresh.write_text("---\n".join(manifest(*job) for job in jobs))
        fresh.replace(file)
