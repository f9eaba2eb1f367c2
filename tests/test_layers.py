"""What an import brings with it, asked in a fresh process: import-linter cannot see through third parties."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import nnssl_ext

TORCH_FREE = ("core", "imageio", "dataset", "fingerprint", "planners", "preprocessing")
COMMANDS = sorted(
    module.name
    for module in pkgutil.iter_modules([str(Path(nnssl_ext.__path__[0]) / "cli")])
    if module.name not in {"common", "machine"}
)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("package", TORCH_FREE)
def test_the_lower_layers_import_without_torch(package):
    code = (
        "import importlib, pkgutil, sys\n"
        f"package = importlib.import_module('nnssl_ext.{package}')\n"
        "for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "print('torch' in sys.modules)"
    )
    assert run(code).strip() == "False"


def test_every_command_has_an_entry_point():
    from importlib.metadata import entry_points

    installed = {e.value for e in entry_points(group="console_scripts") if e.name.startswith("nnssl_")}
    assert installed == {f"nnssl_ext.cli.{name}:main" for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_without_the_heavy_libraries(name):
    code = (
        "import sys\n"
        f"from nnssl_ext.cli.{name} import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'nnunetv2', 'scipy', 'SimpleITK', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    out = run(code)
    assert out.startswith("usage: nnssl_")
    assert out.rstrip().endswith("heavy: []")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistyped_option_is_an_error(name):
    code = f"from nnssl_ext.cli.{name} import main\nmain(['--no_such_option'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_training_a_convolutional_network_imports_no_transformers(tiny_plan, tmp_path):
    """Catches a method's file that imports `nnssl_ext.models.primus` at its top: timm takes seconds."""
    tiny_plan().save(tmp_path / "plans.json")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from nnssl_ext.engine import loop\n"
        "from nnssl_ext.engine.checkpoint import build_checkpoint\n"
        "from nnssl_ext.engine.task import TRAINERS\n"
        "from nnssl_ext.planners.plan import Plan\n"
        f"plan = Plan.load(Path({str(tmp_path / 'plans.json')!r}))\n"
        "trainer = TRAINERS.get('MAETrainer')()\n"
        "task = trainer.build_task(plan.configuration('3d_fullres'), 2)\n"
        "build_checkpoint(task, trainer, plan, content_hashes=[])\n"
        "print('timm' in sys.modules)"
    )
    assert run(code).strip() == "False"
