"""Train a robust classifier: compose the config → instantiate → fit → test → report.

python train.py defense=trades regularizers=[pse,sensitivity] data=digits
"""

from glassarmor.lightning_modules.commands.train import run

if __name__ == "__main__":
    run()
