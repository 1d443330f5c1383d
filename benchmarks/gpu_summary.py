"""The results of runs of `make gpu`: ``python benchmarks/gpu_summary.py FOLDER`` or `make gpu-summary`.

What passed, which goals are met, the worst rows, and what is missing: of the newest run of each part, for each GPU.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from report import performance
from report.tables import Document, Row, number, provenance, render, unique

PROMISED = ("start", "ops", "end-to-end", "test-triton", "costs")  # `make gpu`; what else ran is shown, too
FAILURES_SHOWN, WORST_SHOWN = 12, 10
OURS = "sait_kernels, Triton"  # as a baseline of ops: no peer
# Goals of the headline model, the best of ours with a fixed share: batch -> peer -> times as fast as that peer.
MODEL_GOALS = {
    256: {"timm": 1.7, "timm-compiled": 1.5, "plain-compiled": 1.1},
    1: {"timm": 5.0, "timm-compiled": 1.3},
}
FIXED_SHARE = ("ours", "ours-optimized", "ours-compiled", "ours-graphed", "ours-optimized-graphed")


@dataclass(frozen=True)
class PartRun:
    """A folder of gpu.py."""

    folder: Path
    name: str
    date: str
    steps: list[Row]  # of each promised step, and of those that prepared them
    tests: dict[str, Row]  # the line of each test that counts
    documents: list[Document]
    device: str  # as in the folder's name

    @property
    def passed(self) -> bool:
        return all(step["outcome"] == "passed" for step in self.steps)


class Goal(NamedTuple):
    what: str
    against: str
    goal: float
    reached: float | None  # None: not measured

    @property
    def met(self) -> bool:
        return self.reached is not None and self.reached >= self.goal


def read(folder: Path) -> PartRun:
    """The lines that exist: a cut run has lines for what it did until then."""
    lines = json_lines(folder / "steps.jsonl")
    head = lines[0]
    done = {line["step"]: line for line in lines if "step" in line}
    promised = next((line["promised"] for line in lines if "promised" in line), [])
    never = {"outcome": "cut", "reason": "the run ended before it, or within it"}
    steps = [*done.values(), *({"step": name, **never} for name in promised if name not in done)]
    tests: dict[str, Row] = {}
    for line in json_lines(folder / "tests.jsonl"):
        before = tests.get(line["test"])
        if before is None or before["outcome"] != "failed":  # of one whose worker ended with it the first reason counts
            tests[line["test"]] = line
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    device = re.sub(r"^\d{4}-\d\d-\d\d-", "", folder.parent.name)
    return PartRun(folder, head["part"], head["date"], steps, tests, documents, device)


def json_lines(path: Path) -> list[Row]:
    """The lines of a file, without a half-written last one."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def runs(folders: Iterable[Path]) -> list[PartRun]:
    """The runs in or under the folders: the newest of each part and device, by date."""
    paths = sorted({path.parent for folder in folders for path in folder.rglob("steps.jsonl")})
    found = sorted((read(path) for path in paths), key=lambda run: run.date)
    return list({(run.device, run.name): run for run in found}.values())


def all_passed(folders: Iterable[Path]) -> bool:
    return all(run.passed for run in runs(folders))


def suspects(folder: Path) -> list[str]:
    """The ops whose small calls or tests failed in this run."""
    run = read(folder)
    failed = [line["test"] for line in run.tests.values() if line["outcome"] == "failed"]
    named = [name for test in failed for name in re.findall(r"tests/ops/test_(\w+)\.py", test)]
    for step in run.steps:
        if step["step"].startswith("small calls"):
            named += re.findall(r"^(\w+): (?:failed|no end)", step.get("last", ""), re.MULTILINE)
    return sorted(set(named))


def written(folders: Iterable[Path]) -> str:
    """The summary, in Markdown."""
    found = runs(folders)
    if not found:
        return "No run of `make gpu` here."
    devices = unique(run.device for run in found)
    return "\n\n".join(of_device([run for run in found if run.device == device]) for device in devices)


def of_device(found: Sequence[PartRun]) -> str:
    documents = [document for run in found for document in run.documents if "rows" in document]
    parts = [f"# {found[0].device}"]
    parts += unique(provenance(document) for document in documents)[:1]
    parts += [part_table(found), *failed_steps(found), *test_lines(found)]
    goals = [*op_goals(documents), *model_goals(documents)]
    parts += [goal_table(goals), *traffic(found)]
    parts += worst(documents)
    parts.append(missing(found, documents, goals))
    return "\n\n".join(parts)


def part_table(found: Sequence[PartRun]) -> str:
    lines = []
    for run in found:
        outcomes = Counter(step["outcome"] for step in run.steps)
        seconds = sum(step.get("seconds", 0) for step in run.steps)
        came = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        lines.append([run.name, run.date[:19], came, number(seconds, 0)])
    return render(["part", "when", "steps", "seconds"], lines, text=3)


def failed_steps(found: Sequence[PartRun]) -> list[str]:
    """With the last lines of what they printed."""
    parts = []
    for run in found:
        for step in run.steps:
            if step["outcome"] in ("failed", "cut"):
                last = "\n".join(step.get("last", "").splitlines()[-6:])
                quoted = f"\n```\n{last}\n```" if last else ""
                parts.append(f"**{run.name}: {step['step']}: {step['outcome']}**, {step['reason']}{quoted}")
    return parts


def test_lines(found: Sequence[PartRun]) -> list[str]:
    parts = []
    for run in found:
        if not run.tests:
            continue
        outcomes = Counter(line["outcome"] for line in run.tests.values())
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        shown = [line for line in run.tests.values() if line["outcome"] in ("failed", "started")]
        lines = [f"- {line['test']}: {line.get('reason', 'running when the run was cut')}" for line in shown]
        more = [f"- and {len(lines) - FAILURES_SHOWN} more"] if len(lines) > FAILURES_SHOWN else []
        parts.append("\n".join([f"Tests of {run.name}: {counts}.", *lines[:FAILURES_SHOWN], *more]))
    return parts


def traffic(found: Sequence[PartRun]) -> list[str]:
    """Bytes that reach memory, over the fewest possible."""
    rows = [row for run in found for row in json_lines(run.folder / "traffic.jsonl")]
    lines = []
    for row in rows:
        cells = ["", "", f"no figure: {row.get('error')}"]
        if "ratio" in row:
            met = "met" if row["ratio"] <= row["goal_at_most"] else "missed"
            cells = [number(row["ratio"], 2), number(row["goal_at_most"], 2), met]
        lines.append([row["op"], row["backend"], *cells])
    header = ["op", "backend", "bytes moved, of the fewest", "at most", ""]
    return [render(header, lines, text=2)] if lines else []


def measured(documents: Sequence[Document]) -> list[Row]:
    return [row for document in documents for row in document["rows"] if "error" not in row]


def op_goals(documents: Sequence[Document]) -> list[Goal]:
    """Goals that rows carry: for a ratio, and for the share of the roofline bound, the same in all rows of a case."""
    found: dict[tuple[str, str], Goal] = {}
    for row in measured(documents):
        what = f"{row['name']}, {row['case']}" + (f", batch {row['batch']}" if row["name"] == "model" else "")
        if "goal" in row:
            found[what, row["baseline"]] = Goal(what, row["baseline"], row["goal"], row["ratio"])
        if "goal_of_floor" in row:
            found[what, "floor"] = Goal(what, "the roofline bound", row["goal_of_floor"], row["of_floor"])
    return list(found.values())


def model_goals(documents: Sequence[Document]) -> list[Goal]:
    """Goals of whole models against their peers, each from one run."""
    rows = [row for row in measured(documents) if row.get("model") == performance.MODEL and "peer" in row]
    found = []
    for batch, goals in MODEL_GOALS.items():
        of_batch = {row["peer"]: row for row in rows if row["batch"] == batch}
        ours = min(
            (of_batch[peer] for peer in FIXED_SHARE if peer in of_batch), key=lambda row: row["ours_us"], default=None
        )
        for against, goal in goals.items():
            what = f"{performance.MODEL}, batch {batch}"
            if ours is None or against not in of_batch:
                found.append(Goal(what, against, goal, None))
                continue
            ratio = of_batch[against]["ours_us"] / ours["ours_us"]
            found.append(Goal(f"{what}: {ours['case']}", of_batch[against]["case"], goal, round(ratio, 3)))
    return found


def goal_table(goals: Sequence[Goal]) -> str:
    """Missed goals first, the one furthest off at the top."""
    known = [(goal, goal.reached) for goal in goals if goal.reached is not None]
    known.sort(key=lambda pair: pair[1] / pair[0].goal)
    lines = [
        [goal.what, goal.against, number(goal.goal, 2), number(reached, 2), "met" if goal.met else "missed"]
        for goal, reached in known
    ]
    counted = f"Goals: {sum(goal.met for goal in goals)} of {len(goals)} met, {len(goals) - len(known)} not measured."
    table = [render(["", "against", "goal", "reached", ""], lines, text=2)] if lines else []
    return "\n\n".join([counted, *table])


def worst(documents: Sequence[Document]) -> list[str]:
    """The rows in which ours is slowest against a peer, whether or not there is a goal."""
    rows = [row for row in measured(documents) if "peer" not in row and row["baseline"] != OURS]
    rows += [
        row | {"ratio": row["vs_best_dense"], "baseline": row["best_dense"]}
        for row in measured(documents)
        if row.get("group") == "ours"
    ]
    slowest = sorted(rows, key=lambda row: row["ratio"])[:WORST_SHOWN]
    lines = [
        [
            row["name"],
            row["case"],
            str(row["batch"]),
            row["baseline"],
            number(row["ours_us"], 1),
            number(row["ratio"], 2),
        ]
        for row in slowest
    ]
    header = ["op", "case", "batch", "against", "ours µs", "×"]
    return [f"Worst rows:\n\n{render(header, lines, text=4)}"] if lines else []


def missing(found: Sequence[PartRun], documents: Sequence[Document], goals: Sequence[Goal]) -> str:
    """What should have a figure and has none: parts, steps, benchmarks and peers, goals."""
    there = {run.name for run in found}
    lines = [f"- part {name}: not run" for name in PROMISED if name not in there]
    for run in found:
        for step in run.steps:
            if step["outcome"] == "left out":
                lines.append(f"- {run.name}: {step['step']}: {step['reason']}")
    for document in documents:
        for row in document["rows"]:
            if "error" in row:
                about = [row["name"], row["case"]]
                about += [f"batch {row['batch']}"] if "batch" in row else []
                about += [f"against {row['baseline']}"] if "baseline" in row else []
                lines.append(f"- {', '.join(about)}: {row['error']}")
    lines += [f"- goal of {goal.what} against {goal.against}: not measured" for goal in goals if goal.reached is None]
    return "\n".join([f"Missing: {len(lines) or 'nothing'}.", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).resolve().parent / "results"
    parser.add_argument("folders", nargs="*", type=Path, default=[results], metavar="FOLDER")
    print(written(parser.parse_args().folders))


if __name__ == "__main__":
    main()
