#!/usr/bin/env python3
"""The linker of the Windows build: g++ with less to export and nothing to bring along.

rustc exports every `#[no_mangle]` function of every crate. On Linux a link argument keeps those of others inside (plugin-api/build.rs);
the Windows linker takes a list from rustc, and no argument that shortens it. Programs have no build script that finds them the static
libstdc++, as the library has. LOCUM_WINDOWS_LINKER names the compiler that links.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    for argument in sys.argv[1:]:
        exports = Path(argument.removeprefix("-Wl,"))
        if exports.suffix == ".def":
            lines = exports.read_text().splitlines()
            exports.write_text("".join(f"{line}\n" for line in lines if line == "EXPORTS" or line.strip().startswith('"locum_')))
    linker = os.environ["LOCUM_WINDOWS_LINKER"]
    os.execv(linker, [linker, *("-l:libstdc++.a" if argument == "-lstdc++" else argument for argument in sys.argv[1:])])


if __name__ == "__main__":
    main()
