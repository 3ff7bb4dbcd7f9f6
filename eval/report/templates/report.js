"use strict";
// Sorting, filtering and copying of tables; the theme; printing. Without this script the page has the same content, unsorted.
const byId = (id) => document.getElementById(id);
const report = JSON.parse(byId("data").textContent);

const table = byId("rows");
const bodyRows = () => [...table.tBodies[0].rows];
const shownRows = () => bodyRows().filter((row) => !row.hidden);
const cellOf = (row, column) => row.querySelector(`[data-column="${column}"]`);

function compareCells(one, other) {
  const values = [one.dataset.value, other.dataset.value];
  if (values.includes("")) return values[0] === values[1] ? 0 : values[0] === "" ? Infinity : -Infinity;
  const numbers = values.map(Number);
  return numbers.some(Number.isNaN) ? values[0].localeCompare(values[1], "en", { numeric: true }) : numbers[0] - numbers[1];
}

function sortRows(column, direction) {
  const sign = direction === "descending" ? -1 : 1;
  const rows = bodyRows().sort((a, b) => {
    const order = compareCells(cellOf(a, column), cellOf(b, column));
    return Number.isFinite(order) ? sign * order : order; // rows without a value stay at the end
  });
  table.tBodies[0].append(...rows);
}

function makeSortable() {
  for (const heading of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    const column = heading.textContent;
    button.type = "button";
    button.textContent = column;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const direction = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", direction);
      sortRows(column, direction);
      say(`sorted by ${column}, ${direction}`);
    });
  }
}

const say = (text) => (byId("said").textContent = text);

function filterRows() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of bodyRows()) {
    const text = row.textContent.toLowerCase();
    const optimal = cellOf(row, "Pareto").textContent === "yes";
    row.hidden = !words.every((word) => text.includes(word)) || (byId("pareto-only").checked && !optimal);
  }
  say(`${shownRows().length} of ${bodyRows().length} files`);
}

// Puts the latencies of another batch size into the table, and sorts and filters it again.
function showBatch(batch) {
  for (const row of bodyRows()) {
    const cells = report.rows.find((each) => each.name === row.dataset.name).cells[batch];
    for (const [column, [text, value]] of Object.entries(cells)) {
      const cell = cellOf(row, column);
      cell.textContent = text;
      cell.dataset.value = value ?? "";
    }
  }
  for (const place of document.querySelectorAll(".batch")) place.textContent = batch;
  const sorted = [...table.tHead.rows[0].cells].find((heading) => heading.hasAttribute("aria-sort"));
  if (sorted) sortRows(sorted.textContent, sorted.getAttribute("aria-sort"));
  filterRows();
}

function tableText() {
  return [table.tHead.rows[0], ...shownRows()].map((row) => [...row.cells].map((cell) => cell.textContent.trim()));
}

function asMarkdown(lines) {
  const escaped = lines.map((line) => line.map((text) => text.replace(/[\\|<`*[]/g, "\\$&")));
  escaped.splice(1, 0, lines[0].map(() => "---"));
  return escaped.map((line) => `| ${line.join(" | ")} |`).join("\n") + "\n";
}

function asCsv(lines) {
  // A spreadsheet evaluates a cell that starts like this as a formula, unless it is a number or starts with an apostrophe.
  const plain = (text) => (/^[=+\-@]/.test(text) && text.length > 1 && isNaN(text) ? `'${text}` : text);
  const quote = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  return lines.map((line) => line.map((text) => quote(plain(text))).join(",")).join("\r\n") + "\r\n";
}

// A page opened from disk may have no clipboard API; document.execCommand works there.
async function copy(text, form) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = document.createElement("textarea");
    const focused = document.activeElement;
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    if (!done) return say("this browser does not allow copying");
  }
  say(`copied ${shownRows().length} files as ${form}`);
}

function filterClasses() {
  const wanted = byId("class-filter").value.trim().toLowerCase();
  let found = 0;
  for (const row of byId("by-class").tBodies[0].rows) {
    const matches = row.cells[0].textContent.toLowerCase().includes(wanted);
    row.hidden = !matches;
    row.classList.toggle("found", matches && wanted !== "");
    if (matches) found += 1;
  }
  byId("class-count").textContent = wanted ? `${found} classes` : "";
}

function startTheme() {
  const button = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const name = () => (button.textContent = isDark() ? "Light" : "Dark");
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    name();
  });
  system.addEventListener("change", name);
  name();
  button.hidden = false;
}

// On a narrow screen each row of a table is a list of its cells with the headings of their columns, so that none is hidden.
function nameCells() {
  for (const each of document.querySelectorAll(".scroll > table")) {
    const headings = [...each.tHead.rows[0].cells].map((heading) => heading.textContent.trim());
    for (const row of [...each.tBodies].flatMap((body) => [...body.rows])) {
      const first = headings.length - [...row.cells].reduce((sum, cell) => sum + cell.colSpan, 0); // after a row group
      let column = first;
      for (const cell of row.cells) {
        cell.dataset.column ??= cell.querySelector("svg") || cell.colSpan > 1 ? "" : headings[column];
        column += cell.colSpan;
      }
    }
    each.classList.add("cards");
  }
}

function openFoldsToPrint() {
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const fold of closed) fold.open = true;
  });
  addEventListener("afterprint", () => closed.forEach((fold) => (fold.open = false)));
}

nameCells();
makeSortable();
byId("filter").addEventListener("input", filterRows);
byId("pareto-only").addEventListener("change", filterRows);
byId("copy-markdown").addEventListener("click", () => copy(asMarkdown(tableText()), "Markdown"));
byId("copy-csv").addEventListener("click", () => copy(asCsv(tableText()), "CSV"));
byId("table-tools").hidden = false;
if (byId("by-class")) {
  byId("class-filter").addEventListener("input", filterClasses);
  byId("class-tools").hidden = false;
}
startTheme();
openFoldsToPrint();
