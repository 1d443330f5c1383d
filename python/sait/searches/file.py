"""PlanFile: what a search found, as a file that says for which model, by which images, and what it lost."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sait.checkpoint import replace_file
from sait.environment import environment
from sait.families import family_of, weights
from sait.methods.plan import Plan
from sait.searches.parts import Parts, leave_out, restored
from sait.sparsify import SparseModel, learned_by, sparsify

FORMAT = 1
KIND = "sait plan"
WORDS = {  # of a shape's entries
    "class": "of class {}",
    "depth": "of {} blocks",
    "channels": "of {} channels",
    "heads": "of {} heads",
    "mlp": "with {} weights in an MLP",
    "prefix": "with {} prefix tokens",
    "patches": "of {} patches",
}


class Score(NamedTuple):
    """What a plan does on some images.

    Attributes:
        images: their number.
        dense, found: accuracy of the dense model and of the plan; or their agreement with the dense model.
        lost: dense - found; low, high: its interval of 95 %, of differences image by image.
    """

    images: int
    dense: float
    found: float
    lost: float
    low: float
    high: float


@dataclass(frozen=True)
class PlanFile:
    """A plan for one model, and how it was found.

    Attributes:
        model: its name, as it was typed.
        shape: of the model, by which another one is refused: class, depth, channels, heads, mlp, prefix, patches.
        plan: of what is left when ``left_out`` is gone.
        left_out: in the numbers of the whole model.
        measure: "accuracy" or "agreement"; may_lose: how much of it.
        search, held_out: on the images that chose the plan, and on others.
        dense_gmac, gmac: 1e9 multiply-adds of a held-out image, the mean.
        evaluations, stopped, seed, command: of the search.
    """

    model: str
    shape: dict[str, Any]
    plan: Plan
    left_out: Parts
    measure: str
    may_lose: float
    search: Score
    held_out: Score
    dense_gmac: float
    gmac: float
    evaluations: int
    stopped: str
    seed: int
    command: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        others = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            "kind": KIND,
            "format": FORMAT,
            **others,
            "plan": self.plan.to_dict(),
            "label": self.plan.label,
            "left_out": self.left_out.to_dict(),
            "search": self.search._asdict(),
            "held_out": self.held_out._asdict(),
            **environment(),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it, whole or not at all. OSError: it cannot be written."""
        written = json.dumps(self.to_dict(), indent=1) + "\n"
        replace_file(path, lambda half: half.write_text(written, encoding="utf-8"))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> PlanFile:
        """What save wrote.

        Raises:
            ValueError: the file is no such file, damaged, or of another version. OSError: it cannot be read.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no JSON, or damaged: {error}. sait tune --search writes it anew.") from error
        if not isinstance(document, dict) or document.get("kind") != KIND:
            raise ValueError(f"{path} is no plan file: expected what sait tune --search wrote.")
        if document.get("format") != FORMAT:
            raise ValueError(
                f"{path} is of format {document.get('format')!r}, expected {FORMAT}: it is of another version of sait. "
                "Search anew by this one, with the command that the file names."
            )
        try:
            plan, label = Plan.from_dict(document["plan"]), document["label"]
            made: dict[str, Any] = {name: document[name] for name in cls.__dataclass_fields__}
            made["plan"] = replace(plan, label=label if isinstance(label, str) else None)
            made["left_out"] = Parts.from_dict(document["left_out"])
            made["search"], made["held_out"] = (Score(**document[name]) for name in ("search", "held_out"))
            return cls(**made)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is damaged: {why}. sait tune --search writes it anew.") from error

    def check(self, model: Any, path: str | os.PathLike[str] = "plan") -> None:
        """ValueError unless a whole model has the shape of the one that the plan was found for."""
        own = shape_of(model)
        for name, words in WORDS.items():
            if own[name] != self.shape.get(name):
                raise ValueError(
                    f"{path} is a plan for {self.model}, a model {words.format(self.shape.get(name))}; this one is "
                    f"{words.format(own[name])}. Name that model, or search a plan for this one: sait tune --search."
                )

    def apply(self, model: Any, path: str | os.PathLike[str] = "plan") -> Any:
        """Makes a whole model what was found: without the parts that are left out, sparse, with the plan. In place.

        Args:
            model: of the shape that the plan was found for, sparse already or not.
            path: for messages.

        Raises:
            ValueError: another model, or one that has not learned what the plan needs. TypeError: as sparsify.
        """
        self.check(model, path)
        learned = learned_by(model)
        if missing := sorted(set(self.plan.learned()) - set(learned)):
            raise ValueError(
                f"{path}: its plan has learned {', '.join(missing)}, and this model has not. Name the checkpoint that "
                f"it was found for, {self.model}."
            )
        plan = self.plan.sharing(model._sait.plan) if learned else self.plan
        if self.left_out:
            model = leave_out(restored(model), self.left_out)
        return sparsify(model, plan)


def shape_of(model: Any) -> dict[str, Any]:
    """What tells models apart whose plans do not fit each other."""
    family = family_of(type(model))
    if family is None:
        raise TypeError(f"plan: model: expected one that sparsify takes, got {type(model).__name__}.")
    original: type = type(model)._sait_original if isinstance(model, SparseModel) else type(model)
    blocks = family.blocks(model)
    view, (rows, columns) = family.view(blocks[0]), family.grid(model)
    return {
        "class": original.__name__,
        "depth": len(blocks),
        "channels": view.channels,
        "heads": view.heads,
        "mlp": weights(view.mlp),
        "prefix": family.num_prefix(model),
        "patches": rows * columns,
    }
