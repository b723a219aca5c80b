"""`python -m cctool`: the program, without its script."""

from cctool.cli.main import main

if __name__ == "__main__":
    main()
