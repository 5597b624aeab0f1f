"""Run the command as `python -m codistill_deploy`."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the working folder, in which any file could have the name of a module of Python

from codistill_deploy.cli.app import main

main()
