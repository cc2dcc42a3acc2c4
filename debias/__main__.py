"""``python -m debias``: the same as the command ``debias``."""

from debias.cli import main

if __name__ == "__main__":
    main()
