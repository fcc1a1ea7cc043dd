"""Build the wheel and the sdist, and check what an installation would add: only `bacalhau*`."""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"bacalhau", "bacalhau_api", "bacalhau_controllers"}


def main() -> int:
    """Return 0 if wheel and sdist are as they should be; print what is not."""
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-d", out], cwd=ROOT, check=True
        )
        (wheel,) = Path(out).glob("*.whl")
        (sdist,) = Path(out).glob("*.tar.gz")
        names = zipfile.ZipFile(wheel).namelist()
        tops = {name.split("/")[0] for name in names}
        strangers = {top for top in tops if top not in PACKAGES and not top.endswith(".dist-info")}
        missing = [f"{p}/py.typed" for p in PACKAGES if f"{p}/py.typed" not in names]
        with tarfile.open(sdist) as archive:
            tests = [n for n in archive.getnames() if "/tests/" in n]
    if strangers or missing or tests:
        print(f"strangers in the wheel: {strangers}; missing: {missing}; tests in sdist: {tests}")
        return 1
    print(f"wheel holds {sorted(PACKAGES)} and nothing else")
    return 0


if __name__ == "__main__":
    sys.exit(main())
