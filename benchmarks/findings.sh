#!/usr/bin/env bash
# The networks and analyses behind docs/findings.md: benchmarks/findings.sh CIFAR_FOLDER OUT  (about two hours on two cores)
# CIFAR_FOLDER holds train*.npz and test.npz, see data=arrays.
set -euo pipefail
cifar=$1
out=$2
quiet="panels=[] regularizers=[] compare_undefended=false wandb.mode=disabled out=$out probe.every_n_epochs=100"
small="data=arrays data.path=$cifar data.train_limit=25000 data.test_limit=1000 network.width=2 network.last_stride=1
       channels_last=true trainer.precision=bf16-mixed val_attack.steps=5 trainer.limit_val_batches=1"

python train.py $quiet val_attack.steps=10 defense=none name=digits_none
python train.py $quiet val_attack.steps=10 name=digits_trades
python train.py $quiet $small defense=none trainer.max_epochs=15 name=cifar_none
python train.py $quiet $small defense=pgd_at defense.attack.steps=7 trainer.max_epochs=14 name=cifar_pgd

analyse() {  # network, checkpoint, name, attack, images, more
    python evaluate.py checkpoint="$out/$1/checkpoints/$2" out="$out/analyses" name="$1-$3" attack="$4" images="$5" "${@:6}"
}
for net in digits_none:last digits_trades:best cifar_none:last cifar_pgd:best; do
    name=${net%%:*}
    from="$name ${net##*:}.ckpt"
    steps="steps=100 search_steps=6"
    analyse $from pgd pgd 128
    analyse $from fgsm fgsm 128
    for attack in cw ead group_sparse; do
        analyse $from $attack $attack 64 $(printf 'attack.%s ' $steps)
    done
    analyse $from cam_pgd cam_pgd 128
    analyse $from shifted_pgd cam_pgd 128 attack.where=shifted
    analyse $from random_pgd cam_pgd 128 attack.where=random
    analyse $from cam_cw cam_cw 64 $(printf 'attack.attack.%s ' $steps)
    analyse $from shifted_cw cam_cw 64 attack.where=shifted $(printf 'attack.attack.%s ' $steps)
done
python benchmarks/findings.py "$out/analyses"
