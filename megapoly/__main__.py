"""``python -m megapoly`` is the command ``megapoly``."""

from megapoly.cli import main

if __name__ == "__main__":
    main()
