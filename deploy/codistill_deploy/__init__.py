"""The `codistill` command: runs servers and workers, compares methods, reports and exports.

* :mod:`codistill_deploy.cli.app` is the command line; each command stands on one module below.
* :mod:`codistill_deploy.cli.run` runs one experiment in its folder, with a view on the console and a report.
* :mod:`codistill_deploy.launch.local` runs an experiment with processes on this machine, :mod:`codistill_deploy.launch.in_process`
  in one process, on the same core.
* :mod:`codistill_deploy.compare.runner` runs methods and seeds, :mod:`codistill_deploy.compare.statistics` makes the table of it.
* :mod:`codistill_deploy.run_folder` lays out a run's folder, :mod:`codistill.rundir.history` reads what a run recorded.
* :mod:`codistill_deploy.report` writes reports, :mod:`codistill_deploy.console.progress` shows the live table.
* :mod:`codistill_deploy.export` writes weights for plain PyTorch.
"""
