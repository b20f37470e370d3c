"""Text to learn from: the sources of Python's documentation, out of Debian's python3.11-doc.

Its licence is that of Python (PSF-2.0), and 0BSD for the examples in it. Every tenth file is held
out.
"""

import gzip
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from stochastic_depth.cli.fashion_mnist import cache_folder, debian_package

PACKAGE = "python3.11-doc"
SOURCES = Path("usr/share/doc/python3.11/html/_sources")
HELD_OUT = 10  # one file of so many


def files() -> list[Path]:
    """The sources, in a fixed order."""
    folder = cache_folder() / PACKAGE
    if not folder.is_dir():
        with TemporaryDirectory(dir=cache_folder()) as scratch:
            packed = debian_package(PACKAGE, SOURCES, Path(scratch))
            if packed is None:
                raise SystemExit(f"Debian's package {PACKAGE} is needed: apt-get install {PACKAGE}")
            draft = Path(scratch, "copy")
            shutil.copytree(packed, draft, symlinks=False)
            os.rename(draft, folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def read(path: Path) -> str:
    """The text of a file, which may be packed."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    return content.decode(errors="replace")


def split() -> tuple[list[Path], list[Path]]:
    """The files to train on, and those that are held out."""
    found = files()
    held = set(found[::HELD_OUT])
    return [path for path in found if path not in held], sorted(held)


def topic(path: Path) -> str:
    """The part of the documentation that a file belongs to."""
    return path.relative_to(cache_folder() / PACKAGE).parts[0]
