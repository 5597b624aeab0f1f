"""Run the command as `python -m codistill_deploy`."""

from codistill_deploy.cli.app import main

main()
