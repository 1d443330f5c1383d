"""train: dense and sparse epochs in turn, on one set of weights."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sait import checkpoint
from sait.methods.base import Trained
from sait.methods.plan import Plan
from sait.sparsify import learned_by, sparsify
from sait.state import Density, record_gates, record_scores, selections, set_density
from sait.train.answers import own_answers
from sait.train.config import Config, StoppedError, TrainingError
from sait.train.data import Data, expected_by, open_data
from sait.train.distill import Lesson, Teacher, attention_loss, load_teacher, logit_loss, patch_shares
from sait.train.evaluate import evaluate
from sait.train.groups import learned_and_rest, slow_down
from sait.train.manifold import last_features, manifold_loss, same_tokens
from sait.train.processes import Processes
from sait.train.student import create_student, student_plan, trained_density

MODEL, STATE, METRICS = "model.safetensors", "last.pt", "metrics.csv"
# Of a resumed run these may differ from the first part's: they change where and how long it runs, not what it computes.
FREE_KEYS = ("out", "device", "workers", "tensorboard")

Row = dict[str, Any]
Advance = Callable[[str, int, int], object]  # (what is going on, steps done, steps in all)


def train(
    config: Config,
    processes: Processes,
    *,
    resume: bool = False,
    command: str = "",
    advance: Advance = lambda *_: None,
    on_epoch: Callable[[Row], object] = lambda _: None,
) -> Path:
    """Runs a training to its end.

    After every epoch the folder ``config.out`` holds model.safetensors (for sait.load; the average of the weights
    where there is one), last.pt (all that a resumed run needs) and metrics.csv, each of them whole at any time.

    Args:
        config: what to do.
        processes: from sait.train.processes.processes.
        resume: go on where last.pt in ``config.out`` ends. Every epoch draws its random numbers from seed, epoch and
            rank alone, so the run goes on as it would have.
        command: noted in the checkpoint.
        advance: called after every step.
        on_epoch: called in the first process with every new row of metrics.csv.

    Returns:
        The path of model.safetensors.

    Raises:
        TrainingError: anything is wrong with config, data, teacher, checkpoint or folder, or the loss or a gradient is
            no longer finite. What the folder held stays there.
    """
    return Trainer(config, processes, resume, command).run(advance, on_epoch)


class Trainer:
    """A training in progress."""

    def __init__(self, config: Config, processes: Processes, resume: bool, command: str) -> None:
        self.config, self.processes, self.command = config, processes, command
        self.out = Path(config.out)
        self.epoch, self.rows = 0, []  # type: int, list[Row]
        self.weights = {
            "label_loss": 1.0,
            "attention_loss": config.alpha,
            "logit_loss": config.logit_alpha,
            "manifold_loss": config.manifold_alpha,
        }
        self._random_for(0)
        self.kwargs, self.model = create_student(config)
        self.model.to(processes.device)
        self.losses = self.model._sait.plan.losses
        self.weights |= {} if self.losses is None else self.losses.weights
        self.expected = expected_by(self.model)
        self.data: Data = open_data(config, self.expected, processes)
        self.teacher: Teacher | None = load_teacher(config, self.model, processes.device)
        state = self._open_folder(resume)  # not before all else is known to be right: it makes the folder
        self.optimizer = create_optimizer_v2(
            self.model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )
        self.clipped = learned_and_rest(self.model)
        if len(self.clipped) > 1:
            slow_down(self.optimizer, self.clipped[0], config.backbone_scale)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]  # a part of an epoch is fine
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.data.steps,
        )
        if len(self.clipped) > 1:
            self.scheduler.step_update(0)  # timm sets the scaled rates not before
        self.ema = None if config.ema is None else ModelEmaV3(self.model, decay=config.ema, use_warmup=True)
        self.mixup: Mixup | None = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.smoothing,
                num_classes=self.model.num_classes,
            )
        if state is not None:
            self._restore(state)
        self.parallel: nn.Module = self._shared_out()

    def run(self, advance: Advance, on_epoch: Callable[[Row], object]) -> Path:
        with self._event_files() as events:
            while self.epoch < self.config.epochs:
                row = self._train_epoch(self.epoch + 1, advance)
                self.epoch += 1
                if self.epoch % self.config.eval_every == 0 or self.epoch == self.config.epochs:
                    row |= self._evaluate(advance)
                self.rows.append(row)
                if self.processes.first:
                    self._save()
                    events(row)
                    on_epoch(row)
                self.processes.wait()
        return self.out / MODEL

    def _shared_out(self) -> nn.Module:
        """The model whose gradients are those of all processes."""
        if self.processes.world_size == 1:
            return self.model
        devices = [self.processes.device] if self.processes.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=devices)

    def _begin_epoch(self, epoch: int) -> None:
        """Tells what the method learns, and follows where other parameters learn from here on."""
        before = [parameter.requires_grad for parameter in self.model.parameters()]
        for part in learned_by(self.model).values():
            begin: Any = getattr(part, "begin_epoch", None)
            if begin is not None:
                begin(epoch, self.config.epochs)
        if before != [parameter.requires_grad for parameter in self.model.parameters()]:
            self.parallel = self._shared_out()

    def mode(self, epoch: int) -> str:
        """ "dense" or "sparse"; epochs count from 1."""
        if self.config.method is not None:
            return "sparse"
        if self.config.mode != "alternate":
            return self.config.mode
        return "dense" if epoch % 2 else "sparse"

    def _train_epoch(self, epoch: int, advance: Advance) -> Row:
        config, steps = self.config, self.data.steps
        self._random_for(epoch)
        self._begin_epoch(epoch)
        # The same draws in every process: images that keep few tokens would wait for those that keep many.
        densities = np.random.default_rng([config.seed, epoch])
        mode = self.mode(epoch)
        shown = f"{mode} (keep=1.0)" if mode == "dense" and config.learns_from_dense_tokens else mode
        sums = dict.fromkeys(("loss", *self.weights), 0.0)
        self.parallel.train()
        start = time.perf_counter()
        for step, (images, labels) in enumerate(self.data.train_batches(epoch)):
            set_density(self.model, **trained_density(config, self.model, mode, densities.random()))
            where = f"epoch {epoch}, step {step + 1} of {steps} ({mode})"
            losses = self.step(images.to(self.processes.device), labels.to(self.processes.device), where)
            for name, value in losses.items():
                sums[name] += value
            done = (epoch - 1) * steps + step + 1
            self.scheduler.step_update(done)
            if self.ema is not None:
                self.ema.update(self.model, step=done)
            advance(f"epoch {epoch}/{config.epochs} {shown}, loss {losses['loss']:.3f}", step + 1, steps)
        seconds = time.perf_counter() - start
        totals = self.processes.sum(*sums.values())
        means = [total / (steps * self.processes.world_size) for total in totals]
        return {
            "epoch": epoch,
            "mode": mode,
            "lr": self.optimizer.param_groups[0]["lr"],
            **{name: float(f"{mean:.5g}") for name, mean in zip(sums, means, strict=True)},
            "seconds": round(seconds, 2),
            "images_per_s": round(steps * config.batch / seconds, 1),
        }

    def step(self, images: Tensor, labels: Tensor, where: str) -> dict[str, float]:
        """One step at the density that is set: each loss by its name. StoppedError, with ``where``, if one is not
        finite, or a gradient is not."""
        config, losses = self.config, self.losses
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        with contextlib.ExitStack() as stack:
            wants_scores, wants_features = config.learns_attention or losses, config.manifold_alpha or losses
            scores = stack.enter_context(record_scores(self.model)) if wants_scores else []
            features = stack.enter_context(last_features(self.model)) if wants_features else []
            answers = stack.enter_context(own_answers(self.model)) if losses else {}
            gates = stack.enter_context(record_gates(self.model)) if losses else []
            stack.enter_context(torch.autocast(images.device.type, torch.bfloat16, enabled=config.amp == "bf16"))
            logits = self.parallel(images)
        logits = logits.float()
        smoothing = 0.0 if self.mixup is not None else config.smoothing  # mixup has smoothed the labels already
        parts = {"label_loss": F.cross_entropy(logits, labels, label_smoothing=smoothing)}
        lesson: Lesson | None = None
        prefix = self.model.num_prefix_tokens
        if self.teacher is not None:
            lesson = self.teacher(images)
            if config.learns_attention:
                parts["attention_loss"] = attention_loss(lesson.attention, patch_shares(scores[0], len(images), prefix))
            if config.logit_alpha:
                parts["logit_loss"] = logit_loss(lesson.logits, logits, config.temperature)
            if config.manifold_alpha:
                (kept,), theirs = selections(self.model), self.teacher.model.num_prefix_tokens
                wanted = same_tokens(lesson.features, theirs, kept, prefix)
                parts["manifold_loss"] = manifold_loss(wanted, features[0][:, prefix:])
        if losses is not None:
            step = Trained(self.model._sait.active, logits, features[0], scores, prefix, gates=gates)
            step = step._replace(labels=labels, answers=answers)
            if self.teacher is not None and lesson is not None:
                theirs = self.teacher.model.num_prefix_tokens
                step = step._replace(
                    teacher_logits=lesson.logits, teacher_features=lesson.features, teacher_prefix=theirs
                )
            parts |= losses(step)
        loss = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        self._check_finite("the loss", loss, where, parts)
        self.optimizer.zero_grad()
        loss.backward()
        for parameters in self.clipped:
            norm = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
            self._check_finite("the gradient", norm, where)
        self.optimizer.step()
        return {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}

    def _check_finite(self, what: str, value: Tensor, where: str, parts: Mapping[str, Tensor] | None = None) -> None:
        """StoppedError unless it is; it names the first of its parts that is not."""
        if math.isfinite(value.item()):
            return
        wrong = next((name for name, part in (parts or {}).items() if not math.isfinite(part.item())), None)
        where += f", by its {wrong}" if wrong else ""
        kept = "there is no checkpoint yet"
        if self.epoch:
            kept = f"{self.out / MODEL} holds epoch {self.epoch}, to go on from with --init and another --out"
        raise StoppedError(f"{what} is {value.item()} in {where}; {kept}. Lower lr or clip, or set amp to none.")

    def _evaluate(self, advance: Advance) -> Row:
        config = self.config
        model = self.model if self.ema is None else self.ema.module
        adaptive = (Density(mass=mass, **config.limits) for mass in config.eval_mass)
        densities: list[Density | Plan] = [Density(), *map(Density, config.eval_keep), *adaptive]
        if config.method is not None:
            densities = [Density(), model._sait.plan]
        batches = math.ceil(self.data.held_out_images / config.batch)
        counter = iter(range(1, batches + 2))
        results = evaluate(
            model,
            self.data,
            densities,
            self.processes,
            dtype=torch.bfloat16 if config.amp == "bf16" else torch.float32,
            advance=lambda: advance("evaluating", next(counter), batches),
        )
        return {f"accuracy, {result.label}": round(result.accuracy, 5) for result in results}

    def _save(self) -> None:
        model = self.model if self.ema is None else self.ema.module
        if self.config.method is not None:
            set_density(model, model._sait.plan)
        else:
            set_density(model) if self.config.mode == "dense" else sparsify(model, student_plan(self.config))
        try:
            checkpoint.save(
                model,
                self.out / MODEL,
                name=self.config.model,
                kwargs=self.kwargs,
                command=self.command,
                config=self.config.to_dict(),
                metrics=self.rows,
            )
            checkpoint.replace_file(self.out / STATE, lambda half: torch.save(self._state(), half))
            checkpoint.replace_file(
                self.out / METRICS, lambda half: half.write_text(to_csv(self.rows), encoding="utf-8")
            )
        except OSError as error:
            raise TrainingError(f"--out: cannot write into {self.out}: {error.strerror or error}.") from error

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "epoch": self.epoch,
            "rows": self.rows,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _open_folder(self, resume: bool) -> dict[str, Any] | None:
        """Checks the folder before the work; the state to go on from, if that is asked for."""
        path = self.out / STATE
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if self.processes.first:
                probe = self.out / f"{STATE}.part"
                probe.touch()
                probe.unlink()
        except OSError as error:
            raise TrainingError(f"--out: cannot write into {self.out}: {error.strerror}.") from error
        if not resume:
            if path.exists():
                raise TrainingError(f"--out: {self.out} holds a training already; give --resume, or another folder.")
            self.processes.wait()  # until every process has seen that there is none
            return None
        if not path.exists():
            raise TrainingError(f"--resume: there is no {path} to go on from.")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file makes the unpickler say
            raise TrainingError(f"--resume: {path} is damaged: {' '.join(str(error).split())[:200]}") from error
        then = Config().to_dict() | state["config"]  # a key that is newer than the file was at its default
        now = self.config.to_dict()
        changed = [key for key in now if key not in FREE_KEYS and now[key] != then[key]]
        if changed:
            key = changed[0]
            raise TrainingError(
                f"--resume: {path} was trained with {key}={then[key]!r}, and this run has {now[key]!r}; "
                "expected the same config."
            )
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.rows = state["epoch"], state["rows"]
        self.scheduler.step_update(self.epoch * self.data.steps)

    def _random_for(self, epoch: int) -> None:
        """Seeds torch, numpy and random by seed, epoch and rank: no epoch's draws depend on the one before."""
        seed = np.random.SeedSequence([self.config.seed, epoch]).generate_state(1)[0] // 2
        random_seed(int(seed), self.processes.rank if epoch else 0)  # all processes build the same model

    @contextlib.contextmanager
    def _event_files(self) -> Iterator[Callable[[Row], None]]:
        if not (self.config.tensorboard and self.processes.first):
            yield lambda _: None
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError("config: tensorboard: the package is missing; pip install tensorboard.") from error
        with SummaryWriter(str(self.out)) as writer:

            def write(row: Row) -> None:
                for name, value in row.items():
                    if isinstance(value, float):
                        writer.add_scalar(name, value, row["epoch"])

            yield write


def to_csv(rows: list[Row]) -> str:
    """The rows under one header; a cell that a row does not have is empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
