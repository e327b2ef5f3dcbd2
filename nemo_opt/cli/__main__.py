"""`python -m nemo_opt.cli` is `nemo-opt`."""

from nemo_opt.cli.main import main

if __name__ == "__main__":
    main()
