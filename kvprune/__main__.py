"""`python -m kvprune` is the command line."""

from kvprune.cli import main

if __name__ == "__main__":
    main()
