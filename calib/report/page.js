// --- header, warnings, notes, details -----------------------------------------------------------

const KINDS = {
  compare: "Calibration methods compared",
  calibrate: "Calibration",
  check: "Check of a quantized model",
};

function showHeader() {
  $("kind").textContent = KINDS[doc.kind] ?? doc.kind;
  $("title").textContent = doc.title;
  if (doc.check) {
    const [textContent, tone] = doc.check.passed ? ["PASSED", "good"] : ["FAILED", "bad"];
    Object.assign($("verdict"), { hidden: false, textContent, className: `verdict ${tone}` });
    const failed = doc.check.verdicts.filter(({ holds }) => !holds);
    $("verdict").after(...failed.map((verdict) => make("p", {}, verdict.text)));
  }
  for (const [term, words] of facts()) {
    $("facts").append(make("div", {}, make("dt", {}, term), make("dd", {}, words)));
  }
  if (doc.command) Object.assign($("command"), { hidden: false, textContent: doc.command });
}

function facts() {
  const { check, model, samples, float } = doc;
  const file = ({ name, n_bytes: n }) => `${name}, ${bytes(n)}`;
  const whose = check ? "" : samples.held_out ? ", held out" : ", the same";
  const compared = samples.made_up ? `${whole(samples.evaluation)} made-up inputs`
    : `${several(samples.evaluation, "sample")}${whose}`;
  return [
    [check ? "Float" : "Model", file(model)],
    check && ["Quantized", file(check.quantized)],
    ["SHA-256", `${(check?.quantized ?? model).sha256.slice(0, 16)}…`],
    samples.calibration &&
      [check ? "Left out" : "Calibrated on", several(samples.calibration, "sample")],
    samples.evaluation && ["Compared on", compared],
    known(float.top1) && ["Float top-1", `${db(float.top1)} %`],
    known(float.metric) && [`Float ${doc.metric_name ?? "metric"}`, figures(float.metric)],
  ].filter(Boolean);
}

function showWarningsAndNotes() {
  if (doc.warnings.length) reveal("warnings");
  $("warnings").append(...doc.warnings.map((words) => make("p", { className: "warning" }, words)));
  if (doc.notes.length) reveal("notes");
  $("notes").append(make("ul", {}, ...doc.notes.map((words) => make("li", {}, words))));
  if (!doc.skipped.length) return;
  const columns = [named(), text("Reason", (row) => row.reason, { className: "wide" })];
  reveal("skipped")("table").append(table("Left float", columns, doc.skipped));
}

function showDetails() {
  const files = [["model", doc.model], ["float", doc.check?.float],
    ["quantized", doc.check?.quantized]].filter(([, file]) => file);
  const digests = files.map(([role, { name, n_bytes: n, sha256 }]) =>
    `${role}: ${name}, ${whole(n)} bytes\n  ${sha256}`);
  const versions = Object.entries(doc.versions).map((pair) => pair.join(" "));
  reveal("details")("body").append(
    make("h3", {}, "Options"), make("pre", { tabIndex: 0 }, JSON.stringify(doc.options, null, 2)),
    make("h3", {}, "Versions"), make("pre", { tabIndex: 0 }, versions.join("\n")),
    make("h3", {}, "SHA-256"), make("pre", { tabIndex: 0 }, digests.join("\n")));
}

function showContents() {
  for (const section of document.querySelectorAll("main > section:not([hidden])")) {
    const title = section.querySelector("h2").textContent;
    $("contents").append(make("a", { href: `#${section.id}` }, title));
  }
}

// --- results of methods -------------------------------------------------------------------------

function showResults() {
  const part = reveal("results");
  const { rows } = doc;
  const agreeing = "samples whose top class is the float model's";
  const columns = [
    number("Bits", (row) => row.bits),
    text("Method", (row) => row.method, { cell: (row) => methodName(row.method) }),
    best(number("SQNR, dB", (row) => row.sqnr_db, db, { hint: "of the outputs" }), Math.max),
    number("Over max, dB", (row) => row.gain_db, gain),
    best(number("Cosine", (row) => row.cosine, fixed(5)), Math.max),
    best(number("Largest error", (row) => row.max_error, figures), Math.min),
    best(number("Agreement, %", (row) => row.agreement, percent, { hint: agreeing }), Math.max),
    best(number("Top-1, %", (row) => row.top1, db), Math.max),
    number(doc.metric_name ?? "Metric", (row) => row.metric, figures),
    number("Weights, %", (row) => row.size_ratio, percent, { hint: "of the float model's size" }),
    number("Time, s", (row) => row.seconds, fixed(2)),
    text("Notes", (row) => row.notes.join("; "), { className: "wide" }),
  ];
  const breaks = (row) => row !== rows[0] && rows[rows.indexOf(row) - 1].bits !== row.bits;
  part("table").append(table("Results", measured(columns, rows), rows, { breaks }));
  part("lead").textContent = "The quantized model's outputs against the float model's.";
  if (rows.length === 1) return;
  part("lead").textContent += " A star marks the best of its width.";
  part("charts").append(chart("Output SQNR", "dB, by width and method: higher is better",
    () => methodBars("sqnr_db", db)));
  if (rows.some((row) => row.gain_db)) {
    part("charts").append(chart("Better than max", "dB of output SQNR over max at the same width",
      () => methodBars("gain_db", gain)));
  }
}

/** The column with the best of each width marked, where they are not all the same. */
function best(column, pick) {
  const won = (row) => {
    const peers = doc.rows.filter(({ bits }) => bits === row.bits).map(column.get).filter(known);
    return new Set(peers).size > 1 && column.get(row) === pick(...peers);
  };
  return { ...column, best: won };
}

// --- sensitivity --------------------------------------------------------------------------------

function showSensitivity(found) {
  const { tensors, base_db: base } = found;
  const part = reveal("sensitivity");
  const alone = span(tensors.map((row) => row.alone_db));
  const spared = span(tensors.map((row) => row.all_but_db));
  const harm = (row) => 1 - 0.95 * (row.alone_db - alone.low) / (alone.high - alone.low || 1);
  const help = (row) => (row.all_but_db - base) / (spared.high - base || 1);
  part("lead").textContent =
    `Output SQNR with ${found.method} at ${found.bits} bits, on ${whole(found.n_samples)} ` +
    "samples. It alone: no other tensor is quantized; a long bar is much harm. All but it: a " +
    `long bar is much help to spare it; with all quantized it is ${db(base)} dB.`;
  const columns = [
    number("Rank", (row) => tensors.indexOf(row) + 1),
    named(),
    text("Kind", (row) => row.kind, { className: "minor" }),
    number("It alone, dB", (row) => row.alone_db, db, { bar: harm, tint: "var(--method-0)" }),
    number("All but it, dB", (row) => row.all_but_db, db, { bar: help }),
    text("How", (row) => (row.estimated ? "estimated" : "measured"), { className: "minor" }),
  ];
  const caption = "Sensitivity of the tensors, worst first";
  part("table").append(table(caption, measured(columns, tensors), tensors, { tall: true }));
  if (!found.layers?.length) return;
  part("table").append(make("details", {}, make("summary", {}, "Layers, worst first"),
    make("div", {}, make("ol", {}, ...found.layers.map((name) => make("li", {}, name))))));
}

function showProposals(found) {
  const { proposals, curve, bits, wide_bits: wide } = found;
  const part = reveal("proposals");
  if (proposals.length) {
    part("lead").textContent = "Output SQNR before and after, measured. Copy what helps into " +
      `octav.yaml. Aimed at ${db(found.target_db)} dB on ${several(found.n_samples, "sample")} of ` +
      `the calibration data, where all tensors at ${bits} bits give ${db(found.base_db)} dB and ` +
      `all at ${wide} bits ${db(found.wide_db)} dB.`;
  }
  part("cards").append(...proposals.map(proposal));
  if (!curve.length) return;
  part("chart").append(chart(`Output SQNR against the number of tensors at ${wide} bits`,
    `dB; the worst first, all others at ${bits} bits`, () => wideningCurve(found)));
}

function proposal({ title, what, yaml, n_samples: samples, ...effect }) {
  const code = make("pre", { tabIndex: 0 }, yaml);
  const button = make("button", { type: "button", "aria-live": "polite" }, "Copy");
  button.onclick = async () => {
    button.textContent = (await copy(yaml, code)) ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };
  const { before, after, saves, wide_size_ratio: wide } = effect;
  const share = (ratio) => `${percent(ratio)} %`;
  const size = known(after?.size_ratio)
    ? `weights ${share(before.size_ratio)} → ${share(after.size_ratio)}, ` : "";
  const costly = saves === false
    ? `No smaller than all tensors at more bits (weights ${share(wide)}): consider that first.` : "";
  const top1 = known(before?.top1) && known(after?.top1)
    ? `top-1 ${db(before.top1)} → ${db(after.top1)} %, ` : "";
  return make("article", {},
    make("h3", {}, title),
    make("p", {}, what),
    make("p", { className: "effect" }, `${db(effect.before_db)} → ${db(effect.after_db)} dB `,
      make("span", {}, `${top1}${size}measured on ${several(samples, "sample")}`)),
    costly && make("p", { className: "quiet" }, costly),
    make("div", { className: "yaml" }, code, button));
}

/** Whether ``words`` are on the clipboard now; if not, ``node``, which shows them, is selected. */
async function copy(words, node) {
  try {
    await navigator.clipboard.writeText(words);
    return true;
  } catch {
    getSelection().selectAllChildren(node);
    return document.execCommand("copy");
  }
}

// --- tensors ------------------------------------------------------------------------------------

const widthsOf = (tensor) => [...new Set(tensor.results.map((result) => result.bits))];
const view = { bits: doc.bits[0], filter: "", sort: {}, open: new Set() };
/** The width that is looked at, or the only one that a tensor has, as in a calibrated model. */
const bitsOf = (tensor) => (widthsOf(tensor).length === 1 ? widthsOf(tensor)[0] : view.bits);
/** First and last layers may be wider than what was asked for. */
const actualOf = (tensor) => resultsOf(tensor)[0]?.actual_bits ?? bitsOf(tensor);
const resultsOf = (tensor) => tensor.results.filter(({ bits }) => bits === bitsOf(tensor));
const resultOf = (tensor, method) => resultsOf(tensor).find((row) => row.method === method);
const curveOf = (tensor) => tensor.curves.find(({ bits }) => bits === bitsOf(tensor));

function showTensors() {
  const part = reveal("tensors");
  const someChoice = doc.tensors.some((tensor) => widthsOf(tensor).length > 1);
  const update = () => part("table").replaceChildren(tensorTable());
  const choose = (bits) => () => { view.bits = bits; update(); };
  const choices = doc.bits.map((bits) => make("label", {}, make("input",
    { type: "radio", name: "bits", checked: bits === view.bits, onchange: choose(bits) }),
  `${bits} bits`));
  const search = make("input", { type: "search", placeholder: "part of a name" });
  search.oninput = () => { view.filter = search.value.toLowerCase(); update(); };
  part("tools").onsubmit = () => false;
  part("tools").append(
    someChoice ? make("fieldset", {}, make("legend", {}, "Width"), ...choices) : "",
    make("label", {}, "Find", search));
  update();
}

function tensorTable() {
  const { low, high } = span(doc.tensors.flatMap(resultsOf).map((result) => result.sqnr_db));
  const floor = Math.min(0, low);
  const length = (value) => (value - floor) / (high - floor || 1);
  const methods = doc.methods.filter((name) => doc.tensors.some((row) => resultOf(row, name)));
  const sqnr = (method) => (row) => resultOf(row, method)?.sqnr_db;
  const columns = [
    text("Tensor", (row) => row.name, { className: "name", cell: opener }),
    text("Kind", (row) => row.kind, { className: "minor" }),
    text("Granularity", (row) => row.granularity, { className: "minor" }),
    ...(doc.tensors.some((row) => actualOf(row) !== view.bits) ? [number("Bits", actualOf)] : []),
    ...methods.map((method) => number(method, sqnr(method), db, { hint: "SQNR, dB",
      heading: () => methodName(method), tint: tintOf(method),
      bar: (row) => length(sqnr(method)(row)) })),
    ...measured([text("Minima", (row) => (curveOf(row)?.second ? "two" : ""),
      { hint: "of the error in the clipping scalar", cell: flag })], doc.tensors),
  ];
  const rows = doc.tensors.filter(({ name }) => name.toLowerCase().includes(view.filter));
  const box = table("Tensors", columns, rows, { sort: view.sort, opens: toggle });
  for (const tr of box.querySelectorAll("tr.opens")) if (view.open.has(tr.row)) expand(tr.row, tr);
  return box;
}

const opener = ({ name }) => make("button", { type: "button", "aria-expanded": "false" }, name);
const flag = (tensor) =>
  (curveOf(tensor)?.second ? make("span", { className: "flag" }, "two minima") : "");

function toggle(tensor, tr) {
  if (!tr.detail) {
    view.open.add(tensor);
    expand(tensor, tr);
    return;
  }
  view.open.delete(tensor);
  tr.detail.remove();
  tr.detail = null;
  tr.querySelector("button").setAttribute("aria-expanded", "false");
}

function expand(tensor, tr) {
  const { groups, consumers } = tensor;
  const about = [
    `${whole(tensor.count)} values`,
    `largest magnitude ${figures(tensor.max_abs)}`,
    tensor.signed ? "signed" : "unsigned",
    groups > 1 && `${whole(groups)} groups`,
    consumers.length && `read by ${consumers.join(", ")}`,
  ].filter(Boolean).join(" · ");
  const quiet = (words) => make("p", { className: "quiet" }, words);
  const inside = make("div", {}, quiet(about), ...tensor.notes.map(quiet),
    make("div", { className: "charts" }, ...tensorCharts(tensor)));
  tr.detail = make("tr", { className: "detail" }, make("td", { colSpan: tr.cells.length }, inside));
  tr.querySelector("button").setAttribute("aria-expanded", "true");
  tr.after(tr.detail);
}

function tensorCharts(tensor) {
  const [results, curve, bits] = [resultsOf(tensor), curveOf(tensor), actualOf(tensor)];
  const unit = tensor.relative ? ", as fractions of each channel's own maximum" : "";
  const legend = "measured (line), model J(s) (dashed), minima (dots)" +
    (curve?.second ? ", the two candidates (diamonds)" : "");
  return [
    tensor.histogram?.counts.length &&
      chart("Values", `magnitudes${unit}, and thresholds at ${bits} bits`,
        () => histogram(tensor, results)),
    curve && chart(`Error at ${bits} bits`, `mean squared, against the clipping scalar: ${legend}`,
      () => errorCurve(tensor, results, curve)),
  ].filter(Boolean);
}

function showSeconds(tensors) {
  const first = (curve, i, all) =>
    all.findIndex(({ actual_bits: bits }) => bits === curve.actual_bits) === i;
  const rows = tensors.flatMap(({ name, curves }) => curves.filter(first)
    .filter((curve) => curve.second).map(({ actual_bits: bits, second }) => ({ name, bits, ...second })));
  if (!rows.length) return;
  const columns = [
    named(),
    number("Bits", (row) => row.bits),
    number("Smaller s", (row) => row.small.s, figures),
    number("MSE there", (row) => row.small.mse, figures),
    number("Larger s", (row) => row.large.s, figures),
    number("MSE at that", (row) => row.large.mse, figures),
  ];
  reveal("seconds")("table").append(table("Tensors with two minima", columns, rows, { tall: true }));
}

// --- confidence and check -----------------------------------------------------------------------

function showConfidence({ method, bits, n_samples: samples, tensors, text: words }) {
  const part = reveal("confidence");
  const halves = samples.map(whole).join(" and ");
  part("lead").textContent = `${words} (${method} at ${bits} bits; ${halves} samples.)`;
  const { high } = span(tensors.map((row) => row.percent));
  const columns = [
    named(),
    number("All samples", (row) => row.all, figures),
    number("First half", (row) => row.first, figures),
    number("Second half", (row) => row.second, figures),
    number("Difference, %", (row) => row.percent, db, { bar: (row) => row.percent / (high || 1) }),
  ];
  part("table").append(table("Thresholds by halves of the data", columns, tensors, { tall: true }));
}

function showCheck({ verdicts, outputs, tensors, first, first_text: words, ...accuracy }) {
  const part = reveal("check");
  const result = ({ holds }) =>
    make("strong", { className: holds ? "good" : "bad" }, holds ? "✓ holds" : "✗ fails");
  part("verdicts").append(table("Verdicts", [
    text("Bound", (row) => row.bound),
    number("Limit", (row) => row.limit, figures),
    number("Found", (row) => row.found, figures),
    text("Verdict", (row) => String(row.holds), { cell: result }),
    text("In words", (row) => row.text, { className: "wide" }),
  ], verdicts));
  part("accuracy").textContent = accuracyText(accuracy);
  part("outputs").append(table("Outputs", [
    named("Output"),
    number("SQNR, dB", (row) => row.sqnr_db, db),
    number("Cosine", (row) => row.cosine, fixed(5)),
    number("Largest error", (row) => row.max_error, figures),
  ], outputs));
  part("first").textContent = words ?? "";
  if (tensors.length) showAlongGraph(part, tensors, first);
}

function accuracyText({ agreement, top1, metric }) {
  return [
    known(agreement) && `Agreement with the float model: ${percent(agreement)} %.`,
    top1 && `Top-1: ${db(top1.float)} % float, ${db(top1.quantized)} % quantized.`,
    metric && `${metric.name}: ${figures(metric.float)} float, ${figures(metric.quantized)} quantized.`,
  ].filter(Boolean).join(" ");
}

function showAlongGraph(part, tensors, first) {
  part("chart").append(chart("SQNR along the graph", "dB of each tensor, in graph order",
    () => alongGraph(tensors, first)));
  const caption = "All tensors, in graph order";
  const box = table(caption, [
    number("Place", (row) => tensors.indexOf(row) + 1),
    named(),
    text("Operator", (row) => row.op_type),
    number("SQNR, dB", (row) => row.sqnr_db, db),
  ], tensors, { tall: true });
  part("chart").append(make("details", {}, make("summary", {}, caption), make("div", {}, box)));
}

// --- all together -------------------------------------------------------------------------------

showHeader();
showWarningsAndNotes();
if (doc.check) showCheck(doc.check);
if (doc.rows.length) showResults();
if (doc.sensitivity?.proposals.length || doc.sensitivity?.curve.length) {
  showProposals(doc.sensitivity);
}
if (doc.sensitivity?.tensors.length) showSensitivity(doc.sensitivity);
if (doc.tensors.length) showTensors();
showSeconds(doc.tensors);
if (doc.confidence) showConfidence(doc.confidence);
showDetails();
showContents();
const onChange = (query, what) => matchMedia(query).addEventListener("change", what);
onChange("(prefers-color-scheme: dark)", () => redraw({ all: false }));
// Nobody scrolls on paper: all charts are drawn for it, in its colours.
onChange("print", () => redraw({ all: true }));
