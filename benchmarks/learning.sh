#!/usr/bin/env bash
# The table of docs/methods/learning.md: what each method learns of its own on the Decathlon's hippocampus data.
#
#   benchmarks/learning.sh path/to/Task04_Hippocampus path/to/workspace [unet|primus|long|two_channels ...]
#
# Of the 260 labelled scans that the Decathlon gives it takes the 130 of learning/cases.txt: others must not lie in imagesTr.
# 80 of them lose their labels and are pretrained on, with small networks and some hundred steps. Of the other scans 20 are the
# pool that probes and fine-tuning draw 5 labelled cases from, and 30 are the test. Each method stands beside its own
# control run on destroyed targets, the untrained network, and nnU-Net from scratch, with three seeds, one after another:
# there is a table after each. A seed takes more than two hours on two cores that compute in bf16; it can be stopped and
# started again at any time.
set -euo pipefail
source=$1
workspace=$2
groups=${*:3}
for group in $groups; do
    case $group in unet | primus | long | two_channels) ;; *)
        echo "There is no group $group: give unet, primus, long or two_channels." >&2
        exit 2
        ;;
    esac
done
here=$(cd "$(dirname "$0")" && pwd)
if ! (cd "$source/imagesTr" && ls -- *.nii.gz) | sed 's/\.nii\.gz$//' | cmp -s - "$here/learning/cases.txt"; then
    echo "$source/imagesTr must hold the images of $here/learning/cases.txt and no others: the table is about these." >&2
    echo "Give a copy of the folder from which the others are removed, in dataset.json as well." >&2
    exit 2
fi

export nnssl_raw=$workspace/raw nnssl_preprocessed=$workspace/preprocessed nnssl_results=$workspace/results
export nnUNet_raw=$nnssl_raw nnUNet_preprocessed=$nnssl_preprocessed nnUNet_results=$nnssl_results
mkdir -p "$nnssl_raw" "$nnssl_preprocessed" "$nnssl_results"

[ -d "$nnssl_raw/Dataset001_HippocampusUnlabelled" ] ||
    nnssl_convert msd "$source" -d 4 --unlabelled 80 --unlabelled_dataset 1
nnssl_plan_and_preprocess -d 1 -pl nnsslPlannerResEncXS -np 2

compare() { # name, settings, labelled and unlabelled dataset, trainers
    nnssl_compare -d "$3" --pretrain_dataset "$4" -tr "${@:5}" --budget 550 --settings "$here/learning/$2.json" \
        --splits "$here/learning/splits.json" --num_train 5 --seeds $seeds --sham --name "$1" \
        -device cpu --precision bf16 -np 2
}

learn() { # group
    case $1 in
    unet)
        compare learning_unet unet 4 1 MAETrainer SparkTrainer ModelsGenesisTrainer InpaintingTrainer \
            VolumeFusionTrainer SwinUNETRTrainer DINOTrainer DINOv2Trainer RotationTrainer JigsawTrainer \
            RelativePatchLocationTrainer ExemplarTrainer CPCTrainer SimCLRTrainer VoCoTrainer DenseContrastiveTrainer \
            PatchClusteringTrainer PixelClusteringTrainer PCRLv2Trainer RegistrationTrainer MultiTaskTrainer
        ;;
    primus)
        compare learning_primus primus 4 1 MAETrainer SimMIMTrainer CroCoTrainer ModelsGenesisTrainer \
            InpaintingTrainer VolumeFusionTrainer SwinUNETRTrainer DINOv2Trainer
        ;;
    long) # as many volumes for both, some seven times those of the other groups
        compare learning_long long 4 1 MAETrainer DINOv2Trainer
        ;;
    two_channels) # a smoke test, and no evidence: the second contrast is made from the first
        for number in 001 004; do
            one=$(echo "$nnssl_raw/Dataset$number"_*)
            two=${one/Dataset0/Dataset1}
            [ -f "$two/dataset.json" ] || python "$here/smoke_derived_contrast.py" "$one" "$two"
        done
        nnssl_plan_and_preprocess -d 101 -pl nnsslPlannerResEncXS -np 2
        compare smoke_derived_contrast primus 104 101 MultiMAETrainer
        ;;
    esac
}

for seeds in "0" "0 1" "0 1 2"; do
    for group in ${groups:-unet primus two_channels long}; do
        learn "$group"
    done
done
