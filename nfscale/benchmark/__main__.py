"""`python -m nfscale.benchmark NAME ...`, which is `nfscale benchmark NAME ...` where no command line is installed."""

from nfscale.benchmark.app import main

if __name__ == "__main__":
    main()
