"""Set runs beside each other: tables with statistics over seeds, pictures, and one page with their curves.

python compare.py runs/A runs/B [--baseline METHOD] [--out comparisons/NAME]    run folders, cards, folders of cards
python compare.py --study configs/study/tiny.yaml --out DIR [--jobs 2] [data.path=…]    train what is left of a study first
"""

from glassarmor.lightning_modules.commands.study import run

if __name__ == "__main__":
    run()
