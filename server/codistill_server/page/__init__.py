"""The page of a run: what a server shows while the run goes, and the report that stays.

* :mod:`codistill_server.page.document` turns what was recorded into one JSON document, and one script, `assets/page.js`,
  draws the page from that document alone.
* :mod:`codistill_server.page.rendering` puts page and document into one file that needs nothing else, or leaves the
  document out: then `assets/live.js` fetches it, and newer ones.
* :mod:`codistill_server.page.live` has the data ready for those who ask.
"""
