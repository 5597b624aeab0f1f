"""The aggregation server of codistill.

* :mod:`codistill_server.rounds` is the heart: a pure state machine of one run's rounds;
  :mod:`codistill_server.round_events` holds its events and actions.
* :mod:`codistill_server.ensembles` makes soft targets from students' logits, as pure functions.
* :mod:`codistill_server.methods` joins the two: a method's server half turns a round's outputs into targets.
* :mod:`codistill_server.journal` keeps closed rounds on disk.
* :mod:`codistill_server.coordinator` is one run's server without a socket: it has messages checked, drives the rounds,
  writes the journal and hands out answers.
* :mod:`codistill_server.door` checks who joins, :mod:`codistill_server.contributions` reads what they publish,
  :mod:`codistill_server.reports` checks what they report; :mod:`codistill_server.refusals` is how a call is turned away.
* :mod:`codistill_server.observations` knows where the run stands; :mod:`codistill_server.metrics` shows it to
  Prometheus, and :mod:`codistill_server.recorder` writes it down.
* :mod:`codistill_server.history` reads what was written down, :mod:`codistill_server.page` shows it in a browser, and
  :mod:`codistill_server.web` is the HTTP port of page and metrics.
* :mod:`codistill_server.guard` keeps out who has no token; :mod:`codistill_server.limits` holds everybody to a share.
* :mod:`codistill_server.service` puts the coordinator on gRPC, :mod:`codistill_server.app` runs it as a process.
"""
