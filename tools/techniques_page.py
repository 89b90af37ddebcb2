"""Write docs/techniques.md from the seams; with `--check` only compare."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from vivace.cli.listings import list_techniques

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "techniques.md"

HEAD = """\
# Techniques

Made from the seams by `tools/techniques_page.py`; `vivace techniques` prints the same.
Exactness is that of the default options. A format or store is exact if a request gives the same
bits however it is run with it. One that is narrower than the checkpoint rounds; `vivace eval --kl`
measures how much that matters."""


def page() -> str:
    papers = tomllib.loads((ROOT / "docs" / "papers.toml").read_text(encoding="utf-8"))
    lines, seam = [HEAD], None
    for technique in list_techniques():
        if technique["seam"] != seam:
            seam = technique["seam"]
            lines += ["", f"## {seam}", "", "| technique | exactness | options | what it does |"]
            lines += ["|---|---|---|---|"]
        options = ", ".join(f"`{key} = {value!r}`" for key, value in technique["options"].items())
        cited = "; ".join(f"{key}: {papers[key]['title']}" for key in technique["papers"])
        summary = technique["summary"] + (f" ({cited})" if cited else "")
        cells = (f"`{technique['name']}`", technique["exactness"], options, summary)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE.relative_to(ROOT)} is out of date: run python tools/techniques_page.py")
