"""A worker's memory: a few times the one volume that it works on."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_ext.dataset.manifest import write_dataset_json
from nnssl_ext.planners.plan import Plan

EDGE = 170
ALLOWED = 8
WORKER = """
import re, sys
from pathlib import Path
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.planners.plan import Plan
from nnssl_ext.preprocessing.run import preprocess_case

plan = Plan.load(Path(sys.argv[1]))
before = 0
for case in Manifest.load(Path(sys.argv[2])).cases:  # the first is tiny: it loads what is needed
    entry = preprocess_case(case, plan, plan.configuration("3d_fullres"), Path(sys.argv[3]), "float16")
    after = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    growth, before = after - before, after
print(growth * 1024, *entry.shape)
"""


@pytest.mark.parametrize("spacing", [(1.1, 1.2, 1.0), (4.0, 1.1, 0.9)])
def test_memory_of_a_worker(
    roots: Path, make_plan: Callable[..., Plan], tmp_path: Path, spacing: tuple[float, float, float]
) -> None:
    folder = roots / "raw" / "Dataset001_Test"
    (folder / "imagesTr").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, edge in enumerate((20, EDGE)):
        array = rng.integers(100, 900, (round(edge / spacing[0]), edge, edge), dtype=np.int16)
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(spacing[::-1])
        sitk.WriteImage(image, str(folder / "imagesTr" / f"case_{number}_0000.nrrd"))
    write_dataset_json(folder, channel_names=["MRI"], file_ending=".nrrd", num_cases=2)
    make_plan().save(tmp_path / "plan.json")
    arguments = [str(tmp_path / "plan.json"), str(folder), str(tmp_path / "store")]
    run = subprocess.run([sys.executable, "-c", WORKER, *arguments], capture_output=True, text=True, check=True)
    growth, *shape = map(int, run.stdout.split())
    volume = max(np.prod(shape), array.size) * np.dtype(np.float32).itemsize
    assert volume < growth < ALLOWED * volume
