"""Check that the measured numbers in the three READMEs stand in result files.

python tests/benchmarks/check_numbers.py                list the numbers that are in no result file
python tests/benchmarks/check_numbers.py --changes 60   change 60 digits of each README, each alone, and count how many are noticed

A number is right if a value of a result file that its section links rounds to it, with a percent sign also a hundredth. In a
table, all numbers of a column have to stem from one key, and all numbers of a row from records that have something in common, or the other
way round. number_rules.py lists which numbers are left out, and which are computed from several records. With `--changes 60`, 176 of 180
changes are noticed. Not checked are numbers in words, whole numbers without a unit in prose, and whether a row has the right name.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from number_rules import (
    ARGUMENT_COLUMNS,
    ARGUMENTS,
    BENCHMARKS,
    CLAIMS,
    DOCUMENTS,
    LEFT_OUT,
    MAIN,
    MAIN_KEYS,
    NO_MEASUREMENTS,
    NOT_YET_CHECKED,
)
from result_values import RESULTS, ROOT, Value, values_of

NUMBER = re.compile(r"(?<![\w.\-/+^,=\u00d7])(?P<digits>[-+]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?)(?![\d\u00d7])(?P<unit> ?%|x\b| ?[a-zA-Z]+\b)?")
UNITS = {"%", "ms", "s", "seconds", "GiB", "MiB", "x", "nats", "points", "point", "times"}
LABEL = re.compile(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->")


@dataclass
class Shown:
    """A number of a document."""

    text: str
    percent: bool
    line: int
    place: tuple[int, int, int] = (0, 0, 0)  # row, column and position in the cell of a table
    matches: list[Value] = field(default_factory=list)

    def rounds_to(self, number: float) -> bool:
        """Whether a value rounds to the shown number."""
        shown = float(self.text.replace(",", ""))
        mantissa, _, exponent = self.text.partition("e")
        decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
        return abs(shown - number) <= 0.5000001 * 10.0**-decimals

    def shows(self, value: Value) -> bool:
        """Whether the number is that value; with a percent sign also a fraction, or a ratio minus 1 as in "+3.9 %"."""
        if self.rounds_to(value.number):
            return True
        if not self.percent or abs(value.number) > 2:
            return False
        percent = 100 * value.number
        return any(map(self.rounds_to, (percent, -percent) if "over" not in value.name else (percent - 100,)))


def numbers_in(text: str, percent: bool = False) -> Iterator[tuple[int, Shown, str]]:
    """The numbers of a text with their offsets and units, without those in code, links and budgets."""
    for pattern in (LABEL, ARGUMENTS):
        text = pattern.sub(lambda match: "`" * len(match[0]), text)
    for match in NUMBER.finditer(text):
        unit = (match["unit"] or "").strip()
        is_percent = bool(percent or re.match(r"(?: (?:to|and|or) [-+]?[\d.]+)? ?%", text[match.end("digits") :]))
        yield match.start(), Shown(match["digits"].rstrip(","), is_percent, 0), unit


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@dataclass
class Section:
    """A section of a document: its heading, lines of prose, and tables."""

    document: str
    heading: str
    prose: list[tuple[int, str]] = field(default_factory=list)
    tables: list[list[tuple[int, str]]] = field(default_factory=list)

    def files(self) -> list[Path]:
        """The result files that the section links. README.md shows numbers of all files, recipes/README.md those beside it."""
        if self.document != BENCHMARKS:
            results = RESULTS.glob("*.json") if self.document == MAIN else ()
            return sorted([*results, *(ROOT / "recipes").glob("*.json")])
        text = "\n".join(line for _, line in [*self.prose, *chain.from_iterable(self.tables)])
        return [RESULTS / name for name in dict.fromkeys(re.findall(r"\(results/([\w.-]+\.json)\)", text))]


def sections(document: str, text: str) -> list[Section]:
    """The sections of a document, without code blocks."""
    result, code, above, table = [Section(document, "")], False, "", False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            code = not code
        elif code:
            continue
        elif line.startswith("#"):
            title = line.lstrip("#").strip().split(":")[0]
            above = title if not line.startswith("###") else above
            result.append(Section(document, title if above == title else f"{above} {title}"))
        elif line.startswith("|"):
            if not table:
                result[-1].tables.append([])
            result[-1].tables[-1].append((number, line))
        elif line.strip() and not line.startswith(NOT_YET_CHECKED[document] or ("\n",)):
            result[-1].prose.append((number, line))
        table = line.startswith("|")
    return result


def table_numbers(table: list[tuple[int, str]]) -> list[Shown]:
    """The measured numbers of a table: no headers, no columns of arguments, and no first column unless it is the only one with numbers."""
    header = cells(table[0][1])
    result = []
    for row, (line, text) in enumerate(table[2:]):
        for column, cell in enumerate(cells(text)):
            for item, part in enumerate(cell.split(";") if header[column] not in ARGUMENT_COLUMNS else ()):
                for position, (_, shown, _) in enumerate(numbers_in(part, "%" in header[column])):
                    shown.line, shown.place = line, (100 * row + item, column, position)
                    result.append(shown)
    if len({shown.place[1] for shown in result}) > 1:
        result = [shown for shown in result if shown.place[1]]
    return result


def most(counts: Counter[Any]) -> set[Any]:
    """All that were counted most often."""
    return {item for item, number in counts.items() if number == max(counts.values())}


def unexplained(numbers: list[Shown], names: int | None, tags: int) -> list[Shown]:
    """Numbers left if each column (names=1) or row (names=0) has to show one key, and each row (tags=0) or column (tags=1) one group of
    records. With names=None the keys may differ.
    """

    def line(shown: Shown, axis: int | None) -> tuple[int, ...]:
        return shown.place[1:] if axis == 1 else (shown.place[0],)

    keys = {}
    for place in {line(shown, names) for shown in numbers} if names is not None else ():
        mine = [shown for shown in numbers if line(shown, names) == place]
        keys[place] = most(Counter(chain.from_iterable({value.name for value in shown.matches} for shown in mine)))
    fitting = [[v for v in s.matches if names is None or v.name in keys[line(s, names)]] for s in numbers]
    left = []
    for index in {shown.place[tags] for shown in numbers}:
        mine = [(shown, values) for shown, values in zip(numbers, fitting, strict=True) if shown.place[tags] == index]
        counts = Counter(chain.from_iterable({tag for value in values for tag in value.tags} for _, values in mine))
        tag = min(most(counts), default=None)
        left += [shown for shown, values in mine if not any(tag in value.tags for value in values)]
    return left


def prose_numbers(section: Section) -> list[Shown]:
    """The measured numbers of the prose: those with a decimal point, an exponent or a unit of measurement."""
    text = " ".join(line for _, line in section.prose)
    lines = [number for number, line in section.prose for _ in range(len(line) + 1)]
    result = []
    for offset, shown, unit in numbers_in(text):
        if unit in UNITS or shown.percent or set(".e") & set(shown.text):
            shown.line = lines[offset]
            result.append(shown)
    return result


def claimed(document: str, text: str) -> tuple[str, list[Shown], list[Shown]]:
    """The text without the numbers of CLAIMS and LEFT_OUT; the wrong ones of CLAIMS, and all of these."""
    wrong, numbers = [], []
    for template in [*CLAIMS[document], *LEFT_OUT[document]]:
        pattern = re.sub(r"\\ ", r"\\s+", re.escape(template)).replace(r"\{\}", r"([-+]?\d[\d.,]*(?:e-?\d+)?)")
        matches = list(re.finditer(pattern, text))
        if not matches:
            raise ValueError(f"{document} does not say {template!r} any more. Change or delete the rule in number_rules.py.")
        for match in matches:
            shown = [Shown(number, False, text.count("\n", 0, match.start(i)) + 1) for i, number in enumerate(match.groups(), 1)]
            if template in CLAIMS[document]:
                values = CLAIMS[document][template]()
                numbers += shown
                wrong += [number for number, value in zip(shown, values, strict=True) if not number.rounds_to(value)]
        text = re.sub(pattern, lambda match: re.sub(r"\d", "_", match[0]), text)
    return text, wrong, numbers


def check_section(section: Section) -> tuple[list[Shown], list[Shown]]:
    """The numbers of a section that are in none of its files, and all of its measured numbers."""
    values = list(chain.from_iterable(values_of(file) for file in section.files()))
    if section.document == MAIN:
        values = [Value(v.name, v.number, frozenset(tag for tag in v.tags if tag[0] == "at")) for v in values if v.name in MAIN_KEYS]
    left, tabled = [], []
    for table in section.tables:
        numbers = table_numbers(table)
        for shown in numbers:
            shown.matches = [value for value in values if shown.shows(value)]
        ways = [(None, 0)] if section.document == MAIN else [(1, 0), (0, 1)]
        left += min((unexplained(numbers, *way) for way in ways), key=len)
        tabled += numbers
    prose = prose_numbers(section)
    in_files = values if section.document == BENCHMARKS else []
    in_tables = [float(shown.text.replace(",", "")) for shown in tabled]
    left += [s for s in prose if not any(map(s.shows, in_files)) and not any(map(s.rounds_to, in_tables))]
    return left, tabled + prose


def check(document: str, text: str) -> tuple[list[Shown], list[Shown]]:
    """The numbers of a document that are in no result file, and all of its measured numbers."""
    text, left, numbers = claimed(document, text)
    for section in sections(document, text):
        if section.heading not in NO_MEASUREMENTS + NOT_YET_CHECKED[document]:
            wrong, shown = check_section(section)
            left += wrong
            numbers += shown
    return left, numbers


def messages(document: str, left: list[Shown]) -> list[str]:
    advice = "Correct it, link its file in the section, or say in number_rules.py how it is computed or why it is in no file."
    return [f"{document}:{shown.line}: no result file of the section has {shown.text} for this row and column. {advice}" for shown in left]


def changed_digit(text: str, numbers: list[Shown], generator: random.Random) -> tuple[str, str]:
    """The text with another digit in a number, and the change in words."""
    lines = text.splitlines()
    while True:
        shown = generator.choice(numbers)
        places = [m.start() for m in re.finditer(rf"(?<![\w.,]){re.escape(shown.text)}(?![\w]|[.,]\d)", lines[shown.line - 1])]
        index = generator.choice([i for i, character in enumerate(shown.text.partition("e")[0]) if character.isdigit()])
        if places:
            place = generator.choice(places) + index
            line = lines[shown.line - 1]
            digit = generator.choice([d for d in "0123456789" if d != line[place]])
            lines[shown.line - 1] = line[:place] + digit + line[place + 1 :]
            return "\n".join(lines), f"line {shown.line}: {shown.text} with {digit} at {index}"


def noticed(document: str, changes: int, seed: int = 0) -> list[str]:
    """The changes of a digit, each alone, that `check` does not notice."""
    text, generator = (ROOT / document).read_text(), random.Random(seed)
    numbers, missed = check(document, text)[1], []
    for _ in range(changes):
        changed, words = changed_digit(text, numbers, generator)
        try:
            left = check(document, changed)[0]
        except ValueError:
            continue
        if not left:
            missed.append(words)
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=0, help="number of digits to change in each document, each alone")
    changes, missing = parser.parse_args().changes, 0
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        left, numbers = check(document, text)
        print(*messages(document, left), sep="\n", end="\n" if left else "")
        missing += len(left)
        print(f"{document}: {len(numbers)} numbers, {len(left)} of them in no result file")
        if changes:
            missed = noticed(document, changes)
            print(*missed, f"{changes - len(missed)} of {changes} changes of a digit noticed", sep="\n")
    sys.exit(missing > 0)


if __name__ == "__main__":
    main()
