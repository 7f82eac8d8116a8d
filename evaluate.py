"""Look into a trained network: the full analysis of one attack on one set of images, as a page, pictures and JSON; or judge
it by a suite of attacks.

python evaluate.py checkpoint=runs/NAME attack=cw images=128
python evaluate.py checkpoint=runs/NAME suite=standard
"""

from glassarmor.lightning_modules.commands.evaluate import run

if __name__ == "__main__":
    run()
