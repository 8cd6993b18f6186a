"""`python -m protoseg` is `protoseg`."""

from protoseg.cli import main

if __name__ == "__main__":
    main()
