"""Scores equal scikit-learn's, and their definitions; the picture of a confusion matrix for few and many classes."""

import itertools
import json
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from sklearn.metrics import classification_report, confusion_matrix

from fastft.models.report import Line, Report
from fastft.training import lines, metrics, plots
from fastft.training.result import FinetuneResult


@given(st.integers(2, 6), st.data())
def test_scores_are_those_of_the_definitions_and_of_sklearn(classes, draw):
    names = [f"class {index}" for index in range(classes)]
    rows = st.lists(st.tuples(*[st.integers(0, classes - 1)] * 2), min_size=1, max_size=50)
    targets, predictions = map(np.array, zip(*draw.draw(rows), strict=True))
    scores = metrics.classification(names, targets, predictions)

    matrix = np.array(scores["confusion_matrix"])
    assert scores["accuracy"] == np.trace(matrix) / len(targets)
    for index, name in enumerate(names):
        found = scores["per_class"][name]
        right, predicted, true = matrix[index, index], matrix[:, index].sum(), matrix[index].sum()
        assert found["precision"] == (right / predicted if predicted else 0)
        assert found["recall"] == (right / true if true else 0) and found["support"] == true

    labels = list(range(classes))
    report = classification_report(
        targets, predictions, labels=labels, target_names=names, output_dict=True, zero_division=0
    )
    assert (matrix == confusion_matrix(targets, predictions, labels=labels)).all()
    for ours, theirs in (
        *((scores["per_class"][name], report[name]) for name in names),
        (scores["macro"], report["macro avg"]),
        (scores["weighted"], report["weighted avg"]),
        (scores, report["macro avg"]),
    ):
        assert [ours[key] for key in metrics.SCORES] == [theirs[key] for key in ("precision", "recall", "f1-score")]


def test_a_class_that_is_never_predicted_has_precision_0():
    scores = metrics.classification(["a", "b", "c"], np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1]))
    assert scores["per_class"]["a"] == {"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 2}
    assert scores["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert scores["confusion_matrix"] == [[1, 1, 0], [0, 1, 0], [0, 1, 0]] and scores["accuracy"] == 0.5
    assert json.loads(json.dumps(scores)) == scores, "plain numbers only"


@pytest.mark.parametrize(
    "name", ["{}", "class {}", "some long name of the class {}", "two\nlines {}", "{} 非常好吃的餐厅非常好吃", "😀{}"]
)
@pytest.mark.parametrize("classes", [2, 8, 30])
def test_tables_fit_beside_the_names_of_the_facts(name, classes):
    names, draw = [name.format(index) for index in range(classes)], np.random.default_rng(0)
    scores = metrics.classification(names, *draw.integers(0, classes, (2, 20_000)))
    found = lines.class_lines(scores)
    assert max(map(cell_len, found)) <= 70 and not any("\n" in line for line in found)
    if classes <= 8:
        matrix = [list(map(int, line.split()[-classes:])) for line in found[-classes:]]
        assert matrix == scores["confusion_matrix"]


def test_facts_are_folded_between_words_where_there_is_a_width():
    fact = "  indented words here\n\nhttp://long.example/" + "x" * 40 + " end-of-line words"
    assert lines.fact_line("name", fact).count("\n") == 2
    folded = lines.fact_line("name", fact, 30).split("\n")
    assert folded == [
        *("name        indented words", "          here", "          "),
        *("          http://long.example/" + "x" * 40, "          end-of-line words"),
    ]


def test_names_that_the_font_has_not_are_drawn_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.confusion_matrix(tmp_path / "a.png", ["北京", "\U0001f600 $x$"], [[3, 1], [0, 2]])
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_kernels_are_told_by_kind_and_reason():
    parts = [("a", "Linear", None), ("b", "Embedding", "why"), ("c", "Tanh", "why"), ("d", "Embedding", "why")]
    report = Report("Model", tuple(Line(*part) for part in [*parts, ("e", "Linear", "not now")]), (), None)
    told = ["fastft's in 1 of 5 modules", "PyTorch's in 2 Embedding, 1 Tanh: why", "PyTorch's in 1 Linear: not now"]
    assert lines.kernels_lines(report) == told
    assert lines.kernels_lines(None) == ["PyTorch's (stock=True)"]
    kinds = [Line(str(index), f"Kind{index}OfModule", "a reason of some words") for index in range(20)]
    folded = lines.kernels_fact(Report("Model", tuple(kinds), (), None)).split("\n")
    assert len(folded) > 3 and max(map(len, folded)) <= lines.WIDTH


@pytest.mark.parametrize("count", [1, 2])
def test_the_legend_shows_what_is_drawn(tmp_path, monkeypatch, count):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: drawn.append(figure))
    keys = ("loss", "accuracy", "validation_loss", "validation_accuracy")
    history = [{"epoch": epoch, **dict.fromkeys(keys, 1 / epoch)} for epoch in (1, 2)]
    result = FinetuneResult(tmp_path, ["a"], history, [1.0] * 80, {}, np.zeros(1), {}, {}, 2)
    plots.learning_curves(tmp_path / "a.png", {str(index): result for index in range(count)})
    for axes in drawn[0].axes:
        curves = {line.get_color() for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())}
        shown = axes.get_legend().get_lines()[-1].get_color()
        assert len(curves) == count and (shown in curves if count == 1 else shown == "grey")


@pytest.mark.parametrize("classes", [2, 100])
def test_a_confusion_matrix_is_drawn_without_overlapping_names(tmp_path, monkeypatch, classes):
    from matplotlib.figure import Figure

    drawn = []

    def draw(figure, *arguments, **options):
        figure.draw_without_rendering()
        drawn.append(figure)

    monkeypatch.setattr(Figure, "savefig", draw)
    counts = np.random.default_rng(0).integers(0, 20_000, (classes, classes))
    plots.confusion_matrix(tmp_path / "a.png", [f"${index}$ " + "long name " * 5 for index in range(classes)], counts)
    axes = drawn[0].axes[0]
    for labels, low in ((axes.get_xticklabels(), "x0"), (axes.get_yticklabels(), "y0")):
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: getattr(box, low))
        for before, after in itertools.pairwise(boxes):
            assert getattr(before, low.replace("0", "1")) <= getattr(after, low) + 1
    assert len(axes.texts) == (classes**2 if classes <= 30 else 0)
