"""nnssl_demo: the whole pipeline on made-up or given data, ending in a report."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from math import ceil
from pathlib import Path

from nnssl_ext.cli.common import USER_ERROR, command

PRETRAIN_ID, LABELLED_ID = 1, 2
NUM_FOLDS = 5
EPOCH_STEPS = 25
PRETRAIN_OPTIMIZER = "optim.name=adamw optim.lr=0.001 optim.weight_decay=0.01"
FINETUNE_OPTIMIZER = "schedule=poly optimizer=adamw lr=0.001 weight_decay=0.01 precision=bf16"
"""Recipes for hundreds of steps. The published ones use SGD, whose deep layers hardly move in that time."""
LEADING_STEPS = 2000
"""Pretraining of this length led the baseline early in fine-tuning on the hippocampus data (docs/finetuning.md)."""
MIN_SCRATCH_DICE = 0.3
"""Below this the scratch arm learned nothing, and comparing with it says nothing."""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="nnssl_demo",
        allow_abbrev=False,
        description="Run every stage on a CPU in minutes: made-up volumes (or --source) in, a report out. Each command "
        "is shown as you would type it. A second start goes on where the first one stopped.",
    )
    p.add_argument(
        "--source", type=Path, help="a dataset in the Medical Segmentation Decathlon's layout (default: phantoms)"
    )
    p.add_argument("--folder", type=Path, default=Path("demo"), help="where everything is written (default: demo)")
    p.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="folds to train (default: all five)")
    p.add_argument("--num_cases", type=int, default=44, help="phantoms to make (default: 44)")
    p.add_argument("--unlabelled", type=int, default=24, help="cases to pretrain on, without labels (default: 24)")
    p.add_argument("--num_train", nargs="+", default=["5"], help="labelled cases to fine-tune on, or all (default: 5)")
    p.add_argument("--pretrain_epochs", type=int, default=12, help=f"of {EPOCH_STEPS} steps each (default: 12)")
    p.add_argument("--finetune_epochs", type=int, default=10, help=f"of {EPOCH_STEPS} steps each (default: 10)")
    p.add_argument("-np", "--num_processes", type=int, default=2, help="worker processes (default: 2)")
    return p


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the pipeline's commands one after another and checks that there is something to compare."""
    args = parser().parse_args(argv)
    started = time.monotonic()
    folder = args.folder.resolve()
    _check(args)
    _keep_settings(args, folder)
    environment = _environment(folder)
    source = args.source or _phantoms(folder / "source", args.num_cases)
    for number, (title, line) in enumerate(_commands(args, source, folder), start=1):
        print(f"\n[{number}] {title}\n$ {shlex.join(line)}", flush=True)
        _run(line, environment)
    _finish(folder, time.monotonic() - started, args.pretrain_epochs * EPOCH_STEPS)


def _check(args: argparse.Namespace) -> None:
    """Refuses at once what the last of the commands would refuse after minutes."""
    from nnssl_ext.core.records import read_json

    number = args.num_cases
    if args.source:
        if not (args.source / "dataset.json").is_file():
            raise ValueError(f"--source {args.source} has no dataset.json: give an extracted dataset of the Decathlon")
        number = len(read_json(args.source / "dataset.json").get("training", ()))
    labelled = number - args.unlabelled
    if args.unlabelled < 2 or labelled < NUM_FOLDS:
        raise ValueError(
            f"--unlabelled {args.unlabelled} of {number} cases is not possible: 2 or more are pretrained on, and "
            f"{NUM_FOLDS} or more must be left with labels"
        )
    if wrong := [fold for fold in args.folds if not 0 <= fold < NUM_FOLDS]:
        raise ValueError(f"--folds {wrong[0]} is not there: choose from 0 to {NUM_FOLDS - 1}")
    most = labelled - ceil(labelled / NUM_FOLDS)
    for size in args.num_train:
        if size != "all" and not (size.isdigit() and 1 <= int(size) <= most):
            raise ValueError(f"--num_train {size} is not possible: give numbers from 1 to {most}, or all")


def _keep_settings(args: argparse.Namespace, folder: Path) -> None:
    """Writes what this demo is made of, and refuses to go on with one that was started otherwise."""
    from nnssl_ext.core.records import read_json, write_json

    names = ("source", "num_cases", "unlabelled", "pretrain_epochs", "finetune_epochs")
    wanted = {name: getattr(args, name) for name in names} | {"source": args.source and str(args.source.resolve())}
    file = folder / "demo.json"
    found = read_json(file) if file.is_file() else wanted
    changed = [f"{name} is {found.get(name)}, not {wanted[name]}" for name in names if found.get(name) != wanted[name]]
    if changed:
        raise ValueError(f"{folder} holds a demo made otherwise ({'; '.join(changed)}). Give another one: --folder")
    write_json(file, wanted)


def _environment(folder: Path) -> dict[str, str]:
    roots = {
        f"{tool}_{kind}": str(folder / kind)
        for tool in ("nnssl", "nnUNet")
        for kind in ("raw", "preprocessed", "results")
    }
    for path in roots.values():
        Path(path).mkdir(parents=True, exist_ok=True)
    print("\n".join(f"export {name}={shlex.quote(path)}" for name, path in roots.items() if name.startswith("nnssl")))
    return {**os.environ, **roots, "OMP_WAIT_POLICY": "passive"}


def _phantoms(folder: Path, num_cases: int) -> Path:
    from nnssl_ext.dataset.phantom import write_phantom_dataset

    if not (folder / "dataset.json").is_file():
        write_phantom_dataset(folder, num_cases)
    print(f"\n[0] {num_cases} made-up volumes with three structures each, in {folder}")
    return folder


def _commands(args: argparse.Namespace, source: Path, folder: Path) -> list[tuple[str, list[str]]]:
    """The pipeline as titles and command lines."""
    run = "MAETrainer-demo__nnsslPlans__3d_fullres"
    checkpoint = folder / f"results/Dataset{PRETRAIN_ID:03d}_DemoUnlabelled" / run / "fold_all/checkpoint_final.pth"
    workers = f"-np {args.num_processes}"
    finetune = _words("nnssl_plan_finetuning", f"-d {LABELLED_ID} -pc", checkpoint, workers)
    length = f"num_epochs={args.finetune_epochs} iterations_per_epoch={EPOCH_STEPS} val_iterations_per_epoch=4"
    recipe = f"{length} {FINETUNE_OPTIMIZER}"
    return [
        (
            "convert: some cases become a dataset without labels",
            _words(
                *("nnssl_convert msd", source, f"-d {LABELLED_ID} --name Demo"),
                f"--unlabelled {args.unlabelled} --unlabelled_dataset {PRETRAIN_ID}",
            ),
        ),
        (
            "fingerprint, plan and preprocess it",
            _words(f"nnssl_plan_and_preprocess -d {PRETRAIN_ID} -pl nnsslPlannerResEncXS", workers),
        ),
        (
            "pretrain by masked autoencoding",
            _words(
                f"nnssl_train {PRETRAIN_ID} 3d_fullres -tr MAETrainer -tag demo -device cpu --c -batch_size 4",
                f"-num_epochs {args.pretrain_epochs} -steps_per_epoch {EPOCH_STEPS} --save_every 1",
                f"--precision bf16 --set val_steps_per_epoch=4 block_size=8 {PRETRAIN_OPTIMIZER}",
            ),
        ),
        (
            "plan fine-tuning from the checkpoint",
            [*finetune, *_words(f"-n mae -transfer encoder --set {recipe}")],
        ),
        ("plan the baseline from scratch", [*finetune, *_words(f"-n scratch --from_scratch --set {recipe}")]),
        (
            "fine-tune both arms on every fold, score and report",
            _words(
                f"nnssl_evaluate -d {LABELLED_ID} -p ptPlans__mae ptPlans__scratch --name demo -device cpu {workers}",
                f"--num_train {' '.join(args.num_train)} -f {' '.join(map(str, args.folds))}",
            ),
        ),
    ]


def _words(*parts: str | Path) -> list[str]:
    """Words of a command line: texts are split at spaces, paths are not."""
    return [word for part in parts for word in ([str(part)] if isinstance(part, Path) else part.split())]


def _run(line: Sequence[str], environment: dict[str, str]) -> None:
    module = f"nnssl_ext.cli.{line[0].removeprefix('nnssl_')}"
    code = f"import sys; sys.argv[0] = {line[0]!r}; from {module} import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *line[1:]], env=environment, check=False)
    if done.returncode:
        print(f"\nerror: that command ended with status {done.returncode}; the demo stops here", file=sys.stderr)
        raise SystemExit(done.returncode)


def _finish(folder: Path, seconds: float, pretraining_steps: int) -> None:
    from nnssl_ext.evaluation.records import REPORT_FILE, load_evaluation

    results = next((folder / "results").glob(f"Dataset{LABELLED_ID:03d}_*")) / "evaluation" / "demo"
    evaluation = load_evaluation(results)
    dice = evaluation.summary(evaluation.reference.name, evaluation.num_train[-1], "dice")
    if dice is None or dice.mean is None or dice.mean < MIN_SCRATCH_DICE:
        print(
            f"\nerror: the arm from scratch reached a Dice of {dice and dice.mean}, below {MIN_SCRATCH_DICE}: it "
            "learned too little to compare with. Train longer in another folder (--folder, --finetune_epochs), or on "
            "more cases (--num_train)",
            file=sys.stderr,
        )
        raise SystemExit(USER_ERROR)
    for verdict in evaluation.verdicts:
        print(f"\n{verdict.headline}\n{verdict.certainty}")
    if pretraining_steps < LEADING_STEPS:
        print(
            f"\n{pretraining_steps} steps of pretraining show every stage, not what pretraining is worth: expect no "
            "gain from so few (docs/finetuning.md, Short pretraining)."
        )
    print(f"\nDone in {seconds / 60:.1f} minutes. The report: {results / REPORT_FILE}")
