"""Writes the headers of the C++ runtime that are rendered: python render_headers.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from edgeqdm.emit.render import cpp_headers


def main(folder: Path) -> None:
    for name, text in cpp_headers().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file that is touched is compiled again.
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
