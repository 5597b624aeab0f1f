// Keeps a run's page up to date: asks its server every two seconds where the run stands, and for the run's document when
// something was recorded that is not drawn yet. A server that is away is asked on; it may be another process that answers.
// <html data-version> names the document that is drawn; <html data-state> says "running", "lost" or "finished".
"use strict";

(async () => {
  const POLL = 2000;
  const PATIENCE = 8000;
  const root = document.documentElement;
  const link = { lost: null, since: null };
  let state = null;
  let drawn = "";

  const pause = (milliseconds) => new Promise((done) => { setTimeout(done, milliseconds); });

  async function ask(path, headers = {}) {
    let answer;
    try {
      answer = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    } catch {
      throw new Error("The server does not answer");
    }
    if (answer.status === 304) return null;
    if (!answer.ok) throw new Error(`The server answers: ${(await answer.text()).trim() || answer.status}`);
    return answer.json();
  }

  async function update() {
    state = await ask("now.json");
    link.lost = null;
    link.since = Date.now();
    codistill.now(state, link); // at once: the document may take longer, or fail
    if (state.version === drawn) return;
    const data = await ask("run.json", { "If-None-Match": `"${drawn}"` });
    if (!data) return;
    codistill.render(data);
    drawn = data.version;
    root.dataset.version = drawn;
  }

  for (;;) {
    try {
      await update();
    } catch (error) {
      link.lost = error.message;
    }
    codistill.now(state, link);
    const finished = state !== null && state.complete && (drawn === state.version || link.lost !== null);
    root.dataset.state = finished ? "finished" : link.lost === null ? "running" : "lost";
    if (finished && link.lost !== null) return; // while it is there, a participant that joins again takes the run's end back
    await pause(POLL);
  }
})();
