"""`python -m foejax` is the command `foejax`."""

from foejax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
