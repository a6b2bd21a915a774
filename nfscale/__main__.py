"""`python -m nfscale` is the command `nfscale`."""

from nfscale.cli import main

if __name__ == "__main__":
    main()
