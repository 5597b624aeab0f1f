"""The page of a run, live from the server and as the report that stays.

* :mod:`codistill_server.observability.dashboard.document` turns the records into one JSON document. One script, `assets/page.js`,
  draws the page from that document alone.
* :mod:`codistill_server.observability.dashboard.html` puts page and document into one file that needs nothing else. Without the
  document, `assets/live.js` fetches it, and newer ones.
* :mod:`codistill_server.observability.dashboard.live` prepares the data that live pages ask for.
"""
