"""`python -m bacalhau`, for where the `bacalhau` command is not on the path."""

from bacalhau.cli import main

if __name__ == "__main__":
    main()
