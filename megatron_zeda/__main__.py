"""``python -m megatron_zeda`` is ``zeda``."""

import sys

from megatron_zeda.cli import main

if __name__ == "__main__":
    sys.exit(main())
