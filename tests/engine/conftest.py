"""A tiny preprocessed dataset on disk, and a run on it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nnssl_ext.core.random import generator
from nnssl_ext.engine.run import RunSettings, RunSpec
from nnssl_ext.engine.tracking import Tracker
from nnssl_ext.planners.plan import Plan
from nnssl_ext.preprocessing.index import Index, Provenance, write_index
from nnssl_ext.preprocessing.store import write_case
from nnssl_ext.trainers.mae import MAETrainer

RECIPE = ["block_size=4", "num_epochs=3", "steps_per_epoch=3", "val_steps_per_epoch=2", "val_fraction=0.3"]
RELEASED_KEYS = {
    "network_weights",
    "citations",
    "nnssl_adaptation_plan",
    "nnssl_plans",
    "nnssl_pretraining",
    "nnssl_content_hashes",
}
"""Of a checkpoint in its released form."""


def write_store(folder: Path, num_cases: int, cases_per_subject: int = 1, channels: int = 1) -> None:
    """Blobs of different brightness, of odd sizes, one smaller than the patch."""
    entries = {}
    for number in range(num_cases):
        rng = generator("engine tests", number)
        shape = (18 + number, 14 if number == 0 else 27, 9)
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij"))
        foreground = (grid**2).sum(0) < 1
        data = np.where(foreground, rng.uniform(0.5, 2.0), -0.5) + 0.1 * rng.standard_normal((channels, *shape))
        case_id = f"case_{number:02d}"
        entries[case_id] = write_case(
            folder,
            case_id,
            data.astype(np.float32),
            {},
            foreground,
            spacing=(1.0, 1.0, 1.0),
            provenance=Provenance(subject=f"patient_{number // cases_per_subject}", content_hashes=(f"{number:064x}",)),
        )
    write_index(folder, Index(settings={}, entries=entries))


@pytest.fixture
def pictures() -> None:
    """Asked for by tests of runs that are to draw; the others save that second."""


@pytest.fixture(autouse=True)
def _few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(Tracker, "draw_progress", lambda self: None)
        monkeypatch.setattr(Tracker, "reconstruction", lambda self, *arguments: None)


@pytest.fixture
def preprocessed(roots: Path, tiny_plan: Callable[..., Plan]) -> Path:
    """`Dataset999_Tiny`, preprocessed: plans and six cases of six patients."""
    folder = roots / "preprocessed" / "Dataset999_Tiny"
    tiny_plan().save(folder / "nnsslPlans.json")
    write_store(folder / "nnsslPlans_3d_fullres", 6)
    return folder


@pytest.fixture
def make_spec(preprocessed: Path, tiny_plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., RunSpec]:
    """Makes the specification of a run of MAE; settings by name, recipe overrides as a list, a folder's name."""

    def make(
        overrides: list[str] = [],  # noqa: B006 - never changed
        name: str = "run",
        resume: bool = False,
        plan: Plan | None = None,
        memory_gb: float | None = None,
        **settings: object,
    ) -> RunSpec:
        plan = plan or tiny_plan()
        return RunSpec(
            trainer=MAETrainer.configured([*RECIPE, *overrides]),
            plan=plan,
            configuration=plan.configuration("3d_fullres"),
            data_folder=preprocessed / "nnsslPlans_3d_fullres",
            folder=tmp_path / name,
            settings=RunSettings(**{"tensorboard": False, "save_every": 1, **settings}),
            resume=resume,
            memory_gb=memory_gb,
        )

    return make
