"""Makes docs/performance.md from the JSON of the benchmarks in docs/performance/: python -m benchmarks.report"""

import json
from pathlib import Path

from benchmarks import decoding


DOCS = Path(__file__).parents[1] / "docs"


def page(folder: Path = DOCS) -> str:
    """The text of docs/performance.md."""
    measured = json.loads((folder / "performance" / "decoding.json").read_text(encoding="utf-8"))
    introduction = (folder / "performance_intro.md").read_text(encoding="utf-8").rstrip()
    return "\n".join([introduction, "", "## Decoding", "", decoding.table(measured), ""])


if __name__ == "__main__":
    (DOCS / "performance.md").write_text(page(), encoding="utf-8")
