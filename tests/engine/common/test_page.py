import pytest

from anabranch.common.page import marks, write_tables

BEGIN, END = marks("tables")


def test_tables_replace_what_is_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    write_tables(page, "new\n")
    write_tables(page, "newer\n")
    assert page.read_text() == f"before\n{BEGIN}\nnewer\n{END}\nafter\n"


def test_each_name_has_its_own_place(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("\n".join([*marks("one"), "between", *marks("two")]))
    write_tables(page, "2\n", "two")
    write_tables(page, "1\n", "one")
    begin, end = marks("two")
    assert page.read_text().endswith(f"between\n{begin}\n2\n{end}")
    assert "begin -->\n1\n<!-- one: end" in page.read_text()


def test_a_page_may_be_missing_but_not_unmarked(tmp_path):
    page = tmp_path / "page.md"
    write_tables(page, "only\n")
    assert page.read_text() == f"{BEGIN}\nonly\n{END}\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must hold the lines"):
        write_tables(page, "x")
