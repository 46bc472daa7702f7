"""Texts of goods are shown as they are."""

import io

from rich.table import Table

from common.console.tables import plain_console, shortened

TITLE = "连衣裙 [/新款] [red]蓝[/red] :bag: [xl/xxl]"


def test_brackets_and_colons_stay():
    file = io.StringIO()
    table = Table(title=TITLE)
    table.add_column("[b]名")
    table.add_row(TITLE)
    plain_console(file=file, width=120).print(table)
    assert file.getvalue().count(TITLE) == 2 and "[b]名" in file.getvalue()


def test_long_texts_are_cut_where_they_are_shown():
    assert shortened("裙" * 100_000) == "裙" * 57 + "..." and shortened("a\n b") == "a b"
