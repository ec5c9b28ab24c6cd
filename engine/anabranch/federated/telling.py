"""What a comparison came to: on the terminal, and in the folder that was named for it."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from anabranch.common.checkpoint import write_json
from anabranch.common.files import replace_file


def tell(
    numbers: Mapping[str, Any],
    out: Path | None,
    *,
    as_json: bool,
    text: Callable[[], str],
    markdown: Callable[[], str],
    page: Callable[[], str],
) -> None:
    """Write `numbers`, Markdown and page into `out`, if there is one and a run was done, and print numbers or text."""
    if out and numbers["runs"]:
        write_json(out / "results.json", numbers)
        for name, content in (("results.md", markdown()), ("report.html", page())):
            replace_file(out / name, partial(Path.write_text, data=content, encoding="utf-8"))
    if as_json:
        print(json.dumps(numbers))
    elif numbers["runs"]:
        print(text())
        if out:
            print(f"\n{out / 'report.html'} shows the courses of the runs")
    else:
        print("stopped before a run was done" + ("; go on with --resume" if out else ""))
