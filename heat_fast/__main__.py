"""``python -m heat_fast``: the command line, where the script is not on the path."""

from __future__ import annotations

from heat_fast.cli import main

if __name__ == "__main__":
    main()
