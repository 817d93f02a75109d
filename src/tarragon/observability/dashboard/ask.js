// The dialog before anything is killed, drained or added, and the one for the admin key.

import { $ } from "./format.js";
import { post, setKey } from "./api.js";

const dialog = $("ask");
let onYes = () => {};

export function say(text) {
  $("said").textContent = text;
}

function open({ title, text, yes, signal = false, key = false, then }) {
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-yes").textContent = yes;
  $("ask-signal").hidden = !signal;
  $("ask-key").hidden = !key;
  onYes = then;
  if (!dialog.open) dialog.showModal();
}

$("ask-no").addEventListener("click", () => dialog.close());
$("ask-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("ask-yes").disabled = true;
  try {
    say(await onYes());
    dialog.close();
  } catch (error) {
    $("ask-text").textContent = `Refused: ${error.message}`;
  } finally {
    $("ask-yes").disabled = false;
  }
});

const AFTER = {
  attention: "Its streams go on elsewhere, from what is committed; a replacement starts in the background.",
  expert: "Its shadows take over at once; a replacement starts in the background.",
  gateway: "Every stream in progress ends; a new gateway starts at once.",
  store: "Streams go on, unprotected until it is back.",
  orchestrator: "Workers and streams go on without it; it is restarted, and this page with it.",
};

export function askKill(id, role) {
  open({
    title: `Kill ${id}?`,
    text: AFTER[role] ?? "",
    yes: `Kill ${id}`,
    signal: true,
    then: async () => {
      const signal = $("ask-signal").querySelector("select").value;
      await post("/kill", { worker_id: id, signal });
      return `${id}: ${signal} sent`;
    },
  });
}

export function askDrain(id) {
  open({
    title: `Drain ${id}?`,
    text: "Its work moves to the others, then it stops for good. The cluster is one worker smaller.",
    yes: `Drain ${id}`,
    then: async () => {
      await post("/drain", { worker_id: id });
      return `${id} is draining`;
    },
  });
}

export function askAdd(role) {
  open({
    title: `Add an ${role} worker?`,
    text: "It takes memory and a share of the machine's cores.",
    yes: "Add it",
    then: async () => `${(await post("/add", { role })).worker_id} is starting`,
  });
}

export function askKey(then) {
  if (dialog.open) return;
  open({
    title: "Admin key",
    text: "This cluster's admin API wants its key. It is kept until the tab is closed.",
    yes: "Use it",
    key: true,
    then: async () => {
      setKey($("ask-key").querySelector("input").value);
      then();
      return "key set";
    },
  });
}
