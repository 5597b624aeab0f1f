"""The aggregation server of codistill.

* :mod:`codistill_server.rounds.machine` is the core: a pure state machine of one run's rounds.
  :mod:`codistill_server.rounds.events` go in, :mod:`codistill_server.rounds.actions` come out, and
  :mod:`codistill_server.rounds.stragglers` says how long a round waits.
* :mod:`codistill_server.ensembles` makes soft targets from students' logits, as pure functions.
* :mod:`codistill_server.methods` joins the two: a method's aggregator turns a round's outputs into targets.
* :mod:`codistill_server.coordinator` is one run's server without a socket: it has messages checked, asks the state machine
  and carries out its actions.
* :mod:`codistill_server.admission` validates joins, contributions and reports; :mod:`codistill_server.errors` is how a call is
  rejected.
* :mod:`codistill_server.storage` keeps closed rounds on disk.
* :mod:`codistill_server.observability` shows the run's state: to Prometheus, on a page, in files.
* :mod:`codistill_server.rpc` puts the coordinator on gRPC, with authentication and each peer's quotas, which
  :mod:`codistill_server.ratelimit` holds.
* :mod:`codistill_server.app` runs all of it as a process.
"""
