"""Fine-tuning: train a cut network for a few epochs to recover accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dsconv_surgery.finetuning.batches import total_steps
from dsconv_surgery.finetuning.history import History
from dsconv_surgery.finetuning.loop import TrainingLoop
from dsconv_surgery.finetuning.loss import DistillationLoss, Loss
from dsconv_surgery.finetuning.optimizers import OPTIMIZERS, MakeOptimizer
from dsconv_surgery.finetuning.settings import FineTune
from dsconv_surgery.network.layers import check_network
from dsconv_surgery.support import distributed
from dsconv_surgery.support.copies import model_device
from dsconv_surgery.support.inputs import checked_prepare
from dsconv_surgery.support.modes import callers_precision, standard_modes
from dsconv_surgery.support.outputs import OutputSelector
from dsconv_surgery.support.random_state import preserve_random_state


@standard_modes()
def fine_tune(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    loss: Loss | None = None,
    settings: FineTune | None = None,
    optimizer: MakeOptimizer | None = None,
    inputs: int = 1,
    prepare: Callable[[Any], Any] | None = None,
    output: Callable[[Any], Any] | None = None,
    checkpoint: str | Path | None = None,
    callback: Callable[[int, Mapping[str, float]], object] | None = None,
    progress: bool | None = None,
) -> History:
    """Train a cut network in place to recover the accuracy that the cut cost.

    Minimises `(1 - d) labels + d teacher`, where d is `settings.distill`, `labels` the loss of the labels and `teacher` the divergence
    from the dense network's outputs (distillation, Hinton et al. 2015). Parameters that require no gradient do not change.
    Under torchrun, training is distributed: give every process the same batches. Each process takes its part of every batch, so the
    result is the same, to rounding, for any number of processes.

    Args:
        model: a cut network. It ends with the last weights and with the training flags it had before.
        batches: an iterable of batches that can be iterated once per epoch: inputs (tensors, or nests of tensors), or tuples of inputs and
            then labels.
        teacher: the dense network. With a teacher, batches need no labels.
        validate: gives a network's score before training and after each epoch, higher for better. It gets a copy in evaluation mode.
        loss: `(outputs, *labels) -> mean over the batch`, of the network's outputs as they are. By default it is `F.cross_entropy`, for
            class indices and class scores: the network's output, or the one tensor that `output` selects. Regression, other outputs and
            float labels need a loss.
        settings: see `FineTune`.
        optimizer: `(parameters, lr) -> an optimizer`, in place of `settings.optimizer`, as in `partial(torch.optim.SGD, momentum=0.9)`.
        inputs: number of items of a batch that the network takes. The items after them are labels.
        prepare: a function from a batch to inputs and then labels, for batches of another structure. It may return `Inputs` for keyword
            arguments: `lambda batch: (Inputs(pixel_values=batch["pixel_values"]), batch["labels"])`.
        output: a function from a network's output to the tensors that are compared with the teacher's; class scores for the default loss.
        checkpoint: a file, written every `settings.save_every` steps and after each epoch. To resume an interrupted run, make the same
            call again, with the network as it was cut: it ends with the same weights as an uninterrupted run. With several processes,
            the first process writes and reads the file.
        callback: called after each step with its number and {"loss", "lr"}, and after each validation with {"loss", "score"}.
        progress: show a bar over steps: True, False, or None for in a terminal only.

    Returns:
        A `History`, to print, `to_json()` or `plot(path)`. Its `weights["last"]` and, with `validate`, `weights["best"]` are state_dicts.

    Raises:
        ValueError: settings or batches do not fit, the outputs of the two networks cannot be compared, or the checkpoint is of another
            run (other settings, weights, teacher, optimizer or number of batches; other images or another loss are not detected).
        TypeError: the batches are not iterable, or a network is wrapped or not an nn.Module.
        FloatingPointError: the loss is not finite. The model then has the last good weights.

    Example:
        >>> history = fine_tune(small.model, loader, teacher=model, settings=FineTune(epochs=3))
    """
    settings = FineTune() if settings is None else settings
    if not isinstance(settings, FineTune):
        raise TypeError(f"fine_tune: settings are {type(settings).__name__}, expected FineTune(...).")
    networks = {"model": model} | ({} if teacher is None else {"teacher": teacher})
    for name, network in networks.items():
        check_network(network, f"fine_tune: {name}")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise TypeError(f"fine_tune: model is {type(model).__name__}. Pass model.module: under torchrun, fine_tune wraps it.")
    if inference := [name for name, parameter in model.named_parameters() if parameter.is_inference()]:
        raise ValueError(
            f"fine_tune: {inference[0]} was made under torch.inference_mode() and cannot be trained. Build the model outside of it."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("fine_tune: nothing to train: no parameter of the model requires a gradient. Call model.requires_grad_() first.")
    steps = total_steps(batches, settings, checkpoint is not None)
    distillation = DistillationLoss(teacher, loss, settings.distill, settings.temperature, OutputSelector(output, "fine_tune"))
    checked_prepare(prepare)
    make_optimizer = optimizer or OPTIMIZERS[settings.optimizer]
    path = None if checkpoint is None else Path(checkpoint)
    training_flags = [(module, module.training) for network in networks.values() for module in network.modules()]
    try:
        with distributed.process_group(model_device(model)), preserve_random_state(), callers_precision():
            if teacher is not None:
                teacher.eval()
            loop = TrainingLoop(model, batches, distillation, validate, settings, make_optimizer, inputs, prepare, steps, callback, path)
            return loop.run(progress)
    finally:
        for module, training in training_flags:
            module.training = training
