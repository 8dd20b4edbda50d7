"""The training loop of `fine_tune`: it can be interrupted at any moment, and goes on where it was."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from dsconv_surgery.calibration.batchnorm import collecting_statistics, over_ranks
from dsconv_surgery.finetuning.batches import batch_items, derived_seed, seed_epoch, step_batches
from dsconv_surgery.finetuning.history import Epoch, History
from dsconv_surgery.finetuning.loss import DistillationLoss
from dsconv_surgery.finetuning.mixing import can_mix, mix_images
from dsconv_surgery.finetuning.optimizers import OPTIMIZERS, Optimizers, by_rate, decay, learning_rate_factor, products
from dsconv_surgery.finetuning.settings import FineTune
from dsconv_surgery.plan import Plan
from dsconv_surgery.support import distributed
from dsconv_surgery.support.atomic_files import atomic_write
from dsconv_surgery.support.cache import digest
from dsconv_surgery.support.fidelity import checked_score
from dsconv_surgery.support.random_state import preserve_random_state


class TrainingLoop:
    """One run of `fine_tune`, whose arguments it takes, checked."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        lesson: DistillationLoss,
        validate: Callable[[nn.Module], float] | None,
        plan: Plan | None,
        settings: FineTune,
        optimizer: Optimizers | None,
        inputs: int,
        per_epoch: int | None,
        callback: Callable[[int, Mapping[str, float]], object] | None,
    ) -> None:
        self.model, self.batches, self.lesson, self.validate = model, batches, lesson, validate
        self.settings, self.inputs, self._callback = settings, inputs, callback
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.device = self.trained[0].device
        self.per_epoch = per_epoch
        every = (settings.steps or 0) if per_epoch is None else settings.epochs * per_epoch
        self.total = min(every, settings.steps or every)
        self.optimizer = (optimizer or OPTIMIZERS[settings.optimizer])(by_rate(self.trained, settings.lr))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "float16")
        self.average = [p.detach().clone() for p in self.trained] if settings.average else []
        self.products = products(model, plan) if plan is not None and settings.weight_decay else []
        self.net: Any = model if distributed.process_and_world_size()[1] == 1 else nn.parallel.DistributedDataParallel(model)
        self.mix = float(lesson.teacher is not None) if settings.mix is None else settings.mix
        self.step, self.epoch, self.into_epoch = 0, 0, 0  # steps done, epochs done, steps done in this one
        self.sums: dict[str, float] = {}  # over this epoch's steps
        self.epochs: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.seconds, self._since = 0.0, time.perf_counter()
        self._good: tuple[dict[str, Tensor], int] = ({}, 0)  # what a loss that is not finite falls back to, and since which step
        self._identity = self._digest(lesson.teacher, plan if settings.weight_decay else None)

    def run(self, checkpoint: Path | None, progress: bool) -> History:
        """From where the checkpoint left off, if there is one, to the end."""
        if checkpoint is not None:
            self._load(checkpoint)
        self.optimizer.zero_grad(set_to_none=True)
        self._good = (self._weights(), self.step)
        with tqdm(total=self.total, initial=self.step, desc="fine-tune", unit="step", disable=not progress) as bar:
            while not self.finished:
                seed_epoch(self.batches, self.settings.seed, self.epoch)
                self._set_mode()
                for group in step_batches(self.batches, self.settings.accumulate, self.into_epoch):
                    shown = self._step(group)
                    bar.set_postfix_str(
                        f"loss {shown:.4f}" + "".join(f", score {e.score:.4f}" for e in self.epochs[-1:] if e.score is not None)
                    )
                    bar.update()
                    if self.step % self.settings.save_every == 0 and self.step < self.total:
                        self._keep(checkpoint)
                    if self.step >= self.total:
                        break
                self._end_epoch()
                self._keep(checkpoint)
        kept = {"last": self._weights()} | ({"best": self.best} if self.best else {})
        versions = {"torch": torch.__version__, "dsconv_surgery": version("dsconv_surgery"), "python": platform.python_version()}
        return History(tuple(self.epochs), asdict(self.settings), versions, kept)

    def _digest(self, teacher: nn.Module | None, plan: Plan | None) -> str:
        """What tells runs apart, but for what cannot be seen without going through it: the images, and functions."""
        kind = f"{type(self.optimizer).__module__}.{type(self.optimizer).__qualname__}"
        plain = (bool, int, float, str, tuple, type(None))
        rates = [{k: v for k, v in sorted(group.items()) if isinstance(v, plain)} for group in self.optimizer.param_groups]
        networks = [self.model, *([] if teacher is None else [teacher])]
        said = (sorted(asdict(self.settings).items()), self.total, kind, rates, plan and plan.to_json(), *map(str, networks))
        return digest(repr(said), *(value for network in networks for value in network.state_dict().values()))

    def _set_mode(self) -> None:
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, _BatchNorm) and self.settings.norms != "trained":
                module.eval()

    def _step(self, group: list[Any]) -> float:
        """One optimizer step; the loss."""
        rank, count = distributed.process_and_world_size()
        rising = learning_rate_factor(self.step, self.total, self.settings.warmup)
        for its, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            its["lr"] = rate * rising
        names, values = ["loss"], torch.zeros(())
        # What steps draw (dropout) is theirs alone: data are drawn alike however many of them ran before an interruption.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derived_seed(self.settings.seed, "mix", self.step))
            mixtures = [
                mix_images(items, self.inputs, self.mix) if self.settings.mix or can_mix(items, self.inputs) else (items, 1.0)
                for items in map(batch_items, group)
            ]
            torch.manual_seed(derived_seed(self.settings.seed, "step", self.step, rank))
            for at, (batch, kept) in enumerate(mixtures):
                mine, weight = distributed.local_part(batch)
                apart = self.net.no_sync() if count > 1 and at < len(group) - 1 else nullcontext()
                with apart, over_ranks(weight > 0) if count > 1 else nullcontext():
                    loss, parts = self._lesson(mine, kept)
                    self.scaler.scale(loss * (weight / len(group))).backward()
                names = ["loss", *parts]
                values = values + torch.stack([loss.detach(), *parts.values()]).cpu() * (weight / count / len(group))
        means = dict(zip(names, distributed.all_reduce_sum(values.to(self.device)).tolist(), strict=True))
        self.scaler.unscale_(self.optimizer)
        limit = self.settings.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, limit))
        if not math.isfinite(means["loss"]) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            self._give_up(means["loss"], norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:  # of 65,536; halved by every gradient that is not finite
            self._give_up(means["loss"], norm)
        self.optimizer.zero_grad(set_to_none=True)
        if self.products:
            decay(self.products, self.settings.weight_decay * self.settings.lr * rising)
        if self.average:
            get_ema_multi_avg_fn(self.settings.average)(self.average, [p.detach() for p in self.trained], None)
        self.step += 1
        self.into_epoch += 1
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self._tell({"loss": means["loss"], "lr": self.settings.lr * rising})
        return means["loss"]

    def _lesson(self, items: tuple[Any, ...], kept: float) -> tuple[Tensor, dict[str, Tensor]]:
        if len(items) < self.inputs or not isinstance(items[0], Tensor):
            found = ", ".join(type(item).__name__ for item in items) or "nothing"
            raise ValueError(f"fine_tune: a batch holds {found}, expected {self.inputs} input(s), as the network takes them, then labels.")
        if len(items) == self.inputs and self.lesson.teacher is None:
            raise ValueError("fine_tune: a batch holds no labels, and there is no teacher. Pass teacher=, the dense network, or labels.")
        items = pytree.tree_map_only(Tensor, lambda t: t.to(self.device, non_blocking=True), items)
        inputs, targets = items[: self.inputs], items[self.inputs :]
        if self.settings.channels_last:
            inputs = tuple(t.contiguous(memory_format=torch.channels_last) if isinstance(t, Tensor) and t.ndim == 4 else t for t in inputs)
        dtype = getattr(torch, self.settings.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            outputs = self.net(*inputs)
            wanted = self.lesson.wanted(inputs)
        return self.lesson(outputs, wanted, targets, kept)

    def _give_up(self, loss: float, norm: float) -> None:
        weights, step = self._good
        self.model.load_state_dict(weights)
        self.optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(
            f"fine_tune: at step {self.step + 1} of {self.total} the loss is {loss:.4g} and its gradient's norm {norm:.4g}, expected "
            f"finite ones. The weights after step {step} were put back. Lower lr (now {self.settings.lr:g}), clip lower "
            f"(now {self.settings.clip}), or look for inputs or labels that are not finite."
        )

    def _end_epoch(self) -> None:
        self.epoch += 1
        means = {name: value / self.into_epoch for name, value in self.sums.items()}
        self.into_epoch, self.sums = 0, {}
        if self.finished:
            self._settle()
        score = None
        if self.validate is not None:
            with self._averaged(), torch.no_grad():
                self.model.eval()
                score = checked_score(self.validate, self.model, "validate")
                if not self.best or score > max(e.score for e in self.epochs if e.score is not None):
                    self.best = self._weights()
        labels, teacher, features = (means.get(name) for name in ("labels", "teacher", "features"))
        self.epochs.append(Epoch(self.epoch, self.step, means["loss"], labels, teacher, features, score, round(self._elapsed(), 2)))
        if score is not None:
            self._tell({"loss": means["loss"], "score": score})

    def _tell(self, values: Mapping[str, float]) -> None:
        if self._callback is not None:
            with preserve_random_state():
                self._callback(self.step, values)

    @property
    def finished(self) -> bool:
        return (self.per_epoch is not None and self.epoch >= self.settings.epochs) or self.step >= self.total

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the place of the last ones for as long as this lasts."""
        kept = [p.detach().clone() for p in self.trained] if self.average else []
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.trained, values, strict=False):
            parameter.copy_(value)

    def _settle(self) -> None:
        """The weights that the run ends with: their average, if there is one, and BatchNorm statistics that go with it."""
        self._copy(self.average)
        self.average = []
        if self.settings.norms == "late":
            count = self.settings.accumulate * (self.per_epoch or self.total)  # of batches without a length, which may be without end
            with collecting_statistics(self.model), torch.no_grad():
                for batch in islice(self.batches, count):
                    items = batch_items(batch)
                    self.model(*pytree.tree_map_only(Tensor, lambda t: t.to(self.device), items[: self.inputs]))

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._since

    def _keep(self, checkpoint: Path | None) -> None:
        """Take note of where the run is: in memory, and in the checkpoint."""
        self._good = (self._weights(), self.step)
        if checkpoint is None or distributed.process_and_world_size()[0]:
            return
        places = {"step": self.step, "epoch": self.epoch, "into_epoch": self.into_epoch, "seconds": self._elapsed(), "sums": self.sums}
        state = {
            "run": self._identity,
            "places": places,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "model": self._good[0],
            "best": self.best,
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        with atomic_write(checkpoint) as written, written.open("wb") as file:
            torch.save(state, file)

    def _load(self, checkpoint: Path) -> None:
        state = distributed.from_first_process(lambda: self._read(checkpoint), self.device)
        if state is None:
            return
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.load_state_dict(state["model"])
        self.scaler.load_state_dict(state["scaler"])
        self.best, self.average = pytree.tree_map_only(Tensor, lambda t: t.to(self.device), (state["best"], state["average"]))
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        for name, value in state["places"].items():
            setattr(self, name, value)

    def _read(self, checkpoint: Path) -> dict[str, Any] | None:
        if not checkpoint.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
            its = state["run"]
        except Exception as error:  # whatever a file that is none of ours, or half of one, makes torch say
            raise ValueError(
                f"{checkpoint}: not a checkpoint of fine_tune ({type(error).__name__}). Remove it, or name another."
            ) from error
        if its != self._identity:
            raise ValueError(
                f"{checkpoint}: of another run - other settings, another network, teacher or optimizer, other weights to begin with, or "
                "another number of batches. A network that an interrupted run has trained in part has other weights: pass it as it was "
                "cut. Else remove the file, or name another."
            )
        return state
