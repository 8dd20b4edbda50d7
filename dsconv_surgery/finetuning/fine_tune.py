"""Fine-tune after surgery: win back, in a few epochs, what the cut cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from dsconv_surgery.finetuning.batches import steps_per_epoch
from dsconv_surgery.finetuning.history import History
from dsconv_surgery.finetuning.loop import TrainingLoop
from dsconv_surgery.finetuning.loss import DistillationLoss, Loss, blocks_of
from dsconv_surgery.finetuning.optimizers import Optimizers
from dsconv_surgery.finetuning.settings import FineTune
from dsconv_surgery.plan import Plan
from dsconv_surgery.support import distributed
from dsconv_surgery.support.random_state import preserve_random_state


def fine_tune(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    loss: Loss | None = None,
    plan: Plan | None = None,
    settings: FineTune | None = None,
    optimizer: Optimizers | None = None,
    inputs: int = 1,
    checkpoint: str | Path | None = None,
    callback: Callable[[int, Mapping[str, float]], object] | None = None,
    progress: bool = False,
) -> History:
    """Train a cut network, in place, to win back what the cut cost.

    Lowers `(1 - d) labels + d teacher + f features` (see `dsconv_surgery.distill`), with SOAP or AdamW. Whatever requires no gradient
    stays as it is. Started by torchrun, this is distributed training: every process is given the same batches and works on its share of
    each, so that the global batch is the same however many there are.

    Args:
        model: a cut network; ends with the last weights (their average, if that is asked for), its training flags as they were.
        batches: an iterable of batches that can be iterated again, once for each epoch: tensors, or tuples of inputs and then labels.
        teacher: the dense network; batches may then do without labels.
        validate: a network's score, higher for better, after each epoch; it is given the network in evaluation mode.
        loss: `(outputs, *labels) -> mean over the batch`; cross-entropy if not given.
        plan: the plan that the network was cut by; needed for `weight_decay`.
        settings: see `FineTune`.
        optimizer: makes another optimizer than those of `settings` from groups of parameters.
        inputs: how many items of a batch the network takes; what follows are labels.
        checkpoint: a file to go on from after an interruption, written every `settings.save_every` steps and at the end. The run then
            ends with the same weights as an undisturbed one. Call as before, with the network as it was cut; of several processes the
            first one's file counts.
        callback: called after each step with its number and its "loss" and "lr", after each epoch with "score" as well.
        progress: show a bar with loss, score and time left.

    Returns:
        A `History`: print it, or see `to_json()` and `plot(path)`; `weights["best"]` and `weights["last"]` are state_dicts.

    Raises:
        ValueError: settings or batches that do not fit, outputs of the two networks that cannot be compared, a checkpoint of another run
            (other settings, weights, teacher, optimizer or number of batches; not told apart: other images, another loss).
        TypeError: batches that are not iterable, a model that is wrapped or none.
        FloatingPointError: the loss is not finite any more. The model has the last good weights.

    Example:
        >>> history = fine_tune(small.model, loader, teacher=model, settings=FineTune(epochs=3))
    """
    settings = FineTune() if settings is None else settings
    if not isinstance(settings, FineTune):
        raise TypeError(f"fine_tune: settings are {type(settings).__name__}, expected FineTune(...).")
    for name, network in {"model": model, "teacher": teacher}.items():
        if not isinstance(network, nn.Module) and (name == "model" or network is not None):
            it = "that of a Compressed is its .model" if hasattr(network, "model") else "as torch builds it"
            raise TypeError(f"fine_tune: {name} is {type(network).__name__}, expected an nn.Module: {it}.")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise TypeError("fine_tune: found a wrapped model. Pass model.module; under torchrun it is wrapped here.")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("fine_tune: none of the model's parameters requires a gradient, so there is nothing to train.")
    if settings.weight_decay and plan is None:
        raise ValueError("fine_tune: weight_decay is taken of products of factors, which only the plan knows. Pass plan=, or leave it out.")
    if settings.features and (teacher is None or not blocks_of(model, teacher)):
        why = "there is no teacher" if teacher is None else "no block around a cut layer has the same name and type in both networks"
        raise ValueError(
            f"fine_tune: features={settings.features:g} is of the outputs of the dense network's blocks, but {why}. Leave it out."
        )
    per_epoch = steps_per_epoch(batches, settings, checkpoint is not None)
    with ExitStack() as after:
        after.enter_context(distributed.process_group(trained[0].device))
        after.enter_context(_as_it_was(model, teacher))
        lesson = DistillationLoss(model, teacher, loss, settings.distill, settings.temperature, settings.features)
        after.enter_context(lesson.watching())
        training = TrainingLoop(model, batches, lesson, validate, plan, settings, optimizer, inputs, per_epoch, callback)
        return training.run(None if checkpoint is None else Path(checkpoint), progress)


@contextmanager
def _as_it_was(model: nn.Module, teacher: nn.Module | None) -> Iterator[None]:
    """Training flags and random states are put back at the end."""
    flags = [(m, m.training) for network in (model, teacher) if network is not None for m in network.modules()]
    try:
        if teacher is not None:
            teacher.eval()
        with preserve_random_state():
            yield
    finally:
        for module, training in flags:
            module.training = training
