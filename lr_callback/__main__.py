"""``python -m lr_callback`` is ``lr-callback``."""

from lr_callback.cli import main

if __name__ == "__main__":
    main()
