"""Tables in a page that people write around them."""

from pathlib import Path

from anabranch.common.files import replace_file

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def write_tables(path: Path, tables: str) -> None:
    """Put tables between the two marks of a Markdown page, or write a page that is only them."""
    text = path.read_text(encoding="utf-8") if path.is_file() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} must hold the lines {BEGIN!r} and {END!r}, between which the tables go")
    page = f"{before}{BEGIN}\n{tables}{END}{after}"
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
