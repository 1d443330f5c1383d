"""Writes the tables of the README, docs/performance.md and docs/deploy.md from results files, and the plots.

``make report``. Speed comes from the newest results files of each device, for ops and for whole models against their
peers; accuracy from the results of ``make photographs``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from report import exports, performance, serving
from report.tables import Document, Row, number, on_gpu, provenance, render, unique, weights

ROOT = Path(__file__).resolve().parents[2]
MARKERS = "<!-- {}: begin (written by make report) -->", "<!-- {}: end -->"
SCHEMA = 1
NOTHING_YET = "Not measured yet: `make bench end-to-end paper report`."
NO_GPU_YET = "GPU: not measured yet."
NO_ADAPTIVE_YET = "Not measured yet: `make end-to-end-adaptive report`."
NO_EXPORTS_YET = "Not measured yet: `make exports report`."
NO_SERVING_YET = "Not measured yet: `make end-to-end-serving report`."


def newest(folder: Path, kind: str | None = None) -> list[Document]:
    """The latest results document of one kind for each device and part; those without a part first.

    ValueError for another schema than this script's.
    """
    latest: dict[tuple[str, str], Document] = {}
    for path in sorted(folder.rglob("*.json")):  # runs on a GPU have folders of their own
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"results of schema {document['schema']}; this script knows schema {SCHEMA}")
        key = document["device"], document.get("part", "")
        if document.get("kind") == kind and (key not in latest or latest[key]["date"] < document["date"]):
            latest[key] = document
    return sorted(latest.values(), key=lambda document: document.get("part", ""))


def whole(documents: Sequence[Document]) -> list[Document]:
    """Those without a part: the roofline bound is shown for these."""
    return [document for document in documents if "part" not in document]


def headlined(documents: Sequence[Document]) -> list[Document]:
    """For each device the newest that has ours against the same pruning elsewhere, even if it is a part; else its whole
    one."""
    chosen = {document["device"]: document for document in whole(documents)}
    for document in sorted(documents, key=lambda document: document["date"]):
        if any("vs_best_pruned" in row for row in document["rows"] if row.get("model") == performance.MODEL):
            chosen[document["device"]] = document
    return list(chosen.values())


def sections(documents: Sequence[Document], written: Callable[[Document], str]) -> str:
    """What ``written`` makes of each document, CPUs first."""
    cpus = [written(document) for document in documents if not on_gpu(document)]
    gpus = [written(document) for document in documents if on_gpu(document)]
    return "\n\n".join([*(cpus or [NOTHING_YET]), *(gpus or [NO_GPU_YET])])


def markdown(document: Document) -> str:
    """The tables of models and ops, and what they were measured on."""
    measured = [row for row in document["rows"] if "error" not in row]
    models = [row for row in measured if row["name"] == "model"]
    ops = [row for row in measured if row["name"] != "model"]
    parts = [provenance(document)]
    for name, batch, baseline in unique((row["model"], row["batch"], row["baseline"]) for row in models):
        rows = [row for row in models if (row["model"], row["batch"], row["baseline"]) == (name, batch, baseline)]
        mode = " in eager mode" if baseline == "timm dense" else ""
        parts += [f"**{name}, batch {batch}**{weights(rows)}; × is against {baseline}{mode}:", model_table(rows)]
    if ops:
        parts += ["**Ops**, median µs, and × against the torch expression:", op_table(ops)]
    parts += [no_figures(row) for row in document["rows"] if "error" in row]
    return "\n\n".join(parts)


def no_figures(row: Row) -> str:
    against = f" against {row['baseline']}" if "baseline" in row else ""
    return f"`{row['name']}`, {row['case']}{against}: no figures: {row['error']}"


def with_models(documents: Sequence[Document]) -> list[Document]:
    """Those that have models at several densities; a run on a GPU may have ops only."""
    return [document for document in documents if performance.density_rows(document)]


def model_table(rows: Sequence[Row]) -> str:
    dtypes = unique(row["dtype"] for row in rows)
    header = ["density", "tokens", "GMAC", *(f"{dtype} {unit}" for dtype in dtypes for unit in ("img/s", "×"))]
    by_case = {(row["case"], row["dtype"]): row for row in rows}
    dense = next((row for row in rows if row["case"] == "dense mode"), None)
    size = ["", ""] if dense is None else [number(dense["tokens"], 0), number(dense["gmac"], 2)]
    baseline = [rows[0]["baseline"], *size]
    for dtype in dtypes:
        row = next(row for row in rows if row["dtype"] == dtype)
        baseline += [number(row["batch"] / row["baseline_us"] * 1e6, 1), "1.00"]
    lines = [baseline]
    for case in unique(row["case"] for row in rows):
        found = [by_case.get((case, dtype)) for dtype in dtypes]
        example = next(row for row in found if row)
        line = [case, number(example["tokens"], 0), number(example["gmac"], 2)]
        for row in found:
            line += [number(row["images_per_s"], 1), ratio(row)] if row else ["", ""]
        lines.append(line)
    return render(header, lines)


def op_table(rows: Sequence[Row]) -> str:
    dtypes = unique(row["dtype"] for row in rows)
    header = ["op", "", "against", *(f"{dtype} {what}" for dtype in dtypes for what in ("µs", "×"))]
    lines = []
    for name, case, baseline in unique((row["name"], row["case"], row["baseline"]) for row in rows):
        line = [f"`{name}`", case, baseline]
        for dtype in dtypes:
            key = (name, case, baseline, dtype)
            row = next((r for r in rows if (r["name"], r["case"], r["baseline"], r["dtype"]) == key), None)
            line += [number(row["ours_us"], 0), ratio(row)] if row else ["", ""]
        lines.append(line)
    return render(header, lines, text=3)


def ratio(row: Row) -> str:
    """With the goal beside the figure if it is missed."""
    missed = "goal" in row and row["ratio"] < row["goal"]
    return f"{row['ratio']:.2f}" + (f" (goal {row['goal']:g})" if missed else "")


def insert(readme: str, name: str, block: str) -> str:
    """The README with the block between the markers of that name. ValueError if they are missing."""
    first, last = (marker.format(name) for marker in MARKERS)
    before, begin, rest = readme.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the page lacks the markers {first} and {last}")
    return f"{before}{first}\n{block}\n{last}{after}"


def updated(readme: str, results: Path, photographs: Path) -> str:
    """The README with the newest results of a folder, and those of ``make photographs``."""
    documents = newest(results, performance.KIND)
    first = headlined(documents)
    of_devices = [[document, *(d for d in documents if d["device"] == document["device"])] for document in first]
    cpus = [performance.front(found) for found in of_devices if not on_gpu(found[0])]
    gpus = [performance.front(found) for found in of_devices if on_gpu(found[0])]
    parts = [*(cpus or [NOTHING_YET]), *(gpus or [NO_GPU_YET])]
    if photographs.exists():
        from photographs import headline  # and with it torch, timm and sait

        parts.append(headline.summary(json.loads(photographs.read_text(encoding="utf-8"))))
    return insert(readme, "front", "\n\n".join(parts))


def updated_performance(page: str, results: Path) -> str:
    """docs/performance.md with the newest results of a folder."""
    peers = newest(results, performance.KIND)
    page = insert(page, "results", sections(newest(results), markdown))
    page = insert(page, "density", sections(with_models(newest(results)), performance.density))
    compared = [sections(peers, performance.everything), performance.unmeasured(peers)]
    page = insert(page, "end-to-end", "\n\n".join(filter(None, compared)))
    page = insert(page, "losses", sections(peers, performance.losses))
    uneven = [performance.adaptive(document) for document in newest(results, performance.ADAPTIVE)]
    page = insert(page, "adaptive", "\n\n".join(uneven or [NO_ADAPTIVE_YET]))
    served = newest(results, serving.KIND)
    for name in serving.COLUMNS:
        found = [serving.condition(name)(document) for document in serving.of_condition(served, name)]
        page = insert(page, name, "\n\n".join(found or [NO_SERVING_YET]))
    return insert(page, "floor", sections(whole(peers), performance.floor))


def updated_deploy(page: str, results: Path) -> str:
    """docs/deploy.md with the newest exports of a folder."""
    tables = [exports.table(document) for document in newest(results, exports.KIND)]
    return insert(page, "exports", "\n\n".join(tables or [NO_EXPORTS_YET]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument("--performance", type=Path, default=ROOT / "docs" / "performance.md", metavar="FILE")
    parser.add_argument("--deploy", type=Path, default=ROOT / "docs" / "deploy.md", metavar="FILE")
    of_photographs = ROOT / "experiments" / "photographs" / "results.json"
    parser.add_argument("--photographs", type=Path, default=of_photographs, metavar="FILE")
    arguments = parser.parse_args()
    readme, page = (path.read_text(encoding="utf-8") for path in (arguments.readme, arguments.performance))
    arguments.readme.write_text(updated(readme, arguments.results, arguments.photographs), encoding="utf-8")
    arguments.performance.write_text(updated_performance(page, arguments.results), encoding="utf-8")
    deploy = updated_deploy(arguments.deploy.read_text(encoding="utf-8"), arguments.results)
    arguments.deploy.write_text(deploy, encoding="utf-8")
    folder = arguments.performance.parent
    for document in with_models(newest(arguments.results)):
        performance.plot_density(document, folder)
    for document in whole(newest(arguments.results, performance.KIND)):
        performance.plot_floor(document, folder)


if __name__ == "__main__":
    main()
