"""Does a method learn anything of its own? Each on the Decathlon's hippocampus, beside random and sham features.

    python benchmarks/learning.py --source Task04_Hippocampus --workspace DIR --trainers MAETrainer --seeds 0 1 2

80 scans without labels are pretrained on, with a network of width 8 and some hundred steps; 20 labelled ones are the
pool that probes draw subsets of 5 from, 30 are the test. Three arms are probed, with the same subsets and test cases:

- method: the pretrained encoder;
- sham: the same steps on destroyed targets (`nnssl_train --sham`), which have all but the task;
- random: the encoder that the run of that seed started from.

With `--fine_tune`, nnU-Net is trained on 5 labelled cases as well, from the method's weights and from scratch.

What is there is not done again: each result is a JSON file of its own in `DIR/learning/results`, and a run that was
stopped goes on. The table is `DIR/learning/table.md` and `.json`; `--table` only writes it anew. A protocol that does
not suit a method is changed by `--settings FILE`, JSON: {"FooTrainer": {"steps": 300, "settings": ["name=value"]}}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.evaluation.learning import Difference, Results, pretext_metrics, summarise, without_nan

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
UNLABELLED, LABELLED = 1, 4
DERIVED = 100
"""Added to the numbers of both datasets where a second contrast is derived from the first."""
NUM_UNLABELLED, NUM_POOL = 80, 20
NUM_EPOCHS = 5
PROBE_PATCH = (32, 40, 24)
"""Windows in which every U-Net's features are probed, whatever patch it was pretrained on."""
VIT_SIZE = "XS"
TOKEN = (8, 8, 8)
SMALL = {"block_size": 8}
"""Settings that fit a method to so small a crop, for those that have them."""
OPTIMISER = ("optim.name=adamw", "optim.lr=1e-3", "optim.weight_decay=0.01", "schedule.name=cosine")
FINETUNING = {
    "num_epochs": 6,
    "iterations_per_epoch": 50,
    "val_iterations_per_epoch": 1,
    "schedule": "poly",
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 1e-2,
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a method is trained here."""

    patch_size: tuple[int, ...] = PROBE_PATCH
    batch_size: int = 4
    steps: int = 550
    settings: tuple[str, ...] = OPTIMISER
    backbone: str = ""
    """`cnn` or `vit`; empty: a U-Net where the method runs on one."""
    channels: int = 1
    """Of the scans. The second of two is derived from the first: that is a smoke test, and no evidence."""

    @property
    def reference(self) -> str:
        """Network and data, which random features share with the methods they stand beside."""
        return self.backbone + (", derived contrast" if self.channels > 1 else "")

    def dataset(self, number: int) -> int:
        """The number of the dataset with these channels that belongs to one of a single channel."""
        return number + (DERIVED if self.channels > 1 else 0)


TWO_VIEWS = Protocol(patch_size=(24, 24, 24), batch_size=6, steps=450)
TWO_RESTORED = replace(TWO_VIEWS, batch_size=4)
SMALL_CUBES = ("cube_edge=2",)
"""The recipe's cubes of 8 are made for crops of 96; ten of them hold a third of a crop of 24."""
NEARER_VIEWS = ("crop_scale=[0.75,0.9]", "shift=0.1", "spatial.rotation=0", "spatial.elastic=0")
"""Where a view has 60 tokens, 6 of them seen, few steps do not find what corresponds in views that are also turned,
deformed and of another size."""
PROTOCOLS = {
    "dino": Protocol(patch_size=(24, 24, 24), steps=300, settings=("accumulate=1",)),
    "jigsaw": Protocol(batch_size=2, steps=350),
    "relative": Protocol(batch_size=2, steps=350),
    "voco": Protocol(batch_size=2, steps=350),
    "cpc": Protocol(batch_size=2, steps=250),
    "registration": Protocol(batch_size=2, steps=350),
    "croco": Protocol(settings=(*OPTIMISER, *NEARER_VIEWS)),
    "inpainting": replace(TWO_RESTORED, settings=(*OPTIMISER, *SMALL_CUBES)),
    "swinunetr": TWO_RESTORED,
    **dict.fromkeys(("simclr", "contrast", "exemplar", "pcrl", "clustering"), TWO_VIEWS),
}
"""By a part of the trainer's name; the other masked and restorative methods, and all others, have the defaults."""


@dataclass(frozen=True)
class Job:
    """One training with its probe."""

    trainer: str
    """Its name, perhaps with a backbone as `MAETrainer:vit`; empty for random features."""
    arm: str
    """`method`, `sham` or `random`."""
    seed: int
    protocol: Protocol
    fine_tune: bool

    @property
    def key(self) -> str:
        """Name of its files; another protocol has other ones."""
        code = hashlib.sha256(json.dumps(asdict(self.protocol)).encode()).hexdigest()[:6]
        name = self.trainer.replace(":", "-") or self.protocol.backbone
        return f"{name}-{self.arm}-s{self.seed}-{code}"


def parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--source", type=Path, help="the extracted Task04_Hippocampus")
    result.add_argument("--workspace", type=Path, required=True, help="folder for everything that is made")
    result.add_argument("--trainers", nargs="+", default=["MAETrainer"], help="methods; NAME:vit on a transformer")
    result.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (default: 0 1 2)")
    result.add_argument("--no_sham", action="store_true", help="leave the sham runs out")
    result.add_argument("--fine_tune", action="store_true", help="also fine-tune nnU-Net on 5 cases, and from scratch")
    result.add_argument("--settings", type=Path, help="JSON with other protocols by trainer")
    result.add_argument("--workers", type=int, default=2, help="trainings at a time, one thread each (default: 2)")
    result.add_argument("--table", action="store_true", help="only write the table of the results that are there")
    result.add_argument("--job", help=argparse.SUPPRESS)
    return result


def trainer_class(trainer: str) -> Any:
    """The registered trainer of a name, perhaps with a backbone.

    Raises:
        ValueError: If there is none.
    """
    from nnssl_ext.engine.task import TRAINERS

    return TRAINERS.get(trainer.partition(":")[0])


def protocol_of(trainer: str, changes: Mapping[str, Any]) -> Protocol:
    """The protocol of a method, resolved for this benchmark.

    Raises:
        ValueError: If there is no such trainer, or a change names no field.
    """
    from nnssl_ext.core.records import from_dict

    kind = trainer_class(trainer)
    short = trainer.lower()
    base = next((protocol for part, protocol in PROTOCOLS.items() if part in short), Protocol())
    protocol = from_dict(Protocol, {**asdict(base), **changes.get(trainer, {})}, trainer)
    backbone = trainer.partition(":")[2] or protocol.backbone or ("cnn" if "cnn" in kind.task.info.encoders else "vit")
    names = {setting.name for setting in fields(kind.task.Config)}
    small = tuple(f"{name}={value}" for name, value in SMALL.items() if name in names)
    warmup = f"schedule.warmup_steps={protocol.steps // 10}"
    channels = max(protocol.channels, kind.task.info.needs.channels)
    return replace(protocol, backbone=backbone, channels=channels, settings=(*small, warmup, *protocol.settings))


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """Every job that the arguments ask for: first all random ones, then seed by seed."""
    from nnssl_ext.engine.task import PretextTask

    changes = json.loads(args.settings.read_text()) if args.settings else {}
    protocols = {trainer: protocol_of(trainer, changes) for trainer in args.trainers}
    pairs = sorted({(protocol.backbone, protocol.channels) for protocol in protocols.values()})
    untrained = [Protocol(backbone=backbone, channels=channels) for backbone, channels in pairs]
    jobs = [Job("", "random", seed, protocol, args.fine_tune) for protocol in untrained for seed in args.seeds]
    for seed in args.seeds:
        for trainer, protocol in protocols.items():
            jobs.append(Job(trainer, "method", seed, protocol, args.fine_tune))
            if not args.no_sham and trainer_class(trainer).task.sham is not PretextTask.sham:
                jobs.append(Job(trainer, "sham", seed, protocol, False))
    return jobs


def set_environment(workspace: Path) -> None:
    """The folders of the pipeline lie in the workspace."""
    for kind in ("raw", "preprocessed", "results"):
        (workspace / kind).mkdir(parents=True, exist_ok=True)
        for prefix in ("nnssl", "nnUNet"):
            os.environ[f"{prefix}_{kind}"] = str(workspace / kind)


def prepare(source: Path | None, workspace: Path, derived: bool) -> None:
    """Converts, plans and preprocesses, as far as it has not been done; with `derived` also with a second contrast.

    Raises:
        ValueError: If data has to be converted and no source was given.
    """
    from nnssl_ext.cli.convert import main as convert
    from nnssl_ext.cli.plan_and_preprocess import main as plan_and_preprocess
    from nnssl_ext.core.paths import find_dataset, raw_root

    if not any((workspace / "raw").iterdir()):
        if source is None:
            raise ValueError("there is no data in the workspace yet: give --source Task04_Hippocampus")
        words = ["-d", str(LABELLED), "--unlabelled", str(NUM_UNLABELLED), "--unlabelled_dataset", str(UNLABELLED)]
        convert(["msd", str(source), *words])
    for number in (UNLABELLED, LABELLED) if derived else ():
        folder = find_dataset(number, raw_root())
        target = folder.with_name(folder.name.replace(f"{number:03d}", f"{number + DERIVED:03d}", 1))
        if not (target / "dataset.json").is_file():
            script = Path(__file__).with_name("smoke_derived_contrast.py")
            subprocess.run([sys.executable, str(script), str(folder), str(target)], check=True)
    for number in (UNLABELLED, UNLABELLED + DERIVED) if derived else (UNLABELLED,):
        if not list((workspace / "preprocessed").glob(f"Dataset{number:03d}_*/nnsslPlans_3d_fullres/*.json")):
            plan_and_preprocess(["-d", str(number), "-pl", "nnsslPlannerResEncXS", "-np", "0"])


def make_plan(protocol: Protocol, patch_size: Sequence[int]) -> Any:
    """The plan of the unlabelled dataset with another patch, batch, and perhaps a transformer."""
    from nnssl_ext.core.paths import find_dataset, preprocessed_root
    from nnssl_ext.planners.plan import Plan
    from nnssl_ext.planners.primus import PRIMUS_SIZES, primus_architecture

    folder = find_dataset(protocol.dataset(UNLABELLED), preprocessed_root())
    raw = Plan.load(folder / "nnsslPlans.json").raw
    own = {"patch_size": list(patch_size), "batch_size": protocol.batch_size}
    configuration = {**raw["configurations"]["3d_fullres"], **own}
    if protocol.backbone == "vit":
        configuration["architecture"] = primus_architecture(PRIMUS_SIZES[VIT_SIZE], tuple(patch_size), TOKEN)
    return Plan({**raw, "configurations": {"3d_fullres": configuration}})


def run_job(job: Job, workspace: Path) -> dict[str, Any]:
    """Trains where there is something to train, probes, perhaps fine-tunes; the record to keep."""
    import torch

    from nnssl_ext.downstream.frozen import load_frozen, random_frozen

    torch.set_num_threads(1)
    started, own = time.monotonic(), time.process_time()
    resumed = (run_folder(job, workspace) / "metrics.jsonl").exists()
    record: dict[str, Any] = {"trainer": job.trainer, "arm": job.arm, "seed": job.seed, "net": job.protocol.reference}
    record["protocol"] = asdict(job.protocol)
    checkpoint = None
    if job.arm == "random":
        plan = make_plan(job.protocol, PROBE_PATCH)
        frozen = random_frozen(plan, plan.configuration("3d_fullres"), job.seed)
    else:
        checkpoint = train(job, workspace)
        epochs = (checkpoint.parent / "metrics.jsonl").read_text().splitlines()
        record["pretext"] = pretext_metrics(json.loads(epochs[-1]))
        frozen = load_frozen(checkpoint)
    record["training_cpu_seconds"] = None if resumed else round(time.process_time() - own)
    record["probe"] = probe_features(frozen, job.protocol)
    if job.fine_tune:
        record["fine_tuned"] = fine_tune(job, checkpoint, workspace)
    return {**record, "seconds": round(time.monotonic() - started)}


def run_folder(job: Job, workspace: Path) -> Path:
    """Where a pretraining lies."""
    return workspace / "learning" / "runs" / job.key


def train(job: Job, workspace: Path) -> Path:
    """Pretrains, or goes on with it; the final checkpoint."""
    from nnssl_ext.core.paths import find_dataset, preprocessed_root
    from nnssl_ext.engine.loop import pretrain
    from nnssl_ext.engine.run import RunSettings, RunSpec

    protocol = job.protocol
    plan = make_plan(protocol, protocol.patch_size)
    length = (f"num_epochs={NUM_EPOCHS}", f"steps_per_epoch={protocol.steps // NUM_EPOCHS}", "val_steps_per_epoch=8")
    sham = ("sham=true",) if job.arm == "sham" else ()
    configuration = plan.configuration("3d_fullres")
    spec = RunSpec(
        trainer=trainer_class(job.trainer).configured([*length, *protocol.settings, *sham], protocol.backbone),
        plan=plan,
        configuration=configuration,
        data_folder=find_dataset(protocol.dataset(UNLABELLED), preprocessed_root()) / configuration.data_identifier,
        folder=run_folder(job, workspace),
        settings=RunSettings(seed=job.seed, save_every=1, picture_every=NUM_EPOCHS, tensorboard=False),
        resume=True,
    )
    pretrain(spec)
    return spec.folder / "checkpoint_final.pth"


def split_labelled(protocol: Protocol) -> tuple[Any, list[str], list[str]]:
    """The raw labelled dataset, the label pool and the test cases."""
    from nnssl_ext.core.paths import find_dataset, raw_root
    from nnssl_ext.dataset.manifest import Manifest

    manifest = Manifest.load(find_dataset(protocol.dataset(LABELLED), raw_root()))
    cases = [case.case_id for case in manifest.cases]
    return manifest, cases[:NUM_POOL], cases[NUM_POOL:]


def probe_features(frozen: Any, protocol: Protocol) -> dict[str, Any]:
    """Linear probe of the test cases: Dice (subsets, cases, classes)."""
    from nnssl_ext.downstream.probing import ProbeConfig
    from nnssl_ext.evaluation.probes import probe_record

    manifest, pool, test = split_labelled(protocol)
    return probe_record(frozen, manifest, pool, test, patch_size=PROBE_PATCH, config=ProbeConfig(neighbours=0))


def fine_tune(job: Job, checkpoint: Path | None, workspace: Path) -> dict[str, Any]:
    """nnU-Net on 5 labelled cases, from a checkpoint or from scratch: Dice (cases, classes) of the test cases.

    The subset of labelled cases and nnU-Net's own seed are those of the job's seed, for every method.
    """
    from nnssl_ext.core.executor import make_executor
    from nnssl_ext.core.records import read_json
    from nnssl_ext.dataset.splits import Split
    from nnssl_ext.downstream.probing import ProbeConfig, draw_subset
    from nnssl_ext.engine.checkpoint import load_checkpoint
    from nnssl_ext.finetuning.nnunet_dataset import preprocess
    from nnssl_ext.finetuning.nnunet_plans import plan_finetuning
    from nnssl_ext.finetuning.run import run_fold

    _, pool, test = split_labelled(job.protocol)
    dataset = job.protocol.dataset(LABELLED)
    chosen = draw_subset(len(pool), ProbeConfig().num_labelled, job.seed)
    split = Split(train=tuple(pool[index] for index in chosen), val=tuple(test))
    base = checkpoint or scratch_checkpoint(job, workspace)
    both = load_checkpoint(base)["nnssl_pretraining"]["trains_decoder"]
    plan = plan_finetuning(
        dataset,
        base,
        job.key,
        transfer="encoder_decoder" if both and checkpoint else "encoder",
        from_scratch=checkpoint is None,
        patch_size=PROBE_PATCH,
        batch_size=2,
        splits=[split],
        seed=job.seed,
        **FINETUNING,
    )
    with make_executor(0) as executor:
        preprocess(plan.plans_path, plan.configuration, executor)
    result = run_fold(dataset, plan.plans_name, plan.configuration, 0, device="cpu", num_threads=1)
    rows = read_json(result.summary)["metric_per_case"]
    names = [Path(row["prediction_file"]).name.split(".")[0] for row in rows]
    scores = np.array([[row["metrics"][label]["Dice"] for label in sorted(row["metrics"])] for row in rows], float)
    order = [names.index(case) for case in test]
    return {"cases": test, "dice": without_nan(scores[order])}


def scratch_checkpoint(job: Job, workspace: Path) -> Path:
    """A checkpoint of an untrained network, whose plans the baseline takes over."""
    from nnssl_ext.engine.checkpoint import build_checkpoint, save_checkpoint
    from nnssl_ext.trainers.mae import MAETrainer

    plan = make_plan(job.protocol, PROBE_PATCH)
    trainer = MAETrainer.configured([f"block_size={SMALL['block_size']}"], job.protocol.backbone)
    path = run_folder(job, workspace) / "checkpoint_final.pth"
    task = trainer.build_task(plan.configuration("3d_fullres"), NUM_UNLABELLED)
    save_checkpoint(path, build_checkpoint(task, trainer, plan, content_hashes=[]))
    return path


def run_all(jobs: Sequence[Job], args: argparse.Namespace) -> list[str]:
    """Runs what is missing, some processes at a time; the keys of what failed."""
    folder = args.workspace / "learning"
    (folder / "logs").mkdir(parents=True, exist_ok=True)

    def run(job: Job) -> str | None:
        target = folder / "results" / f"{job.key}.json"
        if target.is_file() and not (job.fine_tune and "fine_tuned" not in json.loads(target.read_text())):
            return None
        started = time.monotonic()
        command = [sys.executable, __file__, "--workspace", str(args.workspace), "--job", json.dumps(asdict(job))]
        with (folder / "logs" / f"{job.key}.txt").open("a") as log:
            environment = {**os.environ, **ONE_THREAD}
            status = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode
        words = "done" if status == 0 else f"FAILED, see {log.name}"
        print(f"{job.key}: {words} ({time.monotonic() - started:.0f} s)", flush=True)
        return job.key if status else None

    with ThreadPoolExecutor(args.workers) as pool:
        return [key for key in pool.map(run, jobs) if key is not None]


def read_results(jobs: Sequence[Job], workspace: Path) -> Results:
    """The results that are there."""
    found = {}
    for job in jobs:
        path = workspace / "learning" / "results" / f"{job.key}.json"
        if path.is_file():
            found[job.trainer or job.protocol.reference, job.arm, job.seed] = json.loads(path.read_text())
    return found


def write_table(rows: Sequence[Mapping[str, Any]], folder: Path, command: str) -> str:
    """Writes `table.md` and `table.json`; the markdown."""
    head = ("method", "net", "seeds", "pretext on held-out cases", "gate", "Dice", "sham", "random", "over random")
    head += ("over sham", "undecidable below", "fine-tuned over scratch", "verdict", "core-s")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        limit = row["over_sham"].undecidable_below if row["over_sham"] else None
        cells = [row["trainer"], row["net"], len(row["seeds"]), row["pretext"], row["gate"]]
        cells += [number(row[arm]) for arm in ("dice", "sham", "random")]
        cells += [row["over_random"] or "-", row["over_sham"] or "-", number(limit)]
        cells += [row["fine_tuned_over_scratch"] or "-", row["verdict"], number(row["core_seconds"], 0)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    text = "\n".join(lines) + (
        "\n\nDice: foreground, linear probe on frozen features, mean over label subsets, test cases and seeds. In "
        "brackets: 95% of a bootstrap over seeds and cases. A difference with a question mark is one that these seeds "
        "and cases cannot decide: its interval holds 0, or it is within the luck of the trainings, which is given for "
        "the one over sham. Sham, beside a pretext metric: the value of a network that was asked for another case than "
        "the one it saw. A derived contrast makes a smoke test, which shows nothing of a method's worth.\n"
        f"Made by: {command}\n"
    )
    plain = [{k: asdict(v) if isinstance(v, Difference) else v for k, v in row.items()} for row in rows]
    (folder / "table.json").write_text(json.dumps(plain, indent=2) + "\n")
    (folder / "table.md").write_text(text)
    return text


def number(value: float | None, digits: int = 3) -> str:
    """With so many digits, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def read_job(text: str) -> Job:
    """A job as `run_all` hands it to a process."""
    values = json.loads(text)
    return Job(protocol=read_protocol(values.pop("protocol")), **values)


def read_protocol(values: Mapping[str, Any]) -> Protocol:
    """A protocol as JSON holds it."""
    return Protocol(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and prints the table; 1 where a job failed."""
    args = parser().parse_args(argv)
    args.workspace = args.workspace.absolute()
    set_environment(args.workspace)
    if args.job:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        from nnssl_ext.core.records import write_json

        job = read_job(args.job)
        write_json(args.workspace / "learning" / "results" / f"{job.key}.json", run_job(job, args.workspace))
        return 0
    jobs = make_jobs(args)
    failed = []
    if not args.table:
        prepare(args.source, args.workspace, any(job.protocol.channels > 1 for job in jobs))
        failed = run_all(jobs, args)
    words = " ".join(Path(word).name for word in (sys.argv[1:] if argv is None else argv))
    rows = summarise(read_results(jobs, args.workspace), args.trainers)
    print(write_table(rows, args.workspace / "learning", f"python benchmarks/learning.py {words}"))
    if failed:
        print(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}. The same command tries them again.")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
