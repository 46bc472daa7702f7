"use strict";
// Requests to the images API, answered as a stream of server-sent events.

class ApiProblem extends Error {
  constructor(status, code, message, retryAfter) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

function headersWithKey() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function streamImages(path, body, onEvent, signal) {
  const isForm = body instanceof FormData;
  const headers = { ...headersWithKey(), ...(isForm ? {} : { "Content-Type": "application/json" }) };
  const response = await fetch(path, { method: "POST", headers, body: isForm ? body : JSON.stringify(body), signal });
  if (!response.ok) {
    const error = (await response.json().catch(() => ({}))).error || {};
    throw new ApiProblem(response.status, error.code, error.message || response.statusText, response.headers.get("Retry-After"));
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const line = text.slice(0, end).split("\n").find((l) => l.startsWith("data: "));
      text = text.slice(end + 2);
      if (!line) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ApiProblem(0, event.error.code, event.error.message);
      onEvent(event);
    }
  }
}

async function modelName() {
  const response = await fetch("/v1/models", { headers: headersWithKey() });
  return response.ok ? (await response.json()).data[0] : null;
}
