"""Tables in a page that people write around them."""

from pathlib import Path

from anabranch.common.files import replace_file


def write_tables(path: Path, tables: str, name: str = "tables") -> None:
    """Put tables between the two marks of that name in a Markdown page, or write a page that is only them."""
    begin, end = marks(name)
    text = path.read_text(encoding="utf-8") if path.is_file() else f"{begin}\n{end}\n"
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"{path} must hold the lines {begin!r} and {end!r}, between which the tables go")
    page = f"{before}{begin}\n{tables}{end}{after}"
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def marks(name: str) -> tuple[str, str]:
    """The lines before and behind what is replaced."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
