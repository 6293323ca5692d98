"""The summary of reports that commands print."""

from __future__ import annotations

import io

from rich.console import Console

from sct.eval.reports.report import CONTROL, METHOD, MODEL, REFERENCE, REMARK, Report
from sct.eval.reports.summary import compares, summary


def shown(reports: list[Report], width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(summary(reports))
    return out.getvalue().splitlines()


def imputation() -> Report:
    columns = (METHOD, "given_expressed", "mcc", "mae", REMARK)
    report = Report("Imputation of 15% masked genes, cells (1,000 positions in 2 draws)", columns)
    report.add("most common level per gene", "yes", [0.5, 0.5], [1.0, 1.0], "", key=REFERENCE)
    report.add("model", "no", [0.40, 0.42], [1.0, 1.0], "", key=MODEL)
    report.add("model", "yes", [0.45, 0.47], [1.0, 1.0], "", key=MODEL)
    report.add("kNN", "no", [0.30, 0.32], [1.0, 1.0], "")
    report.add("MAGIC", "-", "-", "-", "not installed")
    return report


def test_each_measurement_has_a_line_with_the_best_baseline():
    losses = Report("Bins of masked genes in 10 cells", ("prediction", "loss"), better={"loss": "min"})
    losses.add("model, one cell", [1.25])
    losses.add("frequencies per gene", [1.75])
    losses.add("frequencies of all genes", [2.0])
    failed = Report("Embedding, cells", (METHOD, REMARK))
    failed.add("all", "obs has no column 'cell_type'")
    cells = Report("100 generated cells", ("cells", "distance"))
    cells.add("model", [1.0])
    lines = shown([imputation(), losses, failed, cells])
    assert lines[0].startswith("The model is better than the best baseline in 2 of 3 measurements")
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "0.410 0.310 +0.100" in text
    assert "expressed genes given MCC" in text.replace("mcc", "MCC")
    assert "0.460 0.500 -0.040" in text
    assert "loss ↓ 1.250 1.750 -0.500" in text
    assert "Not measured: Embedding, cells: obs has no column 'cell_type'" in text
    assert "generated cells" not in text
    assert [compares(each) for each in (imputation(), losses, failed, cells)] == [True, True, True, False]


def test_equal_numbers_are_no_gain_and_baselines_alone_have_a_table():
    equal = Report("A long title " * 8, (METHOD, "accuracy"))
    equal.add("model", [0.50004])
    equal.add("PCA", [0.5])
    assert "in 0 of 1 measurements" in shown([equal])[0]
    alone = Report("Embedding", (METHOD, "accuracy"))
    alone.add("PCA", [0.5])
    lines = shown([alone])
    assert lines[0].startswith("The best baseline of each measurement")
    assert "0.500" in " ".join(lines)
    nothing = Report("Embedding", (METHOD, "accuracy"))
    assert summary([nothing]) is None


def test_the_model_is_found_by_its_key_and_controls_are_no_baselines():
    labels = Report("Labels of 140 cells: cell_type (10)", (METHOD, "accuracy"))
    labels.add("ZerOmics", [0.7], key=MODEL)
    labels.add("ZerOmics, shuffled among cells", [0.9], key=CONTROL)
    labels.add("most common label", [0.3])
    lines = shown([labels])
    assert lines[0].startswith("The model is better than the best baseline in 1 of 1 measurements")
    assert "0.700 0.300 +0.400" in " ".join(" ".join(lines).split())
