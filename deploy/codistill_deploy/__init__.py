"""The `codistill` command: runs servers and workers, compares methods, reports and exports.

* :mod:`codistill_deploy.cli` is the command line, with one module for each command.
* :mod:`codistill_deploy.console` shows progress and tables on a terminal.
* :mod:`codistill_deploy.launch` runs an experiment: with processes on this machine, in one process, or on a Ray cluster.
* :mod:`codistill_deploy.supervise` keeps the processes of a run alive.
* :mod:`codistill_deploy.compare` runs methods and seeds, and summarises what each gained.
* :mod:`codistill_deploy.report` writes reports, :mod:`codistill_deploy.export` weights for plain PyTorch.
* :mod:`codistill_deploy.run_folder` checks and locks a run's folder.
"""
