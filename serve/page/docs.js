"use strict";
// The endpoints of openapi.json as tables.
const BARE = ["title", "type", "default", "description", "anyOf", "enum", "const", "format"];

function element(tag, text, ...children) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

function typeOf(schema) {
  if (schema.anyOf) return schema.anyOf.map(typeOf).filter((t) => t !== "null").join(" or ");
  if (schema.enum) return schema.enum.join(" | ");
  if ("const" in schema) return String(schema.const);
  return schema.format === "binary" ? "file" : schema.type || "any";
}

function limitsOf(schema) {
  const own = Object.entries(schema).filter(([name]) => !BARE.includes(name));
  const said = own.map(([name, value]) => `${name} ${value}`);
  return [...said, ...(schema.anyOf || []).map(limitsOf)].filter(Boolean).join(", ");
}

function fieldsOf(schema) {
  const head = element("tr", "", ...["field", "type", "limits", "default"].map((name) => element("th", name)));
  const table = element("table", "", head);
  for (const [name, field] of Object.entries(schema.properties)) {
    const isRequired = (schema.required || []).includes(name);
    const usual = field.default === undefined || field.default === null ? "" : JSON.stringify(field.default);
    const cells = [name + (isRequired ? " (required)" : ""), typeOf(field), limitsOf(field), usual];
    table.append(element("tr", "", ...cells.map((text) => element("td", text))));
  }
  return table;
}

function endpoint(method, path, operation) {
  const article = element("article", "", element("h2", `${method.toUpperCase()} ${path}`));
  if (operation.description) article.append(element("p", operation.description));
  for (const [media, { schema }] of Object.entries((operation.requestBody || {}).content || {})) {
    article.append(element("p", media), fieldsOf(schema));
  }
  const list = element("ul");
  for (const [status, { description }] of Object.entries(operation.responses)) list.append(element("li", `${status}: ${description}`));
  article.append(list);
  return article;
}

async function show() {
  document.getElementById("base").textContent = `${location.origin}/v1`;
  document.getElementById("example").textContent = [
    `curl ${location.origin}/v1/images/generations -H "Authorization: Bearer $KEY" \\`,
    `  -H "Content-Type: application/json" -d '{"prompt": "\u4e00\u4ef6\u7ea2\u8272\u7684\u8fde\u8863\u88d9", "n": 4, "seed": 3}'`,
  ].join("\n");
  const described = await (await fetch("/openapi.json")).json();
  document.getElementById("title").textContent = `${described.info.title}: images API`;
  for (const [path, operations] of Object.entries(described.paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      document.getElementById("endpoints").append(endpoint(method, path, operation));
    }
  }
}

show().catch(() => { document.getElementById("message").textContent = "openapi.json cannot be read"; });
