// Stream a run of the app and fetch everything it made. Needs nothing but Node 18 or a browser:
//     node api_javascript.mjs [http://127.0.0.1:7860] [steps]

const [url = "http://127.0.0.1:7860", steps = "50"] = globalThis.process?.argv.slice(2) ?? [];
const endpoint = `${url}/gradio_api/call/v2/generate`;
const request = { prompt: "a red mushroom with a white stem", seed: 7, steps: Number(steps) };

const accepted = await fetch(endpoint, {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(request),
});
const { event_id, detail } = await accepted.json();
if (!accepted.ok) throw new Error(JSON.stringify(detail)); // one sentence on what to change

// Server-sent events: "generating" for each preview, then "complete" or "error".
const events = (await fetch(`${url}/gradio_api/call/generate/${event_id}`)).body.pipeThrough(new TextDecoderStream());
let buffer = "";
for await (const chunk of events) {
  buffer += chunk;
  const messages = buffer.split("\n\n");
  buffer = messages.pop();
  for (const message of messages) {
    const [, event, data] = message.match(/^event: (\w+)\ndata: (.*)$/s) ?? [];
    if (event === "error") throw new Error(data);
    if (event !== "generating" && event !== "complete") continue;
    const [preview, status, arms, files] = JSON.parse(data);
    console.log(`${event}: step ${status.step} of ${status.steps}`, preview?.url ?? "");
    if (event === "complete") {
      const urls = Object.fromEntries(files.map((file) => [file.orig_name, file.url]));
      for (const [name, arm] of Object.entries(arms)) console.log(`${name}:`, arm.scores, urls[arm.files.picture]);
      console.log("files:", Object.values(urls));
    }
  }
}
