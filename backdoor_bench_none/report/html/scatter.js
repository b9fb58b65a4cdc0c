// The plot of BA against ASR: a mark for each row, with shape and colour by defense.
const FRAME = { left: 52, top: 24, width: 640, height: 380 };
const SHAPES = ["M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0", "M-4.5-4.5h9v9h-9z", "M0-6L5.6 4.4h-11.2z", "M0-6.2L6 0L0 6.2L-6 0z", "M0 6L5.6-4.4h-11.2z",
  "M-5-5L5 5M5-5L-5 5", "M-6 0H6M0-6V6", "M0-6L5.7-1.9L3.5 4.9h-7L-5.7-1.9z", "M-6-3.4L0 0L6-3.4M0 0V6.4"];
const COLOURS = 7;
// Nine shapes and seven colours are coprime: a pair recurs only after 63 defenses.
const makeMark = (defense) => draw("path", { d: SHAPES[defense % SHAPES.length], class: `dot c${defense % COLOURS}` });

function ticksOf(low, high) {
  const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20].find((size) => (high - low) / size <= 8) || 20;
  const first = Math.ceil(low / step - 1e-9), count = Math.floor(high / step + 1e-9) - first;
  return Array.from({ length: count + 1 }, (_, index) => Number(((first + index) * step).toFixed(1)));
}

// The range of the numbers with a margin: at least ten points, and at most a little more than 0 to 100.
function spanOf(numbers) {
  const low = Math.min(...numbers), high = Math.max(...numbers), more = Math.max(1.5, (high - low) * 0.06, (10 - (high - low)) / 2);
  return [Math.max(-2, low - more), Math.min(102, high + more)];
}

function scatterRows() {
  const [ba, asr] = ["ba", "asr"].map(metricIndex);
  if (ba < 0 || asr < 0) return [];
  return visibleRows().filter((row) => row.values[ba] && row.values[asr]).map((row) => ({
    row, number: data.rows.indexOf(row), defense: row.labels[axisIndex("defense")], ba: row.values[ba], asr: row.values[asr],
  }));
}

const withInterval = (value) => value[0] + (value[2] ? ` (${value[2]} to ${value[3]})` : "");

function renderScatter() {
  const points = scatterRows();
  byId("scatter-section").hidden = metricIndex("ba") < 0 || metricIndex("asr") < 0;
  byId("scatter").replaceChildren(points.length ? drawScatter(points) : make("p", { text: "No row here has both." }));
  renderMarks(points);
  if (byId("numbers").open) renderNumbers(points);
}

function drawScatter(points) {
  const { left, top, width, height } = FRAME, wide = left + width + 16, high = top + height + 44;
  const [x0, x1] = spanOf(points.map((p) => Number(p.asr[0]))), [y0, y1] = spanOf(points.map((p) => Number(p.ba[0])));
  const x = (value) => left + ((value - x0) / (x1 - x0)) * width, y = (value) => top + height - ((value - y0) / (y1 - y0)) * height;
  const svg = draw("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": `Scatter plot of benign accuracy against attack success rate, ${points.length} marks; the table below has the same numbers` });
  for (const tick of ticksOf(x0, x1)) {
    svg.append(draw("line", { class: "grid", x1: x(tick), x2: x(tick), y1: top, y2: top + height }), draw("text", { x: x(tick), y: top + height + 18, "text-anchor": "middle", text: tick }));
  }
  for (const tick of ticksOf(y0, y1)) {
    svg.append(draw("line", { class: "grid", x1: left, x2: left + width, y1: y(tick), y2: y(tick) }), draw("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end", text: tick }));
  }
  svg.append(draw("rect", { class: "frame", x: left, y: top, width, height }),
    draw("text", { x: left + width / 2, y: high - 6, "text-anchor": "middle", text: "← attack success rate, ASR (%): lower is better" }),
    draw("text", { x: 0, y: 0, "text-anchor": "middle", transform: `translate(13 ${top + height / 2}) rotate(-90)`, text: "benign accuracy, BA (%) →" }),
    draw("text", { class: "hint", x: left, y: top - 8, text: "↖ better" }));
  for (const point of points) {
    const dim = state.alone !== null && state.alone !== point.defense;
    const mark = makeMark(point.defense), title = `${describeRow(point.row, varying.length ? varying : ["defense"])}: BA ${withInterval(point.ba)}, ASR ${withInterval(point.asr)}`;
    const group = draw("g", { transform: `translate(${x(point.asr[0]).toFixed(1)} ${y(point.ba[0]).toFixed(1)})`, "data-row": point.number, class: dim ? "dim" : "" }, draw("title", { text: title }), mark);
    dim ? svg.querySelector(".frame").after(group) : svg.append(group);
  }
  return svg;
}

function renderMarks(points) {
  const defenses = [...new Set(points.map((point) => point.defense))].sort((a, b) => a - b);
  byId("marks").replaceChildren(...defenses.map((defense) => {
    const icon = draw("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, makeMark(defense));
    const button = make("button", { type: "button", "aria-pressed": String(state.alone === defense), "data-defense": String(defense) }, icon, make("bdi", { text: data.labels.defense[defense] }));
    button.addEventListener("click", () => {
      state.alone = state.alone === defense ? null : defense;
      renderScatter();
      byId("marks").querySelector(`[data-defense="${defense}"]`).focus();
    });
    return button;
  }));
}

function renderNumbers(points) {
  const axes = varying.length ? varying : ["attack", "defense"];
  const head = make("tr", {}, ...[...axes, "BA (95 %)", "ASR (95 %)"].map((text) => make("th", { scope: "col", text })));
  const lines = points.map((point) => make("tr", {}, ...axes.map((axis, index) => make(index ? "td" : "th", { scope: index ? null : "row" }, make("bdi", { text: labelOf(point.row, axis) }))),
    make("td", { text: withInterval(point.ba) }), make("td", { text: withInterval(point.asr) })));
  byId("numbers").querySelector(".scroll").replaceChildren(make("table", { class: "plain" }, make("thead", {}, head), make("tbody", {}, ...lines)));
}

function startScatter() {
  byId("numbers").addEventListener("toggle", () => { if (byId("numbers").open) renderNumbers(scatterRows()); });
  renderScatter();
}
