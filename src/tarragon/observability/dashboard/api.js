// Asks the admin API. A POST is declared as JSON: no foreign page can send one without being asked first.

// The key is kept until the tab is closed. A link may bring it behind #, which browsers do not send; it is
// taken out of the address at once, so that no history or copied address has it.
let key = sessionStorage.getItem("tarragon-key") ?? "";
export const setKey = (text) => sessionStorage.setItem("tarragon-key", (key = text));
const brought = new URLSearchParams(location.hash.slice(1)).get("key");
if (brought) {
  setKey(brought);
  history.replaceState(null, "", location.pathname + location.search);
}

export class Refused extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

async function request(method, path, body) {
  const headers = { Accept: "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method, headers, body: body && JSON.stringify(body), cache: "no-store" };
  const answer = await fetch(path, { ...options, signal: AbortSignal.timeout(5000) });
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, found.error ?? `the answer is ${answer.status}`);
  return found;
}

export const get = (path) => request("GET", path);
export const post = (path, body) => request("POST", path, body);
