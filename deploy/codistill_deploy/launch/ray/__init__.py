"""A run on a Ray cluster: the server and one worker per student in actors of one placement group.

An actor holds one process, the same that `codistill run` would start, and is made anew where that process, the actor or
its node dies; :mod:`codistill_deploy.supervise.restart_policy` decides, as everywhere. The run's folder is on storage that all nodes share.
"""
