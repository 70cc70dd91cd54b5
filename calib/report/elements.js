// --- elements: what a name holds is text, never markup ------------------------------------------

const doc = JSON.parse(document.getElementById("document").textContent);
const $ = (id) => document.getElementById(id);
const ATTRIBUTE = /-|^role$|^scope$/;

/** A new element with properties, attributes and CSS variables, and children that are not null. */
function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (ATTRIBUTE.test(name)) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter(known));
  return node;
}

/** Shows a section and returns the function that finds its parts. */
function reveal(id) {
  $(id).hidden = false;
  return (part) => $(id).querySelector(`[data-part="${part}"]`);
}

// --- numbers ------------------------------------------------------------------------------------

const DASH = "–";

function known(value) {
  return value !== null && value !== undefined;
}

/** A way to show numbers, for those that may be missing too. */
const shown = (show) => (value) => (known(value) ? show(value).replace("-", "\u2212") : DASH);
const fixed = (digits) => shown((value) => value.toFixed(digits));
const db = fixed(2);
const percent = shown((fraction) => (100 * fraction).toFixed(2));
const gain = (value) => (value > 0 ? "+" : "") + db(value);
const whole = shown((value) => Math.round(value).toLocaleString("en"));
const several = (n, thing) => `${whole(n)} ${thing}${n === 1 ? "" : "s"}`;
const figures = shown((value) =>
  Math.abs(value) >= 1e4 && Math.abs(value) < 1e9 ? whole(value) : value.toPrecision(4));
const bytes = (n) => (n < 1e5 ? `${whole(n)} bytes` : `${(n / 1e6).toFixed(n < 1e7 ? 2 : 0)} MB`);

/** The smallest and largest of the known ``values``. */
function span(values) {
  const found = values.filter(known);
  return { low: Math.min(...found), high: Math.max(...found) };
}

// --- methods ------------------------------------------------------------------------------------

const FAMILIES = ["octav", "mse", "percentile", "entropy", "max"];
const SPARE = ["--method-0", "--method-1", "--method-2", "--method-3"];

/** The CSS variable of each method: its family's, or a spare one where that is taken. */
const COLORS = new Map();
const spare = [...SPARE];
for (const method of doc.methods) {
  const family = method.split(":")[0];
  const free = FAMILIES.includes(family) && ![...COLORS.values()].includes(`--method-${family}`);
  COLORS.set(method, free ? `--method-${family}` : spare.shift() ?? SPARE[0]);
}
const tintOf = (method) => `var(${COLORS.get(method)})`;
const methodName = (method) =>
  make("span", {}, make("i", { className: "swatch", "--tint": tintOf(method) }), method);

// --- tables -------------------------------------------------------------------------------------

/*
 * A column is {title, get: row => value} and, as needed, show: value => text, number: true,
 * cell: row => element, heading: () => element, hint, className, best: row => bool,
 * bar: row => 0..1, its tint.
 */
const text = (title, get, more = {}) => ({ title, get, ...more });
const number = (title, get, show, more = {}) => ({ title, get, show, number: true, ...more });
const named = (title = "Tensor") => text(title, (row) => row.name, { className: "name" });

/** The columns that have something to show. */
function measured(columns, rows) {
  return columns.filter(({ get }) => rows.some((row) => known(get(row)) && get(row) !== ""));
}

/**
 * A table, in a box of its own, that its headings sort.
 *
 * opens: (row, tr) => what choosing a row does. breaks: row => whether a group of rows begins.
 * sort: {title, down}, kept up to date: a table made anew with it has the same order.
 */
function table(caption, columns, rows, { sort = {}, tall = false, opens, breaks } = {}) {
  const lines = rows.map((row) => tableRow(columns, row, opens, breaks));
  const body = make("tbody", {}, ...lines);
  const headings = columns.map((column) => heading(column, () => {
    sort.down = sort.title === column.title ? !sort.down : Boolean(column.number);
    sort.title = column.title;
    order();
  }));
  function order() {
    const column = columns.find(({ title }) => title === sort.title);
    if (!column) return;
    for (const th of headings) th.removeAttribute("aria-sort");
    const direction = sort.down ? "descending" : "ascending";
    headings[columns.indexOf(column)].setAttribute("aria-sort", direction);
    body.classList.add("sorted");
    lines.sort((a, b) => compare(column.get(a.row), column.get(b.row), sort.down));
    for (const tr of lines) body.append(...[tr, tr.detail].filter(known));
  }
  order();
  const head = make("thead", {}, make("tr", {}, ...headings));
  const box = { className: tall ? "scroll tall" : "scroll", tabIndex: 0, role: "region" };
  return make("div", { ...box, "aria-label": caption },
    make("table", { "aria-label": caption }, head, body));
}

function heading(column, onclick) {
  const words = column.heading?.() ?? column.title;
  const minor = column.className === "minor" ? "minor" : "";
  const button = make("button", { type: "button", title: column.hint ?? "", onclick }, words);
  return make("th", { scope: "col", className: column.number ? "number" : minor }, button);
}

/** Missing values come last, whichever way. */
function compare(x, y, down) {
  if (!known(x) || !known(y)) return known(y) - known(x);
  const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
  return down ? -order : order;
}

function tableRow(columns, row, opens, breaks) {
  const cells = columns.map((column) => tableCell(column, row));
  const tr = make("tr", { row, className: breaks?.(row) ? "break" : "" }, ...cells);
  if (opens) {
    tr.classList.add("opens");
    tr.onclick = () => getSelection().isCollapsed && opens(row, tr);
  }
  return tr;
}

function tableCell(column, row) {
  const { get, show = String, className = "", cell, bar, best, tint } = column;
  const value = get(row);
  const td = make("td", { className }, cell ? cell(row) : known(value) ? show(value) : DASH);
  td.classList.toggle("number", Boolean(column.number));
  if (bar && known(value)) {
    td.classList.add("bar");
    td.style.setProperty("--share", Math.max(0, Math.min(1, bar(row))));
    if (tint) td.style.setProperty("--tint", tint);
  }
  if (best?.(row)) {
    td.classList.add("best");
    td.title = "best of its width";
  }
  return td;
}
