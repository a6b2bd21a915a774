"""`python -m nfscale.benchmark NAME ...`, which is `nfscale benchmark NAME ...` where no command line is installed."""

import sys

from nfscale.benchmark.app import main
from nfscale.errors import NfscaleError

if __name__ == "__main__":
    try:
        main()
    except NfscaleError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(int(error.exit_code))
