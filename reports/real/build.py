"""Makes the results of reports/real again from public routing logs, or only the page: ``python reports/real/build.py [CLONES WORK]``.

CLONES holds clones of the repositories that sources.yaml names, a folder each by its name there, at the commit it names:
``ESFT``, ``GPT-OSS-MoE-ExpertFingerprinting``, ``OLMoE``. Nothing is fetched. WORK gets traces, whole results and their pages; what
is there already is not made again. Without arguments only index.html is written, from what is committed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from page import main_figures, write_page
from unpickled import as_csv

from dbes.results import load_result

HERE = Path(__file__).parent
WITHOUT = ("tulu",)
"""Counted for OLMoE alone, so that the two models are compared on the same five domains."""


def dbes(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "dbes.cli", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def make(name: str, sources: dict[str, Any], clones: Path, work: Path) -> Path:
    """The result of one entry of sources.yaml, in WORK/results."""
    entry, result = sources["results"][name], work / "results" / name
    if (result / "result.json").is_file():
        return result
    origin = entry.get("of", name)
    trace = work / "traces" / origin
    if not trace.exists():
        about = sources["results"][origin]
        logs = clones / about["repository"] / sources["repositories"][about["repository"]]["from"]
        sizes = ["--experts", about["experts"], *(["--top-k", about["top_k"]] if "top_k" in about else [])]
        trace.parent.mkdir(parents=True, exist_ok=True)
        if "counts" in about:
            table = HERE / name / "counts.csv"
            table.parent.mkdir(exist_ok=True)
            table.write_text(as_csv(logs / about["counts"] / "expert_counts", WITHOUT), "utf-8")
            dbes("import", table, "--out", trace, "--format", "counts", *sizes)
        else:
            dbes("import", logs, "--out", trace, "--domain-map", HERE / "maps" / about["map"], *sizes)
    dbes("score", trace, "--match", entry.get("match", "none"), "--output-path", result)
    dbes("report", result)
    return result


def main(clones: Path, work: Path) -> None:
    sources = yaml.safe_load((HERE / "sources.yaml").read_text("utf-8"))
    variants = {}
    for name in sources["results"]:
        made = make(name, sources, clones, work)
        if name in sources["whole"]:
            (HERE / name).mkdir(exist_ok=True)
            content = json.loads((made / "result.json").read_text("utf-8"))
            content["settings"]["trace"] = f"traces/{name}"
            (HERE / name / "result.json").write_text(json.dumps(content, separators=(",", ":")) + "\n", "utf-8")
        else:
            variants[name] = main_figures(load_result(made))
    (HERE / "variants.json").write_text(json.dumps(variants, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    elif len(sys.argv) != 1:
        sys.exit(__doc__)
    write_page(HERE / "index.html")
