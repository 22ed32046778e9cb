# SPDX-License-Identifier: Apache-2.0
"""Today's place of the command, until all callers name `tools.cli`."""

import sys

from .tools.cli import main


if __name__ == "__main__":
    sys.exit(main())
