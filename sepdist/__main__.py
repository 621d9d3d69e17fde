"""`python -m sepdist VERB ...` is `sepdist VERB ...`."""

from sepdist.cli import main

if __name__ == "__main__":
    main()
