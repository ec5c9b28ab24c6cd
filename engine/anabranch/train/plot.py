"""The loss curve of a run as a small PNG. Needs matplotlib: the optional extra `plot`."""

import json
from pathlib import Path

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ImportError("drawing the loss needs matplotlib: pip install 'anabranch[plot]'") from error


def draw_loss(log: Path, path: Path) -> None:
    """Draw train and held-out bits against tokens from a loss.jsonl into a PNG."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for key, label, marker, color in (
        ("train_bits_per_token", "training (mean since the last entry)", "", "tab:gray"),
        ("held_out_bits_per_byte", "held out", ".", "tab:blue"),
    ):
        points = [(entry["tokens"] / 1e6, entry[key]) for entry in entries if key in entry]
        axes.plot([x for x, _ in points], [y for _, y in points], label=label, marker=marker, color=color, linewidth=1)
    axes.set_xlabel("million tokens (bytes)")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)
