"""Tables as text, Markdown and HTML."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from dsconv_surgery.support.formatting import Displayed, TableContent

CONTENT = TableContent("a <title>", ("layer", "MACs"), (("conv|1", "1,000"), ("whole network", "12")), ("done & dusted",))


class Result(Displayed):
    def table(self) -> TableContent:
        return CONTENT


class Cells(HTMLParser):
    """The texts in table cells; tags have to be closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def test_text_aligns_numbers_to_the_right() -> None:
    assert str(Result()).splitlines()[1:] == ["layer           MACs", "conv|1         1,000", "whole network     12", "done & dusted"]


@pytest.mark.parametrize("columns", [80, 4000])
def test_text_is_the_same_in_a_notebook(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, rich draws tables itself unless it is told not to."""
    expected = str(Result())
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("JUPYTER_COLUMNS", str(columns))
    assert str(Result()) == expected


def test_markdown_escapes_bars() -> None:
    text = Result().to_markdown()
    table = ["| layer | MACs |", "|---|---|", r"| conv\|1 | 1,000 |", "| whole network | 12 |"]
    assert text.splitlines() == ["a <title>", "", *table, "", "- done & dusted"]


def test_html_has_every_cell_and_escapes_what_is_not_html() -> None:
    text = Result()._repr_html_()
    assert Cells(text).rows == [["layer", "MACs"], ["conv|1", "1,000"], ["whole network", "12"]]
    assert "a &lt;title&gt;" in text
    assert "done &amp; dusted" in text


def test_a_table_without_rows() -> None:
    empty = TableContent("nothing", ("a", "b"), ())
    assert empty.text().split() == ["nothing", "a", "b"]
    assert Cells(empty.html()).rows == [["a", "b"]]
