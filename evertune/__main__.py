"""``python -m evertune``."""

from evertune.launch.cli import main

if __name__ == "__main__":
    main()
