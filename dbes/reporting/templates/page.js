"use strict";
// What the pages share: data, theme, figures, downloads, tables. Text from the data reaches the page by textContent only.
const page = { figures: new Map() };

async function unpack() {
  const text = document.getElementById("data").textContent.trim();
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.map((child) => (child instanceof Node ? child : document.createTextNode(String(child)))));
  return made;
}

function rowsOf(columns, keep) {
  const names = Object.keys(columns), rows = [];
  const count = names.length ? columns[names[0]].length : 0;
  for (let i = 0; i < count; i++) {
    if (keep && !keep(i)) continue;
    const row = {};
    for (const name of names) row[name] = columns[name][i];
    rows.push(row);
  }
  return rows;
}

const number = (value, digits = 3) => (value === null || value === undefined ? "–" : Number(value).toPrecision(digits).replace(/\.?0+$/, (m) => (m.startsWith(".") ? "" : m)));
const fixed = (value, digits = 2) => (value === null || value === undefined ? "–" : Number(value).toFixed(digits));
// What is not 0 gets up to two more decimals before it is written as 0; never "-0.0 %".
const percent = (value, digits = 1) => {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) < 1e-9) return (0).toFixed(digits) + " %";
  for (let more = digits; more <= digits + 2; more++) { const text = (100 * value).toFixed(more); if (Number(text) !== 0) return text + " %"; }
  return (value > 0 ? "<" : ">-") + (10 ** -(digits + 2)).toFixed(digits + 2) + " %";
};
const small = (value) => (value === null || value === undefined ? "–" : value < 0.001 ? "< 0.001" : value.toFixed(value > 0.05 && value < 0.0505 ? 4 : 3));
const half = (low, high) => (low === null || high === null || low === undefined ? "" : ` ±${(50 * (high - low)).toFixed(1)}`);

// ---- theme

const dark = () => document.documentElement.dataset.theme === "dark";
const CATEGORY = { light: ["#0072b2", "#b34f00", "#00795a", "#a2447a", "#7a6400", "#3b7ca8", "#5b5b5b"], dark: ["#56b4e9", "#e69f00", "#2fc79b", "#e79ac6", "#f0e442", "#a5c8ff", "#c3c8cf"] };
function theme() {
  const ink = dark() ? "#e9edf2" : "#14181f", soft = dark() ? "#a7b1be" : "#525c69", line = dark() ? "#2c333d" : "#dde1e7";
  const accent = dark() ? "#7fb8ff" : "#0b5cad", second = dark() ? "#ffb066" : "#9a4a00";
  return {
    background: dark() ? "#171b21" : "#ffffff", font: "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", view: { stroke: null },
    axis: { labelColor: soft, titleColor: soft, titleFontWeight: 500, gridColor: line, domainColor: line, tickColor: line, labelFontSize: 11, titleFontSize: 12, labelLimit: 300 },
    legend: { labelColor: soft, titleColor: soft, titleFontWeight: 500, labelFontSize: 11, titleFontSize: 11, titleLimit: 300 },
    title: { color: ink }, mark: { color: accent }, text: { color: ink }, rule: { color: soft },
    range: { category: CATEGORY[dark() ? "dark" : "light"], diverging: dark() ? ["#4aa3f0", "#232932", "#f2a154"] : ["#1b66ad", "#f3f4f5", "#c25e00"], ramp: dark() ? ["#4aa3f0", "#6d7783", "#f2a154"] : ["#1b66ad", "#aab2bd", "#c25e00"], heatmap: dark() ? ["#1b2430", "#2a6fae", "#a9d5ff"] : ["#eef4fb", "#5fa0d8", "#083f7d"] },
    style: { "second-line": { stroke: second, color: second }, "second-tick": { fill: second, color: second }, zero: { stroke: soft, strokeWidth: 1 }, bound: { stroke: soft, strokeDash: [1, 3], strokeWidth: 1.4 }, interval: { stroke: accent, opacity: 0.45 }, mark: { color: ink, fill: ink }, node: { color: accent, fill: accent }, label: { color: dark() ? "#0f1216" : "#ffffff", fill: dark() ? "#0f1216" : "#ffffff", fontWeight: 600 }, open: { stroke: accent, strokeWidth: 1.6, fill: dark() ? "#171b21" : "#ffffff" } },
  };
}
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  for (const figure of page.figures.values()) draw(figure);
  document.dispatchEvent(new Event("theme"));
}

// ---- figures: page.figures holds {name, place, spec(), rows(), table(), view}

// `known`: whether rows hold anything to draw; where they do not, words stand in place of empty axes.
function addFigure(name, spec, rows, table, known = (all) => all.length > 0) {
  const place = document.querySelector(`[data-figure="${name}"]`);
  if (!place) return null;
  const figure = { name, place, spec, rows, known, table: table || rows, view: null, drawn: 0 };
  page.figures.set(name, figure);
  place.querySelectorAll("[data-save]").forEach((button) => {
    button.setAttribute("aria-label", `Save as ${button.dataset.save.toUpperCase()}`);
    button.addEventListener("click", () => save(figure, button.dataset.save));
  });
  if (spec) watcher.observe(place);
  return figure;
}
// A figure is drawn when it comes near the window, so that a page of many layers opens at once.
const watcher = new IntersectionObserver((entries) => entries.forEach((entry) => {
  if (!entry.isIntersecting) return;
  watcher.unobserve(entry.target);
  const figure = page.figures.get(entry.target.dataset.figure);
  figure.near = true;
  draw(figure);
}), { rootMargin: "500px" });

async function draw(figure) {
  if (!figure.spec || !figure.near) return;
  const turn = ++figure.drawn, target = figure.place.querySelector("[data-plot]"), rows = figure.rows();
  if (!figure.known(rows)) {
    figure.view?.finalize();
    figure.view = null;
    target.removeAttribute("role");
    target.removeAttribute("aria-label");
    target.replaceChildren(element("p", { class: "none" }, "Not defined here; the notes at the top say why."));
    target.dataset.ready = String(turn);
    return undefined;
  }
  const given = figure.spec(), spec = { ...given, datasets: { ...given.datasets, rows } };
  const shown = await vegaEmbed(target, spec, { actions: false, logLevel: 1, renderer: rows.length > 4000 ? "canvas" : "svg", config: theme(), ast: true, tooltip: { theme: "custom" } });
  if (turn !== figure.drawn) return shown.finalize();
  if (figure.view) figure.view.finalize();
  figure.view = shown;
  const graphic = target.querySelector("svg, canvas");
  // The figure as a whole is named; its numbers are in the CSV.
  graphic?.setAttribute("aria-hidden", "true");
  target.setAttribute("role", "img");
  target.setAttribute("aria-label", figure.place.querySelector("h3")?.textContent || figure.name);
  target.dataset.ready = String(turn);
}
// What no one has scrolled to is drawn when the browser has nothing else to do: a printed page has all its figures.
function drawRest() {
  const next = [...page.figures.values()].find((figure) => figure.spec && !figure.near);
  if (!next) { document.documentElement.dataset.drawn = "yes"; return; }
  next.near = true;
  watcher.unobserve(next.place);
  Promise.resolve(draw(next)).finally(() => idle(drawRest));
}
const idle = (act) => (window.requestIdleCallback ? requestIdleCallback(act, { timeout: 2000 }) : setTimeout(act, 50));
const redraw = (...names) => names.forEach((name) => { const figure = page.figures.get(name); if (figure) draw(figure); });

// ---- downloads

function cell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  let text = Array.isArray(value) ? value.map((v) => (Array.isArray(v) ? v.join("") : v)).join(" ") : String(value);
  if (/^[=+\-@\t\r]/.test(text)) text = "'" + text; // a spreadsheet would run it as a formula
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
function csv(rows) {
  if (!rows.length) return "";
  const names = Object.keys(rows[0]);
  return [names.map(cell).join(","), ...rows.map((row) => names.map((name) => cell(row[name])).join(","))].join("\r\n") + "\r\n";
}
function download(name, content, type) {
  const link = element("a", { href: content instanceof Blob || type ? URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type })) : content, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
async function save(figure, kind) {
  const name = `${page.data.name}-${figure.name}.${kind}`;
  if (kind === "csv") return download(name, csv(figure.table()), "text/csv;charset=utf-8");
  figure.near = true;
  if (!figure.view) await draw(figure);
  if (!figure.view) return undefined; // nothing is drawn where nothing is known
  if (kind === "svg") return download(name, await figure.view.view.toSVG(), "image/svg+xml");
  return download(name, await figure.view.view.toImageURL("png", 2));
}

// ---- selections

function fill(id, options, value) {
  const select = document.getElementById(id);
  if (!select) return null;
  select.replaceChildren(...options.map(([key, label]) => element("option", { value: key }, label)));
  if (value !== undefined) select.value = String(value);
  return select;
}
function onChange(id, act) { const place = document.getElementById(id); if (place) place.addEventListener("change", act); }
const chosen = (id) => document.getElementById(id)?.value;
function steppers() {
  document.querySelectorAll("[data-step]").forEach((button) => button.addEventListener("click", () => {
    const select = document.getElementById(button.dataset.for), next = select.selectedIndex + Number(button.dataset.step);
    if (next < 0 || next >= select.options.length) return;
    select.selectedIndex = next;
    select.dispatchEvent(new Event("change"));
  }));
}

// ---- tables: columns are {key, label, number, show(row) -> text or Node}

function sortableTable(table, columns, rows, { caption, size = 40, pager, sort = null, down = true } = {}) {
  const state = { rows, sort, down, at: 0 };
  const head = element("tr"), body = element("tbody");
  columns.forEach((column) => {
    const title = element("button", { type: "button", onclick: () => {
      state.down = state.sort === column.key ? !state.down : Boolean(column.number);
      state.sort = column.key; state.at = 0; show();
    } }, column.label);
    head.append(element("th", { scope: "col", class: column.number ? "n" : "", "data-key": column.key, title: column.title }, title));
  });
  table.replaceChildren(...(caption ? [element("caption", {}, caption)] : []), element("thead", {}, head), body);
  function ordered() {
    if (!state.sort) return state.rows;
    const value = (row) => row[state.sort], sign = state.down ? -1 : 1;
    const empty = (v) => v === null || v === undefined;
    return [...state.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (empty(x) || empty(y)) return empty(x) - empty(y); // unknown stands last either way
      return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en"));
    });
  }
  function show() {
    head.querySelectorAll("th").forEach((th) => (th.dataset.key === state.sort ? th.setAttribute("aria-sort", state.down ? "descending" : "ascending") : th.removeAttribute("aria-sort")));
    const all = ordered(), shown = all.slice(state.at, state.at + size);
    body.replaceChildren(...shown.map((row) => element("tr", {}, ...columns.map((column) => element("td", { class: column.number ? "n" : "", "data-key": column.key }, column.show ? column.show(row) : row[column.key] ?? "–")))));
    if (pager) {
      const move = (by, label) => element("button", { type: "button", ...(state.at + by < 0 || state.at + by >= all.length ? { disabled: "" } : {}), onclick: () => { state.at += by; show(); } }, label);
      pager.replaceChildren(element("span", { role: "status" }, all.length ? `${state.at + 1}–${Math.min(state.at + size, all.length)} of ${all.length.toLocaleString("en")}` : "nothing matches"), ...(all.length > size ? [move(-size, "back"), move(size, "next")] : []));
    }
  }
  show();
  return { set: (next) => { state.rows = next; state.at = 0; show(); }, all: ordered };
}

// A table with the pager and the CSV button that stand beside it.
function dataTable(id, columns, rows, { file, ...options } = {}) {
  const table = sortableTable(document.getElementById(id), columns, rows, { pager: document.getElementById(`${id}-pager`), ...options });
  document.querySelector(`[data-csv="${id}"]`)?.addEventListener("click", () => download(`${page.data.name}-${file}.csv`, csv(table.all()), "text/csv;charset=utf-8"));
  return table;
}

async function start(build) {
  page.data = await unpack();
  document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.getElementById("theme")?.addEventListener("click", () => setTheme(dark() ? "light" : "dark"));
  await build(page.data);
  steppers();
  document.documentElement.dataset.ready = "yes";
  idle(drawRest);
}
