"""The aggregation server of codistill.

* :mod:`codistill_server.rounds.machine` is the heart: a pure state machine of one run's rounds;
  :mod:`codistill_server.rounds.events` holds its events and actions.
* :mod:`codistill_server.ensembles` makes soft targets from students' logits, as pure functions.
* :mod:`codistill_server.methods` joins the two: a method's aggregator turns a round's outputs into targets.
* :mod:`codistill_server.storage.journal` keeps closed rounds on disk.
* :mod:`codistill_server.coordinator` is one run's server without a socket: it has messages checked, drives the rounds,
  writes the journal and hands out answers.
* :mod:`codistill_server.admission.joins` checks who joins, :mod:`codistill_server.admission.contributions` reads what they publish,
  :mod:`codistill_server.admission.progress` checks what they report; :mod:`codistill_server.errors` is how a call is turned away.
* :mod:`codistill_server.observability.state` knows where the run stands; :mod:`codistill_server.observability.prometheus` shows it to
  Prometheus, and :mod:`codistill.rundir.writer` writes it down.
* :mod:`codistill.rundir.history` reads what was written down, :mod:`codistill_server.observability.dashboard` shows it in a browser, and
  :mod:`codistill_server.observability.http` is the HTTP port of page and metrics.
* :mod:`codistill_server.rpc.auth` keeps out who has no token; :mod:`codistill_server.ratelimit` holds everybody to a share.
* :mod:`codistill_server.rpc.service` puts the coordinator on gRPC, :mod:`codistill_server.app` runs it as a process,
  and :mod:`codistill.rundir.address` is how it is found.
"""
