"""`python -m anabranch`: the command, where a launcher such as torchrun wants a module."""

import sys

from anabranch.cli import main

sys.exit(main())
