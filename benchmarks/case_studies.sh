#!/usr/bin/env bash
# The case studies of docs/findings.md: standard against robust on one axis, a small net on digits and a ResNet-18 on CIFAR-10.
#   bash benchmarks/case_studies.sh OUT CIFAR    CIFAR: a folder of .npz shards; without it, digits alone (minutes)
# What is there is not trained again.  The ResNets take an hour each on one core with bf16.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
python=.venv/bin/python

train() { # NAME, overrides
    local name=$1
    shift
    [ -f "$out/$name/results.json" ] || $python train.py "$@" regularizers=[] compare_undefended=false \
        wandb.mode=disabled "out=$out" "name=$name"
}

compare() { # NAME, robust checkpoint, standard run, images; the undefended net of the last epoch: robust accuracy chooses none
    [ -f "$out/$1/analysis.json" ] || $python evaluate.py "checkpoint=$out/$2" "against=$out/$3/checkpoints/last.ckpt" \
        "panels=[outcome,profiles,units,sensitivity]" "images=$4" "out=$out" "name=$1"
}

train digits_none defense=none panels=[] val_attack.steps=10
train digits_trades defense=trades panels=[] val_attack.steps=10
compare digits digits_trades digits_none 200
# A vision transformer: clean first, then robust by TRADES with a radius that grows.
vit=(network=small_vit network.patch_size=8 network.depth=3 network.width=48 optimizer=adamw optimizer.lr=0.002 panels=[])
train vit_none "${vit[@]}" defense=none trainer.max_epochs=30
train vit_trades "${vit[@]}" defense=trades defense.attack.steps=5 health=off trainer.max_epochs=40 "weights=$out/vit_none" \
    '+defense.eps_share={_target_:glassarmor.defenses.Ramp,start:0.1,end:1.0,epochs:20}'
compare vit vit_trades vit_none 128
if [ $# -gt 1 ]; then
    deep=(experiment=cifar10_cpu "data.path=$2" "panels=[training,pse,units,sensitivity,profiles]"
        trainer.max_epochs=8 trainer.limit_train_batches=100)
    train resnet18_none "${deep[@]}" defense=none
    train resnet18_n_fgsm "${deep[@]}" defense=n_fgsm
    compare resnet18 resnet18_n_fgsm/checkpoints/last.ckpt resnet18_none 100
fi
