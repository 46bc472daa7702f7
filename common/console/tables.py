"""Tables in a terminal whose texts are shown as they are: titles of goods hold brackets and colons."""

from typing import Any


def plain_console(**options: Any) -> Any:
    """A rich console that reads neither markup such as `[red]` nor emoji codes such as `:bag:` out of what it shows."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)


def shortened(text: str, longest: int = 60) -> str:
    """The text as it is shown to people: on one line, and cut where it is longer."""
    head = " ".join(text[: 4 * longest].split())
    return f"{head[: longest - 3]}..." if len(head) > longest or len(text) > 4 * longest else head
