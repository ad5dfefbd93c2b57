"""`python -m wallet` is the same as `wallet`."""

import sys

from wallet import main

sys.exit(main())
