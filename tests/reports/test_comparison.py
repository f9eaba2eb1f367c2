"""The page and the table of a comparison of methods."""

import re
from dataclasses import replace

import pytest

from nnssl_ext.cli.report import main
from nnssl_ext.evaluation.comparison_records import load_comparison, save_comparison
from nnssl_ext.reports import comparison_figures as figures
from nnssl_ext.reports.comparison import markdown, pair_rows, rows, write_comparison
from tests.evaluation import comparison_fakes as fakes

UNFAIR = fakes.evaluation(("ptPlans__scratch", 5), ("ptPlans__Spark", 20))


@pytest.fixture(scope="module")
def comparison():
    return fakes.make_comparison()


def test_the_page_holds_everything_and_nothing_from_outside(comparison, tmp_path) -> None:
    path = write_comparison(comparison, UNFAIR, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 1 + 2 + 4 + 2 + 1  # scores, ranks, diagrams, pairs, probes
    assert not re.search(r'(src|href)="http', text)
    assert comparison.headline in text
    assert "scratch was still rising" in text
    assert text.count("those of differences hold the truth in about 80%") == 2  # beneath scores and pairs
    assert "A sign test over 3 seeds cannot give a p under 0.25" in text
    for condition in comparison.conditions:
        assert condition.split("'")[0] in text
    assert comparison.command in text
    assert (tmp_path / "comparison.md").is_file()


def test_records_come_back_as_they_were(comparison, tmp_path) -> None:
    save_comparison(comparison, tmp_path)
    assert load_comparison(tmp_path) == comparison
    with pytest.raises(FileNotFoundError, match="nnssl_compare"):
        load_comparison(tmp_path / "nothing")


def test_the_report_command_draws_the_page_again(comparison, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("nnssl_ext.evaluation.records.load_evaluation", lambda path: UNFAIR)
    monkeypatch.setattr("nnssl_ext.reports.page.write_report", lambda evaluation, folder: folder / "report.html")
    save_comparison(comparison, tmp_path)
    main([str(tmp_path), "-o", str(tmp_path / "other")])
    page = tmp_path / "other" / "comparison.html"
    assert capsys.readouterr().out.splitlines()[1] == f"comparison: {page}"
    drawn = page.read_text(encoding="utf-8")
    assert drawn == write_comparison(comparison, UNFAIR, tmp_path).read_text(encoding="utf-8")


def test_differences_to_scratch_have_the_arms_own_sign(comparison) -> None:
    """DINOv2 stands behind scratch, so its pair is the other way round; fails where that is forgotten."""
    found = {row.label: row.sizes[0] for row in rows(comparison, UNFAIR)}
    assert found["MAE"].difference == "+0.061"
    assert found["DINOv2"].difference == "\u22120.016"
    low, high = found["DINOv2"].difference_interval.split(" to ")
    assert low > high  # minus signs sort by their digits: the lower end is the larger number
    assert found["scratch"].difference == ""


def test_outcomes_follow_the_pair_unless_its_own_scratch_had_not_learned(comparison) -> None:
    """Catches a gain over the network's own scratch that is judged by another one's."""
    first = {row.label: row.sizes[0].outcome for row in rows(comparison, UNFAIR)}
    second = {row.label: row.sizes[1].outcome for row in rows(comparison, UNFAIR)}
    assert first == {
        "MAE": "not a fair comparison",
        "Spark": "not a fair comparison",
        "MAE sham": "undecided",
        "scratch": "",
        "DINOv2": "undecided",
    }
    assert second["MAE"] == "helped"
    poor = fakes.make_comparison({"scratch": 0.7, "vit": 0.03, "MAE": 0.09}, sizes=(5,))
    methods = tuple(replace(row, scratch="vit") if row.label == "MAE" else row for row in poor.methods)
    found = {row.label: row.sizes[0].outcome for row in rows(replace(poor, methods=methods), fakes.evaluation())}
    assert found["MAE"] == "not a fair comparison"


def test_the_table_for_documents_has_a_row_per_method_and_none_for_shams_that_were_only_probed(comparison) -> None:
    probed = replace(fakes.method("Spark sham"), arm=None)
    text = markdown(replace(comparison, methods=(*comparison.methods, probed)), UNFAIR)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 5
    assert len({line.count("|") for line in table}) == 1
    assert "| MAE | U-Net | 500 | 0.234 | mse 0.512 (chance 0.998) | passed | 0.560 |" in text
    assert "\n\nWarning: scratch was still rising with 5 training cases.\n\n" in text
    assert text.endswith(f"Made by: `{comparison.command}`\n")


def test_every_pair_is_listed_with_what_speaks_for_it(comparison) -> None:
    listed = pair_rows(comparison.rankings[0])
    assert len(listed) == 10
    assert listed[0][0] == "MAE \u2212 Spark"
    assert listed[0][-2:] == ("3 of 3", "undecided")


def test_one_seed_and_two_arms_are_drawn_too(tmp_path) -> None:
    single = fakes.make_comparison({"scratch": 0.5, "MAE": 0.6}, sizes=(5,), seeds=(0,))
    text = write_comparison(single, fakes.evaluation(), tmp_path).read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 1 + 1 + 1 + 1 + 1
    assert "No sham runs were asked for" in text


def test_a_sham_has_its_methods_colour_and_no_pretraining_is_grey(comparison) -> None:
    colours = figures.colours_of(comparison)
    assert colours["MAE"] == colours["MAE sham"]
    assert colours["scratch"] == figures.REFERENCE_COLOUR
    assert len(set(colours.values())) == 4
