"""docs/methods.md and its plot from methods.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison.report import PLOT, summary
from recorded import read

Row = dict[str, Any]
HEAD = """# Methods

Each method is one call that returns a plan. All of them run in the same loop, on the same kernels:

```python
model = sait.sparsify(timm.create_model("deit_small_patch16_224"), sait.methods.evit(keep=0.7))
```

| call | ranks patches by | keeps | the rest | default blocks |
|---|---|---|---|---|
| `sait(keep)` | class or column attention | the best | is dropped | at a quarter of the depth |
| `sait(mass=)` | the same | the fewest with that cumulative score (top-p) | is dropped | the same |
| `evit(keep)` | class attention | the best | becomes one row, weighted by the scores | at each quarter |
| `ats(keep)` | class attention times the size of the value | a sample by score | is dropped | from a quarter on |
| `ltp(threshold)` | column attention | those above a threshold that grows with depth | is dropped | every block |
| `tome(r)` | cosine of the keys averaged over heads | all but r | is merged in pairs, with their sizes | every block |
| `random(keep)` | chance | a random share | is dropped | ahead of block 0 |

These have parts that are [trained](training.md#methods-that-are-trained):

| call | what is learned | keeps | the rest | default blocks |
|---|---|---|---|---|
| `ltp_learned(threshold)` | the thresholds | those whose column attention is above | is dropped | every block |
| `dynamicvit(keep)` | predictors | the best | is dropped | at each quarter |
| `cagevit(keep)` | a small CNN, a fusion | the best of the CNN's map | becomes four rows | ahead of block 0 |
| `adavit(keep)` | gates of tokens, heads, sub-layers | what gates leave on | passes the block by | all but block 0 |
| `hot(keep)` | a query for each patch | peaks of density | comes back by its query | at 3/8 of the depth |
"""
WITHOUT_TRAINING = """## Without training

*Written by `make methods` from methods.json. {about}*

No model below was trained for pruning by the method measured, with one exception: the canvas checkpoint was trained by
SaiT at block {block}, so SaiT has an advantage there. DINOv2-S was never trained for pruning. The tables compare
methods at equal multiply-adds. Of two methods with the same arithmetic, the one with fewer stages is faster: each stage
has work that multiply-adds do not count, and where a stage merges or fuses rows, blocks are called one by one.
"""
FINE_TUNED = """## Fine-tuned

Every method fine-tuned on canvas from one model that was trained dense, in the same budget: accuracy at three savings
of multiply-adds, mean and deviation of the seeds, and images a second beside those of all tokens through the same
kernels. [The whole comparison](comparison.md) has settings, intervals, dense modes and the speed in fp32, and says
which claims of the papers held.
"""
COMPARISON = Path(__file__).with_name("comparison") / "results.json"


def write(document: dict[str, Any], out: Path) -> None:
    (out / "methods.md").write_text(markdown(document), encoding="utf-8")
    plot(rows_of(document, "methods"), out / "methods.png")


def markdown(document: dict[str, Any]) -> str:
    rows = rows_of(document, "methods")
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    about = f"{document['device']}, {document['threads']} threads; {versions}; commit {document['commit'][:10]}."
    parts = [HEAD, WITHOUT_TRAINING.format(about=about, block=document["trained_block"])]
    for subject in dict.fromkeys(row["subject"] for row in rows):
        parts += section(subject, [row for row in rows if row["subject"] == subject])
    parts.append("![quality against arithmetic](methods.png)\n")
    if tuned := summary(read(COMPARISON)):
        parts += [FINE_TUNED, tuned, f"![accuracy of the fine-tuned methods]({PLOT})\n"]
    parts.append(twins(rows_of(document, "twin")))
    return "\n".join(parts)


def section(subject: str, rows: Sequence[Row]) -> list[str]:
    dense, quality = rows[0], quality_of(rows[0])
    told = {
        "accuracy": f"Canvas, the SaiT checkpoint, {dense['images']} test images: accuracy in %",
        "cosine": f"DINOv2-S on {dense['images']} crops of photographs at 224 pixels: cosine between the class token "
        "and the dense model's, times 100",
    }[quality]
    lines = [
        f"| fewer multiply-adds | method | {quality} | GMAC | tokens | fp32 img/s | × dense | bf16 img/s | × dense |",
        "|---" * 9 + "|",
        line(dense, dense, quality, ""),
    ]
    missing = []
    for saved in sorted({row["saved"] for row in rows if "saved" in row}):
        of_share = [row for row in rows if row.get("saved") == saved]
        missing += [f"{row['method']} at -{saved:.0%}: {row['error']}." for row in of_share if "error" in row]
        ran = sorted((row for row in of_share if "error" not in row), key=lambda row: -row[quality])
        lines += [line(row, dense, quality, f"-{saved:.0%}") for row in ran]
    return [
        f"### {subject.capitalize()}\n",
        f"{told}, ± the standard error over images. Tokens are those left after the last stage. Speed is for a batch "
        "of 16 with sait.optimize; the dense row runs all tokens through the same kernels; runs are interleaved.\n",
        "\n".join(lines),
        "\n" + best(rows, quality),
        *(["\nNot shown: " + " ".join(missing)] if missing else []),
        "",
    ]


def line(row: Row, dense: Row, quality: str, saved: str) -> str:
    cells = [saved, row["case"], f"{100 * row[quality]:.2f} ± {100 * row['standard_error']:.2f}", f"{row['gmac']:.4g}"]
    cells.append(f"{row['tokens']:.1f}" if "tokens" in row else "")
    for key in ("images_per_s_fp32", "images_per_s_bf16"):
        cells += [f"{row[key]:.1f}", f"{row[key] / dense[key]:.2f}"]
    return "| " + " | ".join(cells) + " |"


def best(rows: Sequence[Row], quality: str) -> str:
    """Where SaiT is the best, and where it is not."""
    found = []
    for saved in sorted({row["saved"] for row in rows if "saved" in row}):
        ran = [row for row in rows if row.get("saved") == saved and "error" not in row]
        ours = max((row for row in ran if row["method"].startswith("SaiT")), key=lambda row: row[quality], default=None)
        other = max(
            (row for row in ran if not row["method"].startswith("SaiT")), key=lambda row: row[quality], default=None
        )
        if ours is None or other is None:
            continue
        ahead = 100 * (ours[quality] - other[quality])
        word = "best" if ahead >= 0 else "not the best"
        found.append(
            f"at -{saved:.0%} SaiT is {word}: {ours['case']} has {100 * ours[quality]:.2f}, {other['case']} "
            f"{100 * other[quality]:.2f}"
        )
    return "Highest first. " + "; ".join(found) + "."


def twins(rows: Sequence[Row]) -> str:
    lines = [
        "## Twins\n",
        "Each method also has a twin, written image by image in plain torch (tests/models/twins.py). The table has the "
        "largest errors of ours and of the twin in float32, against the twin in float64, relative to the largest "
        "result; four images. Where scores are close, float32 may choose another token than float64: such an error is "
        "not rounding.\n",
        "| | method | ours, fp32 | twin, fp32 | same number of tokens |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        same = "yes" if row["same_counts"] else "no"
        lines.append(f"| {row['subject']} | {row['method']} | {row['ours']:.1e} | {row['in_torch']:.1e} | {same} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    with pyplot.style.context("tableau-colorblind10"):
        figure, every = pyplot.subplots(1, len(subjects), figsize=(6 * len(subjects), 4.5), dpi=150, squeeze=False)
    for axes, subject in zip(every[0], subjects, strict=True):
        ran = [row for row in rows if row["subject"] == subject and "error" not in row]
        dense, quality = ran[0], quality_of(ran[0])
        for method in dict.fromkeys(row["method"] for row in ran[1:]):
            points = [dense, *sorted((row for row in ran if row["method"] == method), key=lambda row: -row["gmac"])]
            axes.plot(
                [row["gmac"] for row in points],
                [100 * row[quality] for row in points],
                marker="o",
                markersize=4,
                linewidth=1,
                linestyle="--" if method == "random" else "-",
                label=method,
            )
        axes.set(xlabel="GMAC of an image", ylabel=f"{quality}, times 100", title=subject)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def rows_of(document: dict[str, Any], name: str) -> list[Row]:
    return [row for row in document["rows"] if row["name"] == name]


def quality_of(row: Row) -> str:
    return "accuracy" if "accuracy" in row else "cosine"
