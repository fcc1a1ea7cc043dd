"""Builds the checked-in WebAssembly programs from their C sources, always to the same bytes.

    python tools/build_wasm.py            build all, in place
    python tools/build_wasm.py --check    build all elsewhere and compare; status 1 if one differs

The compiler is `zig cc` of the pinned PyPI package `ziglang`, which brings its own C library, so
nothing of the machine goes into a module. The first build takes about half a minute, because zig
compiles that library.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ZIG_VERSION = "0.17.1"

ROOT = Path(__file__).resolve().parents[1]
# No debug information and no names of files: they would differ from one directory to the next.
FLAGS = ("-target", "wasm32-wasi", "-std=gnu17", "-O2", "-g0", "-s", "-Wall", "-Wextra", "-Werror")


def programs(root: Path = ROOT) -> Iterator[tuple[Path, Path]]:
    """All sources, each with the module that is made of it."""
    for source in sorted((root / "tests/programs").glob("*.c")):
        yield source, source.with_suffix(".wasm")
    for source in sorted((root / "manifests/examples").glob("*/src/*.c")):
        yield source, source.parents[1] / f"{source.stem}.wasm"


def check_version() -> None:
    """Raises RuntimeError unless the pinned compiler is installed."""
    try:
        version = metadata.version("ziglang")
    except metadata.PackageNotFoundError:
        version = "none"
    if version != ZIG_VERSION:
        raise RuntimeError(f"ziglang {ZIG_VERSION} is needed, not {version}: pip install .[dev]")


def build(source: Path, target: Path) -> None:
    """Compile one program. Raises CalledProcessError; the compiler has said why."""
    # Run beside the source and by its bare name, so that no path can get in.
    command = [sys.executable, "-m", "ziglang", "cc", *FLAGS, "-o", str(target), source.name]
    subprocess.run(command, cwd=source.parent, check=True, timeout=600)
    target.chmod(0o644)


def differing(root: Path = ROOT) -> list[Path]:
    """The checked-in modules that are not what their sources give."""
    wrong: list[Path] = []
    with tempfile.TemporaryDirectory() as directory:
        for source, module in programs(root):
            fresh = Path(directory) / module.name
            build(source, fresh)
            if not module.exists() or fresh.read_bytes() != module.read_bytes():
                wrong.append(module)
    return wrong


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args()
    check_version()
    if options.check:
        wrong = differing()
        for module in wrong:
            print(f"differs from its source: {module.relative_to(ROOT)}")
        return 1 if wrong else 0
    for source, module in programs():
        build(source, module.resolve())
        print(f"{module.relative_to(ROOT)}: {module.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
