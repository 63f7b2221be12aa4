"""`python -m commopt`."""

from commopt.cli.app import main

if __name__ == "__main__":
    main()
