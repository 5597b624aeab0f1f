"""A run on a Ray cluster: the server and one worker per student in actors of one placement group.

An actor holds one process, the same that `codistill run` would start. It is created anew where that process, the actor or
its node dies, as :mod:`codistill_deploy.supervise.restart_policy` decides. All nodes share the storage of the run's folder.
"""
