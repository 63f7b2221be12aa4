"""`python -m commopt`."""

from commopt.cli import main

if __name__ == "__main__":
    main()
