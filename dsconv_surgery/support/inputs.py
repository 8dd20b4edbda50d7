"""The inputs of a network: positional and keyword arguments with tensors anywhere in them, and batches of such inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsconv_surgery.support.formatting import as_sentence

REMEDY = "Batches are like the example inputs, with labels after them. Or pass prepare=, a function from a batch to the inputs."


class Inputs:
    """The arguments of one call of a network. A function passed as `prepare=` returns it for networks with keyword arguments.

    Args:
        args, kwargs: what `network(*args, **kwargs)` takes.

    Example:
        >>> prepare = lambda batch: (Inputs(pixel_values=batch["pixel_values"]), batch["labels"])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def __repr__(self) -> str:
        shown = [describe_type(value) for value in self.args] + [f"{key}={describe_type(value)}" for key, value in self.kwargs.items()]
        return f"Inputs({', '.join(shown)})"

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


def _from_children(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
    return Inputs(*args, **kwargs)


pytree.register_pytree_node(
    Inputs,
    lambda inputs: ([inputs.args, inputs.kwargs], None),
    lambda children, _context: _from_children(*children),
    serialized_type_name="dsconv_surgery.Inputs",
)


def as_inputs(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Inputs:
    """The example inputs of a public function, which may be an `Inputs`; TypeError for networks, or keyword arguments without names."""
    if kwargs is not None and not (isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)):
        raise TypeError(f'example_kwargs: found {type(kwargs).__name__}, expected a dict, as in example_kwargs={{"pixel_values": images}}.')
    if modules := [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, nn.Module)]:
        kind = type(modules[0]).__name__
        raise TypeError(
            f"example inputs: found the network {kind}, expected tensors. Pass the network first, then what it takes: (model, x)."
        )
    if len(args) == 1 and isinstance(args[0], Inputs):
        return Inputs(*args[0].args, **args[0].kwargs, **(kwargs or {}))
    return Inputs(*args, **(kwargs or {}))


def example_hint(inputs: Inputs) -> str:
    """What is probably wrong with example inputs that a network does not take, as a sentence and a space, or an empty text."""
    first = inputs.args[0] if len(inputs.args) == 1 else ...
    if isinstance(first, list | tuple) and len(first) == 1 and isinstance(first[0], Tensor):
        return f"Pass x, not {'[x]' if isinstance(first, list) else '(x,)'}, if the network takes a tensor. "
    if (first is None or first == ()) and inputs.kwargs:
        return f"Leave out the {first!r} before example_kwargs=, if the network takes keyword arguments only. "
    return ""


def prepared(prepare: Callable[[Any], Any] | None, batch: Any, where: str) -> Any:
    """What the user's function `prepare` makes of a batch, the batch itself without one; ValueError if it raises an error."""
    try:
        return batch if prepare is None else prepare(batch)
    except Exception as error:
        raise ValueError(f"{where}: prepare= failed on {describe_type(batch)}: {as_sentence(error)} Correct the function.") from error


def batch_remedy(batch: Any, remedy: str = REMEDY) -> str:
    """What to do about a batch that does not fit: for a dict, a `prepare=` with the keys of the dict."""
    items = batch_items(batch)
    if len(items) != 1 or not isinstance(items[0], Mapping) or not items[0]:
        return remedy
    keys = list(items[0])
    images = [key for key in keys if isinstance(value := items[0][key], Tensor) and value.is_floating_point() and value.ndim > 1]
    image = (images or keys)[0]
    labels = "".join(f", batch[{key!r}]" for key in keys if key != image and "label" in str(key).lower())
    labels = labels or "".join(f", batch[{key!r}]" for key in keys if key != image)
    value = f"(batch[{image!r}]{labels})" if labels else f"batch[{image!r}]"
    return f"Pass prepare=, a function from a batch to inputs and labels, as in prepare=lambda batch: {value}."


def checked_prepare(prepare: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    """The argument `prepare=`; TypeError unless it is a function or None."""
    if prepare is not None and not callable(prepare):
        raise TypeError(f"prepare: found {type(prepare).__name__}, expected a function from a batch to the network's inputs.")
    return prepare


def describe_type(value: Any) -> str:
    """A value's type, with the shape and dtype of a tensor."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe_type(item)}" for key, item in list(value.items())[:8]) + "}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)} ({', '.join(describe_type(item) for item in value[:4])})"
    return repr(value) if isinstance(value, bool | int | float | type(None)) else type(value).__name__


def batch_items(batch: Any) -> tuple[Any, ...]:
    """The items of a batch: those of a tuple or list, else the batch itself."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def input_count(items: Sequence[Any], count: int) -> int:
    """How many items of a batch are inputs: `count`, or one if that is an `Inputs`."""
    return 1 if items and isinstance(items[0], Inputs) else count


def batch_inputs(batch: Any, count: int, where: str) -> Inputs:
    """The first items of a batch as the inputs of a network; the labels follow them.

    Raises:
        ValueError: there are fewer items, or no tensor is among them; `where` names the caller and the batch.
    """
    items = batch_items(batch)
    inputs = items[0] if items and isinstance(items[0], Inputs) else Inputs(*items[:count])
    if len(items) < input_count(items, count) or not inputs.tensors:
        types = ", ".join(type(item).__name__ for item in items) or "nothing"
        raise ValueError(
            f"{where} holds {types}, expected {count} input(s) with tensors, as the network takes them, and then labels. "
            + batch_remedy(batch, "Or pass prepare=, a function from a batch to the inputs and labels.")
        )
    return inputs


class InputStructure:
    """The structure of example inputs, and which of their tensors hold one row per image.

    The first tensor with two dimensions or more tells the number of images; a list of (3, height, width) tensors is one image for each
    entry. Other tensors have a row per image if they do in the example, and are shared by all images if they do not.
    """

    def __init__(self, example: Inputs) -> None:
        self._example = (example.args, example.kwargs)
        dimensions = [_dimensions(leaf) for leaf, _ in self._leaves(self._example)]
        # The number, among all tensors and lists of images, of the one that tells the number of images.
        self._main = next((index for least in (2, 1) for index, n in enumerate(dimensions) if n >= least), None)
        self.images = max(1, self._count(self._example))

    def match(self, batch: Any, where: str) -> Inputs:
        """The inputs in a batch: without labels and without keys that the example inputs do not have.

        Raises:
            ValueError: the batch has another structure, or numbers that are not finite.
        """
        (args, kwargs), (batch_args, batch_kwargs) = self._example, self._split(batch, where)
        if len(batch_args) != len(args) or not kwargs.keys() <= batch_kwargs.keys():
            arguments = f"expected arguments like {Inputs(*args, **kwargs)}, found {Inputs(*batch_args, **batch_kwargs)}."
            raise ValueError(f"{where}: {arguments} {REMEDY}")
        places = {key: f"argument {key!r}" for key in (*range(len(args)), *kwargs)} if len(args) + len(kwargs) > 1 else {}
        positional = [_map(_check_leaf, args[i], batch_args[i], where, places.get(i, "")) for i in range(len(args))]
        named = {key: _map(_check_leaf, value, batch_kwargs[key], where, places.get(key, "")) for key, value in kwargs.items()}
        values = tuple(positional), named
        if self._main is None:
            raise ValueError(f"{where}: found {describe_type(batch)}, expected tensors with one row per image. {REMEDY}")
        count = self._count(values)
        for index, (example, value) in enumerate(self._leaves(values)):
            if _has_images(example, self.images) and len(value) != count and (len(value), len(example)) != (1, 1):
                raise ValueError(f"{where}: inputs of {count} and {len(value)} images, expected equally many. {REMEDY}")
            for tensor in value if isinstance(value, list | tuple) else (value,):
                _check_finite(tensor, where, infinite=index != self._main)
        return Inputs(*values[0], **values[1])

    def count(self, inputs: Inputs) -> int:
        """The number of images."""
        return self._count((inputs.args, inputs.kwargs))

    def values_per_image(self, inputs: Inputs) -> int:
        """The number of values of the largest image."""
        main = self._leaves((inputs.args, inputs.kwargs))[self._main or 0][1]
        return max([1, *(image.numel() for image in main)]) if isinstance(main, list | tuple) else max(1, main[:1].numel())

    def select(self, inputs: Inputs, index: slice | Tensor) -> Inputs:
        """The inputs for some images: a range, a mask with one flag per image, or their numbers."""
        values, count = (inputs.args, inputs.kwargs), self.count(inputs)
        numbers = torch.arange(count, device="cpu")[index].tolist()
        rows = index if isinstance(index, slice) else torch.tensor(numbers, dtype=torch.long, device="cpu")

        def pick(example: Any, value: Any, _place: str) -> Any:
            if not (_has_images(example, self.images) and len(value) == count):
                return value
            if isinstance(value, Tensor):
                return value[rows if isinstance(rows, slice) else rows.to(value.device, non_blocking=True)]
            return [value[number] for number in numbers]

        args, kwargs = self._map(pick, values)
        return Inputs(*args, **kwargs)

    def _split(self, batch: Any, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and the keyword arguments in a batch."""
        args, kwargs = self._example
        items = batch_items(batch)
        if items and isinstance(items[0], Inputs):
            return items[0].args, items[0].kwargs
        if len(args) == 1 and not kwargs and _is_image_list(args[0]) and _is_image_list(list(items)):
            items = (batch,)
        needed = len(args) + bool(kwargs)
        if len(items) < needed or (kwargs and not isinstance(items[len(args)], Mapping)):
            expected = [describe_type(value) for value in (*args, *([kwargs] if kwargs else []))]
            raise ValueError(f"{where} holds {describe_type(batch)}, expected {', '.join(expected)}. {batch_remedy(batch)}")
        return items[: len(args)], dict(items[len(args)]) if kwargs else {}

    def _leaves(self, values: Any) -> list[tuple[Any, Any]]:
        """Pairs of a tensor or list of images in the example and the same in other inputs."""
        leaves: list[tuple[Any, Any]] = []
        self._map(lambda example, value, _place: leaves.append((example, value)), values)
        return leaves

    def _map(self, function: Callable[[Any, Any, str], Any], values: Any) -> tuple[list[Any], dict[str, Any]]:
        """`_map` for each argument."""
        (args, kwargs), (batch_args, batch_kwargs) = self._example, values
        positional = [_map(function, example, value, "", "") for example, value in zip(args, batch_args, strict=True)]
        return positional, {key: _map(function, example, batch_kwargs[key], "", "") for key, example in kwargs.items()}

    def _count(self, values: Any) -> int:
        if self._main is None:
            return 0
        main = self._leaves(values)[self._main][1]
        return 1 if isinstance(main, Tensor) and not main.ndim else len(main)


def _is_image_list(value: Any) -> bool:
    """Whether a value is a list of (3, height, width) tensors, as torchvision's detection models take."""
    return type(value) is list and len(value) > 0 and all(isinstance(item, Tensor) and item.ndim == 3 and len(item) == 3 for item in value)


def _dimensions(leaf: Any) -> int:
    return leaf.ndim if isinstance(leaf, Tensor) else 4


def _has_images(example: Any, images: int) -> bool:
    """Whether the first dimension of a tensor or list in the example counts the example's images."""
    return not isinstance(example, Tensor) or (example.ndim > 0 and len(example) == images)


def _check_leaf(example: Any, value: Any, place: str) -> Any:
    """A tensor, or a list of images, that is like the one in the example but for the number and the size of images."""
    if not isinstance(example, Tensor):
        if not isinstance(value, list | tuple) or not _is_image_list(list(value)):
            raise ValueError(f"{place}: found {describe_type(value)}, expected a list of images like {describe_type(example)}. {REMEDY}")
        pairs = [(example[0], image) for image in value]
    elif not isinstance(value, Tensor):
        raise ValueError(
            f"{place}: found {describe_type(value)}, expected a tensor like the example's {describe_type(example)}. {batch_remedy(value)}"
        )
    else:
        pairs = [(example, value)]
    for expected, tensor in pairs:
        if tensor.ndim != expected.ndim or (expected.ndim == 4 and tensor.shape[1] != expected.shape[1]):  # sequences may differ in length
            message = f"{place} has shape {tuple(tensor.shape)}, expected one like the example input's, {tuple(expected.shape)}."
            raise ValueError(f"{message} {REMEDY}")
    return value


def _check_finite(tensor: Tensor, where: str, infinite: bool) -> None:
    """Raise ValueError for numbers that are NaN, or infinite unless `infinite` allows it, as in masks."""
    if tensor.layout is torch.strided and (bad := int((tensor.isnan() if infinite else ~tensor.isfinite()).sum())):
        raise ValueError(f"{where}: {bad} of {tensor.numel()} numbers are NaN or infinite. Leave out or repair those images.")


def _map(function: Callable[[Any, Any, str], Any], example: Any, value: Any, where: str, place: str) -> Any:
    """`value` with the structure of `example`, and `function(example, value, place)` in place of tensors and lists of images.

    ValueError for another structure. `where` names the batch, `place` the position in it.
    """
    location = f"{where}: at {place}" if place else where
    if isinstance(example, Tensor) or _is_image_list(example):
        return function(example, value, location)
    if isinstance(example, Mapping):
        missing = [key for key in example if not isinstance(value, Mapping) or key not in value]
        if missing:
            raise ValueError(f"{location}: found {describe_type(value)}, expected a dict with {', '.join(map(repr, example))}. {REMEDY}")
        return {key: _map(function, item, value[key], where, f"{place}[{key!r}]") for key, item in example.items()}
    if isinstance(example, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(example):
            hint = example_hint(Inputs(example)) if isinstance(value, Tensor) else ""
            raise ValueError(f"{location}: found {describe_type(value)}, expected {describe_type(example)}. {hint}{REMEDY}")
        items = [_map(function, a, b, where, f"{place}[{index}]") for index, (a, b) in enumerate(zip(example, value, strict=True))]
        return items if isinstance(example, list) else type(example)(*items) if hasattr(example, "_fields") else tuple(items)
    if isinstance(value, Tensor | list | tuple | Mapping) or (example is None) != (value is None):
        raise ValueError(f"{location}: found {describe_type(value)}, expected {describe_type(example)}. {REMEDY}")
    return value
