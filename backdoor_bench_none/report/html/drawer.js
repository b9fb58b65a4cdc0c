// The details of one cell, in a dialog: the browser keeps the focus in it, closes it on Escape and returns the focus.
const texts = (number) => data.texts[number];
const section = (title, ...children) => [make("h3", { text: title }), ...children];
const list = (pairs) => make("dl", {}, ...pairs.flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { text: value })]));

function plainTable(head, lines, label) {
  const table = make("table", { class: "plain" }, make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col", text })))),
    make("tbody", {}, ...lines.map((line) => make("tr", {}, ...line.map((text, index) => make(index ? "td" : "th", { scope: index ? null : "row", class: text.length < 18 ? "keep" : null, text }))))));
  return make("div", { class: "scroll", role: "region", "aria-label": label, tabindex: "0" }, table);
}

function showNumbers(row) {
  const lines = data.metrics.flatMap((metric, index) => {
    const value = row.values[index];
    if (!value) return [];
    const rank = { best: "best", close: "≈ the best" }[value[4]] || "";
    const each = row.each ? row.each[index].join(", ") : "";
    return [[metric.heading, value[0] + (value[1] ? ` ±${value[1]}` : ""), value[2] ? `${value[2]} to ${value[3]}` : "–", ...(row.each ? [each] : []), rank]];
  });
  if (!lines.length) return [];
  return section("Numbers", plainTable(["metric", "mean ± sd", "95 %", ...(row.each ? [`seeds ${row.seeds.join(", ")}`] : []), "among defenses"], lines, "Numbers"));
}

function showCommand(row) {
  if (!row.command) return [];
  const said = make("span", { class: "muted", role: "status" }), button = make("button", { type: "button", text: "Copy" });
  const command = make("pre", { id: "command", text: row.command, tabindex: "0", "aria-label": "Command" });
  button.addEventListener("click", () => {
    navigator.clipboard.writeText(row.command).then(() => { said.textContent = " copied"; }, () => {
      getSelection().selectAllChildren(command);
      said.textContent = " selected: press Ctrl+C";
    });
  });
  const others = row.others === undefined ? [] : [make("p", { class: "muted", text: texts(row.others) })];
  return section("Run it again", command, button, said, ...others);
}

function showPreview(row) {
  const preview = data.previews[`${row.labels[axisIndex("dataset")]},${row.labels[axisIndex("attack")]}`];
  if (!preview) return [];
  const [source, text] = preview;
  if (!source) return section("Trigger", make("p", { class: "muted", text: `No picture: ${text}.` }));
  return section("Trigger", make("figure", {}, make("img", { class: "trigger", src: source, alt: text }), make("figcaption", { text: `${text}.` })));
}

function drawCurves(curves) {
  const wide = 560, high = 190, left = 46, top = 10, width = 500, height = 140;
  const numbers = curves.flatMap((curve) => curve.points).filter((value) => value !== null);
  if (!numbers.length) return make("p", { class: "muted", text: "No loss of the victim is finite." });
  const low = Math.min(0, ...numbers), top1 = Math.max(...numbers), span = top1 - low || 1;
  const epochs = Math.max(...curves.map((curve) => curve.epochs));
  const said = curves.map((curve) => `seed ${curve.seed} from ${curve.points[0]} to ${curve.points[curve.points.length - 1]}`).join(", ");
  const svg = draw("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": `Training loss of the victim over ${epochs} epochs: ${said}` });
  svg.append(draw("rect", { class: "frame", x: left, y: top, width, height }));
  for (const value of [low, top1]) svg.append(draw("text", { x: left - 6, y: top + height - ((value - low) / span) * height + 4, "text-anchor": "end", text: Number(value.toPrecision(3)) }));
  svg.append(draw("text", { x: left, y: top + height + 16, "text-anchor": "middle", text: 1 }), draw("text", { x: left + width, y: top + height + 16, "text-anchor": "middle", text: epochs }),
    draw("text", { x: left + width / 2, y: top + height + 32, "text-anchor": "middle", text: "epoch" }));
  curves.forEach((curve, index) => {
    let pen = "M";
    const steps = curve.points.map((value, place) => {
      if (value === null) { pen = "M"; return ""; }
      const step = `${pen}${(left + (place / Math.max(1, curve.points.length - 1)) * width).toFixed(1)} ${(top + height - ((value - low) / span) * height).toFixed(1)}`;
      pen = "L";
      return step;
    });
    svg.append(draw("path", { class: `curve c${index % COLOURS}`, d: steps.join("") || "M0 0" }));
  });
  return svg;
}

function showCurves(row) {
  const curves = row.trials.filter((trial) => trial.curve).map((trial) => ({ seed: trial.seed, points: data.curves[trial.curve[0]], epochs: trial.curve[1] }));
  if (!curves.length) return [];
  return section("Training loss of the victim", make("figure", {}, drawCurves(curves), make("figcaption", { text: `Mean loss per epoch, one line for each of ${curves.length} seed${curves.length > 1 ? "s" : ""}.` })));
}

// A section for each value of one of the trials' blocks, so that a value they share is shown once.
function showBlocks(row, name, title) {
  const groups = new Map();
  for (const trial of row.trials) if (trial[name] !== undefined) groups.set(trial[name], [...(groups.get(trial[name]) || []), trial.seed]);
  return [...groups].flatMap(([number, seeds]) => section(groups.size > 1 || seeds.length < row.trials.length ? `${title}, seed ${seeds.join(", ")}` : title, list(data.blocks[number])));
}

function showTrials(row) {
  const lines = row.trials.map((trial) => [String(trial.seed), trial.key, ...(trial.counts || ["–", "–", "–"]), (trial.costs || []).join("; ")]);
  return row.trials.length ? section("Counts and costs", plainTable(["seed", "record", "BA hits", "ASR hits", "RA hits", "costs"], lines, "Counts and costs")) : [];
}

function showFailures(row) {
  return row.trials.filter((trial) => trial.status).flatMap((trial) => [
    make("p", { class: "bad", text: `Seed ${trial.seed} ${trial.status}: ${texts(trial.reason)}` }),
    ...(trial.traceback === undefined ? [] : [make("details", {}, make("summary", { text: "Traceback" }), make("pre", { text: texts(trial.traceback), tabindex: "0", "aria-label": "Traceback" }))]),
  ]);
}

function openDrawer(number) {
  const row = data.rows[number];
  byId("drawer-title").textContent = data.axes.map((axis) => labelOf(row, axis)).filter((label, index) => data.axes[index] !== "trainer" || label !== "centralized").join(" · ");
  const notes = (row.notes || []).map((note) => make("li", { text: `${texts(note)}.` }));
  byId("drawer-body").replaceChildren(
    ...showFailures(row), ...(notes.length ? [make("ul", { class: "notes" }, ...notes)] : []), ...showNumbers(row), ...showCommand(row), ...showPreview(row), ...showCurves(row),
    ...(row.parts === undefined ? [] : section("Components and their parameters", list(data.axes.map((axis, index) => [axis, texts(row.parts[index])])))), ...showBlocks(row, "found", "What the cell found"), ...showTrials(row),
    ...(row.recipe === undefined ? [] : section("Training recipe", list(data.blocks[row.recipe]))), ...showBlocks(row, "where", "Provenance"), ...showBlocks(row, "upstream", "Data"), ...showBlocks(row, "stages", "Keys of the stages"));
  byId("drawer").showModal();
  byId("drawer").scrollTop = 0;
  byId("close").focus();
}

function startDrawer() {
  document.addEventListener("click", (event) => {
    const target = event.target.closest("[data-row]");
    if (target) openDrawer(Number(target.dataset.row));
    else if (event.target === byId("drawer")) byId("drawer").close();
  });
  byId("close").addEventListener("click", () => byId("drawer").close());
}

startControls();
startDrawer();
update();
startScatter();
requestAnimationFrame(() => setTimeout(() => performance.mark("interactive"))); // after the first frame
