"""`python -m minerva_native` is the `minerva` command."""

import sys

from .cli import main

sys.exit(main())
