// every text whose contrast with the page is below 4.5 to 1
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const paint = (...colors) => {
  canvas.clearRect(0, 0, 1, 1);
  for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const luminance = (color) => {
  const [r, g, b] = color.map(v => v / 255).map(v => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const probe = document.createElement("p");
document.body.append(probe);
probe.style.color = "Canvas";
const page = getComputedStyle(probe).color;
probe.remove();
const found = [];
for (const element of document.querySelectorAll("main *, header *, footer *")) {
  if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
  const behind = [];
  for (let at = element; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
  const back = luminance(paint(page, ...behind));
  const text = luminance(paint(page, ...behind, getComputedStyle(element).color));
  const ratio = (Math.max(back, text) + 0.05) / (Math.min(back, text) + 0.05);
  if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${element.tagName} ${element.textContent.trim().slice(0, 40)}`);
}
return found;
