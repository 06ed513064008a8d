"""``python -m evertune``."""

from evertune.cli.main import main

if __name__ == "__main__":
    main()
