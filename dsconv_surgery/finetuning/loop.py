"""The training loop of `fine_tune`, which can be interrupted at any moment and resumed."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from dsconv_surgery.finetuning.batches import derived_seed, seed_epoch, step_batches
from dsconv_surgery.finetuning.history import Epoch, History
from dsconv_surgery.finetuning.loss import DistillationLoss
from dsconv_surgery.finetuning.mixing import can_mix, mix_images
from dsconv_surgery.finetuning.optimizers import OPTIMIZERS, MakeOptimizer, learning_rate_factor
from dsconv_surgery.finetuning.settings import FineTune
from dsconv_surgery.finetuning.sync_batchnorm import synchronized_batchnorm
from dsconv_surgery.support import distributed
from dsconv_surgery.support.atomic_files import atomic_write
from dsconv_surgery.support.batch import batch_inputs, batch_items
from dsconv_surgery.support.cache import digest
from dsconv_surgery.support.copies import as_channels_last, to_device
from dsconv_surgery.support.fidelity import checked_score
from dsconv_surgery.support.random_state import preserve_random_state


class TrainingLoop:
    """One run of `fine_tune`, whose checked arguments it takes."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: DistillationLoss,
        validate: Callable[[nn.Module], float] | None,
        settings: FineTune,
        optimizer: MakeOptimizer | None,
        inputs: int,
        steps: int,
        callback: Callable[[int, Mapping[str, float]], object] | None,
    ) -> None:
        self.model, self.batches, self.loss, self.validate = model, batches, loss, validate
        self.settings, self.inputs, self.steps, self.callback = settings, inputs, steps, callback
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.device = self.trained[0].device
        self.optimizer = (optimizer or OPTIMIZERS[settings.optimizer])(self.trained, settings.lr)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "float16")
        self.process, self.world_size = distributed.process_and_world_size()
        self.network: Any = model if self.world_size == 1 else nn.parallel.DistributedDataParallel(model)
        self.mix = float(loss.teacher is not None) if settings.mix is None else settings.mix
        self.step, self.epoch_step = 0, 0  # steps done in the run and in this epoch
        self.sums: dict[str, float] = {}  # of the losses of this epoch's steps
        self.epochs: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.seconds, self._started = 0.0, time.perf_counter()  # seconds before the last interruption
        self._good = (self._weights(), 0)  # weights to return to when the loss is not finite, and their step
        self._identity = self._digest()

    def run(self, checkpoint: Path | None, progress: bool) -> History:
        """Train to the end, from the checkpoint if it exists."""
        if checkpoint is not None:
            self._load(checkpoint)
        self.optimizer.zero_grad(set_to_none=True)
        self._good = (self._weights(), self.step)
        with tqdm(total=self.steps, initial=self.step, desc="fine-tune", unit="step", disable=not progress) as bar:
            while self.step < self.steps and (self.settings.steps or len(self.epochs) < self.settings.epochs):
                self._run_epoch(checkpoint, bar)
                if self.epochs[-1].score is not None:
                    bar.set_description(f"fine-tune (score {self.epochs[-1].score:.4f})")
        weights = {"last": self._weights()} | ({"best": self.best} if self.best else {})
        versions = {"torch": torch.__version__, "dsconv_surgery": version("dsconv_surgery"), "python": platform.python_version()}
        return History(tuple(self.epochs), asdict(self.settings), versions, weights)

    def _run_epoch(self, checkpoint: Path | None, bar: Any) -> None:
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
                    self._save(checkpoint)
        self._end_epoch()
        self._save(checkpoint)

    def _step(self, group: list[Any]) -> float:
        """One optimizer step; the loss."""
        factor = learning_rate_factor(self.step, self.steps, self.settings.warmup)
        for parameters, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            parameters["lr"] = rate * factor
        losses = self._backward(group)
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.trained, self.settings.clip or math.inf))
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

    def _backward(self, group: list[Any]) -> dict[str, float]:
        """Add up the gradients of a step's batches; the loss and its parts, means over batches and processes."""
        sums: dict[str, Tensor] = {}
        # Draws inside a step (dropout) must not change those of the batches, which a resumed epoch repeats without its steps.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derived_seed(self.settings.seed, "mix", self.step))
            mixed = [self._mix(batch) for batch in group]
            torch.manual_seed(derived_seed(self.settings.seed, "step", self.step, self.process))
            for index, (batch, k) in enumerate(mixed):
                items, weight = distributed.local_part(batch)
                with self.network.no_sync() if self.world_size > 1 and index < len(group) - 1 else nullcontext():
                    loss, parts = self._loss(items, k)
                    self.scaler.scale(loss * (weight / len(group))).backward()
                for name, value in {"loss": loss.detach(), **parts}.items():
                    sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value * (weight / self.world_size / len(group))
        return dict(zip(sums, distributed.all_reduce_sum(torch.stack(list(sums.values()))).tolist(), strict=True))

    def _mix(self, batch: Any) -> tuple[tuple[Any, ...], float]:
        """Check a batch and apply `mix_images`. A batch that cannot be mixed is an error only where `mix` was set."""
        batch_inputs(batch, self.inputs, "fine_tune: a batch")
        items = batch_items(batch)
        if len(items) == self.inputs and self.loss.teacher is None:
            raise ValueError("fine_tune: a batch holds no labels, and there is no teacher. Pass the dense network as teacher=, or labels.")
        return mix_images(items, self.inputs, self.mix) if self.settings.mix or can_mix(items, self.inputs) else (items, 1.0)

    def _loss(self, items: tuple[Any, ...], k: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch that was mixed with weight k, and its parts."""
        items = to_device(items, self.device)
        inputs, targets = items[: self.inputs], items[self.inputs :]
        if self.settings.channels_last:
            inputs = tuple(map(as_channels_last, inputs))
        dtype = getattr(torch, self.settings.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            outputs = self.network(*inputs)
            teacher_outputs = self.loss.teacher_outputs(inputs)
        return self.loss(outputs, teacher_outputs, targets, k)

    def _stop(self, loss: float, norm: float) -> None:
        """Restore the last good weights and raise FloatingPointError."""
        weights, step = self._good
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
        self.epoch_step, self.sums = 0, {}
        score = None
        if self.validate is not None:
            with torch.no_grad():
                score = checked_score(self.validate, self.model.eval(), "validate")
            if not self.best or score > max(e.score for e in self.epochs if e.score is not None):
                self.best = self._weights()
        number, parts = len(self.epochs) + 1, (means.get("labels"), means.get("teacher"))
        self.epochs.append(Epoch(number, self.step, means["loss"], *parts, score, round(self._elapsed(), 2)))
        if score is not None:
            self._call_back({"loss": means["loss"], "score": score})

    def _call_back(self, values: Mapping[str, float]) -> None:
        if self.callback is not None:
            with preserve_random_state():
                self.callback(self.step, values)

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._started

    def _digest(self) -> str:
        """Identifies the run: settings, networks, weights and optimizer, but not the images nor any function."""
        networks = [network for network in (self.model, self.loss.teacher) if network is not None]
        text = repr((asdict(self.settings), self.steps, self.optimizer, networks))
        return digest(text, *(value for network in networks for value in network.state_dict().values()))

    def _save(self, checkpoint: Path | None) -> None:
        """Remember the weights, and write the checkpoint."""
        self._good = (self._weights(), self.step)
        if checkpoint is None or self.process:
            return
        state = {
            "run": self._identity,
            "loop": {"step": self.step, "epoch_step": self.epoch_step, "seconds": self._elapsed(), "sums": self.sums},
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "model": self._good[0],
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        with atomic_write(checkpoint) as path, path.open("wb") as file:
            torch.save(state, file)

    def _load(self, checkpoint: Path) -> None:
        state = distributed.from_first_process(lambda: self._read(checkpoint), self.device)
        if state is None:
            return
        for name in ("optimizer", "model", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.best = to_device(state["best"], self.device)
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        for name, value in state["loop"].items():
            setattr(self, name, value)

    def _read(self, checkpoint: Path) -> dict[str, Any] | None:
        if not checkpoint.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
            identity = state["run"]
        except Exception as error:  # torch.load raises many types of errors for other files and for parts of a file
            raise ValueError(
                f"{checkpoint}: not a checkpoint of fine_tune ({type(error).__name__}). Remove the file, or name another."
            ) from error
        if identity != self._identity:
            raise ValueError(
                f"{checkpoint}: the checkpoint is of another run, with other settings, networks, initial weights, optimizer or number of "
                "batches. To resume a run, pass the network as it was cut, not partly trained. Otherwise remove the file, or name another."
            )
        return state
