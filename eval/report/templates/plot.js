// Plot of accuracy against latency, in SVG. It is drawn in screen pixels, so that text is not smaller on a phone.
const MARKS = ["M-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0-11 0", "M-5-5H5V5H-5Z", "M0-6.5L6.3 5H-6.3Z",
               "M0-7L7 0L0 7L-7 0Z", "M0 6.5L6.3-5H-6.3Z", "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z"];
const LABEL_HEIGHT = 14;
const host = byId("plot");
const runtimes = [...new Set(report.rows.map((row) => row.runtime))];
const style = (row) => runtimes.indexOf(row.runtime) % MARKS.length;
const state = { batch: report.batch, logX: false, logY: false, view: null };
let shown = null; // scales and size of the current plot

function svg(name, attributes = {}, parent = null, text = null) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  parent?.append(element);
  return element;
}

// An axis maps a value to a position. The logarithmic axis of accuracy shows the logarithm of the error, so that halving
// the error is the same distance everywhere; errors below half an image are drawn as half an image.
const leastError = 50 / report.images;
const linear = { to: (value) => value, from: (place) => place };
const logarithmic = { to: (value) => Math.log10(value), from: (place) => 10 ** place };
const logError = { to: (top1) => -Math.log10(Math.max(100 - top1, leastError)), from: (place) => 100 - 10 ** -place };

function extent(values, axis, share) {
  const places = values.map(axis.to);
  const [low, high] = [Math.min(...places), Math.max(...places)];
  const margin = share * (high - low) || 0.05 * Math.abs(high) || 0.5;
  return [low - margin, high + margin];
}

function wholeView(axes) {
  const timed = report.rows.filter((row) => row.p50[state.batch] !== undefined);
  const latencies = timed.map((row) => row.p50[state.batch]);
  const { latency, top1, batch } = report.constraints;
  if (latency !== null && batch === state.batch) latencies.push(latency);
  const accuracies = report.rows.flatMap((row) => (timed.includes(row) ? [row.low, row.high] : [row.top1]));
  if (top1 !== null) accuracies.push(top1);
  const x = latencies.length ? extent(latencies, axes.x, 0.12) : [0, 1];
  if (!state.logX) x[0] = 0;
  return { x, y: extent(accuracies, axes.y, 0.1) };
}

function ticks([low, high], axis, count) {
  const [from, to] = [axis.from(low), axis.from(high)];
  if (axis !== linear) {
    const wide = axis === logError ? (v) => 100 - v : (v) => v;
    const decades = [];
    for (let power = -4; power < 6; power += 1) for (const m of [1, 2, 5]) decades.push(wide(m * 10 ** power));
    const inside = decades.filter((value) => value >= from && value <= to);
    if (inside.length >= 3) return inside;
  }
  const rough = (to - from) / count;
  const base = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * base).find((each) => each >= rough);
  const found = [];
  for (let i = Math.ceil(from / step - 1e-9); i * step <= to + 1e-9 * step; i += 1) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function drawAxes(root, scale, size) {
  const digits = (values) => Math.max(0, ...values.map((value) => (String(Number(value.toFixed(6))).split(".")[1] ?? "").length));
  const xTicks = ticks(scale.view.x, scale.axes.x, size.width / 90);
  const yTicks = ticks(scale.view.y, scale.axes.y, size.height / 55);
  const yDigits = digits(yTicks);
  for (const value of xTicks) {
    svg("line", { class: "grid", x1: scale.x(value), x2: scale.x(value), y1: size.top, y2: size.bottom }, root);
    svg("text", { x: scale.x(value), y: size.bottom + 17, "text-anchor": "middle" }, root, String(Number(value.toFixed(6))));
  }
  for (const value of yTicks) {
    svg("line", { class: "grid", x1: size.left, x2: size.right, y1: scale.y(value), y2: scale.y(value) }, root);
    svg("text", { x: size.left - 7, y: scale.y(value) + 4, "text-anchor": "end" }, root, value.toFixed(yDigits));
  }
  svg("path", { class: "axis", fill: "none", d: `M${size.left} ${size.top}V${size.bottom}H${size.right}` }, root);
  svg("text", { class: "title", x: size.left, y: 14 }, root, `${report.rows[0].metric}, %`);
  svg("text", { class: "title", x: size.right, y: size.bottom + 36, "text-anchor": "end" }, root,
      `p50 of one call at batch ${state.batch}, ms`);
}

function drawLimits(root, scale, size) {
  const { latency, top1, drop, batch } = report.constraints;
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  if (latency !== null && batch === state.batch) {
    const x = clamp(scale.x(latency), size.left, size.right);
    svg("rect", { class: "ruled-out", x, y: size.top, width: size.right - x, height: size.bottom - size.top }, root);
    svg("line", { class: "limit", x1: x, x2: x, y1: size.top, y2: size.bottom }, root);
    svg("text", { class: "limit-text", x: x - 5, y: size.bottom - 6, "text-anchor": "end" }, root, `limit ${latency} ms`);
  }
  if (top1 !== null) {
    const y = clamp(scale.y(top1), size.top, size.bottom);
    svg("rect", { class: "ruled-out", x: size.left, y, width: size.right - size.left, height: size.bottom - y }, root);
    svg("line", { class: "limit", x1: size.left, x2: size.right, y1: y, y2: y }, root);
    svg("text", { class: "limit-text", x: size.left + 6, y: y - 5 }, root, `limit: drop of ${drop} points`);
  }
}

const isWide = (size) => size.width > 640;
const untimedLabel = (row, size) => (isWide(size) ? `${row.scheme}, ${row.runtime}` : row.scheme);

function drawUntimed(root, labels, scale, size) {
  const rows = report.rows.filter((row) => row.p50[state.batch] === undefined).sort((a, b) => b.top1 - a.top1);
  let lowest = -Infinity;
  for (const row of rows) {
    const y = scale.y(row.top1);
    if (y < size.top || y > size.bottom) continue;
    svg("line", { class: `untimed r${style(row)}`, x1: size.left, x2: size.right, y1: y, y2: y }, root);
    const at = Math.max(y, lowest + LABEL_HEIGHT);
    lowest = at;
    svg("path", { class: "leader", d: `M${size.right} ${y}L${size.right + 10} ${at}` }, labels);
    svg("text", { class: "label", x: size.right + 13, y: at + 4 }, labels, untimedLabel(row, size));
  }
}

// One step line for each device: there are no files between two steps.
function drawParetoFront(root, scale, rows) {
  const best = rows.filter((row) => row.pareto.includes(state.batch)).sort((a, b) => a.p50[state.batch] - b.p50[state.batch]);
  for (const points of Map.groupBy(best, (row) => row.device).values()) {
    const steps = points.map((row, i) => `${i ? "H" : "M"}${scale.x(row.p50[state.batch])}${i ? "V" : " "}${scale.y(row.top1)}`);
    if (points.length > 1) svg("path", { class: "pareto-front", d: steps.join("") }, root);
  }
}

function drawPoint(root, row, scale) {
  const [x, y] = [scale.x(row.p50[state.batch]), scale.y(row.top1)];
  const optimal = row.pareto.includes(state.batch);
  const text = describe(row);
  const chosen = row.name === report.chosen;
  const group = svg("g", { class: `point r${style(row)}${optimal || chosen ? " optimal" : ""}`, tabindex: 0, role: "img",
                           "aria-label": text.join(", "), "data-name": row.name }, root);
  const [low, high] = [scale.y(row.low), scale.y(row.high)];
  if (low - high > 1) svg("path", { class: "bars", d: `M${x} ${low}V${high}M${x - 4} ${low}h8M${x - 4} ${high}h8` }, group);
  if (chosen) svg("circle", { class: "ring", cx: x, cy: y, r: 10 }, group);
  svg("circle", { class: "halo", cx: x, cy: y, r: 14 }, group);
  svg("path", { class: "mark", d: MARKS[style(row)], transform: `translate(${x} ${y})` }, group);
  for (const event of ["pointerenter", "focus"]) group.addEventListener(event, () => showTip(text, x, y));
  for (const event of ["pointerleave", "blur"]) group.addEventListener(event, hideTip);
  return { group, row, x, y };
}

function describe(row) {
  return [row.name, `${row.p50[state.batch].toFixed(2)} ms at batch ${state.batch}`, `${row.top1.toFixed(2)}% ${row.metric}, ${row.drop}`,
          `${row.megabytes.toFixed(2)} MB`, row.pareto.includes(state.batch) ? "Pareto-optimal" : "dominated",
          ...(row.name === report.chosen ? ["recommended"] : [])];
}

// Puts each label at the first position beside its mark where it covers no mark and no label; leaves it out otherwise.
function placeLabels(points, size) {
  const taken = points.map(({ x, y }) => [x - 8, y - 8, x + 8, y + 8]);
  const ordered = [...points].sort((a, b) => b.row.pareto.includes(state.batch) - a.row.pareto.includes(state.batch));
  for (const { group, row, x, y } of ordered) {
    const text = svg("text", { class: "label" }, group, row.scheme);
    const width = text.getComputedTextLength();
    const places = [[11, -8], [11, 16], [-11 - width, -8], [-11 - width, 16], [12, 4], [-12 - width, 4], [-width / 2, -15], [-width / 2, 24]];
    const box = ([dx, dy]) => [x + dx - 1, y + dy - 11, x + dx + width + 1, y + dy + 3];
    const fits = ([left, top, right, bottom]) => left > size.left && right < size.right && top > size.top && bottom < size.bottom
      && !taken.some(([l, t, r, b]) => left < r && right > l && top < b && bottom > t);
    const place = places.find((each) => fits(box(each)));
    if (!place) { text.remove(); continue; }
    taken.push(box(place));
    text.setAttribute("x", x + place[0]);
    text.setAttribute("y", y + place[1]);
  }
}

function draw() {
  const width = Math.max(260, host.clientWidth - 18);
  const height = Math.round(Math.min(460, Math.max(320, 0.52 * width)));
  const size = { width, height, left: 48, top: 26, right: width - 62, bottom: height - 44 };
  if (isWide(size) && report.rows.some((row) => row.p50[state.batch] === undefined)) size.right -= 130;
  const axes = { x: state.logX ? logarithmic : linear, y: state.logY ? logError : linear };
  const view = state.view ?? wholeView(axes);
  const along = ([low, high], from, to) => (place) => from + ((place - low) / (high - low)) * (to - from);
  const [placeX, placeY] = [along(view.x, size.left, size.right), along(view.y, size.bottom, size.top)];
  const scale = { axes, view, x: (value) => placeX(axes.x.to(value)), y: (value) => placeY(axes.y.to(value)) };
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "Accuracy against latency; the table below has the same figures" });
  const clip = svg("clipPath", { id: "inside" }, svg("defs", {}, root));
  svg("rect", { x: size.left, y: size.top, width: size.right - size.left, height: size.bottom - size.top }, clip);
  drawAxes(root, scale, size);
  const inside = svg("g", { "clip-path": "url(#inside)" }, root);
  const labels = svg("g", {}, root);
  drawLimits(inside, scale, size);
  drawUntimed(inside, labels, scale, size);
  const timed = report.rows.filter((row) => row.p50[state.batch] !== undefined);
  drawParetoFront(inside, scale, timed);
  const within = ({ x, y }) => x >= size.left - 1 && x <= size.right + 1 && y >= size.top - 1 && y <= size.bottom + 1;
  const points = timed.map((row) => drawPoint(inside, row, scale));
  for (const point of points.filter((each) => !within(each))) point.group.remove();
  host.replaceChildren(root, tip);
  placeLabels(points.filter(within), size);
  hideTip();
  shown = { scale, size, root };
  root.addEventListener("pointerdown", startZoom);
}

const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("aria-hidden", "true"); // the mark has the same text as its label

function showTip([name, ...lines], x, y) {
  const title = document.createElement("b");
  title.textContent = name;
  tip.replaceChildren(title, ...lines.map((line) => Object.assign(document.createElement("div"), { textContent: line })));
  tip.hidden = false;
  const left = x + 18 + tip.offsetWidth > host.clientWidth ? Math.max(4, x - tip.offsetWidth - 8) : x + 24;
  tip.style.left = `${left}px`;
  tip.style.top = `${Math.max(4, y - tip.offsetHeight / 2)}px`;
}

function hideTip() {
  tip.hidden = true;
}

// Dragging with a mouse zooms in; touch scrolls the page, and has the buttons.
function startZoom(start) {
  if (start.pointerType !== "mouse" || start.button !== 0) return;
  const { root, size, scale } = shown;
  const at = (event) => {
    const box = root.getBoundingClientRect();
    const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
    return [clamp((event.clientX - box.left) * (size.width / box.width), size.left, size.right),
            clamp((event.clientY - box.top) * (size.height / box.height), size.top, size.bottom)];
  };
  const [x0, y0] = at(start);
  const frame = svg("rect", { class: "zoom" }, root);
  const move = (event) => {
    const [x1, y1] = at(event);
    const sides = { x: Math.min(x0, x1), y: Math.min(y0, y1), width: Math.abs(x1 - x0), height: Math.abs(y1 - y0) };
    for (const [key, value] of Object.entries(sides)) frame.setAttribute(key, value);
  };
  const end = (event) => {
    removeEventListener("pointermove", move);
    removeEventListener("pointerup", end);
    frame.remove();
    const [x1, y1] = at(event);
    if (Math.abs(x1 - x0) < 8 || Math.abs(y1 - y0) < 8) return;
    const { view } = scale;
    const share = (value, from, to, [low, high]) => low + ((value - from) / (to - from)) * (high - low);
    const xs = [x0, x1].map((x) => share(x, size.left, size.right, view.x)).sort((a, b) => a - b);
    const ys = [y0, y1].map((y) => share(y, size.bottom, size.top, view.y)).sort((a, b) => a - b);
    state.view = { x: xs, y: ys };
    draw();
  };
  addEventListener("pointermove", move);
  addEventListener("pointerup", end);
}

function zoom(factor) {
  const { view } = shown.scale;
  const around = ([low, high]) => [(low + high) / 2 - (factor * (high - low)) / 2, (low + high) / 2 + (factor * (high - low)) / 2];
  state.view = { x: around(view.x), y: around(view.y) };
  draw();
}

function set(changes) {
  Object.assign(state, { view: null }, changes);
  draw();
}

function drawLegend() {
  const entry = (text, attributes, path) => {
    const item = document.createElement("li");
    const mark = svg("svg", { viewBox: "-11 -8 22 16", "aria-hidden": "true" }, item);
    svg("path", { ...attributes, d: path }, mark);
    item.append(text);
    return item;
  };
  const entries = runtimes.map((runtime, i) => entry(runtime, { class: `mark filled r${i % MARKS.length}` }, MARKS[i % MARKS.length]));
  if (report.chosen) entries.push(entry("recommended", { class: "ring" }, MARKS[0]));
  entries.push(entry("dominated", { class: "mark" }, MARKS[0]));
  if (report.rows.some((row) => !report.batches.every((batch) => row.p50[batch] !== undefined))) {
    entries.push(entry("not timed", { class: "mark", "stroke-dasharray": "5 3" }, "M-11 0H11"));
  }
  byId("legend").replaceChildren(...entries);
  byId("legend").hidden = false;
}

function startPlot() {
  for (const batch of report.batches) byId("batch").add(new Option(batch, batch, batch === state.batch, batch === state.batch));
  byId("batches").hidden = report.batches.length < 2;
  byId("batch").addEventListener("change", (event) => {
    showBatch(Number(event.target.value));
    set({ batch: Number(event.target.value) });
  });
  byId("log-x").addEventListener("change", (event) => set({ logX: event.target.checked }));
  byId("log-y").addEventListener("change", (event) => set({ logY: event.target.checked }));
  byId("zoom-in").addEventListener("click", () => zoom(0.6));
  byId("zoom-out").addEventListener("click", () => zoom(1 / 0.6));
  byId("zoom-reset").addEventListener("click", () => set({}));
  byId("plot-tools").hidden = false;
  let width = 0;
  new ResizeObserver(() => {
    if (host.clientWidth === width) return;
    width = host.clientWidth;
    draw();
  }).observe(host);
  drawLegend();
}

startPlot();
