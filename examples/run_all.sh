#!/usr/bin/env bash
# From raw scans to a report: does masked-autoencoder pretraining help nnU-Net on the Decathlon's hippocampus data?
#
#   examples/run_all.sh path/to/Task04_Hippocampus path/to/workspace
#
# The settings are those of a CPU: a network of width 8, AdamW, 1500 steps. On a GPU leave out -pl, -batch_size,
# -patch_size, --precision, --set, -num_epochs and -steps_per_epoch: the planner and the published recipes then decide.
# Every command can be stopped and started again.
set -euo pipefail
source=$1
workspace=$2

export nnssl_raw=$workspace/raw nnssl_preprocessed=$workspace/preprocessed nnssl_results=$workspace/results
export nnUNet_raw=$nnssl_raw nnUNet_preprocessed=$nnssl_preprocessed nnUNet_results=$nnssl_results
mkdir -p "$nnssl_raw" "$nnssl_preprocessed" "$nnssl_results"

# 60 of the scans lose their labels and become a dataset for pretraining; the other 70 are for the comparison
nnssl_convert msd "$source" -d 4 --unlabelled 60 --unlabelled_dataset 1 --seed 1

nnssl_plan_and_preprocess -d 1 -pl nnsslPlannerResEncXS -np 2

nnssl_train 1 3d_fullres -tr MAETrainer -tag example --c -device cpu --precision bf16 -batch_size 4 \
    -num_epochs 20 -steps_per_epoch 100 --save_every 2 --set val_steps_per_epoch=5 block_size=8 \
    optim.name=adamw optim.lr=1e-3 optim.weight_decay=0.01 schedule.name=cosine schedule.warmup_steps=100
run=$nnssl_results/Dataset001_HippocampusUnlabelled/MAETrainer-example__nnsslPlans__3d_fullres/fold_all

# the two arms: the same plans and the same schedule, with and without the pretrained weights
recipe=(num_epochs=30 iterations_per_epoch=50 val_iterations_per_epoch=4)
recipe+=(schedule=poly optimizer=adamw lr=0.001 weight_decay=0.01 precision=bf16)
nnssl_plan_finetuning -d 4 -pc "$run/checkpoint_final.pth" -n mae -transfer encoder_decoder -patch_size 32 40 32 \
    --set "${recipe[@]}"
nnssl_plan_finetuning -d 4 -pc "$run/checkpoint_final.pth" -n scratch --from_scratch -patch_size 32 40 32 \
    --set "${recipe[@]}"

nnssl_evaluate -d 4 -p ptPlans__mae ptPlans__scratch -f 0 1 2 3 4 --num_train 5 20 all --seeds 0 1 -device cpu -np 2
