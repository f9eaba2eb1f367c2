"""nnssl_plan_finetuning: from a pretrained checkpoint to what nnU-Net trains with."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.cli.common import command

if TYPE_CHECKING:
    from nnssl_ext.finetuning.nnunet_plans import FinetuningPlan

_EXAMPLES = """\
examples:
  nnssl_plan_finetuning -d 4 -pc checkpoint_final.pth -n mae
  nnssl_plan_finetuning -d 4 -pc checkpoint_final.pth -n scratch --from_scratch
  nnssl_plan_finetuning -d 4 -pc checkpoint_final.pth -n mae_saw --set schedule=sawtooth num_epochs=150
  nnssl_plan_finetuning -d 4 -pc checkpoint_final.pth -n vit_unetr -decoder unetr
  nnssl_plan_finetuning -d 4 -pc hf://AnonRes/ResEncL-OpenMind-MAE -n openmind
  nnssl_plan_finetuning -d 4 -pc checkpoint_final.pth -n mae_1mm -m fixed -os 1 1 1 -transfer encoder_decoder
"""


class _ListSettings(argparse.Action):
    """Like --help: prints and leaves, whatever else is missing."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from nnssl_ext.core.records import describe
        from nnssl_ext.finetuning.nnunet_plans import default_config

        for row in describe(default_config()):
            if row.name != "splits":
                print(f"{row.name} ({row.type}, default {row.default})\n    {row.doc}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="nnssl_plan_finetuning",
        allow_abbrev=False,
        description="Write plans, adapted weights and a report with which nnU-Net fine-tunes a pretrained network on a "
        "labelled dataset, and preprocess that dataset for it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "-d", "--dataset", required=True, help="id or name of a labelled dataset in nnUNet_raw (or nnssl_raw)"
    )
    p.add_argument(
        "-pc",
        "--pretrained_checkpoint",
        required=True,
        metavar="FILE",
        help="checkpoint of nnssl_train or of upstream's nnssl; on the Hugging Face hub: hf://OWNER/REPO[@REVISION][/FILE]",
    )
    p.add_argument("-n", "--name", required=True, help="the plans become ptPlans__NAME")
    p.add_argument(
        "-m",
        "--mode",
        default="like_pretrained",
        help="how images are prepared: like_pretrained (default: spacing and normalisation of the pretraining), "
        "default_nnunet (as nnU-Net's own plans), fixed (a spacing given with -os), no_resample (as they are)",
    )
    p.add_argument("-os", "--spacing", type=float, nargs="+", metavar="MM", help="voxel size z y x, for -m fixed")
    p.add_argument(
        "-transfer", default="encoder", help="weights to take over: encoder (default) or encoder_decoder (of MAE, say)"
    )
    p.add_argument("-patch_size", type=int, nargs="+", metavar="N", help="voxels z y x (default: the checkpoint's)")
    p.add_argument("-batch_size", type=int, help="samples a step (default: 2 in 3D, 12 in 2D)")
    p.add_argument(
        "-decoder", help="of a transformer: primus (default), unetr (convolutional pyramid) or mlp (light, SegFormer's)"
    )
    p.add_argument(
        "--token_order", help="of upstream's transformers: evamae or primus (default: what the checkpoint says)"
    )
    p.add_argument("--from_scratch", action="store_true", help="the fair baseline: the same plans without weights")
    p.add_argument("--allow_sham", action="store_true", help="take the weights of a control run (nnssl_train --sham)")
    p.add_argument("--splits", type=Path, help="JSON of folds with train and val ids (default: splits_final.json)")
    p.add_argument(
        "--ignore_keys",
        nargs="+",
        action="extend",
        default=[],
        metavar="PREFIX",
        help="checkpoint keys that may be dropped",
    )
    p.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="training settings; see --settings"
    )
    p.add_argument("--settings", action=_ListSettings, help="list the training settings with their defaults, and leave")
    p.add_argument("-np", type=int, default=2, help="worker processes; 0 works in this one (default: 2)")
    p.add_argument("--no_preprocess", action="store_true", help="only plan; preprocess later with nnUNetv2_preprocess")
    return p


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Plans, preprocesses, and prints the commands that train."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    from nnssl_ext.core.executor import make_executor
    from nnssl_ext.core.logs import configure_logging
    from nnssl_ext.finetuning.nnunet_dataset import preprocess
    from nnssl_ext.finetuning.nnunet_plans import parse_settings, plan_finetuning, read_splits

    configure_logging()
    plan = plan_finetuning(
        args.dataset,
        args.pretrained_checkpoint,
        args.name,
        mode=args.mode,
        spacing=args.spacing,
        transfer=args.transfer,
        patch_size=args.patch_size,
        batch_size=args.batch_size,
        decoder=args.decoder,
        token_order=args.token_order,
        from_scratch=args.from_scratch,
        allow_sham=args.allow_sham,
        ignore_keys=args.ignore_keys,
        splits=read_splits(args.splits) if args.splits else None,
        num_processes=args.np,
        command=["nnssl_plan_finetuning", *words],
        **parse_settings(args.set),
    )
    if not args.no_preprocess:
        with make_executor(args.np) as executor:
            preprocess(plan.plans_path, plan.configuration, executor)
    _print_plan(plan, args.no_preprocess)


def _print_plan(plan: FinetuningPlan, preprocess_first: bool) -> None:
    report: dict[str, Any] = plan.report
    dataset, name, configuration = plan.plans_path.parent.name, plan.plans_name, plan.configuration
    settings = report["preprocessing"]
    print(f"{plan.plans_path}\n  spacing {settings['spacing']} mm, patch {settings['patch_size']}, ", end="")
    print(f"batch {settings['batch_size']}, {', '.join(settings['normalization_schemes'])}")
    if len(settings["patch_size"]) == 2:
        print("  the network is two-dimensional: a volume is fine-tuned and predicted slice by slice")
    if plan.weights_path is not None:
        print(f"{plan.weights_path}\n  tensors: {', '.join(f'{n} {k}' for k, n in report['tensors'].items())}")
    print(f"{plan.report_path}\n\nNext:")
    print('  eval "$(nnssl_env)"')
    if preprocess_first:
        print(f"  nnUNetv2_preprocess -d {int(dataset[7:10])} -plans_name {name} -c {configuration}")
    print(f"  nnUNetv2_train {dataset} {configuration} 0 -p {name} -tr SSLFinetuneTrainer")
    weights = f" -pretrained_weights {shlex.quote(str(plan.weights_path))}" if plan.weights_path else ""
    print(f"or with nnU-Net's own trainer:\n  nnUNetv2_train {dataset} {configuration} 0 -p {name}{weights}")
