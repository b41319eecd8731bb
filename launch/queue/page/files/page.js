// Keeps the page up to date: when the server says that something has changed, the page is asked for again, and the
// sections that differ are replaced. A section in which somebody types, selects text or has a form open stays as it is.
"use strict";

const LEAST_MS = 1500;
let busy = false, again = false;
const seen = new Map();  // what the server last sent, by the id of a section

function localTimes(root) {
  for (const time of root.querySelectorAll("time")) {
    const at = new Date(time.dateTime);
    if (!isNaN(at)) time.title = at.toLocaleString();
  }
}

function inUse(section) {
  const active = document.activeElement;
  if (active && section.contains(active) && /^(INPUT|SELECT|TEXTAREA)$/.test(active.tagName)) return true;
  if (section.querySelector("details.confirm[open]")) return true;
  const selection = document.getSelection();
  return !!selection && !selection.isCollapsed && section.contains(selection.anchorNode);
}

// Elements that may have the keyboard's focus, in their order: the one at the same place gets it again.
const FOCUSED = "a[href], button, summary, [tabindex='0']";

function replace(section, fresh) {
  const active = document.activeElement;
  const place = section.contains(active) ? [...section.querySelectorAll(FOCUSED)].indexOf(active) : -1;
  const log = section.querySelector(".log");
  const atEnd = log && log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
  const top = log ? log.scrollTop : 0;
  section.className = fresh.className;
  section.replaceChildren(...fresh.childNodes);
  localTimes(section);
  const next = section.querySelector(".log");
  if (next) next.scrollTop = atEnd ? next.scrollHeight : top;
  if (place >= 0) {
    const target = section.querySelectorAll(FOCUSED)[place];
    if (target) target.focus({preventScroll: true});
  }
}

async function refresh() {
  if (busy) { again = true; return; }
  busy = true;
  try {
    const answer = await fetch(location.pathname + location.search, {redirect: "manual"});
    if (answer.type === "opaqueredirect" || answer.status === 404) { location.reload(); return; }
    if (!answer.ok) { say("not up to date"); return; }
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const section of document.querySelectorAll("[data-live]")) {
      const next = fresh.getElementById(section.id);
      if (next && next.outerHTML !== seen.get(section.id) && !inUse(section)) {
        seen.set(section.id, next.outerHTML);
        replace(section, next);
      }
    }
    say("");
  } catch (error) {
    say("not connected");
  } finally {
    setTimeout(() => { busy = false; if (again) { again = false; refresh(); } }, LEAST_MS);
  }
}

function say(text) {
  const link = document.getElementById("link");
  if (!link) return;
  link.textContent = text;
  link.hidden = !text;
}

function listen() {
  const source = new EventSource("/live");
  let opened = false;
  source.addEventListener("open", () => { say(""); if (opened) refresh(); opened = true; });
  source.addEventListener("change", refresh);
  source.addEventListener("error", () => say("not connected"));
  window.addEventListener("pagehide", () => source.close());
  window.addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
}

for (const section of document.querySelectorAll("[data-live]")) seen.set(section.id, section.outerHTML);
localTimes(document);
for (const log of document.querySelectorAll(".log")) log.scrollTop = log.scrollHeight;
if (document.querySelector("[data-live]")) listen();
