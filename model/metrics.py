"""A run's metrics.jsonl, and the loss curve and samples drawn from it alone."""

import itertools
import json
import math
import re
import time
from pathlib import Path

from model.files import atomic_write, naming, write_text

# Seconds between two drawings, which take half a second each, as long as 30 steps on a fast GPU
DRAW_EVERY = 20


class Metrics:
    """metrics.jsonl: one JSON object per line, in step order.

    A training row has step, train_loss (nats per token of that step's batch), learning_rate,
    gradient_norm, tokens, seconds (of training) and tokens_per_second, and on CUDA gpu_bytes (the most so
    far). An evaluation row has step, tokens, validation_loss, bits_per_byte and sample.
    """

    def __init__(self, folder: Path, step: int, last_evaluation: int):
        """Open the folder's file and drop what a killed run wrote after its last checkpoint."""
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self.rows = [
            row
            for row in read_rows(self.path)
            if row["step"] <= (last_evaluation if "validation_loss" in row else step)
        ]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.drawn_rows, self.drawn_at = 0, -math.inf

    def add(self, row: dict) -> None:
        self.rows.append(row)
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def draw(self, every: float = DRAW_EVERY) -> None:
        """Rewrite loss_curve.png and samples.md if there are new rows, at most once in so many seconds."""
        if len(self.rows) > self.drawn_rows and time.monotonic() >= self.drawn_at + every:
            draw_loss_curve(self.rows, self.folder / "loss_curve.png")
            write_samples(self.rows, self.folder / "samples.md")
            self.drawn_rows, self.drawn_at = len(self.rows), time.monotonic()


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, without lines that are broken, such as a truncated last one, or not ours."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if is_row(row):
                rows.append(row)
    return rows


def read_history(path: Path, checkpoint: dict) -> list[dict]:
    """The evaluation rows of the run that wrote this checkpoint.

    A run that is made longer goes back, and writes new rows; those of the shorter one are kept in another file, named
    after its last checkpoint. best.pt may be from either; its loss tells from which.
    """
    shorter = re.match(r"shorter_[\d-]+_", path.name)
    files = [path.with_name(f"{shorter[0] if shorter else ''}metrics.jsonl")]
    if path.name == "best.pt":
        files += sorted(path.parent.glob("shorter_*_metrics.jsonl"))
    histories = [[row for row in read_rows(file) if row.get("bits_per_byte") is not None] for file in files]
    best = (checkpoint["step"], checkpoint.get("best_loss"))
    for rows in histories:
        if best in ((row["step"], row.get("validation_loss")) for row in rows):
            return rows
    return histories[0]


def is_row(row: object) -> bool:
    """Whether a line has what is read from it, with the right types."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    losses = [row[name] for name in ("train_loss", "validation_loss") if row.get(name) is not None]
    return all(type(loss) in (int, float) for loss in losses) and row.get("validation_loss", 0) is not None


def smooth(values: list[float]) -> list[float]:
    """The mean of each value and its neighbours: on either side a fortieth of all values, at least four if there are
    enough. Fewer at the beginning, where losses fall fast."""
    count, sums = len(values), [0.0, *itertools.accumulate(values)]
    most = max(min(4, count // 4), count // 40)
    ends = ((k - min(k, most), min(count, k + min(k, most) + 1)) for k in range(count))
    return [(sums[end] - sums[first]) / (end - first) for first, end in ends]


def draw_loss_curve(rows: list[dict], path: Path) -> None:
    """Training loss (each logged batch, and smoothed) and validation loss by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [row for row in rows if row.get("train_loss") is not None]
    validation = [row for row in rows if "validation_loss" in row]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = [row["step"] for row in train], [row["train_loss"] for row in train]
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(losses), color="tab:blue", label="train (smoothed)")
        # the first losses fall from ln(vocabulary) and would flatten the rest
        low = min(losses + [row["validation_loss"] for row in validation])
        high = max(losses[len(losses) // 20 :])
        axes.set_ylim(low - 0.05 * (high - low) - 0.02, high + 0.05 * (high - low) + 0.02)
    if validation:
        best = min(validation, key=lambda row: row["validation_loss"])
        axes.plot(
            [row["step"] for row in validation],
            [row["validation_loss"] for row in validation],
            color="tab:orange",
            marker="o",
            markersize=3,
            label=f"validation (best {best['validation_loss']:.3f} at step {best['step']:,})",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend()
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def write_samples(rows: list[dict], path: Path) -> None:
    """Write the story of each evaluation, latest first."""
    parts = ["# A story at each evaluation\n\nLatest first, all with the same seed.\n"]
    for row in reversed(rows):
        if row.get("sample"):
            story = re.sub(r"\n+", "\n\n", row["sample"])  # Markdown needs a blank line between paragraphs
            parts.append(
                f"## Step {row['step']:,}, validation loss {row['validation_loss']:.3f}\n\n{story}\n"
            )
    write_text(path, "\n".join(parts))
