// Server-sent events over fetch, which can send a key, unlike EventSource.

/** Yields the data of each event of a response's body, as strings. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const frames = (rest + value.replaceAll("\r", "")).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      const lines = frame.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

export const bearer = (key) => (key ? { Authorization: `Bearer ${key}` } : {});
