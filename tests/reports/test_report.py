import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from nnssl_ext.cli.report import main
from nnssl_ext.core.executor import InlineExecutor
from nnssl_ext.engine.panels import PANELS
from nnssl_ext.evaluation import analysis, verdict
from nnssl_ext.evaluation.preparation import EvaluationSettings
from nnssl_ext.evaluation.records import Evaluation, save_evaluation
from nnssl_ext.evaluation.run import evaluate
from nnssl_ext.evaluation.statistics import Interval
from nnssl_ext.imageio import Geometry
from nnssl_ext.reports import overlays, style, tables
from nnssl_ext.reports.figures import rows_of
from nnssl_ext.reports.page import minus, render
from nnssl_ext.reports.pretraining import draw_curves, read_pretraining
from tests.evaluation import fakes

SETTINGS = EvaluationSettings(
    dataset=4, plans=("ptPlans__mae", "ptPlans__scratch", "nnUNetPlans"), num_train=(3, "all"), seeds=(0, 1)
)
VOID = {"meta", "img", "br", "hr", "link", "input"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    """A finished evaluation of three arms, and the folder with its data."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("raw", "preprocessed", "results"):
            (root / kind).mkdir()
        use(root, patch)
        fakes.make_world(root)
        fakes.make_plans(root, "nnUNetPlans", plain=True)
        evaluation, _ = evaluate(
            SETTINGS, InlineExecutor(), device="cpu", command="nnssl_evaluate <&>", trainer=fakes.pretend_to_train
        )
    return evaluation, root


@pytest.fixture(scope="module")
def html(world: tuple[Evaluation, Path]) -> str:
    """Its report."""
    with pytest.MonkeyPatch.context() as patch:
        use(world[1], patch)
        return render(world[0])


def use(root: Path, patch: pytest.MonkeyPatch) -> None:
    for kind in ("raw", "preprocessed", "results"):
        patch.setenv(f"nnssl_{kind}", str(root / kind))
        patch.setenv(f"nnUNet_{kind}", str(root / kind))


@pytest.fixture
def evaluation(world: tuple[Evaluation, Path], monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    use(world[1], monkeypatch)
    return world[0]


class Page(HTMLParser):
    """Collects text, pictures and links, and checks that tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.images += [value for name, value in attributes if tag == "img" and name == "src"]
        self.links += [value for name, value in attributes if name == "href" or (name == "src" and tag != "img")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_the_report_is_self_contained_and_begins_with_the_verdict(world: tuple[Evaluation, Path], html: str) -> None:
    page, verdict = Page(html), world[0].verdicts[0]
    assert page.links == []
    assert "url(" not in html
    assert len(page.images) == 1 + 2 + 1 + 1 + 3  # efficiency, pairs of two arms, folds, curves, three cases
    assert all(image.startswith("data:image/png;base64,iVBOR") for image in page.images)
    body = page.text[page.text.index("nnssl_ext evaluation") :]
    assert body.index(minus(verdict.headline)) < body.index(verdict.certainty) < body.index("How many labels")


def test_the_report_holds_every_number_of_the_tables(world: tuple[Evaluation, Path], html: str) -> None:
    evaluation, text = world[0], Page(html).text
    for summary in evaluation.summaries:
        assert tables.number(summary.mean, summary.metric) in text
    for row in evaluation.comparisons:
        assert tables.number(row.difference, row.metric, signed=True) in text
        assert tables.interval(row.interval, row.metric, signed=True) in text
    for part in (*evaluation.versions.values(), *evaluation.warnings, "nnssl_evaluate <&>", "inner", "nnUNetPlans"):
        assert part in text
    assert "its pretraining run is not on this machine" in text
    assert "share no image" in text


def test_names_are_escaped_gaps_are_named_and_pretraining_is_shown(evaluation: Evaluation, tmp_path: Path) -> None:
    run = tmp_path / "MAETrainer__nnsslPlans__3d_fullres" / "fold_all"
    (run / "reconstructions").mkdir(parents=True)
    rows = [
        {"epoch": e, "step": e, "train_loss": 1 / (e + 1), "val_loss": None, "effective_rank": 0.1} for e in range(3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    acted = {"event": "intervention", "statistic": "rank", "diagnosis": "rank <1", "changes": ["back to step 1"]}
    (run / "interventions.jsonl").write_text(json.dumps({"step": 2, "resumed_at": 1, **acted}) + "\n")
    for epoch in (1, 3):
        Figure(figsize=(1, 1)).savefig(run / "reconstructions" / f"epoch_{epoch:04d}.png")
    unknown = {"pretraining_run": str(run), "images_known": False}
    arms = tuple(replace(arm, **unknown) if arm.pretrained else arm for arm in evaluation.arms)
    html = render(replace(evaluation, arms=arms, dataset="<script>alert(1)</script>", warnings=("<b>bold</b>",)))
    page = Page(html)
    assert "<script>" not in html
    assert "&lt;b&gt;bold" in html
    assert "No pictures. The raw images are not here" in page.text
    assert "MAETrainer__nnsslPlans__3d_fullres" in page.text
    assert "3 epochs of pretraining" in page.text
    assert "among the images that mae learned from is not known. No" in page.text
    assert "share no image" not in page.text
    assert "Step 2: rank <1. Intervened: back to step 1." in page.text
    assert len(page.images) == 5 + 3  # without cases; with curves and two reconstructions


def test_predictions_that_are_gone_are_named(evaluation: Evaluation, tmp_path: Path) -> None:
    assert overlays.missing_files(evaluation, 3) == ""
    gone = tuple(replace(run, folder=str(tmp_path / run.plans_name)) for run in evaluation.runs)
    assert "predictions are not here any more" in overlays.missing_files(replace(evaluation, runs=gone), 3)


def test_an_empty_pretraining_folder_has_nothing_to_show(tmp_path: Path) -> None:
    found = read_pretraining(tmp_path)
    assert (found.curves, found.first, found.last, found.num_epochs) == (None, None, None, 0)


def test_every_number_of_a_pretraining_is_drawn() -> None:
    """Catches health or probe numbers, a chance or an intervention that the report leaves out."""
    names = ["train_loss", "val_known_case_chance", *(name for lines in PANELS.values() for name in lines)]
    row = {"epoch": 0, "step": 9, **{name: 0.1 + number / 99 for number, name in enumerate(names)}}
    acted = {"event": "intervention", "step": 8, "resumed_at": 3, "statistic": "rank"}
    figure = Figure()
    draw_curves(figure, 4, [row], [acted])
    assert {row[name] for name in names} <= {line.get_ydata()[0] for axis in figure.axes for line in axis.lines}
    assert [axis.texts[0].get_text() for axis in figure.axes] == ["rank"] * 7


def test_one_fold_one_seed_one_class_still_make_a_report(evaluation: Evaluation) -> None:
    scores = [
        replace(row, classes={"inner": row.classes["inner"]})
        for row in evaluation.cases
        if row.fold == 0 and row.seed in (0, None) and row.num_train == "all"
    ]
    names = analysis.class_names({"inner": (1,)})
    summaries = tuple(analysis.summarise(scores, names))
    comparisons = tuple(analysis.compare(scores, {arm.name: arm.baseline for arm in evaluation.arms}, names))
    small = replace(
        evaluation,
        folds=(0,),
        seeds=(0,),
        num_train=("all",),
        classes={"inner": (1,)},
        absent={"inner": 2},
        cases=tuple(scores),
        runs=tuple(r for r in evaluation.runs if r.fold == 0 and r.seed in (0, None) and r.num_train == "all"),
        summaries=summaries,
        comparisons=comparisons,
        convergence=(),
        verdicts=tuple(verdict.decide(evaluation.arms, summaries, comparisons, [])),
    )
    text = Page(render(small)).text
    assert "One seed stands behind this" in text
    assert "in 1 fold," in text
    assert "inner in 2 cases." in text  # whose reference lacks it
    assert "hold the choice of patients alone" in text
    assert "Spread over folds" not in text


def test_cases_are_ranked_by_all_arms_together(evaluation: Evaluation) -> None:
    ranked = overlays.rank_cases(evaluation, 3)
    assert [row.rank for row in ranked] == ["best", "median", "worst"]
    means = [np.mean(list(row.dice.values())) for row in ranked]
    assert means == sorted(means, reverse=True)
    assert set(ranked[0].dice) == {"ptPlans__mae", "ptPlans__scratch"}
    everyone = {row.case for row in evaluation.cases}
    assert all(row.case in everyone for row in ranked)


def test_images_are_turned_so_that_axes_run_to_head_back_and_left() -> None:
    array = np.arange(24).reshape(2, 3, 4)
    straight = overlays.Orientation.of(geometry((1, 0, 0, 0, 1, 0, 0, 0, 1)))
    assert np.array_equal(straight.array(array), array)
    mirrored = overlays.Orientation.of(geometry((-1, 0, 0, 0, -1, 0, 0, 0, 1)))
    assert np.array_equal(mirrored.array(array), array[:, ::-1, ::-1])
    # the array's first axis runs to the left, its second to the head, its third to the front
    turned = overlays.Orientation.of(geometry((0, 0, 1, -1, 0, 0, 0, 1, 0)))
    assert turned.spacing == (2.0, 1.0, 3.0)
    assert np.array_equal(turned.array(array), array.transpose(1, 2, 0)[:, ::-1])
    flat = overlays.Orientation.of(Geometry(spacing=(999.0, 1.0, 1.0), origin=(0.0, 0.0), direction=(1.0, 0, 0, 1.0)))
    assert np.array_equal(flat.array(array), array)


def geometry(direction: tuple[float, ...]) -> Geometry:
    return Geometry(spacing=(3.0, 2.0, 1.0), origin=(0.0, 0.0, 0.0), direction=direction)


def test_the_region_of_interest_and_its_slices() -> None:
    mask = np.zeros((40, 60, 60), bool)
    mask[18:20, 30:40, 20], mask[19, 31:33, 21:23] = True, True
    box = overlays.region_of_interest(mask, (6.0, 1.0, 1.0))
    assert box == (slice(16, 22), slice(18, 52), slice(8, 35))
    assert overlays.widest_slices(mask) == [19, 31, 20]
    empty = np.zeros((4, 5, 6), bool)
    assert overlays.region_of_interest(empty, (1.0, 1.0, 1.0)) == (slice(0, 4), slice(0, 5), slice(0, 6))
    assert overlays.widest_slices(empty) == [2, 2, 3]


@pytest.mark.parametrize(
    ("value", "metric", "signed", "text"),
    [
        (0.12345, "dice", False, "0.123"),
        (-0.05, "dice", True, "\u22120.050"),
        (3.456, "hd95", True, "+3.46"),
        (None, "nsd", False, "\u2013"),
    ],
)
def test_numbers_as_text(value: float | None, metric: str, signed: bool, text: str) -> None:
    assert tables.number(value, metric, signed=signed) == text


def test_intervals_and_p_values_as_text() -> None:
    assert tables.interval(Interval(-0.1, 0.2), signed=True) == "\u22120.100 to +0.200"
    assert tables.interval(None) == "\u2013"
    assert [tables.p_text(p) for p in (0.0001, 0.04, None)] == ["< 0.001", "0.040", "\u2013"]


def test_minus_signs_are_set_before_numbers_only() -> None:
    text = "worse (-0.073 Dice, -0.10 to -0.04): give --seeds 0 1, -np 2 or ptPlans-5"
    assert minus(text) == "worse (\u22120.073 Dice, \u22120.10 to \u22120.04): give --seeds 0 1, -np 2 or ptPlans-5"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("number", "within"), [(6, True), (22, False)])
def test_many_names_stand_beneath_the_panels(number: int, within: bool) -> None:
    """Catches a legend that takes the panel's whole room, and letters as large as nnU-Net's curves leave them."""
    with matplotlib.rc_context({"legend.fontsize": 30, "xtick.labelsize": 30}), style.drawing(6.6, 3.4) as figure:
        axes = figure.add_subplot()
        for name in range(number):
            axes.plot([0, 1], label=f"RelativePatchLocation {name}")
        style.legend(figure, axes, "lower right")
        assert (axes.get_legend() is not None, len(figure.legends)) == (within, 0 if within else 1)
        style.encode(figure)
        assert axes.get_window_extent().height > 2 * style.DPI
        assert (figure.get_figheight() == 3.4) == within


def test_many_sizes_take_several_rows() -> None:
    assert rows_of((1, 2, 3, 4, "all")) == [(1, 2, 3), (4, "all")]


def test_the_report_command_draws_the_same_again(
    evaluation: Evaluation, html: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_evaluation(evaluation, tmp_path)
    (tmp_path / "other").mkdir()
    main([str(tmp_path), "-o", str(tmp_path / "other")])
    assert capsys.readouterr().out == f"report: {tmp_path / 'other' / 'report.html'}\n"
    assert (tmp_path / "other" / "report.html").read_text(encoding="utf-8") == html
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "Make one first: nnssl_evaluate" in capsys.readouterr().err
