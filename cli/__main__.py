"""``python -m sharefold_cli``, for torchrun and for machines without the script on the path."""

from __future__ import annotations

from .entry import main

if __name__ == "__main__":
    main()
