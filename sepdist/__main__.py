"""Run `sepdist VERB ...` as `python -m sepdist VERB ...`."""

from sepdist.cli import main

if __name__ == "__main__":
    main()
