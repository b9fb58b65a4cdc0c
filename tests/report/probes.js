// What tests ask a page; `Browser.probe` calls one of these.

// Elements without an accessible name, by the simple half of the rules for it.
function nameless() {
  const labelled = (e) => document.getElementById(e.getAttribute("aria-labelledby") || "");
  const name = (e) => e.getAttribute("aria-label") || e.textContent.trim() || [...(e.labels || [])].map((l) => l.textContent).join(" ")
    || e.getAttribute("alt") || (labelled(e) && labelled(e).textContent) || "";
  return [...document.querySelectorAll("button, select, input, summary, a, dialog, form, nav, section, [role], [tabindex='0'], img")]
    .filter((e) => !e.closest("[hidden]") && e.getAttribute("role") !== "status" && !name(e).trim()).map((e) => e.outerHTML.slice(0, 120));
}

// The texts of the tiles of every cell.
function cells() {
  return [...document.querySelectorAll("#matrix .cell")].map((cell) => [...cell.querySelectorAll(".tile")].map((tile) => tile.textContent));
}

// Every cell of the matrix with the classes of its tiles.
function matrix() {
  const classes = (cell) => [...cell.querySelectorAll(".tile")].map((tile) => tile.className.trim().split(" ").sort().join(" "));
  return [...document.querySelectorAll("#matrix tr")].map((row) => [...row.cells].map((cell) => [cell.textContent, classes(cell)]));
}

// Texts that are harder to read than 4.5 to 1.
function faint() {
  const rgb = (text) => text.match(/[\d.]+/g).map(Number);
  const light = (colour) => colour.slice(0, 3).map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour[3] !== 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const speaks = [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!speaks || e.closest("svg, script, style, .same, .sr, noscript, option") || !e.getClientRects().length) continue;
    const [dark, bright] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => x - y);
    const contrast = (bright + 0.05) / (dark + 0.05);
    if (contrast < 4.5) found.push([e.className, e.textContent.slice(0, 30), contrast]);
  }
  return found;
}

// Whether the middle of every mark is within the frame.
function marksAreInside() {
  const box = document.querySelector("#scatter .frame").getBoundingClientRect();
  return [...document.querySelectorAll("#scatter g")].every((mark) => {
    const at = mark.getBoundingClientRect(), x = at.x + at.width / 2, y = at.y + at.height / 2;
    return x >= box.x && x <= box.right && y >= box.y && y <= box.bottom;
  });
}

// Shape and colour of each defense's mark.
function marks() {
  return [...document.querySelectorAll("#marks path")].map((path) => path.getAttribute("d") + path.className.baseVal);
}

// Whether each link to a section leads to one.
function sectionsOfLinks() {
  return [...document.querySelectorAll("nav a")].map((link) => document.querySelector(link.getAttribute("href")) !== null);
}

// Which directive stops an image from the network, and whether a script that was added ran.
function violate() {
  const stopped = new Promise((resolve) => {
    document.addEventListener("securitypolicyviolation", (event) => resolve(event.violatedDirective), { once: true });
  });
  const image = new Image();
  image.src = "http://127.0.0.1:9/x.png";
  document.body.append(image);
  return stopped.then((directive) => {
    const script = document.createElement("script");
    script.textContent = "window.ran = true";
    document.body.append(script);
    return [directive, window.ran === true];
  });
}
