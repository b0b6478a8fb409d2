"""The tables that evaluate.py prints, and the page that --report writes: one file, in light and dark mode."""

import html
import io
import re
import string
import warnings
from collections.abc import Callable
from pathlib import Path

from model.loss import bits_per_byte

TEMPLATE = Path(__file__).with_name("report.html")
# One per model, legible on white and on black
COLOURS = ("#3b82d6", "#e07b1f", "#2f9e64", "#a367dc", "#d64550", "#129ba3")
# Prompts whose stories are shown side by side
SHOWN_PROMPTS = 5
# Placeholder, replaced by the page's text colour
INK = "#010203"
# Control characters, which a page must not have
NOT_HTML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

SCORE_NOTE = """Every story is scored from its own beginning to its end, each token once. Lower bits per byte are
better, and comparable between tokenizers. Intervals: 95 %, by bootstrap over stories; differences are paired, on
the same stories."""
QUALITY_NOTE = """Real stories: the same number of validation stories. They share stock phrases with the training
stories too; what exceeds them is copied. 8-grams and spans count tokens, including the prompts. distinct-n: the
share of distinct word n-grams."""

Columns = list[tuple[str, Callable[[dict], str]]]


def number(name: str, form: str) -> Callable[[dict], str]:
    """A cell with a row's figure, or – if it has none."""
    return lambda row: "–" if row.get(name) is None else format_figure(row[name], form)


def interval(name: str, form: str) -> Callable[[dict], str]:
    """A cell with an interval: low to high."""
    return lambda row: " to ".join(format_figure(end, form) for end in row[name]) if row.get(name) else "–"


def format_figure(value: float, form: str) -> str:
    """format(), but without a minus for what is rounded to zero."""
    text = format(value, form)
    plus = "+" if form.startswith("+") else ""
    return text if text.strip("-0.%") else text.replace("-", plus)


SCORE_COLUMNS: Columns = [
    ("checkpoint", lambda row: row["checkpoint"]),
    ("step", number("step", ",")),
    ("parameters", number("parameters", ",")),
    ("bits/byte", number("bits_per_byte", ".4f")),
    ("95 % interval", interval("bits_per_byte_interval", ".4f")),
    ("against the first", number("difference", "+.4f")),
    ("95 % interval", interval("difference_interval", "+.4f")),
    ("verdict", lambda row: row.get("verdict", "")),
    ("loss", number("loss", ".4f")),
    ("perplexity", number("perplexity", ".3f")),
    ("accuracy", number("accuracy", ".2%")),
    ("wrote stories in", lambda row: row.get("stories_written_in", "")),
]
QUALITY_COLUMNS: Columns = [
    ("story quality", lambda row: row["name"]),
    ("stories", number("stories", ",")),
    ("ended by themselves", number("ended", ".1%")),
    ("words per story", number("words", ".0f")),
    ("distinct-1", number("distinct_1", ".3f")),
    ("distinct-2", number("distinct_2", ".3f")),
    ("distinct-3", number("distinct_3", ".3f")),
    ("4-grams repeated within a story", number("repeated_4grams", ".1%")),
    ("words in no training story", number("unseen_words", ".2%")),
    ("8-grams found in training", number("copied_8grams", ".1%")),
    ("  beyond real stories", number("copied_8grams_beyond_real", "+.1%")),
    ("mean longest copied span, tokens", number("mean_longest_copy", ".1f")),
    ("  beyond real stories", number("mean_longest_copy_beyond_real", "+.1f")),
    ("longest copied span overall", number("longest_copy", "d")),
]


def cells(columns: Columns, rows: list[dict]) -> list[list[str]]:
    """A table as text, header first, without columns that are empty in every row."""
    table = [[header for header, _ in columns], *([cell(row) for _, cell in columns] for row in rows)]
    filled = [k for k in range(len(columns)) if any(row[k] not in ("", "–") for row in table[1:])]
    return [[row[k] for k in filled] for row in table]


def transposed(rows: list[list[str]]) -> list[list[str]]:
    """A column for each row, so that long lists of figures fit on narrow screens."""
    return list(map(list, zip(*rows, strict=True)))


def quality_table(quality: dict[str, dict]) -> list[list[str]]:
    """The figures of each group of stories as text, a column for each group."""
    return transposed(cells(QUALITY_COLUMNS, [{"name": name, **row} for name, row in quality.items()]))


def print_scores(results: list[dict]) -> None:
    """A table of the figures, in whichever direction is narrower."""
    table = cells(SCORE_COLUMNS, results)
    print_table(min(transposed(table), table, key=lambda rows: sum(widths(rows)) + 2 * len(rows[0])))


def print_table(rows: list[list[str]]) -> None:
    sizes = widths(rows)
    for first, *rest in rows:
        words = [first.ljust(sizes[0]), *map(str.rjust, rest, sizes[1:])]
        print("  ".join(words).rstrip())


def widths(rows: list[list[str]]) -> list[int]:
    """Of each column, in characters."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def render(report: dict) -> str:
    """The whole page, from the same report that evaluate.py --output writes."""
    results, quality = report["results"], report["quality"]
    charts = [chart for chart in (draw_positions(results), draw_curves(results)) if chart]
    about = {
        "command": report["command"],
        "stories": f"{report['source']}, SHA-256 {report['stories_sha256'][:16]}",
        "device": report["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "seed": report["seed"],
    } | ({"notes": "; ".join(report["notes"])} if report["notes"] else {})
    stories = "".join(map(stories_of_prompt, report["written"][:SHOWN_PROMPTS]))
    facts = [["", ""], *([key, str(value)] for key, value in about.items())]
    sections = [
        section(table(transposed(cells(SCORE_COLUMNS, results))) if results else "", note=SCORE_NOTE),
        section("".join(f"<figure>{chart}</figure>" for chart in charts), kind="figures"),
        section(
            table(quality_table(quality)) + copies(quality) if quality else "", "Story quality", QUALITY_NOTE
        ),
        section(stories, "Stories from the same prompts"),
        section(table(compare_settings(results)) if results else "", "Settings"),
        section(table(facts), "About this page", kind="text"),
    ]
    title = headline(results) or "Story quality"
    when = f"{report['date'][:16].replace('T', ' ')} UTC"
    page = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    body = NOT_HTML.sub("\ufffd", "\n".join(sections))
    about_stories = f"{html.escape(report['source'])} · {when}" if results else when
    return page.substitute(title=html.escape(title), about=about_stories, body=body)


def section(body: str, heading: str = "", note: str = "", kind: str = "") -> str:
    """A section of the page; empty if its body is empty."""
    if not body:
        return ""
    title = f"<h2>{heading}</h2>\n" if heading else ""
    remark = f'<p class="note">{note}</p>\n' if note else ""
    return f'<section>\n{title}<div class="{kind}">{body}</div>\n{remark}</section>'


def headline(results: list[dict]) -> str:
    """The result in one sentence."""
    if not results:
        return ""
    best = min(results, key=lambda result: result["bits_per_byte"])
    text = f"{best['checkpoint']}: {best['bits_per_byte']:.4f} bits per byte"
    clear = all(result is best or result.get("verdict") == "worse" for result in results[1:])
    if len(results) > 1 and best is results[0] and clear:
        return text + ", better than " + ("the other" if len(results) == 2 else "all others")
    if best.get("verdict") == "better":
        return text + f", better than {results[0]['checkpoint']}"
    return text if len(results) == 1 else text + ", though not clearly better"


def table(rows: list[list[str]]) -> str:
    head, *body = ([html.escape(cell) for cell in row] for row in rows)
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += [f"<th>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) for row in body]
    inner = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n{inner}\n</table></div>'


def copies(quality: dict[str, dict]) -> str:
    """Each group's longest copied span and unseen words, if training stories were available."""
    rows = [["", "longest span found in a training story", "examples of words in no training story"]]
    for name, figures in quality.items():
        if "longest_copy_text" in figures:
            text = figures["longest_copy_text"].strip()
            rows.append(
                [name, text or "none of 8 tokens or more", ", ".join(figures["unseen_examples"]) or "none"]
            )
    return f'<div class="text">{table(rows)}</div>' if len(rows) > 1 else ""


def stories_of_prompt(row: dict) -> str:
    """Stories from one prompt, side by side."""
    prompt = html.escape(row["prompt"])
    stories = []
    for name, text in row["stories"].items():
        story = html.escape(text.removeprefix(row["prompt"]).strip("\n"))
        stories.append(f"<article><h4>{html.escape(name)}</h4><p><b>{prompt}</b>{story}</p></article>")
    return f'<h3>{prompt} …</h3><div class="stories">{"".join(stories)}</div>'


def compare_settings(results: list[dict]) -> list[list[str]]:
    """A row for each setting of any model, those that differ first."""
    names = list(dict.fromkeys(name for result in results for name in result["settings"]))
    rows = [[name, *(str(result["settings"].get(name, "–")) for result in results)] for name in names]
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    return [["setting", *(result["checkpoint"] for result in results)], *rows]


def draw_positions(results: list[dict]) -> str:
    """Bits per byte along the story; positions use the mean token length, so that tokenizers compare."""
    lines = []
    for result in results:
        bytes_per_token = result["bytes"] / result["tokens"]
        ranges = [r for r in result["by_position"] if r["tokens"] >= 20]
        where = [(r["first"] + r["end"]) / 2 * bytes_per_token for r in ranges]
        lines.append((where, [bits_per_byte(r["loss"], bytes_per_token) for r in ranges], {}))
    labels = [result["checkpoint"] for result in results]
    return draw(labels, lines, "bytes into the story (log scale)", "Bits per byte along the story", log=True)


def draw_curves(results: list[dict]) -> str:
    """Bits per byte on the validation windows during training, by tokens seen."""
    runs = [result for result in results if len(result["curve"]) > 1]
    lines = []
    for result in runs:
        points = [(row["tokens"] / 1e6, row["bits_per_byte"]) for row in result["curve"]]
        at = [k for k, row in enumerate(result["curve"]) if row["step"] == result["step"]]
        lines.append((*map(list, zip(*points, strict=True)), {"marker": "o", "markevery": at}))
    labels = [result["checkpoint"] for result in runs]
    return draw(labels, lines, "million tokens seen (dot: this checkpoint)", "Bits per byte during training")


def draw(labels: list[str], lines: list[tuple], x_label: str, title: str, log: bool = False) -> str:
    """A line chart as SVG in the page's text colour; empty if there is nothing to draw."""
    if not lines:
        return ""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    style = {**dict.fromkeys(inks, INK), "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        axes = figure.subplots()
        names = [label.replace("$", r"\$") for label in labels]  # dollars would enclose a formula
        for k, (name, (x, y, options)) in enumerate(zip(names, lines, strict=True)):
            axes.plot(x, y, label=name, color=COLOURS[k % len(COLOURS)], linewidth=1.6, **options)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(x_label)
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        # handles by name: left to itself, it would omit labels that start with an underscore
        figure.legend(axes.get_lines(), names, loc="outside lower left", frameon=False)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with warnings.catch_warnings():
            # of characters that its own fonts lack; the browser's may have them
            warnings.simplefilter("ignore")
            FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    svg = buffer.getvalue().replace(INK, "currentColor")
    svg = re.sub(r' id="\w+_\d+"', "", svg[svg.index("<svg") :])  # not unique across figures
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg)  # the page sets the size
    return svg.replace("fill: #ffffff", "fill: none")  # and the background
