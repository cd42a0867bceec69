"""`python -m layerwise` is the command line."""

from layerwise.cli import main

if __name__ == "__main__":
    main()
