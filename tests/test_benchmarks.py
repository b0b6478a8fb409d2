"""The benchmarks run, and count right; what they measure is in benchmarks/RESULTS.md."""

import statistics

import pytest


def test_ablations_compare_each_change_with_the_recipe(run, packed):
    shape = "n-layer=1 n-head=2 n-embd=16 block-size=16 compile=off".split()
    flags = [
        "--preset",
        "quickstart",
        "--flags",
        *shape,
        "--steps",
        3,
        "--batch-tokens",
        64,
        "--max-samples",
        4,
    ]
    flags += ["--changes", "learning-rate=0.0001 no-bigram-start", "--seeds", 2, "--data-dir", packed]
    result = run("benchmarks/ablations.py", *flags, check=0)
    lines = result.stdout.splitlines()
    printed = [float(line.split(": ")[1].split()[0]) for line in lines[:4]]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][
        2:
    ]
    assert [row[0] for row in rows] == ["the recipe", "learning-rate=0.0001 no-bigram-start"]
    recipe, change = ([float(score) for score in row[1].split(", ")] for row in rows)
    assert recipe + change == printed and len(set(printed)) == 4
    means = [statistics.mean(recipe), statistics.mean(change)]
    assert [float(row[2]) for row in rows] == pytest.approx(means, abs=1e-4)
    assert float(rows[1][3]) == pytest.approx(means[1] - means[0], abs=2e-4)
    assert rows[1][4] == "worse"  # random weights that hardly learn
