"""``python -m glassarmor train …``: the same as the command ``glassarmor``."""

from glassarmor.lightning_modules.commands.cli import main

if __name__ == "__main__":
    main()
