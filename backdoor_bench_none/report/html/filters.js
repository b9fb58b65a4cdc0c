// The controls above the matrix.
function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => make("option", { value, text, selected: value === chosen })));
  select.value = chosen;
}

function fillControls() {
  const metrics = data.metrics.map((metric) => [metric.name, metric.heading]);
  const both = metricIndex("ba") >= 0 && metricIndex("asr") >= 0;
  if (!both) state.metric = metrics.length ? metrics[0][0] : "";
  fill(byId("metric"), both ? [[PAIR, "BA and ASR"], ...metrics] : metrics, state.metric);
  const axes = varying.length ? varying : ["defense"];
  if (!axes.includes(state.columns)) state.columns = "defense";
  fill(byId("columns"), (axes.includes("defense") ? axes : ["defense", ...axes]).map((axis) => [axis, axis]), state.columns);
  fill(byId("lines"), [["", "as in the file"], ...axes.map((axis) => [axis, axis])], state.lines);
  fill(byId("scale"), [["full", "shares from 0 to 100"], ["fit", "least to greatest"]], state.scale);
  byId("filters").replaceChildren(...varying.map(makeFilter));
}

function makeFilter(axis) {
  const summary = make("summary", {}), choices = make("fieldset", { class: "choices" }, make("legend", { class: "sr", text: `Show ${axis}` }));
  const box = make("details", { class: "filter", "data-axis": axis }, summary, choices);
  const boxes = data.labels[axis].map((label, index) => {
    const input = make("input", { type: "checkbox", value: String(index) });
    input.checked = !state.hidden[axis].has(index);
    input.addEventListener("change", () => choose(axis, index, input.checked));
    choices.append(make("label", {}, input, make("bdi", { text: label })));
    return input;
  });
  const button = make("button", { type: "button", text: "all or none" });
  button.addEventListener("click", () => {
    const on = boxes.some((input) => !input.checked);
    boxes.forEach((input, index) => { input.checked = on; on ? state.hidden[axis].delete(index) : state.hidden[axis].add(index); });
    update();
  });
  choices.append(button);
  box.addEventListener("toggle", () => { if (box.open) closeFilters(box); });
  return box;
}

function choose(axis, index, shown) {
  if (shown) state.hidden[axis].delete(index);
  else state.hidden[axis].add(index);
  update();
}

function labelFilters() {
  for (const box of document.querySelectorAll(".filter")) {
    const axis = box.dataset.axis, labels = data.labels[axis];
    const kept = labels.filter((_, index) => !state.hidden[axis].has(index));
    box.classList.toggle("active", kept.length < labels.length);
    box.querySelector("summary").textContent = `${axis}: ${kept.length === labels.length ? "all" : kept.length === 1 ? kept[0] : `${kept.length} of ${labels.length}`}`;
  }
}

function closeFilters(except) {
  for (const box of document.querySelectorAll(".filter[open]")) if (box !== except) box.open = false;
}

function update() {
  labelFilters();
  renderMatrix();
  renderScatter();
}

function startControls() {
  fillControls();
  for (const name of ["metric", "columns", "lines", "scale"]) {
    byId(name).addEventListener("change", (event) => { state[name] = event.target.value; update(); });
  }
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("reset").addEventListener("click", () => {
    Object.assign(state, START);
    for (const axis of varying) state.hidden[axis].clear();
    fillControls();
    update();
  });
  document.addEventListener("click", (event) => { if (!event.target.closest(".filter")) closeFilters(null); });
  document.addEventListener("keydown", (event) => {
    const open = event.key === "Escape" && document.querySelector(".filter[open]");
    if (open) { open.open = false; open.querySelector("summary").focus(); }
  });
  byId("controls").hidden = byId("hint").hidden = false;
}
