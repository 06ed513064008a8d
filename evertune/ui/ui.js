// Keeps the parts of a page up to date that follow an update in progress. The server renders them, and escapes all text.
for (const part of document.querySelectorAll("[data-events]")) {
  const source = new EventSource(part.dataset.events);
  source.onmessage = (event) => { part.innerHTML = event.data; };
  addEventListener("pagehide", () => source.close());
}
