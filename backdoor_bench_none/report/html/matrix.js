"use strict";
// The data, helpers that make elements (texts are never parsed as markup), and the matrix.
const data = JSON.parse(document.getElementById("data").textContent);
const STEPS = 40;
const NUMBERED = ["done", "partial"];
const byId = (id) => document.getElementById(id);

function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "text") element.textContent = value;
    else if (value !== null && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function draw(name, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "text") element.textContent = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

const axisIndex = (axis) => data.axes.indexOf(axis);
const labelOf = (row, axis) => data.labels[axis][row.labels[axisIndex(axis)]];
const metricIndex = (name) => data.metrics.findIndex((metric) => metric.name === name);
// Axes with more than one label, in the order of tables.
const varying = data.axes.filter((axis) => data.labels[axis].length > 1);
const describeRow = (row, axes) => axes.map((axis) => labelOf(row, axis)).join(" · ");

const PAIR = "ba,asr";
const START = { metric: PAIR, columns: "defense", lines: "", scale: "full", alone: null };
const state = { ...START, hidden: {} };
for (const axis of varying) state.hidden[axis] = new Set();

function shownMetrics() {
  return state.metric.split(",").map(metricIndex).filter((index) => index >= 0);
}

function visibleRows() {
  return data.rows.filter((row) => varying.every((axis) => !state.hidden[axis].has(row.labels[axisIndex(axis)])));
}

// The least and the greatest number of each metric: the ends of its colours, unless it is a share shown from 0 to 100.
const bounds = data.metrics.map((metric, index) => {
  const numbers = data.rows.filter((row) => row.values[index]).map((row) => Number(row.values[index][0]));
  return [numbers.reduce((a, b) => Math.min(a, b)), numbers.reduce((a, b) => Math.max(a, b))];
});
const boundsOf = (index) => (data.metrics[index].share && state.scale === "full" ? [0, 100] : bounds[index]);

function stepOf(index, text) {
  const [low, high] = boundsOf(index);
  const wide = !data.metrics[index].share && low > 0 && high / low > 50;
  const place = (x) => (wide ? Math.log(x) : x);
  const span = place(high) - place(low);
  const share = span > 0 ? Math.min(1, Math.max(0, (place(Number(text)) - place(low)) / span)) : 1;
  return Math.floor((data.metrics[index].lower && span > 0 ? 1 - share : share) * STEPS + 0.5);
}

function makeTile(row, index, alone) {
  const value = row.values[index], name = make("span", { class: "sr", text: `${data.metrics[index].title} ` });
  if (!value) return make("span", { class: "tile none" }, name, "–");
  const rank = value[4] || "";
  const tile = make("span", { class: `tile v${stepOf(index, value[0])}${rank === "best" ? " best" : ""}` }, name, value[0]);
  if (alone && value[1]) tile.append(make("small", { text: ` ±${value[1]}` }));
  if (rank === "close") tile.append(make("small", { text: "≈" }));
  return tile;
}

function makeCell(number) {
  const row = data.rows[number], metrics = shownMetrics();
  const button = make("button", { type: "button", class: "cell", "data-row": String(number) });
  if (!NUMBERED.includes(row.status)) button.append(make("span", { class: `tile state ${row.status}`, text: row.status }));
  else button.append(...metrics.map((index) => makeTile(row, index, metrics.length === 1)));
  return button;
}

// Lines of labels and cells, as pivot() makes them: varying axes that are no columns make lines; equal labels get separate lines.
function arrange() {
  const rows = visibleRows();
  const several = (axis) => new Set(rows.map((row) => row.labels[axisIndex(axis)])).size > 1;
  let axes = varying.filter((axis) => axis !== state.columns && several(axis));
  if (axes.includes(state.lines)) axes = [state.lines, ...axes.filter((axis) => axis !== state.lines)];
  if (!axes.length) axes = [state.columns === "attack" ? "defense" : "attack"];
  const lines = new Map(), columns = new Map();
  for (const row of rows) {
    const column = row.labels[axisIndex(state.columns)];
    columns.set(column, true);
    let key = axes.map((axis) => row.labels[axisIndex(axis)]).join(), primes = "";
    while (lines.has(key) && lines.get(key).cells.has(column)) [key, primes] = [`${key}'`, `${primes}′`];
    if (!lines.has(key)) lines.set(key, { row, primes, cells: new Map() });
    lines.get(key).cells.set(column, data.rows.indexOf(row));
  }
  const ordered = [...lines.values()];
  const place = (line) => axes.map((axis) => line.row.labels[axisIndex(axis)]);
  if (state.lines) ordered.sort((a, b) => place(a).reduce((order, x, i) => order || x - place(b)[i], 0));
  return { axes, columns: [...columns.keys()], lines: ordered, count: rows.length };
}

function makeLine(line, axes, columns, before) {
  let same = Boolean(before);
  const heads = axes.map((axis, index) => {
    const label = labelOf(line.row, axis) + (index === axes.length - 1 ? line.primes : "");
    same = same && labelOf(before.row, axis) === label && index < axes.length - 1;
    return make("th", { scope: "row", class: same ? "same" : null }, make("bdi", { text: label }));
  });
  const cells = columns.map((column) => make("td", {}, ...(line.cells.has(column) ? [makeCell(line.cells.get(column))] : [])));
  return make("tr", { class: heads[0].className ? null : "first" }, ...heads, ...cells);
}

function renderMatrix() {
  const table = byId("matrix"), { axes, columns, lines, count } = arrange();
  const metrics = shownMetrics().map((index) => data.metrics[index]);
  const granted = new Set(data.rows.filter((row) => row.notes && state.columns === "defense").filter(isGranted).map((row) => row.labels[axisIndex("defense")]));
  const head = make("tr", {}, ...axes.map((axis) => make("th", { scope: "col", class: "axis", text: axis })),
    ...columns.map((column) => make("th", { scope: "col" }, make("bdi", { text: data.labels[state.columns][column] + (granted.has(column) ? "*" : "") }))));
  table.tHead.replaceChildren(head);
  table.tBodies[0].replaceChildren(...lines.map((line, index) => makeLine(line, axes, columns, lines[index - 1])));
  const headings = metrics.map((metric) => metric.heading).join(" / ");
  table.caption.textContent = `${headings}, ${state.columns} by ${axes.join(" and ")}`;
  byId("status").textContent = `Showing ${count} of ${data.rows.length} combinations.`;
  renderLegend(metrics);
}

function isGranted(row) {
  return row.notes.some((note) => /^(Given|Told) /.test(data.texts[note]));
}

function renderLegend(metrics) {
  const [metric] = metrics, index = metric ? metricIndex(metric.name) : -1;
  const [low, high] = index < 0 ? [0, 100] : boundsOf(index);
  const short = (number) => (Math.abs(number) >= 1e6 ? number.toExponential(1) : String(number));
  const ends = metric && metrics.length === 1 ? (metric.lower ? [high, low] : [low, high]).map((x) => ` (${short(x)})`) : ["", ""];
  byId("legend-low").textContent = `worse${ends[0]}`;
  byId("legend-high").textContent = `better${ends[1]}`;
}
