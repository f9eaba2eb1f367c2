"""`nnssl_train`: pretrain a plan's network with a method."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.cli.common import command
from nnssl_ext.cli.machine import GPU_WORKERS, num_workers

if TYPE_CHECKING:
    from nnssl_ext.engine.run import Probe, RunSettings, RunSpec
    from nnssl_ext.planners.plan import Configuration, Plan

DESCRIPTION = "Pretrain the network of a plan on preprocessed scans, without labels."
STOPPED = 75
EPILOG = f"""examples:
  nnssl_train 1 3d_fullres -tr MAETrainer
  nnssl_train 1 3d_fullres -tr MAETrainer --set mask_ratio=0.6 optim.lr=1e-3 -tag sparse
  nnssl_train 1 3d_fullres -tr MAETrainer --c                 go on where it was stopped or killed
  nnssl_train 1 3d_fullres -tr MAETrainer -num_gpus 4         4 GPUs of this machine; the batch size is per GPU
  torchrun --nnodes 2 --nproc-per-node 4 ... -m nnssl_ext.cli.train 1 3d_fullres -tr MAETrainer

SIGTERM, SIGUSR1 and Ctrl-C write a checkpoint after the step in hand and end the command with exit status {STOPPED}:
the same command with --c goes on. Status 0: the run is finished. 2: something must be changed first; the message says
what.
"""
TAG_PATTERN = r"[A-Za-z0-9.-]+(_[A-Za-z0-9.-]+)*"
KIBIBYTE = 2**10


def parser() -> argparse.ArgumentParser:
    """The command line of `nnssl_train`."""
    parse = argparse.ArgumentParser(
        "nnssl_train",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parse.add_argument
    add("dataset", nargs="?", help="id or name of the dataset, such as 1 or Dataset001_Scans")
    add("configuration", nargs="?", help="configuration of the plans, such as 3d_fullres")
    add("-tr", "--trainer", default="MAETrainer", help="method (default: %(default)s); --list shows all")
    add("-p", "--plans", default="nnsslPlans", help="name of the plans (default: %(default)s)")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="settings of the method; -tr NAME --describe shows them",
    )
    add(
        "-tag",
        "--tag",
        help="name of this variant in the results folder (default with --set or --sampling_weights: a short hash)",
    )
    add(
        "--sham",
        action="store_true",
        help="a control run with destroyed targets: what pretraining gives beyond it is the method's own",
    )
    add(
        "--c", dest="resume", action="store_true", help="go on with the run that is there, or begin where there is none"
    )
    add("--list", action="store_true", help="show every method, one line each, and leave")
    add("--describe", action="store_true", help="show the settings of the method with defaults and meanings, and leave")
    length = parse.add_argument_group("length, batch and cases (short for --set)")
    length.add_argument("-num_epochs", "--num_epochs", type=int, help="epochs of the run")
    length.add_argument("-steps_per_epoch", "--steps_per_epoch", type=int, help="optimiser steps of an epoch")
    length.add_argument(
        "-batch_size", "--batch_size", type=int, help="samples per step and device (default: the plan's)"
    )
    length.add_argument(
        "--sampling_weights",
        nargs="+",
        default=[],
        metavar="RULE",
        help="how often cases are shown: uniform (default), dataset or modality for equal shares of each, or "
        "NAME=WEIGHT ... of datasets or modalities, such as CT=2 (the others weigh 1; 0 leaves one out)",
    )
    _add_machine(parse.add_argument_group("machine"))
    return parse


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-device", "--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("-num_gpus", "--num_gpus", type=int, default=1, help="processes to start, one per GPU (default: %(default)s)")
    add(
        "-num_workers",
        "--num_workers",
        type=int,
        help=f"processes that read crops, per GPU (default: {GPU_WORKERS}, on a CPU 0)",
    )
    add(
        "--precision",
        default="auto",
        help="auto, bf16, fp16 or fp32 (default: bf16, else fp16, on a GPU; fp32 on a CPU)",
    )
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add(
        "--channels_last",
        action=argparse.BooleanOptionalAction,
        help="keep tensors with the channels last (default: on a CPU, where it saves a fifth of the time)",
    )
    add("--deterministic", action="store_true", help="reproducible kernels: a resumed run on a GPU is bitwise the same")
    add("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    add("--save_every", type=int, default=10, help="epochs between checkpoints (default: %(default)s)")
    add("--probe_every", type=int, default=0, help="epochs between probes of the features by labels (default: never)")
    add("--probe_dataset", help="labelled raw dataset for the probes (default: held-out cases of the dataset itself)")
    add("--no_tensorboard", action="store_true", help="write no TensorBoard events")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `nnssl_train`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parse = parser()
    args = parse.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if args.list:
        _list_trainers()
    elif args.describe:
        _describe(args.trainer)
    elif args.dataset is None or args.configuration is None:
        parse.error("give a dataset and a configuration, such as: nnssl_train 1 3d_fullres -tr MAETrainer")
    else:
        status = _train(args, arguments)
        if status:
            raise SystemExit(status)


def _list_trainers() -> None:
    from nnssl_ext.engine.task import TRAINERS
    from nnssl_ext.reports.methods import needs_text

    names = TRAINERS.names()
    width = max(map(len, names))
    for name in names:
        trainer = TRAINERS.get(name)
        info = trainer.task.info
        print(f"{name:{width}}  {info.idea} [{', '.join(sorted(info.encoders))}; {needs_text(trainer)}; {info.paper}]")


def _describe(name: str) -> None:
    from nnssl_ext.core.records import describe
    from nnssl_ext.engine.task import TRAINERS
    from nnssl_ext.reports.methods import needs_text

    trainer = TRAINERS.get(name)
    info = trainer.task.info
    print(f"{name}: {info.idea}\n{info.paper}; backbones: {', '.join(sorted(info.encoders))}")
    print(f"data: {needs_text(trainer)}\n")
    for row in describe(trainer()):
        setting = row.name.removeprefix("task_config.")
        print(f"  {setting} = {row.default}  ({row.type})")
        print(f"      {' '.join(row.doc.split())}")
    if trainer.vit:
        print("\nOn a transformer these are the defaults:")
        other = {row.name: row.default for row in describe(trainer())}
        for row in describe(trainer.configured([], "vit")):
            if row.default != other[row.name]:
                print(f"  {row.name} = {row.default}")
    print(f"\nChange any of them: nnssl_train DATASET CONFIGURATION -tr {name} --set NAME=VALUE ...")


def _train(args: argparse.Namespace, arguments: list[str]) -> int:
    from dataclasses import replace

    from nnssl_ext.core.logs import configure_logging
    from nnssl_ext.engine.device import resolve_device
    from nnssl_ext.engine.distributed import current_world
    from nnssl_ext.engine.loop import Outcome, pretrain

    if args.num_gpus < 1:
        raise ValueError(f"num_gpus={args.num_gpus} must be 1 or more.")
    world = current_world()
    if world.main:
        configure_logging()
    if args.num_gpus > 1 and world.size == 1:
        return _start_processes(args, arguments)
    device = resolve_device(_device(args), world)
    spec = replace(_spec(args), memory_gb=free_memory(str(device)))
    return STOPPED if pretrain(spec) is Outcome.STOPPED else 0


def _start_processes(args: argparse.Namespace, arguments: list[str]) -> int:
    """Refuse here what would be refused in every process, then start them.

    The memory is left to them: asking for it would hold some of the first GPU's for as long as they run.
    """
    from nnssl_ext.engine.distributed import World, torchrun
    from nnssl_ext.engine.prepare import prepare

    prepared = prepare(_spec(args), World(size=args.num_gpus, local_rank=args.num_gpus - 1))
    if prepared.finished:
        return 0
    status, stopped = torchrun(args.num_gpus, arguments)
    return STOPPED if stopped and prepared.folder.latest.exists() else status


def _spec(args: argparse.Namespace) -> RunSpec:
    from dataclasses import replace

    from nnssl_ext.core.paths import run_folder
    from nnssl_ext.engine.run import RunSpec
    from nnssl_ext.engine.task import TRAINERS
    from nnssl_ext.planners.plan import Plan

    dataset = _dataset(args.dataset)
    plan = Plan.load(dataset / f"{args.plans}.json")
    configuration = plan.configuration(args.configuration)
    if args.batch_size is not None:
        if args.batch_size < 1:
            raise ValueError(f"batch_size={args.batch_size} must be 1 or more.")
        configuration = replace(configuration, batch_size=args.batch_size)
    lengths = {name: getattr(args, name) for name in ("num_epochs", "steps_per_epoch")}
    short = [f"{name}={value}" for name, value in lengths.items() if value is not None]
    short += [*sampling_setting(args.sampling_weights), *["sham=true"] * args.sham]
    trainer = TRAINERS.get(args.trainer).configured([*args.set, *short], configuration.backbone)
    return RunSpec(
        trainer=trainer,
        plan=plan,
        configuration=configuration,
        data_folder=dataset / configuration.data_identifier,
        folder=run_folder(dataset.name, run_trainer_name(args, trainer.sham), plan.plans_name, configuration.name),
        settings=_settings(args),
        resume=args.resume,
        probe=_probe(args, plan, configuration) if args.probe_every else None,
    )


def _probe(args: argparse.Namespace, plan: Plan, configuration: Configuration) -> Probe:
    """A probe on another dataset, or on the held-out cases of this one, by whatever name it is given."""
    from nnssl_ext.core.paths import find_dataset, raw_root
    from nnssl_ext.dataset.manifest import Manifest
    from nnssl_ext.downstream.during_training import make_probe

    folder = find_dataset(args.probe_dataset or args.dataset, raw_root())
    trained = raw_root() / _dataset(args.dataset).name
    return make_probe(Manifest.load(folder), plan, configuration, held_out_only=folder.resolve() == trained.resolve())


def sampling_setting(weights: Sequence[str]) -> list[str]:
    """The setting that `--sampling_weights` stands for, if it was given.

    Raises:
        ValueError: If it is neither one rule nor names with a weight each.
    """
    import json

    if not weights:
        return []
    if len(weights) == 1 and "=" not in weights[0]:
        return [f"sampling_weights={weights[0]}"]
    pairs = [weight.rpartition("=") for weight in weights]
    try:
        named = {name: float(value) for name, _, value in pairs if name}
    except ValueError:
        named = {}
    if len(named) < len(weights):
        raise ValueError(
            f"sampling_weights {' '.join(weights)} must be uniform, dataset, modality, or NAME=WEIGHT ... with every "
            "name once."
        )
    return [f"sampling_weights={json.dumps(named)}"]


def _dataset(dataset: str) -> Path:
    """The preprocessed folder of a dataset."""
    from nnssl_ext.core.paths import find_dataset, preprocessed_root

    try:
        return find_dataset(dataset, preprocessed_root())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. Once converted: nnssl_plan_and_preprocess -d {dataset}") from error


def run_trainer_name(args: argparse.Namespace, sham: bool) -> str:
    """The trainer's name in the results folder: with a tag where settings were changed, saying where it is a sham."""
    import hashlib

    tag, changed = args.tag, sorted([*args.set, *sampling_setting(args.sampling_weights)])
    if tag is None and changed:
        tag = hashlib.sha256("\n".join(changed).encode()).hexdigest()[:6]
    if tag is not None and not re.fullmatch(TAG_PATTERN, tag):
        raise ValueError(f"tag {tag!r} is not allowed: use letters, digits, '-', '.' and single '_' between them.")
    return "-".join(part for part in (args.trainer, "sham" if sham else None, tag) if part is not None)


def _device(args: argparse.Namespace) -> str:
    import torch

    return args.device or ("cuda" if args.num_gpus > 1 or torch.cuda.is_available() else "cpu")


def _settings(args: argparse.Namespace) -> RunSettings:
    from nnssl_ext.core.records import from_dict
    from nnssl_ext.engine.run import RunSettings

    device = _device(args)
    values = {
        "device": device,
        "precision": args.precision,
        "compile": args.compile,
        "channels_last": args.channels_last,
        "deterministic": args.deterministic,
        "num_workers": num_workers(args, device),
        "seed": args.seed,
        "save_every": args.save_every,
        "probe_every": args.probe_every,
        "tensorboard": not args.no_tensorboard,
    }
    return from_dict(RunSettings, values, "command line")


def free_memory(device: str) -> float | None:
    """Memory in GiB that a device has free; None where the system does not tell."""
    from nnssl_ext.planners.rules import GIBIBYTE

    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0] / GIBIBYTE if torch.cuda.is_available() else None
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
    return int(lines["MemAvailable"].split()[0]) * KIBIBYTE / GIBIBYTE


if __name__ == "__main__":
    main(None)
