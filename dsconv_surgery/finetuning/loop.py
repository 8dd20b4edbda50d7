"""The training loop of `fine_tune`, which can be interrupted at any moment and resumed."""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from dsconv_surgery.finetuning.batches import can_mix, derived_seed, mix_images, seed_epoch, step_batches
from dsconv_surgery.finetuning.history import Epoch, History
from dsconv_surgery.finetuning.loss import DistillationLoss
from dsconv_surgery.finetuning.optimizers import MakeOptimizer, learning_rate_factor
from dsconv_surgery.finetuning.settings import FineTune
from dsconv_surgery.finetuning.training_checkpoint import TrainingCheckpoint, resumable, run_identity
from dsconv_surgery.support import distributed
from dsconv_surgery.support.copies import as_channels_last, model_device, to_device
from dsconv_surgery.support.fidelity import checked_score
from dsconv_surgery.support.formatting import as_sentence
from dsconv_surgery.support.inputs import batch_inputs, batch_items, batch_remedy, input_count, prepared
from dsconv_surgery.support.progress import Progress
from dsconv_surgery.support.random_state import from_random_state, preserve_random_state, random_state, seed_torch

BATCH_REMEDY = (
    "Make batches of the type and shape that it takes, or pass prepare=, a function from a batch to inputs and labels, as in "
    'prepare=lambda batch: (Inputs(pixel_values=batch["image"]), batch["label"]).'
)


@dataclass
class TrainingLoop:
    """One run of `fine_tune`, whose checked arguments it takes."""

    model: nn.Module
    batches: Iterable[Any]
    loss: DistillationLoss
    validate: Callable[[nn.Module], float] | None
    settings: FineTune
    make_optimizer: MakeOptimizer
    inputs: int
    prepare: Callable[[Any], Any] | None
    steps: int
    callback: Callable[[int, Mapping[str, float]], object] | None
    checkpoint: Path | None

    def __post_init__(self) -> None:
        if self.settings.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.device = self.trained[0].device
        self.optimizer = self.make_optimizer(self.trained, self.settings.lr)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.precision == "float16")
        self.process, self.world_size = distributed.process_and_world_size()
        self.network: Any = self.model if self.world_size == 1 else nn.parallel.DistributedDataParallel(self.model)
        self.mix = float(self.loss.teacher is not None) if self.settings.mix is None else self.settings.mix
        self.step, self.epoch_step = 0, 0  # steps done in the run and in this epoch
        self.sums: dict[str, float] = {}  # of the losses of this epoch's steps
        self.epochs: list[Epoch] = []
        self.before: float | None = None  # the score before training
        self.best: dict[str, Tensor] = {}
        self.ran_on = ""  # the inputs of the last batch that the network took
        self.started = time.perf_counter()
        identity = run_identity(self.model, self.loss.teacher, self.optimizer, asdict(self.settings), self.steps, self.checkpoint)
        self.file = TrainingCheckpoint(self.checkpoint, identity)

    @resumable
    def run(self, progress: bool | None) -> History:
        """Train to the end, from the checkpoint if it exists."""
        self._load()
        if self.validate is not None and not self.step:
            self.before = self._score(self.validate)
        self.optimizer.zero_grad(set_to_none=True)
        with Progress(progress, ("fine-tune",)).bar("fine-tune", self.steps, "step", self.step) as bar:
            while self.step < self.steps and (self.settings.steps or len(self.epochs) < self.settings.epochs):
                self._run_epoch(bar)
                if self.epochs[-1].score is not None:
                    bar.set_description(f"fine-tune (score {self.epochs[-1].score:.4f})")
        weights = {"last": self._weights()} | ({"best": self.best} if self.best else {})
        versions = {"torch": torch.__version__, "dsconv_surgery": version("dsconv_surgery"), "python": platform.python_version()}
        return History(tuple(self.epochs), asdict(self.settings), versions, self.before, weights)

    def _run_epoch(self, bar: Any) -> None:
        seed_epoch(self.batches, self.settings.seed, len(self.epochs))
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None and self.settings.batchnorm == "frozen":
                module.eval()
        with synchronized_batchnorm(self.model):
            for group in step_batches(self.batches, self.settings.accumulate, self.epoch_step):
                bar.set_postfix(loss=self._step(group))
                bar.update()
                if self.step >= self.steps:
                    break
                if self.step % self.settings.save_every == 0:
                    self._save()
        self._end_epoch()
        self._save()

    def _step(self, group: list[Any]) -> float:
        """One optimizer step; the loss."""
        factor = learning_rate_factor(self.step, self.steps, self.settings.warmup)
        for parameters, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            parameters["lr"] = rate * factor
        parts = self._backward(group)
        self.scaler.unscale_(self.optimizer)
        parts["norm"] = nn.utils.clip_grad_norm_(self.trained, self.settings.clip or math.inf)
        # The only moment of a step at which the CPU waits for the device.
        losses = dict(zip(parts, torch.stack([part.float() for part in parts.values()]).tolist(), strict=True))
        norm = losses.pop("norm")
        # In float16, the scaler skips a step whose gradient is not finite and halves its scale, from 65,536; otherwise the scale is 1.
        if not math.isfinite(losses["loss"]) or not (math.isfinite(norm) or self.scaler.get_scale() > 1):
            self._stop(losses["loss"], norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.epoch_step += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self._call_back({"loss": losses["loss"], "lr": self.settings.lr * factor})
        return losses["loss"]

    def _backward(self, group: list[Any]) -> dict[str, Tensor]:
        """Add up the gradients of a step's batches; the loss and its parts, means over batches and processes."""
        sums: dict[str, Tensor] = {}
        # Draws inside a step (dropout) must not change those of the batches, which a resumed epoch repeats without its steps.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            seed_torch(derived_seed(self.settings.seed, "mix", self.step))
            mixed = [self._mix(batch) for batch in group]
            seed_torch(derived_seed(self.settings.seed, "step", self.step, self.process))
            for index, (batch, k) in enumerate(mixed):
                items, weight = distributed.local_part(batch)
                with self.network.no_sync() if self.world_size > 1 and index < len(group) - 1 else nullcontext():
                    loss, parts = self._loss(items, k)
                    self.scaler.scale(loss * (weight / len(group))).backward()
                for name, value in {"loss": loss.detach(), **parts}.items():
                    sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value * (weight / self.world_size / len(group))
        return dict(zip(sums, distributed.all_reduce_sum(torch.stack(list(sums.values()))), strict=True))

    def _mix(self, batch: Any) -> tuple[tuple[Any, ...], float]:
        """Check a batch, and mix its images on the model's device. A batch that cannot be mixed is an error only where `mix` was set."""
        batch = prepared(self.prepare, batch, f"fine_tune: a batch of step {self.step + 1}")
        batch_inputs(batch, self.inputs, "fine_tune: a batch")
        items = to_device(batch_items(batch), self.device)
        count = input_count(items, self.inputs)
        if len(items) == count and self.loss.teacher is None:
            problem = "fine_tune: a batch holds no labels, and there is no teacher. Pass the dense network as teacher=, or labels."
            raise ValueError(f"{problem} {batch_remedy(batch, '')}".rstrip())
        return mix_images(items, count, self.mix) if self.settings.mix or can_mix(items, count) else (items, 1.0)

    def _loss(self, items: tuple[Any, ...], k: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch that was mixed with weight k, and its parts."""
        count = input_count(items, self.inputs)
        inputs, targets = items[:count], items[count:]
        if self.settings.channels_last:
            inputs = pytree.tree_map_only(Tensor, as_channels_last, inputs)
        dtype = getattr(torch, self.settings.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            call = batch_inputs(inputs, self.inputs, "fine_tune: a batch")
            state = random_state(self.device)
            try:
                outputs = self.network(*call.args, **call.kwargs)
            except (TypeError, AttributeError, LookupError, RuntimeError) as error:
                if repr(call) == self.ran_on or isinstance(error, torch.OutOfMemoryError):
                    raise  # not because of the batch
                reason = as_sentence(f"{type(error).__name__}: {error}".split("\n")[0])
                before = f" It ran on the {self.ran_on} before." if self.ran_on else ""
                raise ValueError(
                    f"fine_tune: the network does not run on the {call} of a batch in step {self.step + 1}: {reason}{before} "
                    + batch_remedy(items, BATCH_REMEDY)
                ) from error
            self.ran_on = repr(call)
            with from_random_state(state, self.device):  # a network that samples draws the same as its teacher
                teacher_outputs = self.loss.teacher_outputs(call)
        return self.loss(outputs, teacher_outputs, targets, k)

    def _stop(self, loss: float, norm: float) -> None:
        """Restore the last good weights and raise FloatingPointError."""
        weights, step = self.good
        self.model.load_state_dict(weights)
        self.optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(
            f"fine_tune: at step {self.step + 1} of {self.steps} the loss is {loss:.4g} and the norm of its gradient {norm:.4g}, expected "
            f"finite numbers. The model has the weights after step {step} again. Lower lr (now {self.settings.lr:g}) or clip (now "
            f"{self.settings.clip}), or look for inputs or labels that are not finite."
        )

    def _end_epoch(self) -> None:
        """Validate, and add the epoch to the history."""
        means = {name: value / self.epoch_step for name, value in self.sums.items()}
        self.epoch_step, self.sums, score = 0, {}, None
        if self.validate is not None:
            score = self._score(self.validate)
            if not self.best or score > max(e.score for e in self.epochs if e.score is not None):
                self.best = self._weights()
        parts, seconds = (means.get("labels"), means.get("teacher")), round(time.perf_counter() - self.started, 2)
        self.epochs.append(Epoch(len(self.epochs) + 1, self.step, means["loss"], *parts, score, seconds))
        if score is not None:
            self._call_back({"loss": means["loss"], "score": score})

    def _score(self, validate: Callable[[nn.Module], float]) -> float:
        with torch.no_grad():
            return checked_score(validate, self.model.eval(), "validate")

    def _call_back(self, values: Mapping[str, float]) -> None:
        if self.callback is not None:
            with preserve_random_state():
                self.callback(self.step, values)

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _save(self) -> None:
        """Remember the weights, and write the checkpoint."""
        self.good = (self._weights(), self.step)
        if self.checkpoint is None or self.process:
            return
        seconds = time.perf_counter() - self.started
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")} | {
            "loop": {"step": self.step, "epoch_step": self.epoch_step, "seconds": seconds, "sums": self.sums, "before": self.before},
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best": self.best,
        }
        self.file.write(state)

    def _load(self) -> None:
        """Continue from the checkpoint if it exists, and remember the weights."""
        state = distributed.from_first_process(self.file.read, self.device)
        if state is None:
            self._save()  # at once, so that a run that is interrupted early can be resumed, too
            return
        for name in ("optimizer", "scaler", "model"):  # the model last, as the others may raise an error
            getattr(self, name).load_state_dict(state[name])
        loop = state["loop"]
        self.step, self.epoch_step, self.sums, self.before = (loop[key] for key in ("step", "epoch_step", "sums", "before"))
        self.started -= loop["seconds"]
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self.best = to_device(state["best"], self.device)
        self.good = (self._weights(), self.step)  # to return to when the loss is not finite, and their step
        if not self.process:
            place = f"after step {self.step} of {self.steps}, {len(self.epochs)} epochs done"
            print(f"fine_tune: {self.checkpoint}: continuing {place}.", file=sys.stderr)


@contextmanager
def synchronized_batchnorm(model: nn.Module) -> Iterator[None]:
    """With several processes, turn BatchNorms in training mode into nn.SyncBatchNorm inside the block, and back at its end.

    Only the class of a module changes, so the network keeps its module objects with their hooks and statistics. ValueError names a
    BatchNorm for which this is impossible.
    """
    modules = model.named_modules() if distributed.process_and_world_size()[1] > 1 else ()
    norms: list[Any] = [(name, m, type(m)) for name, m in modules if isinstance(m, _BatchNorm) and m.training]
    device = model_device(model)
    for name, _, plain in norms:
        if device.type != "cuda" or plain not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise ValueError(
                f"fine_tune: {name} ({plain.__name__} on {device}) normalises by each batch. Several processes can do this together only "
                'on CUDA, and with a plain BatchNorm. Set FineTune(batchnorm="frozen") to use running statistics, or run one process.'
            )
    try:
        for _, norm, _ in norms:
            norm.__class__, norm.process_group = nn.SyncBatchNorm, None
        yield
    finally:
        for _, norm, plain in norms:
            norm.__class__ = plain
            del norm.process_group
