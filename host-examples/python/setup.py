"""Puts the shared library into the wheel. The package itself has no compiled part: the library is loaded with ctypes."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NAMES = {"win32": "locum.dll", "darwin": "liblocum.dylib"}
NAME = NAMES.get(sys.platform, "liblocum.so")
CHECKOUT = Path(__file__).resolve().parents[2]


def library() -> Path:
    """The library to ship: LOCUM_LIBRARY, else what cargo built in this checkout."""
    named = os.environ.get("LOCUM_LIBRARY")
    if named:
        if not Path(named).is_file():
            raise SystemExit(f"LOCUM_LIBRARY names {named}, and there is no such file")
        return Path(named)
    targets = [os.environ.get("CARGO_TARGET_DIR"), CHECKOUT / "target"]
    places = [Path(t) / "release" / NAME for t in targets if t]
    for place in places:
        if place.is_file():
            return place
    raise SystemExit(
        f"{NAME} is not built yet, looked for {' and '.join(map(str, places))}.\n"
        f"Run `cargo build --release -p locum-plugin` in {CHECKOUT} first, or set LOCUM_LIBRARY to the file."
    )


class BuildWithLibrary(build_py):
    """Copies the library beside the modules, unless an editable install finds it in the checkout anyway."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copy2(library(), Path(self.build_lib) / "locum" / NAME)


class PlatformWheel(bdist_wheel):
    """Any Python 3, this platform: the tag of a wheel that holds a library and no extension module."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_")


class BinaryDistribution(Distribution):
    """Sends the package to the platform's site-packages and the wheel past the pure-Python tag."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel}, distclass=BinaryDistribution)
