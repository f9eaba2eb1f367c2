"""docs/methods.md: it is what the registry says, and every figure in it was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnssl_ext.core.records import write_json
from nnssl_ext.engine.task import TRAINERS
from nnssl_ext.reports.methods import COMMAND, COST_FILE, FIGURES, LEARNING_FILE, PAGE, methods_page

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def page() -> str:
    return methods_page(DOCS / FIGURES)


def test_the_committed_page_is_what_the_registry_says(page: str) -> None:
    assert (DOCS / PAGE).read_text(encoding="utf-8") == page, f"docs/{PAGE} is out of date. Write it anew: {COMMAND}"


def section(page: str, name: str) -> str:
    return page.split(f"\n## {name}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("name", TRAINERS.names())
def test_every_method_has_its_section_with_all_its_settings(page: str, name: str) -> None:
    trainer = TRAINERS.get(name)
    text = section(page, name)
    assert f"| [{name}](#{name.lower()}) | {trainer.task.info.idea} |" in page
    papers = [word.removeprefix("arXiv:").strip(",") for word in trainer.task.info.paper.split() if "arXiv:" in word]
    assert all(f"(https://arxiv.org/abs/{paper})" in text for paper in papers)
    for field in trainer.task.Config.__dataclass_fields__:
        assert f"| `{field}" in text, field
    assert ("`-transfer encoder_decoder`" in text) is (
        trainer.task.info.trains_decoder and "cnn" in trainer.task.info.encoders
    )


def test_masked_autoencoders_as_the_code_has_them(page: str) -> None:
    text = section(page, "MAETrainer")
    assert "- **Runs on**: U-Net and transformer." in text
    assert "- **Asks of the data**: any volumes." in text
    assert (
        "1 forward passes of a patch kept for the gradient, of 25% of the tokens on a transformer, with the decoder"
        in text
    )
    assert "| `mask_ratio` | `0.75` | Share of the real voxels that is hidden" in text
    assert "| `optim.lr` | `0.01`; transformer: `0.0003` |" in text
    assert "min_foreground" not in text  # as every trainer's


def test_figures_come_from_their_files_or_are_said_to_be_missing(tmp_path: Path) -> None:
    empty = methods_page(tmp_path)
    assert "not measured on a U-Net; not measured on a transformer" in section(empty, "MAETrainer")
    assert "Does it learn?" not in empty
    reference, spark = {"time": 1.0, "memory": 1.0, "views": 0.02}, {"time": 1.26, "memory": 1.1, "views": 0.123}
    steps = {"cnn": {"MAETrainer": reference, "SparkTrainer": spark}, "vit": {"MAETrainer": reference}}
    write_json(tmp_path / COST_FILE, {"conditions": "Measured so.", "steps": steps})
    (tmp_path / LEARNING_FILE).write_text("| a table | of figures |\n")
    full = methods_page(tmp_path)
    assert "time 1.3x, memory 1.1x, views 12% of the time, on a U-Net" in section(full, "SparkTrainer")
    assert "| 1.3x, 1.1x, 12% |" in full
    assert "Measured so." in full
    assert section(full, "Does it learn?").strip() == "| a table | of figures |"
