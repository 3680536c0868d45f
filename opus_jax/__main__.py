"""`python -m opus_jax` is `opus-jax`."""

import sys

from opus_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
