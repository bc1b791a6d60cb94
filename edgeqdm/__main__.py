"""`python -m edgeqdm` is the command line."""

from edgeqdm.cli import main

if __name__ == "__main__":
    main()
