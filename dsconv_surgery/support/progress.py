"""Progress of a call: a bar for each of its phases, and a line in the log."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import TqdmWarning

from dsconv_surgery.support import distributed

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # in a notebook without ipywidgets, bars are text
    from tqdm.auto import tqdm

LAYER_FORMAT = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"  # without numbers of layers, because these are weighted
_LOGGER = logging.getLogger("dsconv_surgery")


class Progress:
    """Shows the phases of a call as bars, and writes a line for each to the log "dsconv_surgery", at level INFO.

    Of several processes, only the first does.

    Args:
        shown: whether to show bars; None for in a terminal only.
        phases: the titles of the phases, in their order, which numbers them. A bar with another title is part of the phase in progress.

    Attributes:
        part: the part of the call that its phases belong to, such as "budget 2 of 5".
    """

    def __init__(self, shown: bool | None = None, phases: tuple[str, ...] = ()) -> None:
        self.part = ""
        self._shown, self._phases = shown, phases
        self._open: list[Any] = []  # bars

    @contextmanager
    def bar(self, title: str, total: int, unit: str, initial: int = 0, bar_format: str | None = None) -> Iterator[Any]:
        """A tqdm bar, disabled if it is not shown. A total of zero is neither shown nor logged."""
        is_phase = title in self._phases
        number = f"{self._phases.index(title) + 1}/{len(self._phases)} " if is_phase and len(self._phases) > 1 else ""
        text = f"{self.part}{', ' if self.part else ''}{number}{title}"
        silent = not total or distributed.process_and_world_size()[0] > 0
        if not silent:
            _LOGGER.info("%s: %d %s", text, total, unit if total == 1 else f"{unit}s")
        disable = silent or not (_is_terminal() if self._shown is None else self._shown)
        options: dict[str, Any] = {"initial": initial, "desc": text, "unit": unit, "bar_format": bar_format}
        with tqdm(total=total, disable=disable, leave=is_phase, **options) as bar:
            self._open.append(bar)
            try:
                yield bar
            finally:
                self._open.pop()
            bar.update(total - bar.n)
        for outer in self._open[-1:]:
            outer.unpause()  # its estimate of the remaining time leaves out the time of this bar

    @contextmanager
    def layers(self, title: str, params: Mapping[str, int]) -> Iterator[Callable[[str], None]]:
        """A bar over layers with these numbers of parameters; yields a function to call with a layer's name when its work begins.

        For the estimate of the remaining time, layer i of n takes a part `(1 / n + params_i / sum_j params_j) / 2` of the whole.
        """
        mean = sum(params.values()) / max(len(params), 1)
        begun: list[str] = []
        with self.bar(title, len(params), "layer", bar_format=LAYER_FORMAT) as bar:

            def begin(name: str) -> None:
                if name not in begun:
                    if begun:  # the layer before this one is done
                        bar.update((1 + params[begun[-1]] / mean) / 2)
                    begun.append(name)
                    bar.set_postfix_str(f"layer {len(begun)} of {len(params)}: {name}")

            yield begin


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # no standard error, or a closed one
        return False
