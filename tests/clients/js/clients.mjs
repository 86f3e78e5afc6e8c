// JavaScript clients, unmodified: prints one JSON line {name, ok, error} per check.
import OpenAI from "openai";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";

const [baseURL, apiKey] = [process.env.BASE_URL, process.env.API_KEY];
const messages = [{ role: "user", content: "the quick brown fox" }];
const schema = z.strictObject({ city: z.enum(["Rome", "Oslo"]) });
const weather = tool({ description: "The weather.", inputSchema: schema });

function assert(condition, what) {
  if (!condition) throw new Error(what);
}

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const aiModels = {
  // The default model of @ai-sdk/openai speaks the Responses API.
  "ai-sdk openai (responses)": createOpenAI({ baseURL, apiKey })("tiny"),
  "ai-sdk openai (chat)": createOpenAI({ baseURL, apiKey }).chat("tiny"),
  "ai-sdk openai-compatible": createOpenAICompatible({
    name: "faasmoe",
    baseURL,
    apiKey,
    supportsStructuredOutputs: true,
  })("tiny"),
  "ai-sdk anthropic": createAnthropic({ baseURL, apiKey })("tiny"),
};

const checks = {
  "openai-js chat": async () => {
    const answer = await client.chat.completions.create({ model: "tiny", messages, max_tokens: 8 });
    assert(answer.choices[0].message.content, "no content");
  },
  "openai-js chat stream": async () => {
    const stream = client.chat.completions.stream({ model: "tiny", messages, max_tokens: 8 });
    assert((await stream.finalChatCompletion()).choices[0].finish_reason === "length", "finish");
  },
  "openai-js responses": async () => {
    const answer = await client.responses.create({ model: "tiny", input: "fox", max_output_tokens: 8 });
    assert(answer.output_text, "no text");
  },
  "openai-js responses stream": async () => {
    const stream = client.responses.stream({ model: "tiny", input: "fox", max_output_tokens: 8 });
    let text = "";
    stream.on("response.output_text.delta", (event) => (text += event.delta));
    const last = await stream.finalResponse();
    assert(text && text === last.output_text, "text");
  },
};
for (const [name, model] of Object.entries(aiModels)) {
  const options = { model, messages, maxOutputTokens: 8, maxRetries: 0 };
  checks[`${name} generateText`] = async () => assert((await generateText(options)).text, "no text");
  checks[`${name} streamText`] = async () => {
    let text = "";
    let failure;
    const stream = streamText({ ...options, onError: ({ error }) => (failure = error) });
    for await (const part of stream.textStream) text += part;
    assert(!failure, String(failure));
    assert(text, "no text");
  };
  checks[`${name} generateObject`] = async () => {
    const { object } = await generateObject({ ...options, schema, maxOutputTokens: 200 });
    assert(["Rome", "Oslo"].includes(object.city), "city");
  };
  checks[`${name} tools`] = async () => {
    const { toolCalls } = await generateText({
      ...options,
      maxOutputTokens: 400,
      tools: { weather },
      toolChoice: { type: "tool", toolName: "weather" },
    });
    assert(toolCalls.length >= 1 && toolCalls[0].toolName === "weather", "calls");
    assert(["Rome", "Oslo"].includes(toolCalls[0].input.city), "input");
  };
}

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(JSON.stringify({ name, ok: true }));
  } catch (error) {
    console.log(JSON.stringify({ name, ok: false, error: String(error).slice(0, 500) }));
  }
}
