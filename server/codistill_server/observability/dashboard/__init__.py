"""The page of a run: what a server shows while the run goes, and the report that stays.

* :mod:`codistill_server.observability.dashboard.document` turns what was recorded into one JSON document, and one script, `assets/page.js`,
  draws the page from that document alone.
* :mod:`codistill_server.observability.dashboard.html` puts page and document into one file that needs nothing else, or leaves the
  document out: then `assets/live.js` fetches it, and newer ones.
* :mod:`codistill_server.observability.dashboard.live` has the data ready for those who ask.
"""
