"""One line for each scheme and each rule, below the help of the commands that plan. Never imports torch."""

from __future__ import annotations

from dsconv_surgery.planning.rules import RULES

SCHEMES = {  # here and not beside each scheme, whose file imports torch
    "depthwise": "k x k depthwise with several kernels per channel, then 1x1",
    "pointwise_depthwise": "1x1, then k x k depthwise, summed by groups",
    "cp": "1x1, k x k depthwise, 1x1",
    "cp_split": "1x1, k x 1 depthwise, 1 x k depthwise, 1x1",
    "tucker": "1x1, k x k, 1x1; has a pair of ranks",
    "spatial": "k x 1, then 1 x k",
    "channel": "k x k, then 1x1",
    "bottleneck": "1x1, then 1x1, for 1x1 convolutions and linear layers",
}


def planning_epilog() -> str:
    """The schemes, the rules and how layers are named; a line with a backspace keeps the line breaks that follow."""
    rules = {name: (rule.choose.__doc__ or "").strip().splitlines()[0] for name, rule in RULES.items()}
    patterns = (
        'PATTERN is the name of a layer or module, which also means everything below it ("layer1"), or a name with wildcards '
        '("layer*.conv1"); for --include and --exclude also a type ("nn.Linear"). The first pattern that matches a layer counts.'
    )
    return f"{_list('Schemes (--schemes):', SCHEMES)}\n\n{_list('Rules (--rule):', rules)}\n\n{patterns}"


def _list(title: str, lines: dict[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join(["\b", title, *(f"  {name:<{width}}  {line}" for name, line in lines.items())])
