"""The settings of a fine-tuning run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dsconv_surgery.support.records import checked_record

Count = Annotated[int, Field(ge=1, description="a whole number, 1 or more")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, description="a positive number")]
Share = Annotated[float, Field(ge=0, le=1, description="a share in [0, 1]")]


@checked_record('FineTune(epochs=5, lr=5e-4, batchnorm="frozen")')
class FineTune:
    """Settings of `fine_tune`.

    Args:
        epochs: passes over the batches.
        steps: the largest number of optimizer steps. Batches without a length need it, and `epochs` is then ignored.
        optimizer: "soap" (Adam in the eigenbasis of each weight's second moments; Vyas et al. 2024) or "adamw".
        lr: the highest learning rate, at the end of the warm-up. It then falls to zero along half a cosine.
        warmup: share of the steps in which the learning rate rises.
        clip: the largest norm of the gradient; None, or inf in a recipe's file, for no limit.
        distill: weight of the teacher's outputs in the loss, in [0, 1]; the labels have the rest.
        temperature: divides the logits of both networks before they are compared.
        mix: share of the batches whose images are mixed with each other (mixup or CutMix). None means 1 with a teacher and 0 without,
            and leaves batches alone that cannot be mixed.
        batchnorm: "frozen" keeps the running statistics of BatchNorms; "trained" normalises by each batch and updates
            them, which several processes can do on CUDA only.
        precision: of the forward and backward pass (autocast).
        channels_last: train in torch.channels_last.
        accumulate: batches for each optimizer step.
        save_every: steps between two checkpoints.
        seed: of all random draws.

    Raises:
        ValueError: a setting is unknown or out of range.

    Example:
        >>> FineTune(epochs=5, lr=5e-4)
    """

    epochs: Count = 3
    steps: Annotated[int | None, Field(ge=1, description="a whole number, 1 or more, or None")] = None
    optimizer: Annotated[Literal["soap", "adamw"], Field(description='"soap" or "adamw"')] = "soap"
    lr: Positive = 3e-4
    warmup: Share = 0.05
    clip: Annotated[float | None, Field(gt=0, description="a positive number, or None for no limit")] = 1.0
    distill: Share = 0.9
    temperature: Positive = 2.0
    mix: Annotated[float | None, Field(ge=0, le=1, description="a share in [0, 1], or None")] = None
    batchnorm: Annotated[Literal["frozen", "trained"], Field(description='"frozen" or "trained"')] = "frozen"
    precision: Annotated[Literal["float32", "bfloat16", "float16"], Field(description='"float32", "bfloat16" or "float16"')] = "float32"
    channels_last: Annotated[bool, Field(description="True or False")] = False
    accumulate: Count = 1
    save_every: Count = 100
    seed: Annotated[int, Field(description="a whole number")] = 0
