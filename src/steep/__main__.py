"""`python -m steep` is the command `steep`."""

from steep.cli.main import main

if __name__ == "__main__":
    main()
